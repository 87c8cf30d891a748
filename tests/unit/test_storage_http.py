"""A run on a plain web server."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensorstore_fmt.errors import ArgumentError, TruncatedError
from tensorstore_fmt.storage import Listing, Prefix, Range, open_storage
from tensorstore_fmt.storage.remote import RemoteStorage, open_remote
from tensorstore_fmt.storage.retry import RetryPolicy
from tensorstore_fmt.testing.servers import Asked, Reply, Server, serve, serve_http


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "run/index").mkdir(parents=True)
    (tmp_path / "run/run.json").write_bytes(b"{}")
    (tmp_path / "run/index/a").write_bytes(b"0123456789")
    (tmp_path / "run/empty").write_bytes(b"")
    with serve_http(tmp_path) as running:
        yield running


@contextmanager
def _answered(answer: Callable[[Asked], Reply]) -> Iterator[tuple[RemoteStorage, Server]]:
    async def sleep(delay_s: float) -> None:
        pass

    with serve(answer) as server:
        retry = RetryPolicy(sleep=sleep, budget_s=2)
        with open_remote(f"{server.url}/run", {}, writable=False, retry=retry) as storage:
            yield storage, server


def test_reading(server: Server) -> None:
    with open_storage(f"{server.url}/run/", writable=False) as storage:
        assert not storage.is_local
        assert not storage.can_list
        assert not storage.can_write
        assert storage.fetch(
            [
                Prefix("run.json", 512),
                Range("index/a", 2, 5),
                Prefix("index/a", 3),
                Range("index/a", 9, 10),
                Prefix("empty", 4),
                Range("empty", 0, 0),
            ]
        ) == [(b"{}", 2), b"234", (b"012", 10), b"9", (b"", 0), b""]
        assert len(server.asked) == 5  # one each; nothing for no bytes
        assert {each.method for each in server.asked} == {"GET"}


def test_what_is_not_there(server: Server) -> None:
    with open_storage(f"{server.url}/run", writable=False) as storage:
        got = storage.fetch_settled(
            [Prefix("a", 1), Range("a", 0, 1), Range("index/a", 8, 11), Range("index/a", 10, 11)]
        )
        assert [type(error) for error in got] == [FileNotFoundError] * 2 + [TruncatedError] * 2
        assert len(server.asked) == 4


def test_it_is_for_reading_only(server: Server) -> None:
    with pytest.raises(ArgumentError):
        open_storage(server.url, writable=True)
    with open_storage(server.url, writable=False) as storage:
        for act in (
            lambda: storage.publish("a", [b""]),
            lambda: storage.create("a"),
            lambda: storage.delete(["a"]),
            lambda: storage.fetch([Listing("index")]),
            lambda: storage.map("run.json", 1),
        ):
            with pytest.raises(ArgumentError):
                act()
    assert server.asked == []


def test_servers_without_ranges(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789" * 1000)
    with (
        serve_http(tmp_path, ranges=False) as server,
        open_storage(server.url, writable=False) as storage,
    ):
        assert storage.fetch([Prefix("a", 5), Prefix("a", 10**6)]) == [
            (b"01234", 10000),
            (b"0123456789" * 1000, 10000),
        ]
        assert storage.fetch([Range("a", 0, 10000)]) == [b"0123456789" * 1000]
        for start, stop in ((0, 5), (5, 10), (9999, 10001)):
            with pytest.raises(OSError, match="ignores Range"):
                storage.fetch([Range("a", start, stop)])


def test_denials_and_oddities_are_no_absence() -> None:
    for status in (301, 400, 401, 403, 405, 418, 501):
        with _answered(lambda asked, status=status: Reply(status)) as (storage, server):  # type: ignore[misc]
            (error,) = storage.fetch_settled([Prefix("run.json", 1)])
            assert isinstance(error, OSError)
            assert not isinstance(error, FileNotFoundError)
            assert isinstance(error, PermissionError) == (status in (401, 403))
            assert str(status) in str(error)
            assert len(server.asked) == 1


@pytest.mark.parametrize("first", [Reply(503), Reply(429), Reply(0), Reply(206, b"012", cut=1)])
def test_what_may_pass_is_tried_again(first: Reply) -> None:
    replies = [first, first]

    def answer(asked: Asked) -> Reply:
        reply = replies.pop() if replies else Reply(206, b"012")
        return Reply(
            reply.status, reply.body, {"Content-Range": "bytes 0-2/3"} | reply.headers, reply.cut
        )

    with _answered(answer) as (storage, server):
        assert storage.fetch([Range("a", 0, 3)]) == [b"012"]
        assert len(server.asked) == 3


def test_what_never_passes_is_a_failure() -> None:
    for reply in (Reply(503), Reply(0), Reply(206, b"01", {"Content-Range": "bytes 0-1/9"})):
        with _answered(lambda asked, reply=reply: reply) as (storage, server):  # type: ignore[misc]
            for request in (Range("a", 0, 3), Prefix("a", 3)):
                (error,) = storage.fetch_settled([request])
                assert isinstance(error, OSError)
                assert not isinstance(error, FileNotFoundError)
            assert len(server.asked) > 6


def test_answers_that_cannot_be_believed() -> None:
    packed = gzip.compress(b"012")
    for reply in (
        Reply(206, b"012"),
        Reply(206, b"012", {"Content-Range": "bytes nonsense"}),
        Reply(200, packed, {"Content-Encoding": "gzip"}),
    ):
        with _answered(lambda asked, reply=reply: reply) as (storage, _):  # type: ignore[misc]
            for request in (Range("a", 0, 3), Prefix("a", 3)):
                (error,) = storage.fetch_settled([request])
                assert isinstance(error, OSError)
                assert not isinstance(error, FileNotFoundError)


def test_a_body_is_never_read_beyond_what_was_asked_for() -> None:
    def endless(asked: Asked) -> Reply:
        # claims 3 bytes of the range, but brings 50 MB
        return Reply(206, bytes(50_000_000), {"Content-Range": "bytes 0-2/3"})

    with (
        _answered(endless) as (storage, _),
        pytest.raises(OSError, match="50000000 bytes came, 3"),
    ):
        storage.fetch([Range("a", 0, 3)])


def test_query_headers_and_secrets(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with serve_http(tmp_path) as server:
        url = server.url.replace("//", "//me:hunter2@") + "/?token=hunter2"
        options = {"headers": {"X-Mine": "yes"}}
        with open_storage(url, storage_options=options, writable=False) as storage:
            assert storage.fetch([Range("a", 0, 1)]) == [b"x"]
            (error,) = storage.fetch_settled([Range("b", 0, 1)])
            assert isinstance(error, FileNotFoundError)
            assert "hunter2" not in f"{storage!r} {error!r} {error!s}"
            again = pickle.loads(pickle.dumps(storage))
            assert again.fetch([Range("a", 0, 1)]) == [b"x"]
            again.close()
        assert server.asked[0].path == "/a?token=hunter2"
        assert server.asked[0].headers["X-Mine"] == "yes"
        assert server.asked[0].headers["Authorization"].startswith("Basic ")
    with pytest.raises(ArgumentError, match="colour"):
        open_storage(url, storage_options={"colour": "blue"}, writable=False)


def test_the_test_server_keeps_to_its_directory(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    os.symlink(tmp_path / "secret", tmp_path / "inside/link")
    with (
        serve_http(tmp_path / "inside") as server,
        open_storage(server.url, writable=False) as storage,
    ):
        assert isinstance(storage.fetch_settled([Prefix("link", 1)])[0], FileNotFoundError)

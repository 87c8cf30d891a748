"""Requests that reach a real S3 server, and what its failures become."""

from __future__ import annotations

import errno
import http.client
import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tensorstore_fmt.errors import ArgumentError, TruncatedError
from tensorstore_fmt.storage import (
    Listing,
    Prefix,
    Range,
    Storage,
    StoreNotFoundError,
    open_storage,
)
from tensorstore_fmt.storage.remote import RemoteStorage, open_remote
from tensorstore_fmt.storage.retry import RetryPolicy
from tensorstore_fmt.testing.servers import Asked, Reply, S3Server, forward, serve

_NUMBERS = itertools.count()


@pytest.fixture
def storage(s3: S3Server) -> Iterator[Storage]:
    url = s3.url(f"s3/{next(_NUMBERS)}")
    with open_storage(url, storage_options=s3.storage_options, writable=True) as opened:
        yield opened


@contextmanager
def _sent(s3: S3Server) -> Iterator[list[str]]:
    """Collect the requests that reach the server, without the place of the run."""
    before = len(s3.requests())
    sent: list[str] = []
    yield sent
    sent += s3.requests()[before:]


# --- what is sent ----------------------------------------------------------------
def test_every_read_is_one_get(s3: S3Server, storage: Storage) -> None:
    storage.publish("a", [b"0123456789"])
    root = storage.url.removeprefix("s3:/")
    for request, status in (
        (Range("a", 2, 5), 206),
        (Prefix("a", 4), 206),
        (Prefix("a", 99), 206),
        (Range("a", 8, 12), 206),
        (Range("a", 10, 12), 416),
    ):
        with _sent(s3) as sent:
            storage.fetch_settled([request])
        assert sent == [f"GET {root}/a {status}"]
    with _sent(s3) as sent:
        storage.fetch([Range("a", 3, 3)])
    assert sent == []


def test_a_missing_key_is_one_get(s3: S3Server, storage: Storage) -> None:
    for request in (Range("nope", 2, 5), Prefix("nope", 4)):
        with _sent(s3) as sent, pytest.raises(FileNotFoundError):
            storage.fetch([request])
        assert sent == [f"GET {storage.url.removeprefix('s3:/')}/nope 404"]


def test_a_listing_is_one_request_for_1000_keys(s3: S3Server, storage: Storage) -> None:
    names = [f"index/{i:05d}" for i in range(2500)]
    run = storage.url.removeprefix("s3:/")
    plain = http.client.HTTPConnection(s3.endpoint_url.removeprefix("http://"), timeout=20)
    for name in names:  # much quicker than through a client that signs
        plain.request("PUT", f"{run}/{name}", b"x")
        assert plain.getresponse().read() == b""
    plain.close()
    s3.ask("PUT", f"{run[1:]}/index/")  # the folder as the console makes it
    s3.ask("PUT", f"{run[1:]}/index/deeper/a")
    with _sent(s3) as sent:
        (found,) = storage.fetch([Listing("index")])
    assert [f"index/{info.base}" for info in found] == names
    assert {info.nbytes for info in found} == {1}
    assert len(sent) == 3
    assert all(each.startswith("GET /tensors?list-type=2&prefix=s3/") for each in sent)
    with _sent(s3) as sent:
        assert storage.fetch([Listing("inde")]) == [[]]
    assert len(sent) == 1
    with _sent(s3) as sent:
        storage.delete(names)
    assert sent == ["POST /tensors?delete 200"] * 3
    assert storage.fetch([Listing("index")]) == [[]]


def test_publishing_is_one_put(s3: S3Server, storage: Storage) -> None:
    root = storage.url.removeprefix("s3:/")
    with _sent(s3) as sent:
        storage.publish("a", [b"x"])
        storage.publish("b", [b"x"], if_absent=True)
        storage.publish("c", [b"x"], if_absent=True)
        storage.sync(["a", "b"])
        storage.delete(["a"])
    assert sent == [
        f"PUT {root}/a 200",
        f"PUT {root}/b 200",
        f"PUT {root}/b 412",  # the first time: does the store refuse this?
        f"PUT {root}/c 200",
        f"DELETE {root}/a 204",
    ]


def test_many_requests_go_out_at_once(s3: S3Server, storage: Storage) -> None:
    storage.publish("a", [bytes(range(200))])
    ranges = [Range("a", i, i + 1) for i in range(200)]
    assert storage.fetch(ranges) == [bytes([i]) for i in range(200)]


def test_a_run_may_be_a_whole_bucket(s3: S3Server) -> None:
    s3.ask("PUT", "whole-bucket")
    for url in ("s3://whole-bucket", "s3://whole-bucket/"):
        with open_storage(url, storage_options=s3.storage_options, writable=True) as storage:
            storage.publish("index/a", [b"x"])
            assert storage.fetch([Range("index/a", 0, 1)]) == [b"x"]
            assert len(storage.fetch([Listing("index")])[0]) == 1


# --- failures that must not look like absence --------------------------------------
def _everything_fails(storage: Storage, kind: type[Exception]) -> list[Exception]:
    errors: list[Exception] = [
        error
        for error in storage.fetch_settled([Prefix("run.json", 9), Range("a", 0, 1), Listing("i")])
        if isinstance(error, Exception)
    ]
    for act in (
        lambda: storage.publish("a", [b"x"]),
        lambda: storage.publish("a", [b"x"], if_absent=True),
        lambda: storage.delete(["a"]),
    ):
        with pytest.raises(kind) as caught:
            act()  # type: ignore[no-untyped-call]  # a lambda
        errors.append(caught.value)
    assert [type(error) for error in errors] == [kind] * 6
    return errors


def test_a_missing_bucket_is_no_missing_file(s3: S3Server) -> None:
    options = s3.storage_options
    with open_storage("s3://no-such-bucket/a", storage_options=options, writable=True) as storage:
        for error in _everything_fails(storage, StoreNotFoundError):
            assert not isinstance(error, FileNotFoundError)
            assert "no-such-bucket" in str(error)


def test_wrong_credentials(s3: S3Server, storage: Storage) -> None:
    s3.ask("POST", "moto-api/reset-auth", b"0")
    try:
        errors = _everything_fails(storage, PermissionError)
    finally:
        s3.ask("POST", "moto-api/reset-auth", b"inf")
    for error in errors:
        assert "tensors" in str(error)
        assert "InvalidAccessKeyId" in str(error)


def test_no_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    options = {"endpoint_url": s3.endpoint_url, "client_kwargs": {"region_name": "us-east-1"}}
    with open_storage(s3.url("a"), storage_options=options, writable=True) as storage:
        _everything_fails(storage, PermissionError)


def test_nothing_secret_is_shown(s3: S3Server) -> None:
    url = "s3://me:hunter2@no-such-bucket/a"
    with open_storage(url, storage_options=s3.storage_options, writable=True) as storage:
        assert "hunter2" not in repr(storage)
        assert "hunter2" not in storage.describe("a")


def test_unknown_options(s3: S3Server) -> None:
    for unknown in ({"endpoint": "x"}, {"use_listings_cache": True}, {"config_kwargs": 3}):
        with pytest.raises(ArgumentError, match=next(iter(unknown))):
            open_storage(s3.url("a"), storage_options=unknown, writable=True)
    with pytest.raises(ArgumentError):
        open_storage("s3://", storage_options=s3.storage_options, writable=True)
    options = {**s3.storage_options, "client_kwargs": {"colour": "blue"}}
    with open_storage(s3.url("a"), storage_options=options, writable=False) as storage:
        assert isinstance(storage.fetch_settled([Prefix("a", 1)])[0], ArgumentError)


# --- failures that may pass ----------------------------------------------------------
Spoil = Callable[[Asked, Callable[[], Reply]], Reply | None]


class Script:
    """Spoil the first answers of a server, one rule for each request."""

    def __init__(self, s3: S3Server, *rules: Spoil) -> None:
        self._s3 = s3
        self._rules = list(rules)

    def __call__(self, asked: Asked) -> Reply:
        def real() -> Reply:
            return forward(asked, self._s3.endpoint_url)

        rule = self._rules.pop(0) if self._rules else None
        return (rule(asked, real) if rule else None) or real()


@contextmanager
def _spoiled(
    s3: S3Server, *rules: Spoil
) -> Iterator[tuple[RemoteStorage, list[Asked], list[float]]]:
    slept: list[float] = []

    async def sleep(delay_s: float) -> None:
        slept.append(delay_s)

    with serve(Script(s3, *rules)) as server:
        options = {**s3.storage_options, "endpoint_url": server.url}
        url = s3.url(f"spoiled/{next(_NUMBERS)}")
        with open_remote(url, options, writable=True, retry=RetryPolicy(sleep=sleep)) as storage:
            yield storage, server.asked, slept


def _status(status: int, code: str = "Whatever") -> Spoil:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return lambda asked, real: Reply(status, body, {"Content-Type": "application/xml"})


def _pass(asked: Asked, real: Callable[[], Reply]) -> None:
    return None


def _drop(asked: Asked, real: Callable[[], Reply]) -> Reply:
    return Reply(0)


def _cut(asked: Asked, real: Callable[[], Reply]) -> Reply:
    reply = real()
    return Reply(reply.status, reply.body, reply.headers, cut=len(reply.body) // 2)


def _done_but_500(asked: Asked, real: Callable[[], Reply]) -> Reply:
    real()
    return Reply(500)


def _done_but_dropped(asked: Asked, real: Callable[[], Reply]) -> Reply:
    real()
    return Reply(0)


def _short_206(asked: Asked, real: Callable[[], Reply]) -> Reply:
    reply = real()
    return Reply(206, reply.body[:2], {**reply.headers, "Content-Length": "2"})


_PASSING = {
    "500": _status(500, "InternalError"),
    "503": _status(503, "SlowDown"),
    "429": _status(429),
    "dropped": _drop,
    "cut": _cut,
    "not xml": lambda asked, real: Reply(503, b"<html>busy"),
    "short": _short_206,
}


@pytest.mark.parametrize("name", _PASSING)
def test_reads_are_tried_again(s3: S3Server, name: str) -> None:
    with _spoiled(s3, _pass, _PASSING[name], _PASSING[name]) as (storage, asked, slept):
        storage.publish("a", [b"0123456789"])
        assert storage.fetch([Range("a", 2, 9)]) == [b"2345678"]
        # aiohttp itself sends a GET once more when a connection it had kept was closed
        assert len(asked) in ({4} if name != "dropped" else {4, 5})
        assert slept
    assert all(0 < delay < 1 for delay in slept)


@pytest.mark.parametrize("name", ["500", "503", "dropped", "cut", "not xml"])
def test_a_failing_page_is_no_end_of_a_listing(s3: S3Server, name: str) -> None:
    with _spoiled(s3, _pass, _pass, _PASSING[name], _PASSING[name]) as (storage, _, slept):
        storage.publish("index/a", [b"x"])
        storage.publish("index/b", [b"x"])
        assert [info.base for info in storage.fetch([Listing("index")])[0]] == ["a", "b"]
        assert slept


def test_one_failing_request_does_not_repeat_the_others(s3: S3Server) -> None:
    with _spoiled(s3, _pass, _status(503), _pass, _pass) as (storage, asked, slept):
        storage.publish("a", [b"0123456789"])
        assert storage.fetch([Range("a", i, i + 1) for i in range(3)]) == [b"0", b"1", b"2"]
        assert len(asked) == 1 + 3 + 1
        assert len(slept) == 1


def test_trying_ends(s3: S3Server) -> None:
    with _spoiled(s3, *[_status(503, "SlowDown")] * 99) as (storage, asked, slept):
        with pytest.raises(OSError, match="SlowDown") as caught:
            storage.fetch([Prefix("run.json", 9)])
        assert caught.value.errno == errno.EIO
        assert not isinstance(caught.value, FileNotFoundError)
        assert sum(slept) <= 30
        assert max(slept) <= 5
        assert 8 < len(asked) < 20
        assert len(slept) == len(asked) - 1


def test_a_dead_server_is_a_failure(s3: S3Server) -> None:
    options = {**s3.storage_options, "endpoint_url": "http://127.0.0.1:9"}
    retry = RetryPolicy(budget_s=0.3)
    with open_remote(s3.url("a"), options, writable=True, retry=retry) as storage:
        for error in _everything_fails(storage, OSError):
            assert "EndpointConnectionError" in str(error)


@pytest.mark.parametrize("rule", [_status(403, "AccessDenied"), _status(403, "ExpiredToken")])
def test_denials_are_final(s3: S3Server, rule: Spoil) -> None:
    with _spoiled(s3, rule) as (storage, asked, slept):
        with pytest.raises(PermissionError):
            storage.fetch([Prefix("a", 1)])
        assert (len(asked), slept) == (1, [])


@pytest.mark.parametrize(
    "rules",
    [
        [_done_but_500],
        [_done_but_dropped],
        [_done_but_500, _status(503)],
        [_status(409, "ConditionalRequestConflict")],
        [_status(503), _drop, _status(409)],
    ],
)
def test_a_put_whose_answer_was_lost_is_ours(s3: S3Server, rules: list[Spoil]) -> None:
    with _spoiled(s3, *rules) as (storage, _, _):
        storage.publish("run.json", [b"mine"], if_absent=True)
        assert storage.fetch([Prefix("run.json", 9)]) == [(b"mine", 4)]
        with pytest.raises(FileExistsError):
            storage.publish("run.json", [b"mine"], if_absent=True)


def test_a_put_repeated_by_the_http_client_is_ours(s3: S3Server) -> None:
    # The connection was used before, so aiohttp repeats the put without telling anybody.
    with _spoiled(s3, _pass, _done_but_dropped) as (storage, asked, slept):
        storage.publish("a", [b"x"])
        storage.publish("run.json", [b"mine"], if_absent=True)
        assert storage.fetch([Prefix("run.json", 9)]) == [(b"mine", 4)]
        assert [each.method for each in asked[:4]] == ["PUT", "PUT", "PUT", "GET"]
        assert slept == []


def test_a_store_that_drops_metadata_is_believed_by_its_bytes(s3: S3Server) -> None:
    def without_metadata(asked: Asked, real: Callable[[], Reply]) -> Reply:
        reply = real()
        kept = {k: v for k, v in reply.headers.items() if "x-amz-meta" not in k.lower()}
        return Reply(reply.status, reply.body, kept)

    with _spoiled(s3, _done_but_500, _pass, without_metadata) as (storage, _, _):
        storage.publish("run.json", [b"mine"], if_absent=True)

    def theirs(asked: Asked, real: Callable[[], Reply]) -> Reply:
        forward(Asked("PUT", asked.path, {}, b"else"), s3.endpoint_url)
        return Reply(500)

    with _spoiled(s3, theirs) as (storage, _, _), pytest.raises(FileExistsError):
        storage.publish("run.json", [b"mine"], if_absent=True)


def test_a_server_that_ignores_ranges_is_noticed(s3: S3Server) -> None:
    def whole(asked: Asked, real: Callable[[], Reply]) -> Reply:
        headers = {name: value for name, value in asked.headers.items() if name != "Range"}
        return forward(Asked(asked.method, asked.path, headers, b""), s3.endpoint_url)

    with _spoiled(s3, _pass, *[whole] * 9) as (storage, _, slept):
        storage.publish("a", [b"0123456789"])
        for start, stop in ((2, 5), (0, 5), (5, 10)):
            with pytest.raises(OSError, match="ignores Range"):
                storage.fetch([Range("a", start, stop)])
        assert storage.fetch([Range("a", 0, 10)]) == [b"0123456789"]
        assert storage.fetch([Prefix("a", 3), Prefix("a", 99)]) == [
            (b"012", 10),
            (b"0123456789", 10),
        ]
        assert slept == []


def test_another_range_than_asked_for_is_no_data(s3: S3Server) -> None:
    def other(asked: Asked, real: Callable[[], Reply]) -> Reply:
        reply = real()
        headers = {k: v for k, v in reply.headers.items() if k.lower() != "content-range"}
        return Reply(206, reply.body, {**headers, "Content-Range": "bytes 3-5/10"})

    with _spoiled(s3, _pass, *[other] * 99) as (storage, _, _):
        storage.publish("a", [b"0123456789"])
        for request in (Range("a", 2, 5), Prefix("a", 3)):
            with pytest.raises(OSError, match="bytes 3-5/10") as caught:
                storage.fetch([request])
            assert not isinstance(caught.value, TruncatedError)


def test_deletes_that_the_store_refused_are_reported(s3: S3Server) -> None:
    body = (
        b"<DeleteResult><Error><Key>b</Key><Code>AccessDenied</Code><Message>no</Message>"
        b"</Error></DeleteResult>"
    )
    refused: Spoil = lambda asked, real: Reply(200, body, {"Content-Type": "application/xml"})  # noqa: E731 - fits the others
    with _spoiled(s3, refused) as (storage, _, _), pytest.raises(PermissionError):
        storage.delete(["a", "b"])


# --- processes ----------------------------------------------------------------------
def _run_python(script: str, storage: Storage, options: dict[str, object]) -> str:
    # From Python 3.12 on, forking with threads warns; that this works is the test.
    warn = ["-W", "default", "-W", "ignore:This process"]
    command = [sys.executable, *warn, "-c", textwrap.dedent(script), storage.url]
    done = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_parent_and_forked_children_all_read(s3: S3Server, storage: Storage) -> None:
    storage.publish("a", [b"0123456789"])
    script = """
        import gc, json, os, sys, time
        from tensorstore_fmt.storage import Range, open_storage
        url, options = sys.argv[1], json.loads(sys.argv[2])
        storage = open_storage(url, storage_options=options, writable=True)
        other = open_storage(url, storage_options=options, writable=True)
        wanted = [Range("a", i, i + 1) for i in range(10)]

        def read(storage):
            began = time.monotonic()
            assert b"".join(storage.fetch(wanted)) == b"0123456789"
            assert time.monotonic() - began < 8  # no answer that went unheard

        read(storage)
        read(other)
        for ending in ("abrupt", "normal", "closed", "unused"):
            pid = os.fork()
            if pid == 0:
                if ending != "unused":
                    read(storage)
                if ending == "closed":
                    storage.close()
                    other.close()
                if ending == "abrupt":
                    os._exit(0)
                del storage, other
                gc.collect()
                sys.exit(0)
            assert os.waitpid(pid, 0)[1] == 0, ending
            read(storage)
            read(other)
        storage.close()
        other.close()
    """
    # moto closes every connection; what a child could spoil are those that are kept
    with serve(lambda asked: forward(asked, s3.endpoint_url)) as server:
        _run_python(script, storage, {**s3.storage_options, "endpoint_url": server.url})


def test_leaving_it_open_says_nothing_at_exit(s3: S3Server, storage: Storage) -> None:
    script = """
        import json, sys
        from tensorstore_fmt.storage import Listing, open_storage
        storage = open_storage(sys.argv[1], storage_options=json.loads(sys.argv[2]), writable=True)
        print(storage.fetch([Listing("")]))
    """
    assert _run_python(script, storage, s3.storage_options) == "[[]]\n"

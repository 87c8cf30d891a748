"""Who shares a client of S3 with whom, and how long it lives."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import fsspec.asyn
import pytest

from tensorstore_fmt.storage import Listing, Range, Storage, open_storage
from tensorstore_fmt.storage.s3_clients import Client, Clients, shared_clients
from tensorstore_fmt.testing.servers import Asked, Reply, S3Server, forward, serve

Lease = Callable[[Mapping[str, object]], Client]


@pytest.fixture
def clients() -> Iterator[Clients]:
    made = Clients()
    yield made
    made.close_idle()


@pytest.fixture
def lease(clients: Clients) -> Lease:
    return lambda options: clients.lease(fsspec.asyn.get_loop(), options)


def _give_back(clients: Clients, client: Client) -> None:
    asyncio.run_coroutine_threadsafe(clients.give_back(client), client.loop).result(10)


def _opened(client: Client) -> bool:
    """Connect, and say whether the connections can be used."""

    async def work() -> bool:
        s3 = await client.filesystem.set_session()
        return s3._endpoint.http_session._sessions is not None

    return asyncio.run_coroutine_threadsafe(work(), client.loop).result(10)


def _is_open(client: Client) -> bool:
    sessions = client.filesystem._s3._endpoint.http_session._sessions
    return sessions is not None


# --- which are the same -------------------------------------------------------------
def test_equal_options_share_a_client(lease: Lease) -> None:
    options = {"key": "a", "secret": "b", "client_kwargs": {"region_name": "x", "verify": False}}
    again = {"client_kwargs": {"verify": False, "region_name": "x"}, "secret": "b", "key": "a"}
    assert lease(options) is lease(again)


@pytest.mark.parametrize(
    "other",
    [
        {"key": "c", "secret": "b"},
        {"key": "a", "secret": "c"},
        {"key": "a", "secret": "b", "token": "t"},
        {"key": "a", "secret": "b", "endpoint_url": "http://127.0.0.1:1"},
        {"key": "a", "secret": "b", "client_kwargs": {"region_name": "x"}},
        {"key": "a", "secret": "b", "config_kwargs": {"signature_version": "s3v4"}},
        {"key": "a", "secret": "b", "anon": True},
        {"key": "a", "secret": "b", "anon": 1},
    ],
)
def test_other_options_do_not(lease: Lease, other: dict[str, object]) -> None:
    assert lease({"key": "a", "secret": "b"}) is not lease(other)


def test_other_surroundings_do_not(
    lease: Lease, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    seen = [lease({})]
    file.write_text("[default]\naws_access_key_id = a\n")
    seen.append(lease({}))
    file.write_text("[default]\naws_access_key_id = another\n")
    seen.append(lease({}))
    monkeypatch.setenv("AWS_PROFILE", "other")
    seen.append(lease({}))
    assert len(set(map(id, seen))) == 4
    monkeypatch.delenv("AWS_PROFILE")
    assert lease({}) is seen[2]


def test_options_that_are_changed_later_are_not_those_of_the_client(lease: Lease) -> None:
    kwargs = {"region_name": "x"}
    first = lease({"client_kwargs": kwargs})
    kwargs["region_name"] = "y"
    assert first.filesystem.client_kwargs == {"region_name": "x"}
    assert lease({"client_kwargs": kwargs}) is not first
    assert lease({"client_kwargs": {"region_name": "x"}}) is first


def test_objects_are_not_shared_and_closed_with_their_user(clients: Clients, lease: Lease) -> None:
    class Name(str):
        __slots__ = ()

    options = {"key": Name("a"), "secret": "b", "client_kwargs": {"region_name": "x"}}
    first, second = lease(options), lease(options)
    assert first is not second
    assert _opened(first)
    assert _opened(second)
    _give_back(clients, first)
    assert not _is_open(first)
    assert _is_open(second)
    _give_back(clients, second)


# --- how long they live ---------------------------------------------------------------
def test_few_idle_clients_are_kept(clients: Clients, lease: Lease) -> None:
    made = [lease({"key": str(i), "secret": "b", "client_kwargs": {"region_name": "x"}})
            for i in range(20)]  # fmt: skip
    assert all(_opened(client) for client in made)
    for client in made[1:]:
        _give_back(clients, client)
    kept = [client for client in made if _is_open(client)]
    assert kept == [made[0], *made[-4:]]  # the one in use, and those used last
    clients.close_idle()
    assert [client for client in made if _is_open(client)] == made[:1]
    _give_back(clients, made[0])
    assert not _is_open(made[0])


def test_a_client_that_was_denied_access_is_not_given_out_again(
    clients: Clients, lease: Lease
) -> None:
    options = {"key": "a", "secret": "b", "client_kwargs": {"region_name": "x"}}
    first, also = lease(options), lease(options)
    assert _opened(first)
    clients.unshare(first)
    assert lease(options) is not first
    _give_back(clients, first)
    assert _is_open(first)
    _give_back(clients, also)
    assert not _is_open(first)


# --- through storages ------------------------------------------------------------------
def _filesystem(storage: Storage) -> object:
    storage.fetch([Listing("")])
    return storage._store._fs  # type: ignore[attr-defined]  # remote, and connected


def test_storages_share_a_client_and_close_by_themselves(s3: S3Server) -> None:
    url, options = s3.url("clients/a"), s3.storage_options
    first = open_storage(url, storage_options=options, writable=True)
    second = open_storage(s3.url("clients/b"), storage_options=options, writable=True)
    assert _filesystem(first) is _filesystem(second)
    second.publish("x", [b"123"])
    shared = _filesystem(first)
    first.close()
    assert second.fetch([Range("x", 0, 3)]) == [b"123"]
    first.publish("y", [b"45"])  # opens again
    assert _filesystem(first) is shared
    first.close()
    second.close()
    with open_storage(url, storage_options=options, writable=False) as third:
        assert _filesystem(third) is shared
        assert [info.base for info in third.fetch([Listing("")])[0]] == ["y"]


def test_a_storage_that_was_denied_access_connects_anew(s3: S3Server) -> None:
    denying = True

    def answer(asked: Asked) -> Reply:
        if denying:
            return Reply(403, b"<Error><Code>ExpiredToken</Code><Message>no</Message></Error>")
        return forward(asked, s3.endpoint_url)

    with serve(answer) as server:
        options = {**s3.storage_options, "endpoint_url": server.url}
        with open_storage(s3.url("denied"), storage_options=options, writable=False) as storage:
            with pytest.raises(PermissionError):
                storage.fetch([Listing("")])
            denied = storage._store._fs  # type: ignore[attr-defined]  # remote, and connected
        denying = False
        with open_storage(s3.url("denied"), storage_options=options, writable=False) as storage:
            assert _filesystem(storage) is not denied


@pytest.mark.filterwarnings("ignore:This process")  # it forks with threads: that is the test
def test_a_forked_child_has_clients_of_its_own(s3: S3Server) -> None:
    options = s3.storage_options
    with open_storage(s3.url("forked"), storage_options=options, writable=True) as storage:
        storage.publish("x", [b"123"])
        before, clients = _filesystem(storage), shared_clients()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                is_own = shared_clients() is not clients and _filesystem(storage) is not before
                code = 0 if is_own and storage.fetch([Range("x", 0, 3)]) == [b"123"] else 2
            finally:
                sys.stdout.flush()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert shared_clients() is clients
        assert _filesystem(storage) is before
        assert storage.fetch([Range("x", 0, 3)]) == [b"123"]

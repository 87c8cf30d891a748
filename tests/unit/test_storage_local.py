"""What only local files have: links and FIFOs to refuse, maps, appends, locks, forks."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tensorstore_fmt.errors import ArgumentError, FormatError, StateError, TruncatedError
from tensorstore_fmt.storage import (
    FileInfo,
    Listing,
    Prefix,
    Range,
    Request,
    Storage,
    open_storage,
)
from tensorstore_fmt.storage import local as local_module
from tensorstore_fmt.storage import locks as locks_module


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "run", writable=True)


def _run_python(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore:This process", "-c", textwrap.dedent(script), *arguments],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_reading_creates_nothing(storage: Storage, tmp_path: Path) -> None:
    storage.fetch_settled([Prefix("run.json", 9), Listing("index"), Range("a/b", 0, 1)])
    storage.close()
    assert list(tmp_path.iterdir()) == []


def test_opening_and_importing_need_no_fsspec(tmp_path: Path) -> None:
    script = """
        import sys
        from tensorstore_fmt.storage import open_storage
        open_storage(sys.argv[1], writable=True).publish("a", [b"x"])
        print(sorted({"fsspec", "s3fs", "aiohttp", "botocore"} & set(sys.modules)))
    """
    assert _run_python(script, str(tmp_path)) == "[]\n"


def test_links_and_special_files_are_refused(storage: Storage, tmp_path: Path) -> None:
    storage.publish("index/a", [b"x"])
    run = tmp_path / "run"
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a").write_bytes(b"secret")
    (run / "shards").symlink_to(secret)
    (run / "index/link").symlink_to(secret / "a")
    (run / "index/inside").symlink_to("a")
    (run / "index/dangling").symlink_to("nowhere")
    os.mkfifo(run / "index/fifo")
    (run / "index/folder").mkdir()
    (run / "index/zero").symlink_to("/dev/zero")
    paths = ("shards/a", "index/link", "index/inside", "index/dangling", "index/fifo",
             "index/folder", "index/zero")  # fmt: skip
    for path in paths:
        requests: list[Request[object]] = [Prefix(path, 3), Range(path, 0, 3)]
        for error in storage.fetch_settled(requests):
            assert isinstance(error, FormatError)
            assert error.code == "malformed"
        with pytest.raises(FormatError):
            storage.map(path, 1)
    with pytest.raises(FormatError):
        storage.fetch([Listing("shards")])
    (listed,) = storage.fetch([Listing("index")])
    assert FileInfo("a", 1) in listed
    assert {each.base for each in listed} == {"a", "dangling", "fifo", "inside", "link", "zero"}
    for write in (lambda: storage.publish("shards/b", [b""]), lambda: storage.create("shards/b")):
        with pytest.raises(FormatError):
            write()
    assert [each.name for each in secret.iterdir()] == ["a"]


def test_the_root_may_be_a_link(storage: Storage, tmp_path: Path) -> None:
    storage.publish("a", [b"x"])
    (tmp_path / "latest").symlink_to("run")
    assert open_storage(tmp_path / "latest", writable=False).fetch([Listing("")]) == [
        [FileInfo("a", 1)]
    ]


@contextmanager
def _names_are_read_before(then: Callable[[], object]) -> Iterator[None]:
    """Do something each time when the names of a directory are read and nothing else is."""
    scan = os.scandir

    @contextmanager
    def scandir(directory: int) -> Iterator[list[os.DirEntry[str]]]:
        with scan(directory) as entries:
            found = list(entries)
        then()
        yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        yield


def test_what_is_merged_while_it_is_listed_is_listed_again(
    storage: Storage, tmp_path: Path
) -> None:
    for name in ("0", "1", "2", "other"):
        storage.publish(f"index/{name}", [b"x"])

    def merge() -> None:
        storage.publish("index/0-2", [b"xxx"])
        storage.delete(["index/1", "index/2"])

    with _names_are_read_before(merge):
        (listed,) = storage.fetch([Listing("index")])
    assert listed == [FileInfo("0", 1), FileInfo("0-2", 3), FileInfo("other", 1)]


def test_a_directory_that_never_holds_still(storage: Storage, tmp_path: Path) -> None:
    storage.publish("index/0", [b"x"])
    made = iter(range(1, 1000))
    moves: list[int] = []

    def move() -> None:
        moves.append(next(made))
        (tmp_path / f"run/index/{moves[-1] - 1}").rename(tmp_path / f"run/index/{moves[-1]}")

    with _names_are_read_before(move):
        (error,) = storage.fetch_settled([Listing("index")])
    assert isinstance(error, OSError)
    assert not isinstance(error, FileNotFoundError)
    assert "vanishing" in str(error)
    assert len(moves) == 100
    assert storage.fetch([Listing("index")]) == [[FileInfo("100", 1)]]


def test_a_root_that_is_a_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    storage = open_storage(tmp_path / "file", writable=False)
    assert isinstance(storage.fetch_settled([Prefix("run.json", 1)])[0], FileNotFoundError)


def test_a_storage_failure_is_not_absence(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish("index/a", [b"x"])

    def fail(*args: object, **kwargs: object) -> int:
        raise OSError(errno.EIO, "disk on fire")

    monkeypatch.setattr(os, "open", fail)
    for error in storage.fetch_settled([Prefix("a", 1), Range("a", 0, 1), Listing("index")]):
        assert isinstance(error, OSError)
        assert error.errno == errno.EIO
        assert not isinstance(error, FileNotFoundError)


def test_many_bytes_come_through_several_threads(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "_THREADS", 3)
    data = os.urandom(4 << 20)
    storage.publish("a", [data])
    ranges = [Range("a", i << 16, (i + 1) << 16) for i in range(64)]
    assert b"".join(storage.fetch(ranges)) == data
    assert storage.fetch([Range("a", 0, 3 << 20), Range("a", 3 << 20, 4 << 20)]) == [
        data[: 3 << 20],
        data[3 << 20 :],
    ]
    memory = bytearray(len(data))
    view = memoryview(memory)
    storage.fetch_into(ranges, [view[each.start : each.stop] for each in ranges])
    assert memory == data
    got = storage.fetch_settled([*ranges, Range("a", 5, len(data) + 1), Range("b", 0, 1)])
    assert got[:64] == [data[each.start : each.stop] for each in ranges]
    assert isinstance(got[64], TruncatedError)
    assert got[64].facts == {"file": "a", "offset": len(data), "expected": len(data) + 1}
    assert isinstance(got[65], FileNotFoundError)


def test_descriptors_are_few_and_given_back(storage: Storage) -> None:
    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for i in range(200):
        storage.publish(f"shards/{i}", [b"%03d" % i])
    ranges = [Range(f"shards/{i}", 0, 3) for i in range(200)]
    assert storage.fetch(ranges) == [b"%03d" % i for i in range(200)]
    assert count() <= before + 64
    storage.close()
    assert count() == before
    storage.fetch([Range("shards/0", 0, 1)])
    del storage
    # pytest still holds the fixture's value: one descriptor at most
    assert count() <= before + 1


def test_a_deleted_file_can_be_read_by_who_has_it_open(tmp_path: Path) -> None:
    reader = open_storage(tmp_path, writable=False)
    writer = open_storage(tmp_path, writable=True)
    writer.publish("a", [b"xyz"])
    assert reader.fetch([Range("a", 0, 1)]) == [b"x"]
    writer.delete(["a"])
    assert reader.fetch([Range("a", 1, 3)]) == [b"yz"]
    assert isinstance(reader.fetch_settled([Prefix("a", 1)])[0], FileNotFoundError)


def test_a_prefix_sees_what_bears_the_name_now(tmp_path: Path) -> None:
    reader = open_storage(tmp_path, writable=False)
    writer = open_storage(tmp_path, writable=True)
    writer.publish("a", [b"old"])
    assert reader.fetch([Range("a", 0, 3)]) == [b"old"]
    writer.publish("a", [b"newer"])
    assert reader.fetch([Prefix("a", 9)]) == [(b"newer", 5)]
    assert reader.fetch([Range("a", 0, 3)]) == [b"new"]


# --- writing --------------------------------------------------------------------
def test_a_failed_publish_leaves_nothing(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish("index/a", [b"old"])

    def full(fd: int, buffers: object) -> int:
        os.write(fd, b"n")
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(local_module, "write_all", full)
    with pytest.raises(OSError, match="full"):
        storage.publish("index/a", [b"new"])
    monkeypatch.undo()
    assert [each.name for each in (tmp_path / "run/index").iterdir()] == ["a"]
    assert storage.fetch([Range("index/a", 0, 3)]) == [b"old"]


def test_exclusive_without_hard_links(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage.publish("a", [b"one"], if_absent=True)
    with pytest.raises(FileExistsError):
        storage.publish("a", [b"two"], if_absent=True)
    assert storage.fetch([Prefix("a", 9), Listing("")]) == [(b"one", 3), [FileInfo("a", 3)]]


def test_going_on_with_a_file(storage: Storage, tmp_path: Path) -> None:
    storage.publish("shards/a", [b"0123456789"])
    with pytest.raises(StateError) as caught:
        storage.reopen("shards/a", nbytes=9, keep=4)
    assert caught.value.code == "changed"
    assert storage.fetch([Range("shards/a", 0, 10)]) == [b"0123456789"]
    with storage.reopen("shards/a", nbytes=10, keep=4) as appender:
        assert appender.position == 4
        assert appender.append([b"xy"]) == 4
        appender.sync()
    assert storage.fetch([Prefix("shards/a", 99)]) == [(b"0123xy", 6)]
    with open(storage.local_path("shards/a"), "rb") as file:
        assert file.read() == b"0123xy"
    other = open_storage("memory://going-on", writable=True)
    for ask in (lambda: other.reopen("a", nbytes=1, keep=0), lambda: other.local_path("a")):
        with pytest.raises(ArgumentError):
            ask()


def test_appending(storage: Storage) -> None:
    with storage.create("shards/a") as appender:
        assert appender.path == "shards/a"
        assert appender.append([b"0" * 3] * 3000) == 0  # more buffers than one call takes
        assert appender.append([]) == 9000
        assert appender.append([b"", memoryview(b"xyz"), bytearray(b"!")]) == 9000
        assert appender.position == 9004
        assert storage.fetch([Range("shards/a", 8999, 9004)]) == [b"0xyz!"]
        assert appender.append([b"more"]) == 9004
        assert storage.fetch([Range("shards/a", 9000, 9008)]) == [b"xyz!more"]
        storage.sync(["shards/a"])
        appender.sync()
        with pytest.raises(FileExistsError):
            storage.create("shards/a")
    appender.close()
    with pytest.raises(StateError):
        appender.append([b"x"])
    storage.sync(["shards/a"])


def test_short_writes_are_continued(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def short(fd: int, buffers: list[memoryview]) -> int:
        return real(fd, [buffers[0][:3]])

    monkeypatch.setattr(os, "writev", short)
    data = [b"0123456789", b"", b"abcd", b"e"]
    with storage.create("a") as appender:
        appender.append(data)
        assert appender.append(data) == 15
    assert storage.fetch([Range("a", 0, 30)]) == [b"".join(data) * 2]


@pytest.mark.parametrize("broken", ["writev", "fsync"])
def test_after_a_failure_a_file_is_never_written_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, "no")

    with storage.create("a") as appender:
        appender.append([b"x"])
        monkeypatch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="no"):
            appender.append([b"y"]) if broken == "writev" else storage.sync(["a"])
        monkeypatch.undo()
        for again in (lambda: appender.append([b"y"]), appender.sync, lambda: storage.sync(["a"])):
            with pytest.raises(StateError) as caught:
                again()
            assert caught.value.code == "storage_failed"


def test_sync_reaches_files_and_all_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "new/run", writable=True)
    synced: list[str] = []
    real = os.fsync

    def record(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(os, "fsync", record)
    storage.publish("index/a", [b"x"])
    assert synced == []
    storage.sync(["index/a", "index/a"])
    place = str(tmp_path)
    assert synced[0] == f"{place}/new/run/index/a"
    assert sorted(synced) == sorted(
        [f"{place}/new/run/index/a", f"{place}/new/run/index", f"{place}/new/run",
         f"{place}/new", place]
    )  # fmt: skip
    synced.clear()
    storage.publish("index/b", [b"x"])
    storage.sync(["index/b"])
    assert sorted(synced) == [f"{place}/new/run/index", f"{place}/new/run/index/b"]
    with pytest.raises(FileNotFoundError):
        storage.sync(["index/nope"])
    synced.clear()
    storage.publish("index/c", [b"x"], synced=True)
    (aside,) = synced
    assert aside.startswith(f"{place}/new/run/index/c.")
    assert aside.endswith(".tmp")  # before it had its name


# --- maps -----------------------------------------------------------------------
def test_a_map_is_checked_shared_and_read_only(storage: Storage, tmp_path: Path) -> None:
    with storage.create("a") as appender:
        appender.append([b"0123456789"])
        view = storage.map("a", 10)
        assert bytes(view) == b"0123456789"
        assert view.readonly
        assert storage.map("a", 3).obj is view.obj
        with pytest.raises(TruncatedError):
            storage.map("a", 11)
        appender.append([b"x" * 9000])
        assert bytes(storage.map("a", 9010)[9009:]) == b"x"
    os.truncate(tmp_path / "run/a", 5)
    with pytest.raises(TruncatedError):  # mapped before, and cut short since
        storage.map("a", 10)
    storage.publish("empty", [])
    assert bytes(storage.map("empty", 0)) == b""
    with pytest.raises(FileNotFoundError):
        storage.map("nope", 0)
    storage.close()


def test_a_view_outlives_the_storage(storage: Storage) -> None:
    storage.publish("a", [b"0123456789"])
    view = storage.map("a", 10)
    storage.delete(["a"])
    storage.close()
    gc.collect()
    assert bytes(view) == b"0123456789"


# --- locks ----------------------------------------------------------------------
def test_locks(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks_module, "_PATIENCE_S", 0.05)
    assert not storage.is_locked("locks/a")
    with storage.lock("locks/a") as lock:
        assert lock.is_held
        assert storage.is_locked("locks/a")
        assert not storage.is_locked("locks/b")
        with pytest.raises(StateError) as caught:
            storage.lock("locks/a")
        assert caught.value.code == "locked"
    assert not storage.is_locked("locks/a")
    with storage.lock("locks/a") as lock:
        lock.release()
        assert not lock.is_held


def test_a_lock_ends_with_its_process_also_if_a_child_lives_on(storage: Storage) -> None:
    script = """
        import os, sys, time
        from tensorstore_fmt.storage import open_storage
        storage = open_storage(sys.argv[1], writable=True)
        lock = storage.lock("locks/a")
        reads, writes = os.pipe()
        if os.fork() == 0:
            os.write(writes, b"x")  # it lives, and has let go of what it inherited
            time.sleep(60)
            os._exit(0)
        os.read(reads, 1)
        print("locked", flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), storage.url],
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"locked\n"
        assert storage.is_locked("locks/a")
        process.kill()
        process.wait()
        assert not storage.is_locked("locks/a")
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the child, in a session of its own
        process.stdout.close()


def test_file_systems_without_locks(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with storage.lock("locks/a") as lock:
        assert not lock.is_held
        assert not storage.is_locked("locks/a")


# --- processes and arguments -----------------------------------------------------
def test_a_forked_child_reads(storage: Storage) -> None:
    storage.publish("a", [os.urandom(2 << 20)])
    script = """
        import os, sys
        from tensorstore_fmt.storage import Range, open_storage
        storage = open_storage(sys.argv[1], writable=True)
        ranges = [Range("a", 0, 1 << 20), Range("a", 1 << 20, 2 << 20)]
        expected = storage.fetch(ranges)
        storage._lock.acquire()     # as if another thread were in the middle of something
        storage._files._lock.acquire()
        pid = os.fork()
        if pid == 0:
            storage.publish("b", [b"x"])
            storage.map("a", 5)
            ok = storage.fetch(ranges) == expected
            os._exit(0 if ok else 1)
        print(os.waitpid(pid, 0)[1])
    """
    assert _run_python(script, storage.url) == "0\n"
    assert storage.fetch([Range("b", 0, 1)]) == [b"x"]


def test_arguments(tmp_path: Path) -> None:
    for url in ("", "file://host/a", "file:relative/../a://x", "nosuch://a/b", "file://"):
        with pytest.raises(ArgumentError):
            open_storage(url, writable=False)
    with pytest.raises(ArgumentError, match="auto_mkdir"):
        open_storage(tmp_path, storage_options={"auto_mkdir": True}, writable=True)
    with pytest.raises(ArgumentError, match="foo"):
        open_storage("memory://a", storage_options={"foo": 1}, writable=True)


def test_a_relative_path_is_fixed_when_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("run", writable=True)
    monkeypatch.chdir("/")
    storage.publish("a", [b"x"])
    assert (tmp_path / "run/a").read_bytes() == b"x"
    assert storage.url == "run"

"""What a disk may hold after a power cut: a log of what was written, and states built from it.

The rules are those of a file system that promises as little as POSIX lets it: the bytes of a
file are safe after an fsync of the file, a name after an fsync of its directory, a directory
when its own name is. Everything else may be there, in part and in any order. What a failed
fsync was to write is gone for good, whatever later calls say.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from tensorstore_fmt.testing.system_calls import SystemCall

__all__ = ["DiskLog", "DiskState", "Names", "Tail", "build_state"]

Tail: TypeAlias = Literal["nothing", "all", "sector", "block", "zeros", "holes"]
"""What is left of bytes that were not synced: none, all, all up to a border of 512 B or 4 KiB, as
much but with zeros up to the full length, or all with zeros in some blocks."""

Names: TypeAlias = Literal["none", "all", "some", "shuffled"]
"""Which changes of directories that were not synced are there: none, all, some in their order, or
some in any order."""

_ORDERS: Final[tuple[Names, ...]] = ("none", "all", "some", "some", "shuffled")
TAILS: Final[tuple[Tail, ...]] = ("nothing", "all", "sector", "block", "zeros", "holes")
_SECTOR_NBYTES: Final = 512
_BLOCK_NBYTES: Final = 4096


@dataclass(slots=True)
class _File:
    data: bytearray = field(default_factory=bytearray)
    synced: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)  # what failed syncs were to write


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of a directory: names that go, and names that come with their files."""

    gone: tuple[str, ...] = ()
    new: tuple[tuple[str, int], ...] = ()


_DIRECTORY: Final = -1


@dataclass(frozen=True, slots=True)
class _Record:
    op: Literal["write", "sync", "failed", "change", "sync_directory"]
    file: int = 0
    directory: str = ""
    data: bytes = b""
    change: _Change = _Change()


class DiskLog:
    """Keep all that a local storage does to the disk; the hook for `intercepted`.

    Parameters
    ----------
    root
        Directory that exists, below which everything happens.
    failing_syncs
        Numbers of the fsync calls, from 1 on, that fail.

    Attributes
    ----------
    marks
        (place in the log, what was said), in order: see `mark`. A failed sync says "failed".
    """

    def __init__(self, root: str, *, failing_syncs: Collection[int] = ()) -> None:
        self.root = root
        self.marks: list[tuple[int, object]] = []
        self.records: list[_Record] = []
        self.syncs = 0
        self._failing_syncs = failing_syncs
        self._names: dict[str, int] = {}
        self._files = 0

    def __len__(self) -> int:
        return len(self.records)

    def mark(self, what: object) -> None:
        """Note that something was said at this place, such as that a flush returned."""
        self.marks.append((len(self.records), what))

    def __call__(self, call: SystemCall, perform: Callable[[], object]) -> object:
        """Carry out a system call, and keep it."""
        if call.op == "fsync":
            self._sync(call)  # the disk under the test needs no syncing
            return None
        result = perform()
        directory, _, base = call.path.rpartition("/")
        if call.op == "write":
            written = result if isinstance(result, int) else 0
            file = self._names[call.path]
            self.records.append(_Record("write", file, data=call.data[:written]))
        elif call.op == "open":
            self._names[call.path] = self._files
            self._change(directory, _Change(new=((base, self._files),)))
            self._files += 1
        elif call.op == "mkdir":
            self._change(directory, _Change(new=((base, _DIRECTORY),)))
        elif call.op == "unlink":
            del self._names[call.path]
            self._change(directory, _Change(gone=(base,)))
        else:
            self._rename(call, directory, base)
        return result

    def _rename(self, call: SystemCall, directory: str, base: str) -> None:
        there, _, new = call.target.rpartition("/")
        assert there == directory, "names move only within a directory"
        file = self._names[call.path]
        self._names[call.target] = file
        if call.op == "rename":
            del self._names[call.path]
        self._change(directory, _Change((base,) if call.op == "rename" else (), ((new, file),)))

    def _change(self, directory: str, change: _Change) -> None:
        self.records.append(_Record("change", directory=directory, change=change))

    def _sync(self, call: SystemCall) -> None:
        self.syncs += 1
        file = self._names.get(call.path)
        if self.syncs in self._failing_syncs:
            self.mark("failed")
            if file is not None:
                self.records.append(_Record("failed", file))
            raise OSError(errno.EIO, "made to fail", call.path)
        if file is None:
            self.records.append(_Record("sync_directory", directory=call.path))
        else:
            self.records.append(_Record("sync", file))


@dataclass(slots=True)
class DiskState:
    """Files of a state, relative to the root, and directories."""

    files: dict[str, bytes]
    directories: list[str]

    def write(self, folder: str) -> None:
        """Make it true in a folder that is empty or does not exist."""
        for directory in ["", *sorted(self.directories)]:
            os.makedirs(os.path.join(folder, directory), exist_ok=True)
        for path, data in self.files.items():
            with open(os.path.join(folder, path), "wb") as file:
                file.write(data)


def build_state(
    log: DiskLog,
    place: int,
    rng: random.Random,
    *,
    tail: Tail | None = None,
    names: Names | None = None,
) -> DiskState:
    """Give a state that the disk may be in if the power fails behind this many records.

    Parameters
    ----------
    tail, names
        What is left of bytes and names that were not synced; None: chance decides, sometimes for
        everything, sometimes for each thing anew.
    """
    files, synced, pending = _replay(log, place)
    fate = tail if tail is not None else rng.choice((None, None, *TAILS))
    order = names if names is not None else rng.choice(_ORDERS)
    directories = {r.directory for r in log.records[:place] if r.directory}
    entries = {
        each: _apply(synced.get(each, {}), pending.get(each, []), order, rng)
        for each in sorted(directories)
    }
    contents = {}
    for number, file in files.items():
        kind = fate if fate is not None else rng.choice(TAILS)
        contents[number] = _survives(file, kind, rng)
    state = DiskState({}, [])
    _collect(state, log.root, "", entries, contents)
    return state


def _replay(
    log: DiskLog, place: int
) -> tuple[dict[int, _File], dict[str, dict[str, int]], dict[str, list[_Change]]]:
    files: dict[int, _File] = {}
    synced: dict[str, dict[str, int]] = {}
    pending: dict[str, list[_Change]] = {}
    for record in log.records[:place]:
        file = files.setdefault(record.file, _File())
        if record.op == "write":
            file.data += record.data
        elif record.op == "sync":
            file.synced = len(file.data)
        elif record.op == "failed":
            file.lost.append((file.synced, len(file.data)))
            file.synced = len(file.data)  # so the kernel says from now on
        elif record.op == "change":
            pending.setdefault(record.directory, []).append(record.change)
        else:
            names = synced.setdefault(record.directory, {})
            for change in pending.pop(record.directory, []):
                _change(names, change)
    return files, synced, pending


def _change(names: dict[str, int], change: _Change) -> None:
    for base in change.gone:
        names.pop(base, None)
    names.update(change.new)


def _apply(
    synced: dict[str, int], pending: list[_Change], order: Names, rng: random.Random
) -> dict[str, int]:
    names = dict(synced)
    left = list(pending)
    if order == "none":
        left = []
    elif order != "all":
        share = rng.choice((0.2, 0.5, 0.8))
        left = [change for change in left if rng.random() < share]
    if order == "shuffled":
        rng.shuffle(left)
    for change in left:
        _change(names, change)
    return names


def _survives(file: _File, tail: Tail, rng: random.Random) -> bytes:
    data = bytearray(file.data)
    for start, stop in file.lost:
        data[start:stop] = bytes(stop - start)
    loose = len(data) - file.synced
    if tail == "all" or not loose:
        return bytes(data)
    if tail == "nothing":
        return bytes(data[: file.synced])
    unit = _SECTOR_NBYTES if tail == "sector" or rng.random() < 0.5 else _BLOCK_NBYTES
    if tail == "holes":
        for start in range(file.synced // unit * unit, len(data), unit):
            if rng.random() < 0.4:
                begin, stop = max(start, file.synced), min(start + unit, len(data))
                data[begin:stop] = bytes(stop - begin)
        return bytes(data)
    cut = max(file.synced, (file.synced + rng.randrange(loose + 1)) // unit * unit)
    rest = bytes(len(data) - cut) if tail == "zeros" else b""
    return bytes(data[:cut]) + rest


def _collect(
    state: DiskState,
    directory: str,
    relative: str,
    names: dict[str, dict[str, int]],
    contents: dict[int, bytes],
) -> None:
    for base, file in names.get(directory, {}).items():
        path = f"{relative}{base}"
        if file == _DIRECTORY:
            state.directories.append(path)
            _collect(state, f"{directory}/{base}", f"{path}/", names, contents)
        else:
            state.files[path] = contents.get(file, b"")

"""Import of runs that smdebug (Amazon SageMaker Debugger) wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from tensorstore_fmt.errors import ArgumentError, FormatError
from tensorstore_fmt.interop.importing.events import SummaryValue, decode_event
from tensorstore_fmt.interop.importing.records import Bad, Record, records
from tensorstore_fmt.interop.importing.report import ImportReport
from tensorstore_fmt.interop.importing.smdebug_layout import (
    Found,
    Index,
    decode_index,
    event_path,
    index_path,
    scan,
)
from tensorstore_fmt.interop.importing.smdebug_names import (
    COLLECTIONS_NAME,
    from_smdebug,
    is_scalar,
    shape_name,
)
from tensorstore_fmt.interop.importing.target import Key, Target
from tensorstore_fmt.interop.importing.tensorproto import decode_tensor
from tensorstore_fmt.storage.base import without_credentials
from tensorstore_fmt.storage.foreign import ForeignFolder, open_folder
from tensorstore_fmt.writing.convert import check_name

__all__ = ["Progress", "import_smdebug"]

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told how many files are done, how many there are, and which is at hand."""

_MODES: Final[dict[str, str | None]] = {
    "1": "TRAIN", "2": "EVAL", "3": "PREDICT", "4": None,
    "TRAIN": "TRAIN", "EVAL": "EVAL", "PREDICT": "PREDICT", "GLOBAL": None,
}  # fmt: skip
_AT_ONCE: Final = 64
_MAX_INDEX_NBYTES: Final = 64 * 1024 * 1024
_BEGIN_NBYTES: Final = 256 * 1024


def import_smdebug(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    source_options: Mapping[str, object] | None = None,
    storage_options: Mapping[str, object] | None = None,
    attrs: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Copy what smdebug wrote into a new run; neither smdebug nor protobuf is needed.

    Global steps, modes, mode steps and wall times stay what they were. Workers are numbered in
    the order of their names. Names: see `smdebug_names`. Every value is read and decoded by
    itself, worker by worker, so memory holds one tensor and what waits to be written (128 MiB).

    Parameters
    ----------
    source
        The folder with ``index``, ``events`` and ``collections``; or its URL.
    run
        Where to make the run.
    source_options, storage_options
        For the file systems of the one and the other.
    attrs
        Further attributes of the run.
    progress
        Told how many files are done, how many there are, and which is at hand.

    Returns
    -------
    ImportReport
        Also what was left out, with file, offset and reason. The run is closed: what an
        unfinished job writes later is not in it.

    Raises
    ------
    ArgumentError
        Code ``unknown_format``: smdebug did not write this.
    RunExistsError
        There is a run already.
    OSError
        A storage failed. Damage of single files does not raise.
    """
    folder = open_folder(source, storage_options=source_options)
    report = ImportReport(
        kind="smdebug", source=folder.describe(), run=without_credentials(os.fspath(run))
    )
    try:
        found = scan(folder, report)
        report.workers = [worker for worker in found.workers if worker in found.steps]
        report.is_finished = found.is_finished
        report.missing_workers = max(found.num_workers - len(found.workers), 0)
        if report.missing_workers:
            reason = f"{report.missing_workers} of {found.num_workers} workers have left nothing"
            report.skip("collections", None, "missing_workers", reason)
        of_run = {
            **(attrs or {}),
            "imported": {"kind": "smdebug", "source": folder.describe()},
            "smdebug": {
                "workers": report.workers,
                "num_workers": found.num_workers,
                "missing_workers": report.missing_workers,
                "is_finished": found.is_finished,
            },
        }
        with Target(
            run,
            storage_options=storage_options,
            attrs=of_run,
            num_workers=max(len(report.workers), 1),
            report=report,
        ) as target:
            _Import(folder, found, report, target, progress).run()
    finally:
        folder.close()
    return report


class _Import:
    """One import, while it goes on."""

    def __init__(
        self,
        folder: ForeignFolder,
        found: Found,
        report: ImportReport,
        target: Target,
        progress: Progress | None,
    ) -> None:
        self._folder = folder
        self._found = found
        self._report = report
        self._target = target
        self._progress = progress
        self._done = 0
        self._total = sum(len(steps) for steps in found.steps.values())

    def run(self) -> None:
        """Bring everything over."""
        for number, worker in enumerate(self._report.workers or ["worker_0"]):
            self._target.begin(number)  # also if nothing was saved: an empty run is one, too
            _Worker(self._folder, worker, self._found, self._report, self._target).run(self._tell)

    def _tell(self, path: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, path)


class _Worker:
    """The import of one worker."""

    def __init__(
        self,
        folder: ForeignFolder,
        name: str,
        found: Found,
        report: ImportReport,
        target: Target,
    ) -> None:
        self._folder = folder
        self._name = name
        self._steps = found.steps.get(name) or ()
        self._collections = found.collections.get(name)
        self._report = report
        self._target = target
        self._known = {
            tensor
            for collection in (self._collections or {}).values()
            if isinstance(collection, dict)
            for tensor in collection.get("tensor_names") or ()
            if isinstance(tensor, str)
        }
        self._stamped: set[Key] = set()  # of the file at hand

    def run(self, tell: Callable[[str], None]) -> None:
        """Bring over all steps."""
        for at in range(0, len(self._steps), _AT_ONCE):
            steps = list(self._steps[at : at + _AT_ONCE])
            for step, data, begin in self._read(steps):
                self._step(step, data, begin)
                tell(event_path(step, self._name))

    def _read(self, steps: list[int]) -> Iterator[tuple[int, bytes | Exception, bytes | Exception]]:
        indexes = [index_path(step, self._name) for step in steps]
        events = [event_path(step, self._name) for step in steps]
        return zip(
            steps,
            self._folder.begins(indexes, _MAX_INDEX_NBYTES),
            self._folder.begins(events, _BEGIN_NBYTES),
            strict=True,
        )

    def _step(self, step: int, data: bytes | Exception, begin: bytes | Exception) -> None:
        path = index_path(step, self._name)
        index = None
        if isinstance(data, FileNotFoundError):
            self._report.skip(path, None, "missing_file", "there are values, but no index of them")
        else:
            try:
                index = decode_index(data, step=step, worker=self._name)
            except FormatError as error:
                self._report.skip(path, None, error.code, str(error))
        self._stamped = set()
        self._values(step, index, begin)
        if index is not None:
            self._shapes(step, index)

    def _values(self, step: int, index: Index | None, begin: bytes | Exception) -> None:
        path = event_path(step, self._name)
        if index is not None and index.path != path:
            path = index.path
            (begin,) = self._folder.begins([path], _BEGIN_NBYTES)
        if isinstance(begin, FileNotFoundError | FormatError | ArgumentError):
            if index is None or index.places or not index.shapes:
                reason = f"cannot be read: {begin}"
                if isinstance(begin, FileNotFoundError):
                    reason = "it is not there, but there is an index of it"
                self._report.skip(path, None, "missing_file", reason)
            return
        if isinstance(begin, Exception):
            raise begin
        places = {} if index is None else index.places
        offsets = [] if index is None else index.offsets
        known = self._known | set(places.values())
        seen: set[int] = set()
        last: dict[tuple[Key, str], int] = {}
        for found in records(self._folder, path, begin, known=offsets):
            seen.add(found.offset)
            try:
                key, name = self._record(step, index, found, known)
            except FormatError as error:
                named = places.get(found.offset)
                what = f"{named!r}: " if named else ""
                self._report.skip(path, found.offset, error.code, f"{what}{error}")
                continue
            before = last.get((key, name))
            if before is not None:
                reason = f"{name!r} was saved again in the same step; the last value stays"
                self._report.skip(path, before, "replaced", reason, is_damage=False)
            last[key, name] = found.offset
        for offset in offsets:
            if offset not in seen:
                reason = f"{places[offset]!r} should be there, behind what is damaged"
                self._report.skip(path, offset, "truncated", reason)

    def _record(
        self, step: int, index: Index | None, found: Record | Bad, known: set[str]
    ) -> tuple[Key, str]:
        """Bring one value over; give its key and name."""
        if isinstance(found, Bad):
            raise found.error
        event = decode_event(found.payload)
        if len(event.values) != 1 or event.values[0].tensor is None:
            raise FormatError("a record that is no tensor of smdebug")
        value = event.values[0]
        named = value.tag if index is None else index.places.get(found.offset, value.tag)
        if named != value.tag:
            raise FormatError(f"it calls itself {value.tag!r}, so one of the two is damaged")
        if event.step != step:
            raise FormatError(f"it says that it is of step {event.step}, in a file of {step}")
        mode, mode_step = self._mode(value, index)
        name = _checked_name(from_smdebug(value.tag, known))
        key = (step, mode)
        content = _content(value)
        if is_scalar(name) and isinstance(content, np.ndarray) and content.shape == (1,):
            content = content.reshape(())
        self._stamp(key, mode_step, event.wall_time)
        self._target.put(key, name, content)
        self._report.unchecked += not found.is_checked
        return key, name

    def _mode(self, value: SummaryValue, index: Index | None) -> tuple[str | None, int]:
        """Give mode and mode step: as the record says, else the index."""
        number = value.plugins.get("mode", b"").decode("ascii", "replace")
        count = value.plugins.get("mode_step", b"").decode("ascii", "replace")
        if index is not None:
            number, count = number or index.mode, count or str(index.mode_step)
        if number not in _MODES or not (count.isascii() and count.isdigit() and len(count) < 19):
            raise FormatError(f"a record of the mode {number!r} and its step {count!r}")
        return _MODES[number], int(count)

    def _stamp(self, key: Key, mode_step: int, seconds: float) -> None:
        if key in self._stamped:
            return
        is_first = not self._stamped and self._collections is not None
        self._stamped.add(key)
        self._target.stamp(key, mode_step=mode_step, seconds=seconds)
        if is_first:
            self._target.add(key, COLLECTIONS_NAME, json.dumps(self._collections))
            self._collections = None

    def _shapes(self, step: int, index: Index) -> None:
        for tensor, shape in index.shapes.items():
            path = index_path(step, self._name)
            if index.mode not in _MODES or any(not 0 <= n < 2**63 for n in shape):
                self._report.skip(path, None, "malformed", f"{tensor!r}: a shape of {shape}")
                continue
            key = (step, _MODES[index.mode])
            self._stamp(key, max(index.mode_step, 0), 0.0)
            try:
                name = _checked_name(shape_name(tensor))
            except FormatError as error:
                self._report.skip(path, None, error.code, str(error))
                continue
            self._target.put(key, name, np.array(shape, np.int64))


def _checked_name(name: str) -> str:
    try:
        return check_name(name)
    except ArgumentError as error:
        raise FormatError(str(error), code="bad_name") from None


def _content(value: SummaryValue) -> Any:  # noqa: ANN401 - an array, also of strings, or a str
    assert value.tensor is not None
    array, shape = decode_tensor(value.tensor)
    if not isinstance(array, list):
        return array
    try:
        strings = [item.decode() for item in array]
    except UnicodeDecodeError as error:
        raise FormatError(f"a string that is no UTF-8: {error}") from None
    if shape == ():
        return strings[0]
    held = np.empty(len(strings), object)
    held[:] = strings
    return held

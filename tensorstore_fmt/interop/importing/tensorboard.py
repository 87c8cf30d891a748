"""Import of TensorBoard's event files, without TensorBoard or TensorFlow.

====================== ==========================================================================
in the event file      in the run, under the tag
====================== ==========================================================================
scalar                 float32 of shape () (a tensor keeps its own dtype)
tensor                 the tensor
text                   a string, or a row of them
histogram              float64 of shape (buckets, 3): left end, right end, count; of an old one
                       also ``TAG/min``, ``TAG/max``, ``TAG/num``, ``TAG/sum``, ``TAG/sum_squares``
image, audio           the encoded file (PNG, WAV …) as uint8; several at once as ``TAG/0`` …
graphs, profiles …     left out, and said in the report
====================== ==========================================================================

A sub-folder is put before the names: ``run1/loss``. Folders called ``train`` are the mode TRAIN
instead, those called ``validation``, ``val``, ``eval`` or ``test`` the mode EVAL: so the two
curves of a loss have one name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError, FormatError
from tensorstore_fmt.format import layout
from tensorstore_fmt.interop.importing.events import SummaryValue, decode_event
from tensorstore_fmt.interop.importing.records import Record, records
from tensorstore_fmt.interop.importing.report import ImportReport
from tensorstore_fmt.interop.importing.source import files_below, open_source
from tensorstore_fmt.interop.importing.target import Key, Target
from tensorstore_fmt.interop.importing.tensorproto import decode_tensor
from tensorstore_fmt.interop.importing.wire import DOUBLE, fields
from tensorstore_fmt.storage.base import without_credentials
from tensorstore_fmt.storage.foreign import ForeignFolder
from tensorstore_fmt.writing.convert import check_name

__all__ = ["import_tensorboard"]

_FOLDER_MODES: Final = {
    "train": "TRAIN", "validation": "EVAL", "val": "EVAL", "eval": "EVAL", "test": "EVAL",
}  # fmt: skip

Part: TypeAlias = tuple[str, NDArray[Any] | str | float]
"""What to put behind the tag, and a value."""


def import_tensorboard(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    source_options: Mapping[str, object] | None = None,
    storage_options: Mapping[str, object] | None = None,
    attrs: Mapping[str, object] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ImportReport:
    """Copy event files into a new run, one record at a time.

    Steps and wall times stay what they were; what was written again for a step by a later file,
    or later in the same, replaces what was there.

    Parameters
    ----------
    source
        An event file, or a folder that has some at any depth; or its URL.
    run, source_options, storage_options, attrs, progress
        As in `import_smdebug`.

    Returns
    -------
    ImportReport
        Also what was left out, with file, offset and reason.

    Raises
    ------
    ArgumentError
        Code ``unknown_format``: there is no event file.
    RunExistsError
        There is a run already.
    OSError
        A storage failed.
    """
    folder, only = open_source(source, source_options, _is_event_file)
    where = folder.describe(only or "")
    report = ImportReport(
        kind="tensorboard",
        source=where,
        run=without_credentials(os.fspath(run)),
        workers=["worker_0"],
    )
    try:
        found = list(files_below(folder, only, _is_event_file))
        total = sum(len(files) for _, files in found)
        with Target(
            run,
            storage_options=storage_options,
            attrs={**(attrs or {}), "imported": {"kind": "tensorboard", "source": where}},
            num_workers=1,
            report=report,
        ) as target:
            target.begin(0)
            done = 0
            for place, files in found:
                one = _Folder(folder, place, report, target)
                for info in files:
                    path = f"{place}/{info.base}" if place else info.base
                    one.take(path)
                    done += 1
                    if progress is not None:
                        progress(done, total, path)
    finally:
        folder.close()
    return report


def _is_event_file(base: str) -> bool:
    return "tfevents" in base and not base.endswith((".tmp", ".profile-empty"))


def _prefix_and_mode(place: str) -> tuple[str, str | None]:
    above, _, last = place.rpartition("/")
    mode = _FOLDER_MODES.get(last.lower())
    kept = place if mode is None else above
    return (f"{kept}/" if kept else ""), mode


class _Folder:
    """The import of the event files of one folder, in the order of their names."""

    def __init__(
        self, folder: ForeignFolder, place: str, report: ImportReport, target: Target
    ) -> None:
        self._folder = folder
        self._prefix, self._mode = _prefix_and_mode(place)
        self._report = report
        self._target = target
        self._plugins: dict[str, str] = {}  # by tag; only the first value of a tag says it
        self._stamped: Key | None = None

    def take(self, path: str) -> None:
        """Bring one file over."""
        self._stamped = None
        for found in records(self._folder, path, b""):
            try:
                if not isinstance(found, Record):
                    raise found.error
                self._record(path, found)
            except FormatError as error:
                self._report.skip(path, found.offset, error.code, str(error))

    def _record(self, path: str, found: Record) -> None:
        event = decode_event(found.payload)
        if event.other:
            reason = f"a {event.other} has no place in a run"
            self._report.skip(path, found.offset, "no_place", reason, is_damage=False)
        if not event.values:
            return
        if not 0 <= event.step <= layout.MAX_STEP:
            raise FormatError(f"the step {event.step}", code="limit")
        key = (event.step, self._mode)
        for value in event.values:
            parts = self._parts(value)
            if not parts:
                reason = f"{value.tag!r} has nothing that can be stored"
                self._report.skip(path, found.offset, "no_place", reason, is_damage=False)
            for suffix, content in parts:
                name = _checked(f"{self._prefix}{value.tag}{suffix}")
                if key != self._stamped:
                    self._target.stamp(key, mode_step=event.step, seconds=event.wall_time)
                    self._stamped = key
                self._target.put(key, name, content)
                self._report.unchecked += not found.is_checked

    def _parts(self, value: SummaryValue) -> list[Part]:
        if value.plugins:
            self._plugins.setdefault(value.tag, next(iter(value.plugins)))
        if value.simple is not None:
            return [("", np.array(value.simple, np.float32))]
        if value.histogram is not None:
            return _histogram(value.histogram)
        if value.image is not None or value.audio is not None:
            return _encoded(value.image or value.audio)
        if value.tensor is None:
            return []
        content, shape = decode_tensor(value.tensor)
        if isinstance(content, list):
            return _strings(content, shape, self._plugins.get(value.tag, ""))
        return [("", content)]


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ArgumentError as error:
        raise FormatError(str(error), code="bad_name") from None


def _encoded(message: memoryview | None) -> list[Part]:
    """Take the file out of an image or a sound."""
    assert message is not None
    return [
        ("", np.frombuffer(data, np.uint8))
        for number, data in fields(message)
        if number == 4 and not isinstance(data, int)
    ]


def _strings(strings: list[bytes], shape: tuple[int, ...], plugin: str) -> list[Part]:
    is_files = plugin in ("images", "audio")
    if not is_files:
        try:
            texts = [item.decode() for item in strings]
        except UnicodeDecodeError:
            is_files = True
        else:
            if shape == ():
                return [("", texts[0])]
            row = np.empty(len(texts), object)  # tables, too: strings have one axis here
            row[:] = texts
            return [("", row)]
    files = strings
    if plugin == "images":
        files = strings[2:]  # before them, width and height as text
    elif plugin == "audio" and len(shape) == 2:
        files = strings[:: shape[1]]  # beside them, their labels
    suffixes = [""] if len(files) == 1 else [f"/{i}" for i in range(len(files))]
    return [(s, np.frombuffer(f, np.uint8)) for s, f in zip(suffixes, files, strict=True)]


_MOMENTS: Final = {1: "min", 2: "max", 3: "num", 4: "sum", 5: "sum_squares"}


def _histogram(message: memoryview) -> list[Part]:
    moments = dict.fromkeys(_MOMENTS.values(), 0.0)
    packed: dict[int, list[memoryview]] = {6: [], 7: []}
    for number, value in fields(message):
        if isinstance(value, int):
            continue
        if number in _MOMENTS and len(value) == 8:
            (moments[_MOMENTS[number]],) = DOUBLE.unpack(value)
        elif number in packed and len(value) % 8 == 0:
            packed[number].append(value)
    limits, counts = (np.frombuffer(b"".join(parts), "<f8") for parts in packed.values())
    if len(limits) != len(counts):
        raise FormatError(f"a histogram with {len(limits)} limits and {len(counts)} counts")
    table = np.empty((len(counts), 3))
    if len(counts):
        table[0, 0] = min(moments["min"], limits[0])
        table[1:, 0] = limits[:-1]
        table[:, 1] = limits
        table[-1, 1] = min(limits[-1], max(moments["max"], table[-1, 0]))
        table[:, 2] = counts
    return [("", table), *((f"/{name}", float(value)) for name, value in moments.items())]

"""Import of folders of ``.safetensors`` and ``.npz`` files: checkpoints, one or more a step.

The step of a file is in its path: the last number in the name of the file, else in that of the
nearest folder above that has one. ``step_000100.npz``, ``ckpt-100/model.safetensors`` and
``ckpt-100/model-00001-of-00002.safetensors`` are all of step 100 (``-00001-of-00002`` does not
count). A pattern of one's own is a regular expression, searched for in the whole path, whose
group ``step``, or first group, is the number: ``epoch=(?P<step>[0-9]+)``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, FormatError
from tensorstore_fmt.interop.importing import npz_file, safetensors_file
from tensorstore_fmt.interop.importing.report import ImportReport
from tensorstore_fmt.interop.importing.source import files_below, open_source
from tensorstore_fmt.interop.importing.target import Target
from tensorstore_fmt.storage.base import without_credentials
from tensorstore_fmt.storage.foreign import ForeignFolder
from tensorstore_fmt.writing.convert import check_name

__all__ = ["import_npz", "import_safetensors", "step_of"]

Progress: TypeAlias = Callable[[int, int, str], None]

Read: TypeAlias = Callable[
    [ForeignFolder, str, int], Iterator[tuple[str, NDArray[Any] | FormatError]]
]
"""Gives the arrays of a file, by name, or what is wrong with them: (folder, path, nbytes)."""

_PIECE: Final = re.compile(r"-\d+-of-\d+$", re.ASCII)
_NUMBER: Final = re.compile(r"\d+", re.ASCII)
_MAX_DIGITS: Final = 18


def import_safetensors(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    step_pattern: str | None = None,
    mode: str | None = None,
    source_options: Mapping[str, object] | None = None,
    storage_options: Mapping[str, object] | None = None,
    attrs: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Copy all tensors of ``.safetensors`` files into a new run, one tensor at a time.

    Parameters
    ----------
    source
        A file, or a folder that has some at any depth; or its URL.
    step_pattern
        How the path says the step; see the module's docstring.
    mode
        Of all that is imported.
    run, source_options, storage_options, attrs, progress
        As in `import_smdebug`.

    Returns
    -------
    ImportReport
        Also what was left out: files whose path says no step, dtypes that cannot be stored, names
        that another file of the same step had already.

    Raises
    ------
    ArgumentError
        Code ``unknown_format``: there is no such file. Or the pattern cannot be used.
    RunExistsError
        There is a run already.
    OSError
        A storage failed.
    """
    job = _Job("safetensors", safetensors_file.read, source, source_options, step_pattern)
    return job.run(run, mode=mode, storage_options=storage_options, attrs=attrs, progress=progress)


def import_npz(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    step_pattern: str | None = None,
    mode: str | None = None,
    source_options: Mapping[str, object] | None = None,
    storage_options: Mapping[str, object] | None = None,
    attrs: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Copy all arrays of ``.npz`` files into a new run; as `import_safetensors`.

    Nothing in a file is unpickled: arrays of objects are left out.
    """
    job = _Job("npz", npz_file.read, source, source_options, step_pattern)
    return job.run(run, mode=mode, storage_options=storage_options, attrs=attrs, progress=progress)


def step_of(path: str, pattern: re.Pattern[str] | None = None) -> int | None:
    """Give the step that a path says; None if it says none."""
    if pattern is not None:
        match = pattern.search(path)
        if match is None:
            return None
        text = match["step"] if "step" in pattern.groupindex else match[1]
        return int(text) if text and text.isascii() and text.isdigit() else None
    *folders, base = path.split("/")
    stem = _PIECE.sub("", base.rpartition(".")[0])
    for part in [stem, *reversed(folders)]:
        numbers = _NUMBER.findall(part)
        if numbers:
            return int(numbers[-1]) if len(numbers[-1]) <= _MAX_DIGITS else None
    return None


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"step pattern {pattern!r}: {error}") from None
    if compiled.groups == 0:
        raise ArgumentError(
            f"step pattern {pattern!r} has no group that is the number: step_([0-9]+)"
        )
    return compiled


class _Job:
    """One import."""

    def __init__(
        self,
        kind: str,
        read: Read,
        source: str | os.PathLike[str],
        options: Mapping[str, object] | None,
        pattern: str | None,
    ) -> None:
        self._kind = kind
        self._read = read
        self._pattern = _compile(pattern)
        self._folder, self._only = open_source(source, options, self._fits)
        self._where = self._folder.describe(self._only or "")

    def _fits(self, base: str) -> bool:
        return base.endswith(f".{self._kind}")

    def run(
        self,
        run: str | os.PathLike[str],
        *,
        mode: str | None,
        storage_options: Mapping[str, object] | None,
        attrs: Mapping[str, object] | None,
        progress: Progress | None,
    ) -> ImportReport:
        """Bring everything over."""
        report = ImportReport(
            kind=self._kind,
            source=self._where,
            run=without_credentials(os.fspath(run)),
            workers=["worker_0"],
        )
        try:
            files = self._files(report)
            with Target(
                run,
                storage_options=storage_options,
                attrs={**(attrs or {}), "imported": {"kind": self._kind, "source": self._where}},
                num_workers=1,
                report=report,
            ) as target:
                target.begin(0)
                last, names = -1, set[str]()
                for done, (step, path, nbytes) in enumerate(files):
                    names = names if step == last else set()
                    last = step
                    self._file(target, report, (step, mode), (path, nbytes), names)
                    if progress is not None:
                        progress(done + 1, len(files), path)
        finally:
            self._folder.close()
        return report

    def _files(self, report: ImportReport) -> list[tuple[int, str, int]]:
        found: list[tuple[int, str, int]] = []
        for place, files in files_below(self._folder, self._only, self._fits):
            for info in files:
                path = f"{place}/{info.base}" if place else info.base
                step = step_of(path, self._pattern)
                if step is None:
                    reason = "its path says no step; give a pattern"
                    report.skip(path, None, "no_step", reason)
                    continue
                found.append((step, path, info.nbytes))
        return sorted(found)

    def _file(
        self,
        target: Target,
        report: ImportReport,
        key: tuple[int, str | None],
        file: tuple[str, int],
        names: set[str],
    ) -> None:
        path, nbytes = file
        try:
            for name, array in self._read(self._folder, path, nbytes):
                try:
                    if isinstance(array, FormatError):
                        raise array
                    _check(name, array)
                except (FormatError, ArgumentError) as error:
                    report.skip(path, None, error.code, f"{name!r}: {error}")
                    continue
                if name in names:
                    reason = f"{name!r} was in another file of step {key[0]} already"
                    report.skip(path, None, "repeated", reason)
                    continue
                names.add(name)
                target.put(key, name, array)
        except FormatError as error:
            report.skip(path, None, error.code, str(error))


def _check(name: str, array: NDArray[Any]) -> None:
    """Refuse what `log` would refuse, before it is among other values."""
    check_name(name)
    if dtypes.dtype_name(array.dtype) == dtypes.STRING and array.ndim > 1:
        raise ArgumentError("strings have one axis at most in a run")

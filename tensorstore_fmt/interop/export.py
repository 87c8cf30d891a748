"""Export: scalars or tensors of a run into one file whose ending says the format."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from tensorstore_fmt import dtypes
from tensorstore_fmt._version import __version__
from tensorstore_fmt.errors import ArgumentError, StepNotFoundError
from tensorstore_fmt.interop import npfiles, safetensors, tables
from tensorstore_fmt.interop.items import Cast, Item, fit
from tensorstore_fmt.interop.names import expand
from tensorstore_fmt.interop.outfile import check_free, new_file
from tensorstore_fmt.interop.picking import (
    Step,
    Where,
    common_step,
    item_at,
    saved_steps,
    stacked,
)
from tensorstore_fmt.reading.steps import Steps, step_set

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["ENDINGS", "ExportReport", "Progress", "export"]

ENDINGS: Final = (".csv", ".parquet", ".npy", ".npz", ".safetensors")

Progress: TypeAlias = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes
    ----------
    path, nbytes
        The file and its size.
    names
        What is in it.
    steps
        The steps in it, ascending.
    left_out
        Names that would have been meant but are not in it, with the reason.
    """

    path: str
    nbytes: int
    names: list[str]
    steps: list[int]
    left_out: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Give all of it as JSON would say it."""
        return asdict(self)


def export(
    run: Run,
    path: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    step: Step | None = None,
    steps: Steps = None,
    mode: str | None = None,
    worker: int | None = None,
    attempt: int | None = None,
    long: bool = False,
    cast: Cast | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write part of a run into a new local file, piece by piece.

    Parameters
    ----------
    run
        From `open_run`.
    path
        ``.csv`` and ``.parquet`` take scalars; ``.npy`` one name, at one step or stacked over
        several; ``.npz`` and ``.safetensors`` all that was saved at one step.
    names
        Names or patterns; None for all that fit the format.
    step, steps
        One step (``"first"`` and ``"last"`` mean one that all the names have), or as in
        `Tensor.read`.
    mode, worker, attempt
        As in `Tensor.select`.
    long
        CSV with one row per name and step, not one column per name.
    cast
        What to do with dtypes the format lacks: ``"float32"`` where that keeps each value,
        ``"bits"`` for unsigned integers with the same bits. None refuses them.
    force
        Replace a file that exists.
    progress
        Called with bytes done, all bytes, and the name at hand.

    Raises
    ------
    ArgumentError
        The file exists, the format cannot hold what was asked for, or an option does not fit it.
    NameNotFoundError, NotThereError, AmbiguousError
        As `Tensor.read`.
    """
    out = os.fspath(path)
    ending = os.path.splitext(out)[1].lower()
    if ending not in ENDINGS:
        raise ArgumentError(
            f"{out}: the ending says the format, and {ending or 'no ending'} is none of "
            f"{' '.join(ENDINGS)}",
            code="unknown_format",
            file=out,
        )
    check_free(out, replace=force)
    if step is not None and steps is not None:
        raise ArgumentError("give a step or a range of steps, not both")
    if long and ending != ".csv":
        raise ArgumentError(f"long is for .csv; {ending} has one form only")
    job = _Job(
        run,
        out,
        patterns=None if names is None else list(names),
        where={"mode": mode, "worker": worker, "attempt": attempt},
        replace=force,
        progress=progress,
    )
    if ending in (".csv", ".parquet"):
        if cast is not None:
            raise ArgumentError(f"cast is for tensors; {ending} holds scalars")
        return job.scalars(ending, step=step, steps=steps, is_long=long)
    if ending == ".npy":
        return job.one_name(step=step, steps=steps, cast=cast)
    if step is None:
        raise ArgumentError(
            f"{ending} files hold what was saved at one step: say which (--step N, step=N); one "
            "name at several steps fits into .npy"
        )
    return job.one_step(ending, step=step, cast=cast)


class _Job:
    """One export: what its parts share."""

    def __init__(
        self,
        run: Run,
        path: str,
        *,
        patterns: list[str] | None,
        where: Where,
        replace: bool,
        progress: Progress | None,
    ) -> None:
        self.run = run
        self.path = path
        self.names = expand(run, patterns)
        self.is_exact = patterns is not None and self.names == patterns
        self.where = where
        self.replace = replace
        self._progress = progress
        self._done = 0

    def tensor(self, name: str) -> Tensor:
        """Give a tensor, narrowed."""
        return self.run[name].select(**self.where)

    # --- the kinds of files -------------------------------------------------------
    def scalars(
        self,
        ending: str,
        *,
        step: Step | None,
        steps: Steps,
        is_long: bool,
    ) -> ExportReport:
        """Write a table of scalars."""
        kinds = tables.scalar_dtypes(self.run)
        left_out = {name: "no scalar" for name in self.names if name not in kinds}
        if left_out and (self.is_exact or len(left_out) == len(self.names)):
            shown = ", ".join(map(repr, list(left_out)[:5]))
            verb = "is" if len(left_out) == 1 else "are"
            raise ArgumentError(
                f"{ending} files hold scalars, which {shown} {verb} not; "
                "export tensors to .npy, .npz or .safetensors",
                code="no_scalar",
                names=list(left_out),
            )
        names = [name for name in self.names if name in kinds]
        tensors = [self.tensor(name) for name in names]
        if step is not None:
            number = common_step(tensors, step)
            steps = slice(number, number + 1)
        of_scalars = {name: found for name, (found, _) in kinds.items()}
        scalars = tables.collect(self.run, tensors, self.where, step_set(steps), of_scalars)
        if not len(scalars.table):
            for tensor in tensors:
                tensor.read(steps=steps)  # raises if it knows why there is nothing
            raise StepNotFoundError(
                f"none of the {len(names)} names was saved in these steps", names=names
            )
        left_out |= {name: "at some steps it is no scalar" for name in names if not kinds[name][1]}
        with new_file(self.path, replace=self.replace) as file:
            if ending == ".parquet":
                tables.write_parquet(file, scalars)
            else:
                tables.write_csv(file, scalars, None if is_long else names)
        return self._report(names, scalars.steps, left_out)

    def one_name(
        self,
        *,
        step: Step | None,
        steps: Steps,
        cast: Cast | None,
    ) -> ExportReport:
        """Write one name, at one step or stacked."""
        if len(self.names) != 1:
            shown = ", ".join(map(repr, self.names[:5]))
            raise ArgumentError(
                f"a .npy file holds one name, and these are {len(self.names)}: {shown}; "
                "say which (--names NAME), or write .npz"
            )
        tensor = self.tensor(self.names[0])
        if step is not None:
            number = common_step([tensor], step)
            item, used = item_at(tensor, number), [number]
        else:
            used = saved_steps(tensor, steps)
            item = stacked(tensor, used)
        (fitted,) = fit([item], npfiles.DTYPES, cast, file_format=".npy")
        with new_file(self.path, replace=self.replace) as file:
            npfiles.write_npy(file, fitted, self._on_piece([fitted]))
        return self._report([tensor.name], used, {})

    def one_step(self, ending: str, *, step: Step, cast: Cast | None) -> ExportReport:
        """Write all names of a step."""
        tensors = [self.tensor(name) for name in self.names]
        left_out = {t.name: self._why_no_data(t.name) for t in tensors if not t.has_data}
        tensors = [t for t in tensors if t.name not in left_out]
        number = common_step(tensors, step)
        if not self.is_exact:
            here = [t for t in tensors if number in t.steps]
            if here:  # else the read says why there is none
                names = {t.name for t in here}
                left_out |= {t.name: "not saved then" for t in tensors if t.name not in names}
                tensors = here
        items = [item_at(tensor, number) for tensor in tensors]
        if ending == ".safetensors" and not self.is_exact:
            texts = [item.name for item in items if item.dtype == dtypes.STRING]
            left_out |= dict.fromkeys(texts, "a string")
            items = [item for item in items if item.name not in left_out]
        known = npfiles.DTYPES if ending == ".npz" else safetensors.DTYPES
        fitted = fit(items, known, cast, file_format=ending)
        with new_file(self.path, replace=self.replace) as file:
            if ending == ".npz":
                npfiles.write_npz(file, fitted, self._on_piece(fitted))
            else:
                metadata = {
                    "format": "pt",  # some readers of weights insist on it
                    "written_by": f"tensorstore_fmt {__version__}",
                    "run_id": str(self.run.run_id),
                    "step": str(number),
                }
                safetensors.write_safetensors(
                    file, fitted, self._on_piece(fitted), metadata=metadata
                )
        return self._report([item.name for item in fitted], [number], left_out)

    def _why_no_data(self, name: str) -> str:
        if self.run[name].has_data:
            return "not saved in this mode, by this worker or in this attempt"
        return "only statistics were saved"

    def _on_piece(self, items: Sequence[Item]) -> Callable[[int], None]:
        total = sum(item.nbytes for item in items)
        what = items[0].name if len(items) == 1 else f"{len(items)} names"

        def on_piece(nbytes: int) -> None:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, total, what)

        return on_piece

    def _report(self, names: list[str], steps: list[int], left_out: dict[str, str]) -> ExportReport:
        return ExportReport(
            path=self.path,
            nbytes=os.path.getsize(self.path),
            names=names,
            steps=steps,
            left_out=left_out,
        )

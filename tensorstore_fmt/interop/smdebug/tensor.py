"""Tensor: all that a run holds of one name, as smdebug's scripts ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import (
    AmbiguousError,
    ArgumentError,
    NotThereError,
    StepDroppedError,
    StepNotFoundError,
    StepNotYetWrittenError,
)
from tensorstore_fmt.interop.importing.smdebug_names import (
    REDUCTIONS,
    reduction_name,
    shape_name,
)
from tensorstore_fmt.interop.smdebug.configs import reduce
from tensorstore_fmt.interop.smdebug.exceptions import (
    ShapeUnavailableForStep,
    SMDebugValueError,
    StepNotYetAvailable,
    StepUnavailable,
    TensorUnavailableForStep,
)
from tensorstore_fmt.interop.smdebug.from_statistics import from_statistics
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys, StepState, name_of

if TYPE_CHECKING:
    from tensorstore_fmt.interop.smdebug.trials.trial import Trial
    from tensorstore_fmt.reading.tensor import Tensor as RunTensor

__all__ = ["Tensor"]

_SCALARS: Final = "scalar/"

# The torch hook of this library saves reductions beside the tensor, under these names.
_OF_HOOK: Final = {
    ("variance", False): "var", ("mean", True): "absmean", ("max", True): "absmax",
    ("l1", True): "l1", ("l2", True): "l2",
} | {(name, False): name for name in REDUCTIONS if name != "variance"}  # fmt: skip

_NOT_SAVED: Final = (StepNotFoundError, StepNotYetWrittenError, StepDroppedError)


class Tensor:
    """A name of a trial. Made by `Trial.tensor`.

    All steps are global steps, or those of a mode if one is given; workers are names.
    """

    def __init__(self, name: str, trial: Trial) -> None:
        self.name = name
        self.trial = trial

    # --- steps ------------------------------------------------------------------
    def steps(
        self,
        mode: ModeKeys = ModeKeys.GLOBAL,
        show_incomplete_steps: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
    ) -> list[int]:
        """Give the steps at which anything of it was saved: values, reductions or shapes."""
        self.trial.maybe_refresh()
        ledger = self.trial.ledger
        here = self.trial.steps_of(self.name)
        known = ledger.steps if show_incomplete_steps else ledger.complete
        return ledger.in_mode(np.intersect1d(here, known), mode)

    def prev_steps(
        self, step: int, n: int | None = None, mode: ModeKeys = ModeKeys.GLOBAL
    ) -> list[int]:
        """Give the last `n` steps up to this one, itself included, ascending; None: all."""
        before = [each for each in self.steps(mode) if each <= step]
        return before if n is None else before[max(len(before) - n, 0) :]

    def workers(self, step_num: int, mode: ModeKeys = ModeKeys.GLOBAL) -> list[str]:
        """Give the names of the workers that saved it at a step.

        Raises
        ------
        StepNotYetAvailable, TensorUnavailableForStep
            It was not saved then, or not yet.
        """
        step = self._step_with_it(step_num, mode)
        found = {
            worker
            for part in self.trial.parts_of(self.name)
            for worker in part.workers
            if step in part.select(worker=worker).steps
        }
        return [self.trial.worker_name(worker) for worker in sorted(found)]

    # --- values -----------------------------------------------------------------
    def value(
        self,
        step_num: int,
        mode: ModeKeys = ModeKeys.GLOBAL,
        worker: str | None = None,
        *,
        index: Any = (),  # noqa: ANN401 - what NumPy takes
    ) -> NDArray[Any]:
        """Read the value at a step.

        Parameters
        ----------
        worker
            Whose; None: the first that saved it, or the whole of what was saved in parts.
        index
            Only this part of it, as NumPy's basic indexing; only the chunks it touches are read.
            smdebug has no such thing.

        Returns
        -------
        ndarray
            The caller's own. Scalars (``scalar/…``) have the shape (1,), as in smdebug; strings
            are arrays of `numpy.str_`.

        Raises
        ------
        StepUnavailable, StepNotYetAvailable
            There is no such step, or not yet.
        TensorUnavailableForStep
            It was not saved at this step, or only reductions of it.
        InvalidWorker
            There is no such worker.
        FormatError
            It was saved, but cannot be read.
        """
        step = self._global_step(step_num, mode)
        kept = self.trial.kept(self.name, step, mode) if worker is None and index == () else None
        if kept is None:
            number = None if worker is None else self.trial.worker_number(worker)
            try:
                kept = self._read(self.name, step, mode, number, index)
            except NotThereError as error:
                has_reductions = self.trial.has_reductions(self.name, step)
                raise TensorUnavailableForStep(
                    self.name, step_num, mode, has_reductions=has_reductions
                ) from error
        return self._shaped(kept, index)

    def _shaped(self, value: Any, index: Any = ()) -> NDArray[Any]:  # noqa: ANN401 - or a str
        array = np.array(value)
        if array.dtype == object:
            array = array.astype(np.str_)
        return array.reshape(self._shape_of_value(array.shape)) if index == () else array

    def _read(self, name: str, step: int, mode: ModeKeys, worker: int | None, index: Any) -> Any:  # noqa: ANN401 - an array or a str
        """Read from the run; of several workers, the first."""
        tensor = self.trial.run[name]
        of_mode = name_of(mode)
        try:
            return tensor.read(step=step, index=index, mode=of_mode, worker=worker)
        except AmbiguousError as error:
            workers = error.facts.get("workers")
            if not isinstance(workers, list):
                raise
            return tensor.read(step=step, index=index, mode=of_mode, worker=workers[0])
        except ArgumentError as error:
            if error.code != "empty_selection":
                raise
            raise StepNotFoundError(f"{name!r}: {error}", step=step) from None

    def values(
        self, mode: ModeKeys = ModeKeys.GLOBAL, worker: str | None = None
    ) -> dict[int, NDArray[Any]]:
        """Read the values at all steps at which there is one, by step.

        One round of requests if all have the same shape; all of it is in memory then.
        """
        number = None if worker is None else self.trial.worker_number(worker)
        found: dict[int, NDArray[Any]] = {}
        wanted = self.steps(mode)
        tensor = self._raw()
        if tensor is None:
            return {}
        ledger = self.trial.ledger
        of = {step: ledger.global_step(step, mode) for step in wanted}
        saved = set(tensor.select(worker=number).steps.tolist())
        here = {step: at for step, at in of.items() if at in saved and at is not None}
        if not here:
            return {}
        try:
            stacked = tensor.read(steps=sorted(here.values()), mode=name_of(mode), worker=number)
            by_step = dict(zip(sorted(here.values()), stacked, strict=True))
            return {step: self._shaped(by_step[at]) for step, at in here.items()}
        except (ArgumentError, NotThereError):  # several shapes, workers or modes: one by one
            for step, at in here.items():
                try:
                    found[step] = self._shaped(self._read(self.name, at, mode, number, ()))
                except _NOT_SAVED:
                    continue
        return found

    def shape(
        self, step_num: int, mode: ModeKeys = ModeKeys.GLOBAL, worker: str | None = None
    ) -> tuple[int, ...]:
        """Give the shape at a step, also where only the shape was saved; reads no values.

        Raises
        ------
        StepUnavailable, StepNotYetAvailable, TensorUnavailableForStep
            It was not saved then, or not yet.
        ShapeUnavailableForStep
            Neither values nor the shape were.
        """
        step = self._global_step(step_num, mode)
        self._step_with_it(step_num, mode)
        number = None if worker is None else self.trial.worker_number(worker)
        raw = self._raw()
        if raw is not None:
            chosen = raw.select(mode=name_of(mode), worker=number)
            for each in (chosen, *(chosen.select(worker=w) for w in raw.workers)):
                try:
                    return self._shape_of_value(each.shape_at(step))
                except (AmbiguousError, NotThereError):
                    continue
        if shape_name(self.name) in self.trial.run:
            try:
                kept = self._read(shape_name(self.name), step, mode, number, ())
            except NotThereError:
                pass
            else:
                return tuple(int(n) for n in kept)
        raise ShapeUnavailableForStep(self.name, step_num, mode)

    def _shape_of_value(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) if shape == () and self.name.startswith(_SCALARS) else shape

    def _raw(self) -> RunTensor | None:
        run = self.trial.run
        return run[self.name] if self.name in run and run[self.name].has_data else None

    # --- reductions -------------------------------------------------------------
    def reduction_value(
        self,
        step_num: int,
        reduction_name: str,
        mode: ModeKeys = ModeKeys.GLOBAL,
        worker: str | None = None,
        abs: bool = False,  # noqa: A002, FBT001, FBT002 - smdebug's signature
    ) -> Any:  # noqa: ANN401 - a number of any dtype
        """Give a reduction: the one that was saved, else of the value, else of its statistics.

        Parameters
        ----------
        reduction_name
            min, max, mean, std, variance, sum, prod, l1 or l2.
        abs
            Of the absolute values.

        Raises
        ------
        SMDebugValueError
            There is no such reduction.
        StepUnavailable, StepNotYetAvailable, TensorUnavailableForStep
            Neither was saved.
        """
        if reduction_name not in REDUCTIONS:
            raise SMDebugValueError(
                f"no reduction is called {reduction_name!r}; there are {', '.join(REDUCTIONS)}"
            )
        step = self._global_step(step_num, mode)
        number = None if worker is None else self.trial.worker_number(worker)
        stored = self._stored_reduction(step, mode, number, (reduction_name, abs))
        if stored is not None:
            return stored
        try:
            value = self.value(step_num, mode, worker)
        except TensorUnavailableForStep:
            kept = self._from_statistics(step, mode, number, (reduction_name, abs))
            if kept is None:
                raise
            return kept
        return reduce(value, reduction_name, is_abs=abs)

    def _stored_reduction(
        self, step: int, mode: ModeKeys, worker: int | None, wanted: tuple[str, bool]
    ) -> Any:  # noqa: ANN401 - a number, or None
        name, is_abs = wanted
        names = [reduction_name(name, self.name, is_abs=is_abs)]
        if wanted in _OF_HOOK:
            names.append(f"{self.name}/{_OF_HOOK[wanted]}")
        for each in names:
            if each in self.trial.run:
                try:
                    return self._read(each, step, mode, worker, ())
                except NotThereError:
                    continue
        return None

    def _from_statistics(
        self, step: int, mode: ModeKeys, worker: int | None, wanted: tuple[str, bool]
    ) -> float | None:
        """Take a reduction from what the index says of a tensor that was not saved itself."""
        if self.name not in self.trial.run:
            return None
        tensor = self.trial.run[self.name]
        numbers = [worker] if worker is not None else list(tensor.workers)
        for each in numbers:
            try:
                stats = tensor.stats([step], mode=name_of(mode), worker=each)
            except (NotThereError, ArgumentError):
                continue
            return from_statistics(stats, wanted[0], is_abs=wanted[1])
        return None

    def reduction_values(
        self, step_num: int, mode: ModeKeys = ModeKeys.GLOBAL, worker: str | None = None
    ) -> dict[tuple[str, bool], Any]:
        """Give all reductions that were saved at a step, by (name, whether of absolute values).

        Raises
        ------
        StepUnavailable, StepNotYetAvailable, TensorUnavailableForStep
            Nothing of it was saved then, or not yet.
        """
        step = self._global_step(step_num, mode)
        self._step_with_it(step_num, mode)
        number = None if worker is None else self.trial.worker_number(worker)
        found = {}
        for name in REDUCTIONS:
            for is_abs in (False, True):
                value = self._stored_reduction(step, mode, number, (name, is_abs))
                if value is not None:
                    found[name, is_abs] = value
        return found

    # --- the rest ---------------------------------------------------------------
    def _step_with_it(self, step_num: int, mode: ModeKeys) -> int:
        """Give the global step of a step at which anything of the tensor was saved."""
        try:
            step = self._global_step(step_num, mode)
        except StepUnavailable:
            step = -1
        if step < 0 or not self.trial.was_saved(self.name, step):
            raise TensorUnavailableForStep(self.name, step_num, mode)
        return step

    def _global_step(self, step_num: int, mode: ModeKeys) -> int:
        state = self.trial.has_passed_step(step_num, mode)
        if state is StepState.NOT_YET_AVAILABLE:
            raise StepNotYetAvailable(step_num, mode)
        step = self.trial.ledger.global_step(step_num, mode)
        if state is StepState.UNAVAILABLE or step is None:
            raise StepUnavailable(step_num, mode)
        return step

    def __repr__(self) -> str:
        return f"<Tensor {self.name!r} of {self.trial.path}>"

"""The exceptions that smdebug's scripts catch.

Those that say what is not there are also this library's own errors, so ``except
tensorstore_fmt.NotThereError`` catches them too.
"""

from __future__ import annotations

from tensorstore_fmt.errors import (
    ArgumentError,
    NameNotFoundError,
    StateError,
    StepNotFoundError,
    StepNotYetWrittenError,
    TensorStoreError,
)
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys

__all__ = [
    "InvalidCollectionConfiguration",
    "InvalidWorker",
    "MissingCollectionFiles",
    "NoMoreData",
    "RuleEvaluationConditionMet",
    "SMDebugError",
    "SMDebugValueError",
    "ShapeUnavailableForStep",
    "StepNotYetAvailable",
    "StepUnavailable",
    "TensorUnavailable",
    "TensorUnavailableForStep",
]


class SMDebugError(TensorStoreError):
    """Any of these."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(
    cls: type[SMDebugError], args: tuple[object, ...], state: dict[str, object]
) -> SMDebugError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class SMDebugValueError(SMDebugError, ArgumentError):
    """An argument that cannot be used."""


class StepUnavailable(SMDebugError, StepNotFoundError):  # noqa: N818 - smdebug's name
    """A step that was not saved, and will not be."""

    def __init__(self, step: int, mode: ModeKeys) -> None:
        super().__init__(
            f"step {step} of mode {mode.name} is not there: it was not saved", step=step
        )
        self.step = step
        self.mode = mode


class StepNotYetAvailable(SMDebugError, StepNotYetWrittenError):  # noqa: N818 - smdebug's name
    """A step that may still come."""

    def __init__(self, step: int, mode: ModeKeys) -> None:
        super().__init__(f"step {step} of mode {mode.name} is not there yet", step=step)
        self.step = step
        self.mode = mode


class TensorUnavailable(SMDebugError, NameNotFoundError):  # noqa: N818 - smdebug's name
    """No tensor has this name."""

    def __init__(self, tname: str, hint: str = "") -> None:
        super().__init__(f"tensor {tname!r} was not saved{hint}", name=tname)
        self.tname = tname


class TensorUnavailableForStep(SMDebugError, StepNotFoundError):  # noqa: N818 - smdebug's name
    """A tensor that was not saved at this step, or only reductions of it."""

    def __init__(
        self,
        tname: str,
        step: int,
        mode: ModeKeys = ModeKeys.GLOBAL,
        has_reductions: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
    ) -> None:
        hint = "; only reductions of it were: use reduction_value()" if has_reductions else ""
        super().__init__(
            f"tensor {tname!r} was not saved at step {step} of mode {mode.name}{hint}",
            name=tname,
            step=step,
        )
        self.tname = tname
        self.step = step
        self.mode = mode
        self.has_reductions = has_reductions


class ShapeUnavailableForStep(SMDebugError, StepNotFoundError):  # noqa: N818 - smdebug's name
    """A tensor whose shape at this step is not known."""

    def __init__(self, tname: str, step: int, mode: ModeKeys = ModeKeys.GLOBAL) -> None:
        super().__init__(
            f"the shape of tensor {tname!r} at step {step} of mode {mode.name} was not saved",
            name=tname,
            step=step,
        )
        self.tname = tname
        self.step = step
        self.mode = mode


class NoMoreData(SMDebugError, StepNotFoundError):  # noqa: N818 - smdebug's name
    """A step behind the last one of a run that has ended."""

    def __init__(self, step: int, mode: ModeKeys, last_step: int) -> None:
        super().__init__(
            f"step {step} of mode {mode.name} will not come: the run has ended, and its last "
            f"step is {last_step}",
            step=step,
        )
        self.step = step
        self.mode = mode
        self.last_step = last_step


class InvalidWorker(SMDebugError, ArgumentError):  # noqa: N818 - smdebug's name
    """No worker has this name."""

    def __init__(self, worker: object, known: tuple[str, ...] = ()) -> None:
        shown = ", ".join(known[:5]) + (" …" if len(known) > 5 else "")
        super().__init__(f"there is no worker {worker!r}; there are {shown}", worker=str(worker))
        self.worker = worker


class MissingCollectionFiles(SMDebugError, StateError):  # noqa: N818 - smdebug's name
    """Not all workers are there, and those that lack will not come."""


class InvalidCollectionConfiguration(SMDebugError, ArgumentError):  # noqa: N818 - smdebug's name
    """A collection that cannot be what it is said to be."""


class RuleEvaluationConditionMet(SMDebugError):  # noqa: N818 - smdebug's name
    """A rule has fired: what it looks for is there."""

    def __init__(
        self,
        rule_name: str,
        step: int,
        end_of_rule: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
    ) -> None:
        super().__init__(f"rule {rule_name} has fired at step {step}", rule=rule_name, step=step)
        self.rule_name = rule_name
        self.step = step
        self.end_of_rule = end_of_rule

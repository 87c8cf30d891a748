"""The tensors that a rule says it needs at a step, read once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensorstore_fmt.interop.smdebug.analysis.utils import refresh
from tensorstore_fmt.interop.smdebug.exceptions import SMDebugValueError, TensorUnavailableForStep
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys
from tensorstore_fmt.interop.smdebug.tensor import Tensor
from tensorstore_fmt.interop.smdebug.trials.trial import Trial

__all__ = ["RequiredTensors"]


class RequiredTensors:
    """What a rule needs, of its trial and of others. `Rule.set_required_tensors` fills it."""

    def __init__(self, base_trial: Trial, other_trials: Sequence[Trial] | None = None) -> None:
        self._base = base_trial
        self._trials = [base_trial, *(other_trials or ())]
        self._wanted: dict[int, dict[str, list[int]]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget what is needed; what was read stays as long as it may be needed again."""
        self._wanted = {id(trial): {} for trial in self._trials}

    def add(
        self,
        name: str | Sequence[str],
        steps: Iterable[int],
        trial: Trial | None = None,
        should_match_regex: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
    ) -> None:
        """Say that tensors are needed.

        Parameters
        ----------
        name
            Of one tensor; with `should_match_regex`, a pattern, or several.
        steps
            Global steps.
        trial
            Of which trial; None: the rule's own.
        """
        chosen = self._of(trial)
        held = self._base if trial is None else trial
        if should_match_regex:
            names = held.tensor_names(regex=name)
        elif isinstance(name, str):
            names = [name]
        else:
            names = list(name)
        for each in names:
            known = chosen.setdefault(each, [])
            known += [step for step in steps if step not in known]

    def _of(self, trial: Trial | None) -> dict[str, list[int]]:
        held = self._base if trial is None else trial
        found = self._wanted.get(id(held))
        if found is None:
            raise SMDebugValueError(f"{held!r} is not among the trials of this rule")
        return found

    def get_names(self, trial: Trial | None = None) -> list[str]:
        """Give the names that are needed, in the order in which they were added."""
        return list(self._of(trial))

    def get(self, trial: Trial | None = None) -> list[Tensor]:
        """Give the tensors that are needed."""
        held = self._base if trial is None else trial
        return [held.tensor(name) for name in self._of(trial)]

    def get_tensor_steps(self, name: str, trial: Trial | None = None) -> list[int]:
        """Give the steps at which a tensor is needed."""
        return list(self._of(trial).get(name, ()))

    def fetch(self) -> None:
        """Read everything, in one round of requests for each trial; `Tensor.value` finds it.

        Steps behind it are read along, up to 32 MiB.

        Raises
        ------
        TensorUnavailable, TensorUnavailableForStep
            Something is not there.
        StepUnavailable, NoMoreData
            A step of another trial is not there.
        """
        for trial in self._trials:
            wanted = self._wanted[id(trial)]
            steps = sorted({step for needed in wanted.values() for step in needed})
            if trial is self._base:
                trial.wait_for_steps(steps)
            else:  # it may be behind, and does not show the same while it is waited for
                with refresh(trial):
                    trial.wait_for_steps(steps)
            for name, needed in wanted.items():
                trial.tensor(name)  # raises, if there is none
                for step in needed:
                    if not trial.was_saved(name, step):
                        raise TensorUnavailableForStep(name, step, ModeKeys.GLOBAL)
            trial.keep(wanted)

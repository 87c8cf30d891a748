"""Rules: what is to be looked for at every step."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from tensorstore_fmt.interop.smdebug.analysis.utils import no_refresh
from tensorstore_fmt.interop.smdebug.exceptions import RuleEvaluationConditionMet
from tensorstore_fmt.interop.smdebug.rules.req_tensors import RequiredTensors
from tensorstore_fmt.interop.smdebug.trials.trial import Trial

__all__ = ["Rule"]


class Rule(ABC):
    """Base class of rules: a subclass says in `invoke_at_step` whether it fires.

    Parameters
    ----------
    base_trial
        What it looks at.
    action_str
        Actions as smdebug takes them (stop a training job of SageMaker, send an SMS or a mail).
        They are not carried out; a warning says so.
    other_trials
        What it looks at besides.
    actions
        Called as ``action(rule, step)`` when it fires.
    """

    def __init__(
        self,
        base_trial: Trial,
        action_str: str = "",
        other_trials: Sequence[Trial] | None = None,
        *,
        actions: Sequence[Callable[[Rule, int], object]] = (),
    ) -> None:
        self.base_trial = base_trial
        self.other_trials = None if other_trials is None else list(other_trials)
        self.trials = [base_trial, *(other_trials or ())]
        self.rule_name = type(self).__name__
        self.actions = list(actions)
        self.logger = logging.getLogger(__name__)
        self.req_tensors = RequiredTensors(base_trial, other_trials)
        self.report: dict[str, Any] = {
            "RuleTriggered": 0,
            "Violations": 0,
            "Details": {},
            "Datapoints": 0,
        }
        if action_str:
            warnings.warn(
                f"{self.rule_name}: the actions {action_str!r} belong to SageMaker and are not "
                "carried out; give Python functions instead: actions=[…]",
                stacklevel=2,
            )

    def set_required_tensors(self, step: int) -> None:  # noqa: B027 - many rules need none
        """Say with ``self.req_tensors.add(…)`` what is needed at a step; nothing, by default."""

    @abstractmethod
    def invoke_at_step(self, step: int) -> bool:
        """Say whether the rule fires at a step. It sees nothing that comes meanwhile."""

    def invoke(self, step: int) -> None:
        """Evaluate the rule at a global step; wait for it first.

        Raises
        ------
        RuleEvaluationConditionMet
            It has fired. Its actions were carried out.
        StepUnavailable, TensorUnavailable, TensorUnavailableForStep, NoMoreData
            What it needs is not there.
        """
        self.base_trial.wait_for_steps([step])
        self._look_at_others()
        with no_refresh(self.trials):
            self.req_tensors.clear()
            try:
                self.set_required_tensors(step)
                self._fetch()
                self.report["Datapoints"] += 1
                has_fired = bool(self.invoke_at_step(step))
            finally:
                self.req_tensors.clear()
        if has_fired:
            self.report["RuleTriggered"] = 1
            self.report["Violations"] += 1
            for action in self.actions:
                action(self, step)
            raise RuleEvaluationConditionMet(self.rule_name, step)

    def _look_at_others(self) -> None:
        for trial in self.trials[1:]:
            trial.maybe_refresh()

    def _fetch(self) -> None:
        self.req_tensors.fetch()

"""Evaluating a rule at one step after another."""

from __future__ import annotations

import logging

from tensorstore_fmt.interop.smdebug.exceptions import (
    RuleEvaluationConditionMet,
    StepNotYetAvailable,
    StepUnavailable,
    TensorUnavailable,
    TensorUnavailableForStep,
)
from tensorstore_fmt.interop.smdebug.rules.rule import Rule

__all__ = ["invoke_rule"]

_log = logging.getLogger(__name__)


def invoke_rule(
    rule_obj: Rule,
    start_step: int = 0,
    end_step: int | None = None,
    raise_eval_cond: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
) -> None:
    """Evaluate a rule at every step that was saved, as they become complete, until the run ends.

    Parameters
    ----------
    start_step, end_step
        From this global step on, and up to, not including that one.
    raise_eval_cond
        Raise what the rule raises when it fires; else go on behind it.

    Raises
    ------
    NoMoreData
        The run has ended, which is how this ends without `end_step`; scripts expect it.
    RuleEvaluationConditionMet
        It has fired, if asked for.
    """
    trial = rule_obj.base_trial
    step = start_step
    while end_step is None or step < end_step:
        step = trial.next_step(step)
        if end_step is not None and step >= end_step:
            break
        try:
            rule_obj.invoke(step)
        except (
            StepUnavailable,
            StepNotYetAvailable,
            TensorUnavailable,
            TensorUnavailableForStep,
        ) as error:
            _log.debug("%s at step %d: %s", rule_obj.rule_name, step, error)
        except RuleEvaluationConditionMet as error:
            _log.info("%s", error)
            if raise_eval_cond:
                raise
            if error.end_of_rule:
                break
        step += 1

"""Rules: what watches a training through its run, while it runs or afterwards.

::

    from tensorstore_fmt import rules

    report = rules.evaluate("runs/first", [rules.VanishingGradient(), rules.Overfit(ratio=0.2)])
    for finding in report.findings:
        print(finding)

The same from a shell: ``tensorstore-fmt watch runs/first --rule vanishing_gradient``; inside the
training: `run_inside`. Write your own: subclass `Rule`. What was found stays in the run: `alerts`.
"""

from __future__ import annotations

from tensorstore_fmt.rules import builtin
from tensorstore_fmt.rules.actions import Action, AlertLog, Callback, StopTraining, Webhook
from tensorstore_fmt.rules.block import Block, Column
from tensorstore_fmt.rules.builtin import *  # noqa: F403 - their names stand there, once
from tensorstore_fmt.rules.inside import RulesInside, run_inside
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.records import Evaluation, alerts, companions, evaluations
from tensorstore_fmt.rules.registry import find_rule, make_rule, rule_names
from tensorstore_fmt.rules.rule import Finding, Needs, Rule, Series
from tensorstore_fmt.rules.runner import Report, Runner, evaluate
from tensorstore_fmt.rules.stopping import StopWatcher, TrainingStopped, request_stop
from tensorstore_fmt.rules.view import View

__all__ = [
    "Action",
    "AlertLog",
    "Block",
    "Callback",
    "Column",
    "Evaluation",
    "Finding",
    "Needs",
    "Report",
    "Rule",
    "RulesInside",
    "Runner",
    "Series",
    "StopTraining",
    "StopWatcher",
    "TrainingStopped",
    "View",
    "Webhook",
    "alerts",
    "companions",
    "evaluate",
    "evaluations",
    "find_rule",
    "make_rule",
    "parameter",
    "request_stop",
    "rule_names",
    "run_inside",
]
__all__ += builtin.__all__

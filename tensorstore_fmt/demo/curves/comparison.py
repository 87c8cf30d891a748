"""The comparison of the trainings, and what rules found, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence

from tensorstore_fmt import rules
from tensorstore_fmt.demo.curves.observed import Curve, Observed

__all__ = [
    "COLUMNS",
    "EVALUATION_COLUMNS",
    "RULE_COLUMNS",
    "comparison",
    "ending",
    "evaluations_log",
    "lines",
    "rules_log",
]

COLUMNS = (
    "run",
    "learning rate",
    "steps",
    "last loss",
    "best loss (step)",
    "last accuracy",
    "best accuracy (step)",
    "state",
)
"""Of `comparison`."""

RULE_COLUMNS = ("run", "step", "rule", "series", "value", "allowed", "what it found")
"""Of `rules_log`."""


EVALUATION_COLUMNS = ("run", "rule", "modes", "steps looked at", "up to step", "findings")
"""Of `evaluations_log`."""


def comparison(observed: Sequence[Observed]) -> list[tuple[str, ...]]:
    """Give a row for each training; losses of batches, accuracies of the test digits."""
    rows: list[tuple[str, ...]] = []
    for each in observed:
        steps = f"{each.steps} of {each.planned}" if each.planned else str(each.steps)
        rows.append(
            (
                each.name,
                "?" if each.learning_rate is None else f"{each.learning_rate:g}",
                steps,
                _last(each.loss, "{:.3g}"),
                _best(each.loss, "{:.3g}", least=True),
                _last(each.test_accuracy, "{:.1%}"),
                _best(each.test_accuracy, "{:.1%}", least=False),
                ending(each),
            )
        )
    return rows


def _last(curve: Curve, form: str) -> str:
    return form.format(curve.values[-1]) if len(curve) else "-"


def _best(curve: Curve, form: str, *, least: bool) -> str:
    best = curve.best(least=least)
    return "-" if best is None else f"{form.format(best[1])} ({best[0]})"


def ending(observed: Observed) -> str:
    """Say in a few words how a training ended, or what it does."""
    if observed.state == "stopped":
        cause = observed.cause
        if cause is None:
            return f"stopped: {observed.reason}"
        return f"stopped by {cause.rule}, which fired at step {cause.step}"
    return {
        "waiting": "not there yet",
        "training": "is training",
        "finished": "went on to its end",
    }[observed.state]


def rules_log(observed: Sequence[Observed]) -> list[tuple[str, ...]]:
    """Give a row for each thing that rules found, run by run, ascending by step."""
    return [
        (
            each.name,
            str(alert.step),
            alert.rule,
            alert.series,
            f"{alert.value:.3g}",
            f"{alert.threshold:.3g}",
            alert.message,
        )
        for each in observed
        for alert in each.alerts
    ]


def evaluations_log(name: str, evaluations: Sequence[rules.Evaluation]) -> list[tuple[str, ...]]:
    """Give a row for each rule that looked at steps of the run of this name."""
    by_rule: dict[str, list[rules.Evaluation]] = {}
    for each in evaluations:
        by_rule.setdefault(each.rule, []).append(each)
    return [
        (
            name,
            rule,
            ", ".join(dict.fromkeys(each.mode for each in found)),
            str(sum(each.steps for each in found)),
            str(max(each.last for each in found)),
            str(sum(each.findings for each in found)),
        )
        for rule, found in by_rule.items()
    ]


def lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows in aligned columns, the heading first."""
    every = [tuple(columns), *rows]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in every
    ]

"""Records: what rules evaluated and found, kept in companion runs of the run (spec)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tensorstore_fmt.errors import NotARunError
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.rules.places import COMPANIONS, companion_ids, reopen
from tensorstore_fmt.rules.rule import Finding, Rule
from tensorstore_fmt.storage import Storage
from tensorstore_fmt.writing.options import check_options
from tensorstore_fmt.writing.run import RunWriter, open_writer

__all__ = ["Evaluation", "Recorder", "alerts", "alerts_by_companion", "companions", "evaluations"]

_MIB: Final = 1 << 20
_TEXTS: Final = ("rule", "mode", "series", "message")
_FLOATS: Final = ("value", "threshold")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """That a rule looked at some steps.

    Attributes
    ----------
    rule
        Its name.
    mode
        Of the steps; ``"TRAIN+EVAL"`` where it looked at several together.
    first, last
        The first and the last step.
    steps
        How many logged steps there were from the first to the last.
    findings
        How much it found there.
    """

    rule: str
    mode: str
    first: int
    last: int
    steps: int
    findings: int


class Recorder:
    """Writes a companion run: one of one runner, so that nobody waits for anybody.

    Parameters
    ----------
    storage
        Of the run that is watched; it is not changed, and not closed.
    run_id
        Of that run, for the attributes.
    """

    def __init__(self, storage: Storage, run_id: str, rules: Sequence[Rule]) -> None:
        self.id = secrets.token_hex(8)
        settings = [{"rule": rule.name, "parameters": rule.settings} for rule in rules]
        attrs: dict[str, Any] = {"companion_of": run_id, "kind": "rules", "rules": settings}
        self._writer = _writer(reopen(storage, f"{COMPANIONS}/{self.id}", writable=True), attrs)
        # Only now, so that whoever finds the announcement finds the run.
        note = {"companion": self.id, "kind": "rules", "created_us": time.time_ns() // 1000}
        place = reopen(storage, writable=True)
        try:
            place.publish(
                f"{COMPANIONS}/{self.id}.json", [json.dumps(note).encode()], if_absent=True
            )
        finally:
            place.close()
        self._alerts = 0
        self._evaluations = 0

    def evaluated(self, evaluation: Evaluation) -> None:
        """Record that steps were looked at."""
        e = evaluation
        self._writer.log(
            {
                "evaluation/rule": e.rule,
                "evaluation/mode": e.mode,
                "evaluation/steps": np.array([e.first, e.last, e.steps, e.findings], np.int64),
            },
            step=self._evaluations,
        )
        self._evaluations += 1

    def found(self, finding: Finding) -> None:
        """Record a finding."""
        worker = -1 if finding.worker is None else finding.worker
        values: dict[str, object] = {f"alert/{key}": getattr(finding, key) for key in _TEXTS}
        values |= {f"alert/{key}": float(getattr(finding, key)) for key in _FLOATS}
        values |= {"alert/step": np.int64(finding.step), "alert/worker": np.int64(worker)}
        self._writer.log(values, step=self._alerts)
        self._alerts += 1

    def failed(self, rule: str, error: BaseException) -> None:
        """Record that a rule ended with an error."""
        self._writer.log({f"failure/{rule}": f"{type(error).__name__}: {error}"}, step=0)

    def flush(self) -> None:
        """Make it visible now."""
        self._writer.flush()

    def close(self) -> None:
        """End the companion run."""
        self._writer.close()


def _writer(storage: Storage, attrs: dict[str, Any]) -> RunWriter:
    options = check_options(
        is_local=storage.is_local, flush_interval_s=None, flush_bytes=4 * _MIB,
        queue_bytes=16 * _MIB, when_full="block", compression="auto", chunks=None, stats=False,
        on_error="warn", sleep=time.sleep, clock_us=lambda: time.time_ns() // 1000,
        new_id=lambda: secrets.randbits(64) or 1,
    )  # fmt: skip
    return open_writer(storage, options, attrs=attrs)


def companions(run: Run) -> Iterator[Run]:
    """Open the companion runs of a run, one after the other; they are closed again."""
    storage = run._session.storage
    for companion in companion_ids(storage):
        place = reopen(storage, f"{COMPANIONS}/{companion}", writable=False)
        try:
            session = Session(place.url, None, storage=place)
            session.view  # noqa: B018 - looks at the run
        except NotARunError:  # announced, and deleted since
            place.close()
            continue
        with Run(session) as found:
            yield found


def alerts(run: Run) -> list[Finding]:
    """Give what rules found in a run, whoever evaluated them; ascending by step.

    What several runners found alike comes once.

    One LIST, and as many rounds as it takes to open and read each companion run. What they say
    is data: nothing is imported or run.
    """
    found = {
        repr(finding): finding for companion in companions(run) for finding in _alerts(companion)
    }  # by its text, as NaN is not equal to itself
    return sorted(found.values(), key=lambda f: f.step)


def _alerts(companion: Run) -> Iterator[Finding]:
    if "alert/step" not in companion:
        return
    steps = companion["alert/step"].steps
    keys = ("step", "worker", *_TEXTS, *_FLOATS)
    columns = {key: companion[f"alert/{key}"].read(steps=steps).tolist() for key in keys}
    for row in zip(*columns.values(), strict=True):
        fields = dict(zip(keys, row, strict=True))
        fields["worker"] = None if fields["worker"] < 0 else fields["worker"]
        yield Finding(**fields)


def alerts_by_companion(run: Run) -> list[int]:
    """Give how many alerts there are in each companion run, from their catalogs."""
    return [
        companion["alert/step"].step_summary[0] if "alert/step" in companion else 0
        for companion in companions(run)
    ]


def evaluations(run: Run) -> list[Evaluation]:
    """Give which steps of a run rules looked at, in the order in which they did."""
    found: list[Evaluation] = []
    for companion in companions(run):
        if "evaluation/steps" in companion:
            found += _evaluations(companion)
    return found


def _evaluations(companion: Run) -> Iterable[Evaluation]:
    steps = companion["evaluation/steps"].steps
    columns = [companion[f"evaluation/{key}"].read(steps=steps) for key in ("rule", "mode")]
    numbers = companion["evaluation/steps"].read(steps=steps).tolist()
    for rule, mode, (first, last, n, findings) in zip(*columns, numbers, strict=True):
        yield Evaluation(
            rule=str(rule), mode=str(mode), first=first, last=last, steps=n, findings=findings
        )

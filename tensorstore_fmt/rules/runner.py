"""Runners: evaluate rules on a run as its steps become complete, each step once."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, TypeAlias

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.errors import ArgumentError, TensorStoreError
from tensorstore_fmt.reading.run import Run, open_run
from tensorstore_fmt.rules.actions import Action
from tensorstore_fmt.rules.block import Block
from tensorstore_fmt.rules.presence import lost_writers
from tensorstore_fmt.rules.progress import Progress, Stream
from tensorstore_fmt.rules.records import Evaluation, Recorder
from tensorstore_fmt.rules.rule import Finding, Rule

__all__ = ["Ending", "Report", "Runner", "evaluate"]

_logger = logging.getLogger("tensorstore_fmt")
_POLL_S: Final = ((0.1, 1.0), (2.0, 15.0))  # on a disk, elsewhere: at first, when nothing happens
_LEAST_POLL_S: Final = 0.001
_QUIET_S: Final = 1.0  # between looks of rules at the clock

Ending: TypeAlias = Literal["closed", "asked", "timeout", "idle", "writer_died"]
"""Why `Runner.follow` ended."""


@dataclass(slots=True)
class Report:
    """What a runner did.

    Attributes
    ----------
    findings
        In the order in which they were found; at most `most_alerts` a rule.
    found
        How many there were, by rule; also those beyond.
    steps
        How many steps each rule looked at; a step counts once in each mode.
    failures
        Why rules ended, by rule.
    """

    findings: list[Finding] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Exception] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was found, and all rules could be evaluated."""
        return not self.found and not self.failures

    def of(self, rule: str) -> list[Finding]:
        """Give the findings of a rule."""
        return [finding for finding in self.findings if finding.rule == rule]


class Runner(Closeable):
    """Evaluates rules on a run; used by one thread at a time.

    Statistics are read many steps at a time and shared by all rules; each is fetched once. Steps
    that a later attempt of the run repeats come again, and rules begin anew then.

    Parameters
    ----------
    run
        An open run, which is refreshed by this runner alone; it is not closed.
    rules
        Each object serves one runner.
    others
        Runs that rules compare with.
    actions
        What to do with each finding.
    record
        Whether to keep evaluations and findings in a companion run of the run.
    most_alerts
        Findings of one rule that are kept, recorded and acted upon; more are counted.
    on_error
        A rule that raises: ``"warn"`` ends that rule, ``"raise"`` all.
    found
        Called with each finding before the actions.
    """

    def __init__(
        self,
        run: Run,
        rules: Sequence[Rule],
        *,
        others: Sequence[Run] = (),
        actions: Sequence[Action] = (),
        record: bool = True,
        most_alerts: int = 1000,
        on_error: str = "warn",
        found: Callable[[Finding], object] | None = None,
    ) -> None:
        if not rules:
            raise ArgumentError("give at least one rule", argument="rules")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ArgumentError(f"{rule!r:.100} is no Rule object", argument="rules")
        if on_error not in ("warn", "raise"):
            raise ArgumentError(f"on_error is {on_error!r}; it is 'warn' or 'raise'")
        self._run = run
        self._others = tuple(others)
        self._rules = list(rules)
        self._actions = tuple(actions)
        self._progress = Progress(run, others)
        self._records = record
        self._recorder: Recorder | None = None
        self._most_alerts = most_alerts
        self._raises = on_error == "raise"
        self._found = found
        self._quiet_at = 0.0
        self._has_ended = False
        self.report = Report()
        self.action_failures: Counter[str] = Counter()
        """How many actions failed, by kind."""

    @property
    def run(self) -> Run:
        """The run that is watched."""
        return self._run

    # --- work ----------------------------------------------------------------------------

    def evaluate_new(self) -> int:
        """Evaluate all that is complete and was not evaluated; gives how much was found.

        It does not refresh the run: see `follow`.
        """
        before = self.report.found.total()
        if self._progress.rewound():
            self._has_ended = False
            for rule in self._rules:
                rule.rewound()
        streams: dict[Stream, list[Rule]] = {}
        for rule in self._rules:
            for stream in self._progress.streams(rule):
                streams.setdefault(stream, []).append(rule)
        for stream, rules in streams.items():
            for block in self._progress.blocks(stream, rules):
                for rule in rules:
                    self._evaluate(rule, block)
        if self._run.is_closed and not self._has_ended:
            self._has_ended = True
            for rule in list(self._rules):
                self._guarded(rule, rule.invoke_at_end)
        return self.report.found.total() - before

    def follow(
        self,
        *,
        stop: threading.Event | None = None,
        timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
        poll_s: float | None = None,
    ) -> Ending:
        """Refresh and evaluate until the run and the others are closed.

        Parameters
        ----------
        stop
            Ends it, too, after one more look.
        timeout_s
            Ends it after so long.
        idle_timeout_s
            Ends it when nothing came for so long. Without it, it ends when all writers that have
            not closed died: on a disk their locks say so; elsewhere that is never known.
        poll_s
            Seconds between looks; None: 0.1 to 1 on a disk, 2 to 15 elsewhere.

        Returns
        -------
        str
            Why it ended.
        """
        runs = (self._run, *self._others)
        shortest, longest = _POLL_S[not self._run._session.storage.is_local]
        if poll_s is not None:
            shortest = longest = max(poll_s, _LEAST_POLL_S)
        pause = shortest
        stop = stop or threading.Event()
        patience = _Patience(timeout_s, idle_timeout_s)
        while True:
            ending: Ending | None = "asked" if stop.is_set() else patience.ending
            if all(run.is_closed for run in runs):
                ending = "closed"
            self.evaluate_new()
            self.look_at_clock()
            if ending is not None:
                return ending
            if self._recorder is not None:
                self._recorder.flush()
            stop.wait(min(pause, patience.left_s))
            # Asked before the last look, which therefore finds all that a dead writer left.
            has_died = all(run.is_closed or lost_writers(run) for run in runs)
            news = [run.refresh() for run in runs]
            has_news = any(news)
            patience.saw(has_news=has_news, has_died=has_died)
            pause = shortest if has_news else min(1.5 * pause, longest)

    def look_at_clock(self) -> None:
        """Let rules look at the time that has passed, at most once a second."""
        now = time.time()
        if self._run.is_closed or now - self._quiet_at < _QUIET_S:
            return
        self._quiet_at = now
        for rule in list(self._rules):
            self._guarded(rule, partial(rule.invoke_when_quiet, now))

    def close(self) -> None:
        """End the companion run and the actions."""
        for action in self._actions:
            action.close()
        if self._recorder is not None:
            self._recorder.close()

    # --- one rule ------------------------------------------------------------------------------

    def _evaluate(self, rule: Rule, block: Block) -> None:
        if rule not in self._rules:  # it failed before
            return
        before = self.report.found[rule.name]
        self._guarded(rule, partial(rule.invoke_on, block))
        n = sum(len(block.steps(mode)) for mode in block.modes)
        self.report.steps[rule.name] += n
        found = self.report.found[rule.name] - before
        recorder = self._recording()
        if recorder is not None:
            recorder.evaluated(
                Evaluation(
                    rule=rule.name, mode="+".join(block.modes), first=block.low, last=block.high,
                    steps=n, findings=found,
                )
            )  # fmt: skip

    def _guarded(self, rule: Rule, look: Callable[[], Iterable[Finding]]) -> None:
        try:
            self._take(rule, look())
        except Exception as error:
            if self._raises:
                raise
            # A rule is somebody's code; the other rules go on whatever it meets.
            self._rules.remove(rule)
            self.report.failures[rule.name] = error
            _logger.warning(
                "rule %s failed and is not evaluated any more: %s: %s",
                rule.name, type(error).__name__, error,
            )  # fmt: skip
            recorder = self._recording()
            if recorder is not None:
                recorder.failed(rule.name, error)

    def _take(self, rule: Rule, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.report.found[rule.name] += 1
            if self.report.found[rule.name] > self._most_alerts:
                continue
            self.report.findings.append(finding)
            recorder = self._recording()
            if recorder is not None:
                recorder.found(finding)
            if self._found is not None:
                self._found(finding)
            for action in self._actions:
                self._act(action, finding)

    def _act(self, action: Action, finding: Finding) -> None:
        try:
            action.act(finding, self._run)
        except Exception as error:  # noqa: BLE001 - an action never stops the rules
            kind = type(action).__name__
            self.action_failures[kind] += 1
            _logger.warning("the action %s failed: %s: %s", kind, type(error).__name__, error)

    def _recording(self) -> Recorder | None:
        """Begin the companion run when there is something to write."""
        if self._records and self._recorder is None:
            run = self._run
            try:
                self._recorder = Recorder(run._session.storage, run.run_id, self._rules)
            except (OSError, TensorStoreError) as error:
                error.add_note(
                    "what rules find is kept in the run; where nothing can be written use "
                    "record=False (--no-record)"
                )
                raise
        return self._recorder


class _Patience:
    """How long to follow runs: in all, without news, after their writers died."""

    def __init__(self, timeout_s: float | None, idle_timeout_s: float | None) -> None:
        self._end = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._idle_s = idle_timeout_s
        self._idle_end = math.inf
        self._is_over = False
        self.saw(has_news=True, has_died=False)

    def saw(self, *, has_news: bool, has_died: bool) -> None:
        if has_news and self._idle_s is not None:
            self._idle_end = time.monotonic() + self._idle_s
        self._is_over = has_died and not has_news and self._idle_s is None

    @property
    def left_s(self) -> float:
        return max(min(self._end, self._idle_end) - time.monotonic(), 0)

    @property
    def ending(self) -> Ending | None:
        now = time.monotonic()
        if now >= self._end:
            return "timeout"
        if now >= self._idle_end:
            return "idle"
        return "writer_died" if self._is_over else None


def evaluate(
    run: Run | str | os.PathLike[str],
    rules: Sequence[Rule],
    *,
    others: Sequence[Run | str | os.PathLike[str]] = (),
    actions: Sequence[Action] = (),
    record: bool = True,
    on_error: str = "raise",
    storage_options: Mapping[str, object] | None = None,
) -> Report:
    """Evaluate rules on all steps of a run that are complete, and return.

    Parameters
    ----------
    run, others
        Open runs, or where they lie; see `Runner`.
    record
        Whether to keep the outcome in the run; it has to be writable then.
    storage_options
        For runs that are not open.
    """
    opened: list[Run] = []

    def own(each: Run | str | os.PathLike[str]) -> Run:
        if isinstance(each, Run):
            return each
        opened.append(open_run(each, storage_options=storage_options))
        return opened[-1]

    try:
        main, compared = own(run), [own(other) for other in others]
        with Runner(
            main, rules, others=compared, actions=actions, record=record, on_error=on_error
        ) as runner:
            runner.evaluate_new()
            runner.look_at_clock()
            return runner.report
    finally:
        for each in opened:
            each.close()

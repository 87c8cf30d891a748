"""Progress: which steps of a run are new and complete, cut into blocks of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.modes import mode_number
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.steptable import logged_steps
from tensorstore_fmt.rules.block import (
    MOST_VALUE_NBYTES,
    Block,
    Matches,
    of_modes,
    series_of,
    step_nbytes,
)
from tensorstore_fmt.rules.rule import Rule

__all__ = ["Progress", "Stream"]

Stream = tuple[int, ...]
"""Modes whose steps are looked at together, in one ascending order."""

# Each block costs time for every name, so that few large ones are cheaper. Two copies of their
# statistics are in memory while a block is put together.
_MOST_STATS_NBYTES: Final = 128 * 1024 * 1024
_STEP_NBYTES: Final = 256  # that a step takes by itself: in the step table, in a rule's arrays

_I64 = NDArray[np.int64]


class Progress:
    """Up to which step each stream was evaluated."""

    def __init__(self, run: Run, others: Sequence[Run]) -> None:
        self._run = run
        self._others = others
        self._done: dict[Stream, int] = {}
        self._attempt = -1
        self._names: dict[str, Matches] = {}

    def streams(self, rule: Rule) -> list[Stream]:
        """Give the streams that a rule looks at now."""
        needs = rule.needs()
        view = self._run._session.view
        named = {mode_number(each.mode) for each in needs}
        used = view.used_modes
        modes = sorted({m for m in named if m is not None} | set(used if None in named else ()))
        if not needs:
            modes = list(used)
        if rule.joins_modes:
            return [tuple(modes)] if modes else []
        return [(mode,) for mode in modes]

    def rewound(self) -> bool:
        """Say whether a later attempt began since the last time; go back to where it resumes."""
        view = self._run._session.view
        newest = view.attempts[-1] if view.attempts else -1
        before, self._attempt = self._attempt, newest
        if before in (-1, newest):
            return False
        resume = view.resume_step(newest)
        went_back = any(done >= resume for done in self._done.values())
        self._done = {stream: min(done, resume - 1) for stream, done in self._done.items()}
        return went_back

    def blocks(self, stream: Stream, rules: Iterable[Rule]) -> Iterator[Block]:
        """Give what is new in a stream, in blocks; each is done when the next one is asked for."""
        run = self._run
        view = run._session.view
        # What is compared has to be complete in all runs; a closed one is, at every step.
        seen = [view, *(other._session.view for other in self._others)]
        through = min(layout.MAX_STEP, *(each.complete_through(m) for each in seen for m in stream))
        after = self._done.get(stream, -1)
        if through <= after:
            return
        steps = {m: logged_steps(run._session, m, after + 1, through) for m in stream}
        every = np.unique(np.concatenate(list(steps.values())))
        size = self._size(stream, list(rules))
        for begin in range(0, len(every), size):
            part = every[begin : begin + size]
            low, high = int(part[0]), int(part[-1])
            inside = {m: _between(of, low, high) for m, of in steps.items()}
            yield Block(run, inside, low=low, high=high, others=self._others, names=self._names)
            self._done[stream] = high
        self._done[stream] = through

    def _size(self, stream: Stream, rules: Sequence[Rule]) -> int:
        """Give how many steps a block may have, so that what is read of it is bounded."""
        probe = Block(self._run, {}, low=0, high=0, names=self._names)
        view = self._run._session.view
        rows, nbytes = 0, 0
        seen: set[tuple[str, int]] = set()
        for rule in rules:
            for mode in stream:
                for need in of_modes(rule.needs(), mode):
                    for name in probe.names(need.names):
                        if (name, mode) not in seen:
                            seen.add((name, mode))
                            rows += len(series_of(view, name, mode))
                        if need.values:
                            sources = view.sources(name, layout.KIND_DATA)
                            nbytes += max((step_nbytes(source) for source in sources), default=0)
        of_stats = _MOST_STATS_NBYTES // (8 * layout.STATS_LEN * rows + _STEP_NBYTES)
        of_values = MOST_VALUE_NBYTES // nbytes if nbytes else of_stats
        return max(1, min(of_stats, of_values))


def _between(steps: _I64, low: int, high: int) -> _I64:
    begin, end = steps.searchsorted(low, side="left"), steps.searchsorted(high, side="right")
    return steps[begin:end]

"""Trials in which a writer crashes, or meets failures, in a child process that forks give."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from support.crash_running import run_trials
from support.crash_scripts import MODULE, Trial
from support.goals import record

from tensorstore_fmt.testing.crash import CRASHED
from tensorstore_fmt.testing.forks import ChildFailedError, ForkServer

__all__ = ["CrashTrials"]


@dataclass(frozen=True)
class CrashTrials:
    """How trials of one kind of place are carried out.

    Attributes
    ----------
    limit_s
        For one child.
    batch
        So many writers that meet failures run in one child.
    preloaded
        Modules that each child has, beside that of the script.
    """

    limit_s: float
    batch: int
    preloaded: tuple[str, ...] = ()

    @property
    def _modules(self) -> list[str]:
        return [*self.preloaded, MODULE]

    def calls_of(self, trial: Trial) -> list[str]:
        """Give the calls of the script when nothing happens."""
        with ForkServer(self._modules) as server:
            calls: list[str] = server.call(MODULE, "write_with_fault", trial)["calls"]
        return calls

    def carry_out(self, name: str, trials: Sequence[Trial], **facts: object) -> Counter[str]:
        """Carry out all, record them, and give how often what was met."""
        met: Counter[str] = Counter()
        if trials[0].crashes:
            wrong = run_trials(self._modules, trials, lambda server, t: self._crash(server, t, met))
        else:
            batches = [trials[i : i + self.batch] for i in range(0, len(trials), self.batch)]
            wrong = run_trials(self._modules, batches, lambda server, b: self._fail(server, b, met))
        record(name, len(trials), **facts, **met, wrong=len(wrong))
        first = "\n".join(wrong[:3])
        assert not wrong, f"{len(wrong)} of {len(trials)} failed; the first:\n{first}"
        return met

    def _crash(self, server: ForkServer, trial: Trial, met: Counter[str]) -> None:
        """Let a writer crash, and check what it left."""
        child = server.start(MODULE, "write_with_fault", trial, timeout_s=self.limit_s)
        messages = list(child.messages())
        status = child.finish()
        if messages and messages[-1][0] == "error":
            raise ChildFailedError(messages[-1][1])
        has_ended = bool(messages) and messages[-1][0] == "result"
        assert status == (0 if has_ended else CRASHED), status
        acknowledged = max((what for kind, what in messages if kind == "acknowledged"), default=0)
        server.call(MODULE, "check_trial", trial, acknowledged, timeout_s=self.limit_s)
        met["not reached" if has_ended else "crashed"] += 1
        shutil.rmtree(trial.url, ignore_errors=True)  # where it is a folder

    def _fail(self, server: ForkServer, trials: Sequence[Trial], met: Counter[str]) -> None:
        """Let writers meet failures, several in one child; each checks itself."""
        child = server.start(MODULE, "write_all_with_faults", trials, timeout_s=self.limit_s)
        done = 0
        for kind, *what in child.messages():
            if kind in ("wrong", "error"):
                raise ChildFailedError(f"{trials[done]}: {what[-1]}")
            if kind == "done":
                done += 1
                met["failed" if what[1]["reached"] else "not reached"] += 1
                met["dropped"] += what[1]["dropped"]
        assert child.finish() == 0
        assert done == len(trials), f"{trials[done]} ended its process"

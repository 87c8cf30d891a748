"""Runs the trials of a case: every contestant once a round, each trial in a process of its own.

Interleaving is what makes ratios hold on a noisy machine: what disturbs one round disturbs all
contestants of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from suite.case import Case
from suite.contestant import Contestant
from suite.pythons import Pythons
from suite.results import Results

CHILD = Path(__file__).with_name("child.py")


class TrialFailedError(Exception):
    """A child ended badly; the message has the end of what it said."""


@dataclass(frozen=True)
class Trials:
    """Where trials run, and where what they measure goes."""

    pythons: Pythons
    results: Results
    cache: Path
    scratch: Path
    show: bool = True

    def run(self, case: Case, chosen: set[str] | None, repeats: int) -> None:
        """Bring every contestant of a case to so many trials."""
        ready = [c for c in case.contestants() if chosen is None or c.name in chosen]
        ready = [c for c in ready if self._find(c)]
        for round_number in range(repeats):
            for contestant in ready:
                key = f"{case.name}: {contestant.name}"
                if self.results.count(case, contestant.name) > round_number:
                    continue
                if key in self.results.failed:
                    continue
                self._say(f"{key}, {round_number + 1} of {repeats}")
                try:
                    figures = self.one(case, contestant)
                except TrialFailedError as error:
                    self.results.failed[key] = str(error)
                    self._say(f"{key}: failed\n{error}")
                    continue
                self.results.add(case.name, contestant.name, figures)
                value = figures.get(case.unit)
                self._say(f"{key}: {case.unit} {value:.6g}" if value is not None else key)

    def _find(self, contestant: type[Contestant]) -> bool:
        found = self.pythons.find(contestant)
        if isinstance(found, str):
            self.results.absent[contestant.name] = found
            return False
        self.results.versions[contestant.name] = {
            **found[1],
            "settings": contestant.settings,
        }
        return True

    def one(self, case: Case, contestant: type[Contestant]) -> dict[str, float]:
        """Run one trial; prepare before, if that was not done yet."""
        size = "quick" if self.results.quick else "full"
        kept = self.cache / "prepared" / size / case.name / contestant.name
        overrides_prepare = type(case).prepare is not Case.prepare
        if overrides_prepare and not (kept / ".prepared").exists():
            self._child(case, contestant, kept, kept, "--prepare")
        os.sync()  # what others wrote is not still on its way to the disk while this one is timed
        scratch = Path(tempfile.mkdtemp(prefix="trial-", dir=self.scratch))
        try:
            lines = self._child(case, contestant, kept, scratch).splitlines()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return json.loads(lines[-1])

    def _child(
        self, case: Case, contestant: type[Contestant], kept: Path, scratch: Path, *more: str
    ) -> str:
        found = self.pythons.find(contestant)
        assert not isinstance(found, str)
        command = [found[0], str(CHILD), case.name, contestant.name]
        command += ["--kept", str(kept), "--scratch", str(scratch), *more]
        command += ["--quick"] * self.results.quick
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **contestant.variables}
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=case.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TrialFailedError(f"no end after {case.timeout_s:g} s") from error
        if done.returncode:
            raise TrialFailedError(f"exit {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def _say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

"""What was measured: a file of JSON lines that a later run of the suite goes on with."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

from suite.case import Case, Table


def machine() -> dict[str, object]:
    """Say what the figures were measured on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


@dataclass
class Results:
    """All trials of one output folder."""

    folder: Path
    quick: bool
    tables: dict[str, Table] = field(default_factory=dict)
    versions: dict[str, dict] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def _file(self) -> Path:
        return self.folder / "trials.jsonl"

    def load(self) -> None:
        """Take what an earlier run measured, but not trials of the other size."""
        if not self._file.exists():
            return
        for line in self._file.read_text().splitlines():
            trial = json.loads(line)
            if trial["quick"] == self.quick:
                self._take(trial["case"], trial["contestant"], trial["figures"])

    def _take(self, case: str, contestant: str, figures: dict[str, float]) -> None:
        trials = self.tables.setdefault(case, Table()).trials
        trials.setdefault(contestant, []).append(figures)

    def add(self, case: str, contestant: str, figures: dict[str, float]) -> None:
        """Keep one trial."""
        self._take(case, contestant, figures)
        line = {"case": case, "contestant": contestant, "quick": self.quick, "figures": figures}
        line["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line["load"] = os.getloadavg()[0]  # of others too: says how noisy it was
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def count(self, case: Case, contestant: str) -> int:
        """Say how many trials there are."""
        return len(self.tables.get(case.name, Table()).trials.get(contestant, ()))

    def forget(self, names: set[str]) -> None:
        """Drop the trials of some cases, so that they are measured anew."""
        if not self._file.exists():
            return
        lines = self._file.read_text().splitlines()
        kept = [x for x in lines if json.loads(x)["case"] not in names]
        self._file.write_text("".join(f"{x}\n" for x in kept))

    def save(self, cases: list[Case]) -> None:
        """Write ``results.json``: medians, verdicts, versions, and every trial."""
        everything = {
            "machine": machine(),
            "quick": self.quick,
            "versions": self.versions,
            "not_installed": self.absent,
            "failed": self.failed,
            "cases": {
                case.name: {
                    "number": case.number,
                    "question": case.question,
                    "data": case.data,
                    "cache": case.cache,
                    "trials": self.tables[case.name].trials,
                    "verdicts": [vars(v) for v in case.judge(self.tables[case.name])],
                }
                for case in cases
                if case.name in self.tables
            },
        }
        (self.folder / "results.json").write_text(json.dumps(everything, indent=1))

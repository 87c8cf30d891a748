"""Branch coverage of the code that must not be wrong, module by module, with a floor for each.

``python tests/coverage_floor.py`` runs the tests of the format, of commits, merges, `verify`,
`recover` and `compact` under coverage, child processes included, and prints what each module
has. It exits with 1 if one is below the floor, and with the code of pytest if a test fails.
Arguments are handed to pytest, for example ``-x``.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

FLOOR: Final = 95.0

MODULES: Final = (
    "format/*",
    "upkeep/*",
    "writing/carried.py",
    "writing/closing.py",
    "writing/commit.py",
    "writing/committer.py",
    "writing/pending.py",
    "writing/report.py",
    "writing/segments.py",
    "writing/shards.py",
)

# Neither crashes nor soaks: what they find does not show in which branches were taken.
TESTS: Final = (
    "conformance/test_vectors.py",
    "unit/test_codec.py",
    "unit/test_commit_*.py",
    "unit/test_format_*.py",
    "unit/test_kernel.py",
    "unit/test_reading_opening.py",
    "unit/test_statistics.py",
    "unit/test_upkeep_*.py",
    "unit/test_writing_*.py",
    "robustness/test_hostile_cases.py",
    "robustness/test_upkeep_*.py",
)

_ROOT: Final = Path(__file__).resolve().parents[1]


def measure(data: Path, arguments: list[str]) -> tuple[int, Mapping[str, Any]]:
    """Run the tests; give pytest's exit status and coverage's report by file."""
    tests = sorted(str(p) for pattern in TESTS for p in (_ROOT / "tests").glob(pattern))
    environment = os.environ | {"COVERAGE_FILE": str(data / "coverage")}

    def coverage(*words: str) -> int:
        command = [sys.executable, "-m", "coverage", *words]
        return subprocess.run(command, cwd=_ROOT, env=environment, check=False).returncode

    pytest = ["-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *arguments]
    status = coverage("run", *pytest, *tests)
    coverage("combine", "-q")
    coverage("json", "-q", "-o", str(data / "report.json"))
    return status, json.loads((data / "report.json").read_text())["files"]


def below_floor(files: Mapping[str, Any]) -> list[str]:
    """Print every module; give those below the floor."""
    below = []
    for file in sorted(files):
        module = file.rpartition("tensorstore_fmt/")[2]
        summary = files[file]["summary"]
        if not summary["num_branches"] or not any(fnmatch.fnmatch(module, m) for m in MODULES):
            continue
        percent = 100 * summary["covered_branches"] / summary["num_branches"]
        missing = " ".join(f"{a}→{b}" for a, b in files[file]["missing_branches"])
        print(f"{percent:6.1f} %  {summary['num_branches']:4} branches  {module}  {missing}")
        if percent < FLOOR:
            below.append(module)
    return below


def main() -> int:
    """Measure and compare; the exit status says whether all is well."""
    with tempfile.TemporaryDirectory() as folder:
        status, files = measure(Path(folder), sys.argv[1:])
    below = below_floor(files)
    if below:
        print(f"below {FLOOR} % of branches: {', '.join(below)}")
    return status or int(bool(below))


if __name__ == "__main__":
    sys.exit(main())

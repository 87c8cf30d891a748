"""One trial, in a process of its own: ``python benchmarks/suite/child.py CASE CONTESTANT …``.

The last line of the output is the trial's figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

BENCHMARKS = str(Path(__file__).resolve().parents[1])
# The script's own folder would hide modules of the standard library behind the suite's.
sys.path[0] = BENCHMARKS

from suite.case import Place  # noqa: E402 (after the path)
from suite.memory import PeakMemory  # noqa: E402
from suite.registry import find  # noqa: E402


def main() -> None:
    """Prepare if that is missing, run the trial, print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("contestant")
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    given = parser.parse_args()
    case, cls = find(given.case, given.contestant)
    contestant = cls()
    place = Place(given.kept, given.scratch, given.quick)
    if given.prepare:
        place.begin_preparing()
        case.prepare(contestant, place)
        place.end_preparing()
        return
    memory = PeakMemory()
    figures = case.trial(contestant, place)
    figures.setdefault("peak_memory_bytes", memory.over_before())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""The long harnesses run when asked for: ``TSF_COUNT=1 python -m pytest tests/robustness``.

They kill processes, damage files and bound memory for some minutes, and speak of goals that are
not all reached yet; each `goals_*.md` says what is tried, how often, and with which command.
"""

from __future__ import annotations

import os

collect_ignore_glob = (
    []
    if os.environ.get("TSF_COUNT")
    else ["test_crash_*.py", "test_corrupt_*.py", "test_hostile_*.py"]
)

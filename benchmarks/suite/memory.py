"""Peak memory of this process, from a point on."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class PeakMemory:
    """Says how much more than at its making this process held at most.

    Uses the kernel's high-water mark, which a write to ``clear_refs`` sets back. (``ru_maxrss`` is
    of no use here: a child begins with its parent's.)
    """

    def __init__(self) -> None:
        _CLEAR.write_text("5")
        self._before = _status_bytes("VmRSS")

    def over_before(self) -> int:
        """Give the bytes."""
        return max(0, _status_bytes("VmHWM") - self._before)

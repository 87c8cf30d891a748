"""The most memory this process has used."""

from __future__ import annotations

from pathlib import Path


def peak_kib() -> int:
    """Give the peak of resident memory since this program began.

    Not `ru_maxrss`: a program that a process starts inherits that one's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status")

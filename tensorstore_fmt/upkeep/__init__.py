"""Tools for runs that lie there: `verify`, `recover`, `compact`."""

from __future__ import annotations

from tensorstore_fmt.upkeep.report import Problem, VerifyReport
from tensorstore_fmt.upkeep.verifying import verify

__all__ = ["Problem", "VerifyReport", "verify"]

"""Trials, under the names that smdebug's scripts import."""

from __future__ import annotations

from tensorstore_fmt.interop.smdebug.trials.trial import Trial
from tensorstore_fmt.interop.smdebug.trials.utils import create_trial

__all__ = ["Trial", "create_trial"]

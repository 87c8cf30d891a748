"""Tools for runs that lie there: `verify`, `recover`, `compact`.

Reading order: `verifying` (what is checked: `segment_file`, `entry_check`, `shard_file`),
`recovering` (`writer_recovery`, `rebuild`, `sealing`), `compacting`.
"""

from __future__ import annotations

from tensorstore_fmt.upkeep.compacting import compact
from tensorstore_fmt.upkeep.recovering import recover
from tensorstore_fmt.upkeep.report import (
    Action,
    CompactReport,
    Lost,
    Problem,
    RecoverReport,
    VerifyReport,
)
from tensorstore_fmt.upkeep.verifying import verify

__all__ = [
    "Action",
    "CompactReport",
    "Lost",
    "Problem",
    "RecoverReport",
    "VerifyReport",
    "compact",
    "recover",
    "verify",
]

"""Rules, under the names that smdebug's scripts import."""

from __future__ import annotations

from tensorstore_fmt.interop.smdebug.rules.req_tensors import RequiredTensors
from tensorstore_fmt.interop.smdebug.rules.rule import Rule
from tensorstore_fmt.interop.smdebug.rules.rule_invoker import invoke_rule

__all__ = ["RequiredTensors", "Rule", "invoke_rule"]

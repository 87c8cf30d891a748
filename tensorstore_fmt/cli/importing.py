"""The verb ``import``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING

from tensorstore_fmt.cli.failures import EXIT_PROBLEM, UsageError
from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import json_options, storage_options

if TYPE_CHECKING:
    from tensorstore_fmt.interop.importing.report import ImportReport

__all__ = ["import_"]


def import_(arguments: Namespace, output: Output) -> int:
    """Copy what others wrote into a new run; 1 if something was lost."""
    from tensorstore_fmt.interop import importing  # NumPy and Arrow, which help needs not

    more = {"step_pattern": arguments.step_pattern, "mode": arguments.mode}
    more = {name: value for name, value in more.items() if value is not None}
    if more and arguments.kind not in ("safetensors", "npz"):
        option = next(iter(more)).replace("_", "-")
        raise UsageError(f"--{option} is for safetensors and npz, not for {arguments.kind}")
    work: Callable[..., ImportReport] = getattr(importing, f"import_{arguments.kind}")
    report = work(
        arguments.source,
        arguments.url,
        source_options=json_options(arguments.source_options, "--source-options"),
        storage_options=storage_options(arguments),
        progress=output.progress,
        **more,
    )
    output.end_progress()
    if output.is_json:
        output.json(report.as_dict())
    else:
        for line in str(report).splitlines():
            output.line(line)
    return 0 if report.ok else EXIT_PROBLEM

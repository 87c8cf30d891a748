"""The verbs ``verify``, ``recover`` and ``compact``."""

from __future__ import annotations

from argparse import Namespace
from typing import Protocol

from tensorstore_fmt.cli.failures import EXIT_PROBLEM
from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import explaining, storage_options

__all__ = ["compact", "recover", "verify"]


class _Report(Protocol):
    @property
    def ok(self) -> bool: ...

    def as_dict(self) -> dict[str, object]: ...


def verify(arguments: Namespace, output: Output) -> int:
    """Check every byte of a run; 1 if there is damage."""
    import tensorstore_fmt as tsf

    options = storage_options(arguments)
    with explaining(arguments.url, options):
        report = tsf.verify(arguments.url, storage_options=options, progress=output.progress)
    return _say(report, output)


def recover(arguments: Namespace, output: Output) -> int:
    """Save what a crash left behind."""
    import tensorstore_fmt as tsf

    options = storage_options(arguments)
    with explaining(arguments.url, options):
        report = tsf.recover(
            arguments.url,
            storage_options=options,
            dry_run=arguments.dry_run,
            force=arguments.force,
            progress=output.progress,
        )
    return _say(report, output)


def compact(arguments: Namespace, output: Output) -> int:
    """Merge the index of a closed run."""
    import tensorstore_fmt as tsf

    options = storage_options(arguments)
    with explaining(arguments.url, options):
        report = tsf.compact(arguments.url, storage_options=options, progress=output.progress)
    return _say(report, output)


def _say(report: _Report, output: Output) -> int:
    output.end_progress()
    if output.is_json:
        output.json(report.as_dict())
    else:
        for line in str(report).splitlines():
            output.line(line)
    return 0 if report.ok else EXIT_PROBLEM

"""The verb ``export``."""

from __future__ import annotations

from argparse import Namespace

from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import one_step, open_run, selection, step_range
from tensorstore_fmt.cli.text import bytes_text, steps_text

__all__ = ["export"]


def export(arguments: Namespace, output: Output) -> int:
    """Write scalars or tensors to a local file."""
    from tensorstore_fmt.interop.export import export as write

    step = one_step(arguments)
    steps = step_range(arguments)
    with open_run(arguments, output) as run:
        report = write(
            run,
            arguments.out,
            names=arguments.names,
            step=step,
            steps=steps,
            long=arguments.is_long,
            cast=arguments.cast,
            force=arguments.force,
            progress=output.progress,
            **selection(arguments),
        )
    output.end_progress()
    if output.is_json:
        output.json(report.as_dict())
        return 0
    count = f"{len(report.names):,} name{'s' if len(report.names) != 1 else ''}"
    size = bytes_text(report.nbytes)
    output.line(f"{report.path}: {count}, steps {steps_text(report.steps)}, {size}")
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        output.note(f"left out ({reason}): {shown}")
    return 0

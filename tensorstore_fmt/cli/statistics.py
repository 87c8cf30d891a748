"""The verb ``stat``."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import one_step, open_run, selection, step_range
from tensorstore_fmt.cli.text import number_text
from tensorstore_fmt.errors import AmbiguousError

if TYPE_CHECKING:
    from tensorstore_fmt.interop.picking import Step
    from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["stat"]

_COLUMNS = ("count", "nan", "posinf", "neginf", "zero", "min", "max", "mean", "std", "l2")
_RARE = ("nan", "posinf", "neginf")  # shown only where there are any


def stat(arguments: Namespace, output: Output) -> int:
    """Show statistics per step; reads no tensor."""
    from tensorstore_fmt.interop.names import expand
    from tensorstore_fmt.interop.picking import narrowed

    found = []
    step, steps = one_step(arguments), step_range(arguments)
    with open_run(arguments, output) as run:
        for name in expand(run, arguments.names):
            tensor = narrowed(run, name, selection(arguments))
            try:
                found.append({"name": name, **_columns(tensor, step, steps)})
            except AmbiguousError:  # then each for itself
                found += [
                    {"name": name, **where, **_columns(tensor.select(**where), step, steps)}
                    for where in _sources(tensor)
                ]
    if output.is_json:
        output.json({"run": arguments.url, "statistics": found})
        return 0
    for number, columns in enumerate(found):
        title = " ".join(
            str(columns[key]) if key != "worker" else f"worker {columns[key]}"
            for key in ("name", "mode", "worker")
            if key in columns
        )
        if len(found) > 1:
            output.line() if number else None
            output.line(title)
        _show(title, columns, output)
    return 0


def _sources(tensor: Tensor) -> list[dict[str, Any]]:
    """Give the modes, and where they are several the workers, that saved a tensor."""
    if len(tensor.workers) == 1:
        return [{"mode": mode} for mode in tensor.modes]
    return [
        {"mode": mode, "worker": worker}
        for mode in tensor.modes
        for worker in tensor.select(mode=mode).workers
    ]


def _columns(tensor: Tensor, step: Step | None, steps: slice | None) -> dict[str, list[float]]:
    stats = tensor.stats([step] if isinstance(step, int) else steps)
    part = {"first": slice(1), "last": slice(-1, None)}.get(str(step), slice(None))
    return {key: stats[key][part].tolist() for key in stats}


def _show(title: str, columns: dict[str, Any], output: Output) -> None:
    if not columns["step"]:
        output.note(f"{title}: no step has statistics here; cat shows values")
        return
    shown = ["step", *(c for c in _COLUMNS if c not in _RARE or any(columns[c]))]
    rows = [
        [number_text(value) for value in row]
        for row in zip(*(columns[c] for c in shown), strict=True)
    ]
    output.table(shown, rows)

"""The verb ``stat``."""

from __future__ import annotations

from argparse import Namespace

from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import one_step, open_run, selection, step_range
from tensorstore_fmt.cli.text import number_text

__all__ = ["stat"]

_COLUMNS = ("count", "nan", "posinf", "neginf", "zero", "min", "max", "mean", "std", "l2")
_RARE = ("nan", "posinf", "neginf")  # shown only where there are any


def stat(arguments: Namespace, output: Output) -> int:
    """Show statistics per step; reads no tensor."""
    from tensorstore_fmt.interop.names import expand

    where = selection(arguments)
    asked = step_range(arguments)
    found = []
    with open_run(arguments, output) as run:
        for name in expand(run, arguments.names):
            tensor = run[name].select(**where)
            if arguments.step is None:
                stats = tensor.stats(asked)
            else:
                stats = tensor.stats([one_step(arguments, tensor)])
            found.append((name, {key: stats[key].tolist() for key in stats}))
    if output.is_json:
        output.json({"run": arguments.url, "statistics": [{"name": n, **s} for n, s in found]})
        return 0
    for number, (name, columns) in enumerate(found):
        if number:
            output.line()
        if len(found) > 1:
            output.line(name)
        _show(name, columns, output)
    return 0


def _show(name: str, columns: dict[str, list[float]], output: Output) -> None:
    if not columns["step"]:
        output.note(f"{name}: no step has statistics; see the values with cat")
        return
    shown = ["step", *(c for c in _COLUMNS if c not in _RARE or any(columns[c]))]
    rows = [
        [number_text(value) for value in row]
        for row in zip(*(columns[c] for c in shown), strict=True)
    ]
    output.table(shown, rows)

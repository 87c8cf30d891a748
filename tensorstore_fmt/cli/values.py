"""The verbs ``cat`` and ``slice``: values, read and shown."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from tensorstore_fmt.cli.expressions import parse_index
from tensorstore_fmt.cli.failures import UsageError
from tensorstore_fmt.cli.output import Output, json_value
from tensorstore_fmt.cli.session import one_step, open_run, selection, step_range
from tensorstore_fmt.cli.text import escape, shape_text
from tensorstore_fmt.errors import StepNotFoundError

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["cat", "slice"]


def cat(arguments: Namespace, output: Output) -> int:
    """Print values: scalars one line per step, tensors summarised."""
    from tensorstore_fmt.interop.tables import scalar_dtypes

    asked = step_range(arguments)
    with open_run(arguments, output) as run:
        tensor = run[arguments.name].select(**selection(arguments))
        _, is_scalar = scalar_dtypes(run).get(tensor.name, (set(), False))
        if is_scalar:
            _cat_scalar(run, tensor, asked, arguments, output)
        else:
            _cat_tensor(tensor, asked, arguments, output)
    return 0


def _cat_scalar(run: Run, tensor: Tensor, asked: Any, arguments: Namespace, output: Output) -> None:
    from tensorstore_fmt.interop.tables import collect
    from tensorstore_fmt.reading.steps import step_set

    if arguments.step is not None:
        step = one_step(arguments, tensor)
        asked = [step]
    scalars = collect(run, [tensor], selection(arguments), step_set(asked))
    table = scalars.table
    if not len(table):
        # raises if it knows why there is nothing
        tensor.read(step=asked[0]) if arguments.step is not None else tensor.read(steps=asked)
        raise StepNotFoundError(
            f"{tensor.name!r}: no step was saved in this range", name=tensor.name
        )
    columns = {c: table[c].to_pylist() for c in ("step", "mode", "worker")}
    columns["value"] = scalars.values().to_pylist()
    if output.is_json:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        output.json({"run": run.describe(), "name": tensor.name, "values": rows})
        return
    if set(columns["mode"]) == {"NONE"}:
        del columns["mode"]
    if set(columns["worker"]) == {0}:
        del columns["worker"]
    cells = [[str(cell) for cell in row] for row in zip(*columns.values(), strict=True)]
    output.table(list(columns), cells, left=("mode", "value"))


def _cat_tensor(tensor: Tensor, asked: Any, arguments: Namespace, output: Output) -> None:
    if arguments.steps is not None:
        from tensorstore_fmt.reading.steps import step_set

        saved = tensor.steps
        steps = saved[step_set(asked).of_saved(saved)].tolist()
        if not steps:
            tensor.read(steps=asked)  # raises if it knows why
            raise StepNotFoundError(
                f"{tensor.name!r}: no step was saved in this range", name=tensor.name
            )
    else:
        if arguments.step is None:
            count = len(tensor.steps)
            arguments.step = "last"
            if count > 1:
                output.note(f"the last of {count} saved steps; others with --step N or --steps A:B")
        steps = [one_step(arguments, tensor)]
    if output.is_json:
        values = [
            {"step": step, "shape": array.shape, "values": json_value(array)}
            for step, array in ((step, _array(tensor, step)) for step in steps)
        ]
        output.json({"name": tensor.name, "dtype": tensor.dtype_name, "values": values})
        return
    for step in steps:
        _show(f"step {step}", _array(tensor, step), output)


def _array(tensor: Tensor, step: int) -> Any:
    import numpy as np

    value = tensor.read(step=step)
    return np.asarray(value, object) if isinstance(value, str) else value


def _show(what: str, array: Any, output: Output) -> None:
    from tensorstore_fmt import dtypes

    is_text = array.dtype == object
    kind = dtypes.STRING if is_text else dtypes.dtype_name(array.dtype)
    output.line(f"{what}, {kind}, {shape_text(array.shape)}")
    for line in _array_text(array, output).splitlines():
        output.line(line)


def _array_text(array: Any, output: Output) -> str:
    import numpy as np

    if array.dtype == object:
        array = np.vectorize(escape, otypes=[object])(array) if array.size else array
    width = output.width or 100
    with np.printoptions(linewidth=width, threshold=1000, edgeitems=3):
        return str(array[()]) if array.ndim == 0 else np.array2string(array)


def slice(arguments: Namespace, output: Output) -> int:  # noqa: A001 - the verb's name
    """Read part of a tensor; print it or save it."""
    index = parse_index(arguments.index)
    asked = step_range(arguments)
    if arguments.out is None and (arguments.force or arguments.cast):
        raise UsageError("--force and --cast are for --out FILE.npy")
    with open_run(arguments, output) as run:
        tensor = run[arguments.name].select(**selection(arguments))
        if arguments.steps is None:
            step = one_step(arguments, tensor)
            array = tensor.read(step=step, index=index)
            steps = [step]
        else:
            saved = tensor.steps
            from tensorstore_fmt.reading.steps import step_set

            steps = saved[step_set(asked).of_saved(saved)].tolist()
            array = tensor.read(steps=asked, index=index)
    import numpy as np

    array = np.asarray(array, object) if isinstance(array, str) else np.asarray(array)
    if arguments.out is not None:
        return _save(tensor.name, array, arguments, output)
    if output.is_json:
        output.json(
            {
                "run": run.describe(),
                "name": tensor.name,
                "steps": steps,
                "index": arguments.index,
                "dtype": tensor.dtype_name,
                "shape": array.shape,
                "values": array,
            }
        )
        return 0
    stacked = f"{len(steps)} steps" if arguments.steps is not None else f"step {steps[0]}"
    _show(stacked, array, output)
    return 0


def _save(name: str, array: Any, arguments: Namespace, output: Output) -> int:
    from tensorstore_fmt import dtypes
    from tensorstore_fmt.interop import npfiles
    from tensorstore_fmt.interop.items import Item, fit
    from tensorstore_fmt.interop.outfile import new_file

    if not arguments.out.endswith(".npy"):
        raise UsageError(f"--out {arguments.out}: the name of a .npy file is needed")
    kind = dtypes.STRING if array.dtype == object else dtypes.dtype_name(array.dtype)
    item = Item(name=name, dtype=kind, shape=array.shape, pieces=lambda: [lambda: array])
    (fitted,) = fit([item], npfiles.DTYPES, arguments.cast, file_format=".npy")
    with new_file(arguments.out, replace=arguments.force) as file:
        npfiles.write_npy(file, fitted, lambda _: None)
    if output.is_json:
        output.json(
            {"path": arguments.out, "name": name, "dtype": fitted.dtype, "shape": array.shape}
        )
    else:
        output.line(f"{arguments.out}: {fitted.dtype}, {shape_text(array.shape)}")
    return 0

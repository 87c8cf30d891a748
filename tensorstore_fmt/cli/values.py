"""The verbs ``cat`` and ``slice``: values, read and shown."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from tensorstore_fmt.cli.expressions import parse_index
from tensorstore_fmt.cli.failures import UsageError
from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import one_step, open_run, selection, step_range
from tensorstore_fmt.cli.text import escape, shape_text
from tensorstore_fmt.errors import StepNotFoundError

if TYPE_CHECKING:
    from tensorstore_fmt.interop.items import Array
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["cat", "slice_"]

_FULL = 500  # arrays of up to so many elements are printed in full


def cat(arguments: Namespace, output: Output) -> int:
    """Print values: scalars one line per step, tensors summarised."""
    from tensorstore_fmt.interop.picking import narrowed
    from tensorstore_fmt.interop.tables import scalar_dtypes

    with open_run(arguments, output) as run:
        tensor = narrowed(run, arguments.name, selection(arguments))
        if not tensor.has_data:
            raise StepNotFoundError(
                f"{tensor.name!r}: no values were saved, only statistics; see them with stat",
                name=tensor.name,
            )
        kinds, is_scalar = scalar_dtypes(run).get(tensor.name, (set(), False))
        if is_scalar:
            _cat_scalar(run, tensor, kinds, arguments, output)
        else:
            _cat_tensor(run, tensor, arguments, output)
    return 0


def _cat_scalar(
    run: Run, tensor: Tensor, kinds: set[str], arguments: Namespace, output: Output
) -> None:
    from tensorstore_fmt.interop.picking import common_step, saved_steps
    from tensorstore_fmt.interop.tables import collect
    from tensorstore_fmt.reading.steps import step_set

    step, steps = one_step(arguments), step_range(arguments)
    if step is not None:
        number = common_step([tensor], step)
        steps = slice(number, number + 1)
    scalars = collect(run, [tensor], selection(arguments), step_set(steps), {tensor.name: kinds})
    table = scalars.table
    if not len(table):
        tensor.read(step=steps.start) if step is not None and steps else None  # says why not
        saved_steps(tensor, steps)
    columns = {c: table[c].to_pylist() for c in ("step", "mode", "worker")}
    columns["value"] = scalars.values().to_pylist()
    if all(kind in ("int64", "uint64") for kind in kinds):  # the largest come as digits
        columns["value"] = [int(value) for value in columns["value"]]
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


def _cat_tensor(run: Run, tensor: Tensor, arguments: Namespace, output: Output) -> None:
    from tensorstore_fmt.interop.picking import common_step, saved_steps

    if arguments.steps is not None:
        steps = saved_steps(tensor, step_range(arguments))
    else:
        step = one_step(arguments)
        count = len(tensor.steps) if step is None else 1
        if count > 1:
            output.note(f"the last of {count} saved steps; others with --step N or --steps A:B")
        steps = [common_step([tensor], "last" if step is None else step)]
    arrays = ((step, _array(tensor.read(step=step))) for step in steps)
    if output.is_json:
        values = [{"step": s, "shape": array.shape, "values": array} for s, array in arrays]
        output.json(
            {
                "run": run.describe(),
                "name": tensor.name,
                "dtype": tensor.dtype_name,
                "values": values,
            }
        )
        return
    for step, array in arrays:
        _show(f"step {step}", array, output)


def slice_(arguments: Namespace, output: Output) -> int:
    """Read part of a tensor; print it or save it."""
    index = parse_index(arguments.index or "...")
    if arguments.out is None and (arguments.force or arguments.cast):
        raise UsageError("--force and --cast are for --out FILE.npy")
    if arguments.out is not None and not arguments.out.endswith(".npy"):
        raise UsageError(f"--out {arguments.out}: the name of a .npy file is needed")
    with open_run(arguments, output) as run:
        from tensorstore_fmt.interop.picking import common_step, narrowed, saved_steps

        tensor = narrowed(run, arguments.name, selection(arguments))
        if arguments.steps is not None:
            steps = saved_steps(tensor, step_range(arguments))
            array = _array(tensor.read(steps=steps, index=index))
            what = f"{len(steps)} step{'s' if len(steps) > 1 else ''} stacked"
        else:
            step = one_step(arguments)
            assert step is not None  # one of both is required
            steps = [common_step([tensor], step)]
            array = _array(tensor.read(step=steps[0], index=index))
            what = f"step {steps[0]}"
        where = run.describe()
    if arguments.out is not None:
        return _save(tensor.name, array, arguments, output)
    if output.is_json:
        output.json(
            {
                "run": where,
                "name": tensor.name,
                "steps": steps,
                "index": arguments.index or "...",
                "dtype": _dtype_name(array),
                "shape": array.shape,
                "values": array,
            }
        )
    else:
        _show(what, array, output)
    return 0


def _save(name: str, array: Array, arguments: Namespace, output: Output) -> int:
    from tensorstore_fmt.interop import npfiles
    from tensorstore_fmt.interop.items import Item, fit
    from tensorstore_fmt.interop.outfile import new_file

    item = Item(
        name=name,
        dtype=_dtype_name(array),
        shape=array.shape,
        pieces=lambda: [lambda: array],
    )
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


# --- arrays ----------------------------------------------------------------------------
def _array(value: object) -> Array:
    """Give what was read as an array; one string of rank 0 comes as a `str`."""
    import numpy as np

    return np.asarray(value, object if isinstance(value, str) else None)


def _dtype_name(array: Array) -> str:
    from tensorstore_fmt import dtypes

    return dtypes.STRING if array.dtype == object else dtypes.dtype_name(array.dtype)


def _show(what: str, array: Array, output: Output) -> None:
    output.line(f"{what}, {_dtype_name(array)}, {shape_text(array.shape)}")
    for line in _array_text(array, output).splitlines():
        output.line(line)


def _array_text(array: Array, output: Output) -> str:
    import numpy as np

    if array.dtype == object and array.size:
        array = np.vectorize(escape, otypes=[object])(array)
    edges = {1: 3, 2: 3, 3: 2}.get(array.ndim, 1)
    with np.printoptions(linewidth=output.width or 100, threshold=_FULL, edgeitems=edges):
        return str(array[()]) if array.ndim == 0 else np.array2string(array)

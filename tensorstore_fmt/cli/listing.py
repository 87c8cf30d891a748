"""The verb ``ls``: the names in a run, or the runs in a folder."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from tensorstore_fmt.cli.failures import describe
from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.session import open_run, open_url, storage_options
from tensorstore_fmt.cli.text import bytes_text, shape_text, steps_text, time_text
from tensorstore_fmt.errors import NotARunError, TensorStoreError
from tensorstore_fmt.storage.folders import join

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run

__all__ = ["ls"]

_HEADING = ("name", "kind", "dtype", "shape", "steps", "saved", "raw", "stored")
_LEFT = ("name", "run", "kind", "dtype", "shape", "steps", "created", "state")


def ls(arguments: Namespace, output: Output) -> int:
    """List names, or runs."""
    try:
        run = open_run(arguments, output)
    except NotARunError as error:
        runs = error.facts.get("runs")
        if not isinstance(runs, list) or arguments.pattern or arguments.shows_steps:
            raise
        return _list_runs(arguments, runs, output)
    with run:
        if arguments.shows_steps and arguments.pattern is None:
            return _list_steps(run, arguments, output)
        return _list_names(run, arguments, output)


def _list_names(run: Run, arguments: Namespace, output: Output) -> int:
    from tensorstore_fmt.interop.names import expand

    names = expand(run, None if arguments.pattern is None else [arguments.pattern])
    wants_rows = output.is_json or arguments.is_long
    rows = _rows(run, names) if wants_rows else []
    if arguments.shows_steps:
        steps = {name: run[name].steps.tolist() for name in names}
        for row in rows:
            row["steps"] = steps[row["name"]]
    if output.is_json:
        output.json({"run": run.describe(), "names": rows})
    elif not names:
        output.note("no names yet: nothing was flushed, or nothing logged")
    elif arguments.is_long:
        output.table(_HEADING, [_cells(row) for row in rows], left=_LEFT)
    else:
        for name in names:
            output.line(f"{name}  {steps_text(steps[name])}" if arguments.shows_steps else name)
    return 0


def _rows(run: Run, names: list[str]) -> list[dict[str, Any]]:
    """Give a row per name, from the catalogs alone."""
    rows: dict[str, dict[str, Any]] = {}
    wanted = set(names)
    for each in run.table().to_pylist():
        name = each["name"]
        if name not in wanted:
            continue
        row = rows.get(name)
        is_data = each["kind"] == "data"
        if row is None or (is_data and row["kind"] == "statistics"):
            row = rows[name] = {
                "name": name,
                "kind": "statistics",
                "dtype": each["dtype"],
                "shape": each["shape"],
                "modes": [],
                "workers": [],
                "first_step": each["first_step"],
                "last_step": each["last_step"],
                "saved": 0,
                "raw_nbytes": 0,
                "stored_nbytes": 0,
            }
            if is_data:
                row["kind"] = _kind(each)
        _add(row, each, is_data=is_data)
    return [rows[name] for name in names if name in rows]


def _kind(each: dict[str, Any]) -> str:
    if each["dtype"] == "string":
        return "string" if each["shape"] == [] else "strings"
    return "scalar" if each["shape"] == [] else "tensor"


def _add(row: dict[str, Any], each: dict[str, Any], *, is_data: bool) -> None:
    """Add a series to the row of its name; statistics count only where there is no data."""
    if not is_data and row["kind"] != "statistics":
        return
    row["raw_nbytes"] += each["raw_nbytes"]
    row["stored_nbytes"] += each["stored_nbytes"]
    row["saved"] += each["steps"]
    row["first_step"] = min(row["first_step"], each["first_step"])
    row["last_step"] = max(row["last_step"], each["last_step"])
    row["modes"] = sorted({*row["modes"], each["mode"]})
    row["workers"] = sorted({*row["workers"], each["worker"]})
    if each["dtype"] != row["dtype"]:
        row["dtype"] = "mixed"
    if row["shape"] is not None and each["shape"] != row["shape"]:
        old, new = row["shape"], each["shape"]
        row["shape"] = (
            [a if a == b else None for a, b in zip(old, new, strict=True)]
            if len(old) == len(new)
            else None
        )


def _cells(row: dict[str, Any]) -> list[str]:
    first, last = row["first_step"], row["last_step"]
    span = f"{first}..{last}" if last > first else str(first)
    return [
        row["name"],
        row["kind"],
        row["dtype"],
        "mixed" if row["shape"] is None else shape_text(row["shape"]),
        steps_text(row["steps"]) if "steps" in row else span,
        f"{row['saved']:,}",
        bytes_text(row["raw_nbytes"]),
        bytes_text(row["stored_nbytes"]),
    ]


def _list_steps(run: Run, arguments: Namespace, output: Output) -> int:
    steps = {mode: run.steps(mode).tolist() for mode in ("NONE", "TRAIN", "EVAL", "PREDICT")}
    steps = {mode: found for mode, found in steps.items() if found}
    if output.is_json:
        output.json({"run": run.describe(), "steps": steps})
    elif arguments.is_long or list(steps) != ["NONE"]:
        for mode, found in steps.items():
            output.line(f"{mode}  {len(found):,}: {steps_text(found)}")
    else:
        output.line(steps_text(steps["NONE"]))
    return 0


# --- runs ------------------------------------------------------------------------------
def _list_runs(arguments: Namespace, runs: list[str], output: Output) -> int:
    rows = [_run_row(arguments, name) for name in runs] if arguments.is_long else []
    if output.is_json:
        document = rows or [{"run": join(arguments.url, name)} for name in runs]
        output.json({"folder": arguments.url, "runs": document})
    elif arguments.is_long:
        heading = ("run", "created", "state", "names", "last step", "stored")
        cells = [_run_cells(row) for row in rows]
        output.table(heading, cells, left=_LEFT)
    else:
        for name in runs:
            output.line(join(arguments.url, name))
    return 0


def _run_row(arguments: Namespace, name: str) -> dict[str, Any]:
    url = join(arguments.url, name)
    try:
        with open_url(url, storage_options(arguments)) as run:
            steps = run.steps()
            return {
                "run": url,
                "created_us": run.created_us,
                "is_closed": run.is_closed,
                "names": len(run),
                "last_step": int(steps[-1]) if len(steps) else None,
                "stored_nbytes": sum(run.table()["stored_nbytes"].to_pylist()),
            }
    except (TensorStoreError, OSError) as error:
        return {"run": url, "error": describe(error)}


def _run_cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["run"], "", f"unreadable: {row['error']['code']}", "", "", ""]
    created = time_text(row["created_us"])
    return [
        row["run"],
        "?" if created is None else created[:16].replace("T", " "),
        "closed" if row["is_closed"] else "live",
        f"{row['names']:,}",
        "" if row["last_step"] is None else str(row["last_step"]),
        bytes_text(row["stored_nbytes"]),
    ]

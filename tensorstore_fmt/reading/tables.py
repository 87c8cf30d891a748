"""Tables: what a run holds, as Arrow tables for polars, pandas and DuckDB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.assembly import Assembly, Chosen, assemble
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.fetch import read_all
from tensorstore_fmt.reading.modes import MODE_NAMES
from tensorstore_fmt.reading.reader import check_all_is_there, check_name
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.stats import derived, stat_rows
from tensorstore_fmt.reading.steptable import step_rows
from tensorstore_fmt.reading.timeline import Timeline, timelines
from tensorstore_fmt.reading.view import Source, View

__all__ = ["index_table", "scalars_table", "statistics_table"]

_I64 = NDArray[np.int64]

_KINDS = {layout.KIND_DATA: "data", layout.KIND_STATS: "statistics"}

_INDEX_SCHEMA = pa.schema(
    [
        ("name", pa.utf8()),
        ("kind", pa.utf8()),
        ("mode", pa.utf8()),
        ("worker", pa.int64()),
        ("attempt", pa.int64()),
        ("dtype", pa.utf8()),
        ("shape", pa.list_(pa.int64())),
        ("first_step", pa.int64()),
        ("last_step", pa.int64()),
        ("steps", pa.int64()),
        ("raw_nbytes", pa.int64()),
        ("stored_nbytes", pa.int64()),
    ]
)
_SCALARS_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("mode", pa.utf8()),
        ("worker", pa.int64()),
        ("wall_time_us", pa.int64()),
        ("name", pa.utf8()),
        ("value", pa.float64()),
        ("text", pa.utf8()),
    ]
)


def index_table(view: View) -> pa.Table:
    """Give what was saved, one row per name, kind, mode, worker, attempt, dtype and shape.

    An axis of varying length is null in ``shape``. Counts include hidden steps; nothing checks
    the sums, which are the writer's, and they end at 2**63 - 1.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    for segment in view.segments:
        key = segment.name.key
        catalog = segment.head.catalog
        for number in range(len(catalog)):
            series = catalog[number]
            if series.kind not in _KINDS:
                continue
            identity = (
                series.name, _KINDS[series.kind], MODE_NAMES[series.mode], key.worker,
                key.attempt, series.dtype, series.shape,
            )  # fmt: skip
            sums = [series.steps, series.raw_nbytes, series.stored_nbytes]
            known = rows.get(identity)
            if known is None:
                rows[identity] = [series.first_step, series.last_step, *sums]
            else:
                rows[identity] = [
                    min(known[0], series.first_step),
                    max(known[1], series.last_step),
                    *(_bounded(a + b) for a, b in zip(known[2:], sums, strict=True)),
                ]
    ordered = sorted(rows)
    columns: list[list[Any]] = [
        [each[i] for each in ordered] for i in range(len(_INDEX_SCHEMA) - 5)
    ]
    columns[-1] = [[None if n < 0 else n for n in shape] for shape in columns[-1]]
    columns += [[rows[each][i] for each in ordered] for i in range(5)]
    return pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, _INDEX_SCHEMA, strict=True)],
        schema=_INDEX_SCHEMA,
    )


def _bounded(value: int) -> int:
    """Keep a sum that somebody claims in 64 bits."""
    return max(-(2**63), min(value, 2**63 - 1))


def _names(view: View, names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(view.names)
    for name in names:
        check_name(view, name)
    return list(names)


def _is_scalar(source: Source) -> bool:
    series = source.series
    return (
        not series.global_shape
        and -1 not in series.shape
        and math.prod(series.shape) == 1
        and not dtypes.is_complex(series.dtype)
    )


def scalars_table(session: Session, names: Sequence[str] | None) -> pa.Table:
    """Give all values that have one element a step.

    Columns step, mode, worker, wall_time_us (null if unknown), name, value (float64; null for
    strings), text (null for numbers); ascending by name, then step, then mode and worker.
    Integers above 2**53 are rounded.
    """

    def work(view: View) -> pa.Table:
        wanted = [
            name
            for name in _names(view, names)
            if any(_is_scalar(s) for s in view.sources(name, layout.KIND_DATA))
        ]
        queries = [Query(name=name) for name in wanted]
        for query in queries[:1]:
            check_all_is_there(view, query)
        lines = timelines(view, session.pages, queries)
        parts: list[tuple[str, Timeline, _I64, Assembly]] = []
        for name, every in zip(wanted, lines, strict=True):
            line = every.saved()
            sources = line.found.sources
            # A stable sort by step follows.
            for number in _by_mode_and_worker(sources):
                rows = np.flatnonzero(line.source == number)
                if len(rows) and _is_scalar(sources[number]):
                    chosen = Chosen(
                        line, line.step[rows], rows, np.arange(len(rows)), is_parts=False
                    )
                    parts.append((name, line, rows, assemble(chosen, ())))
        arrays = read_all(session.storage, [part[-1] for part in parts])
        by_name: dict[str, list[pa.Table]] = {}
        for (name, line, rows, _), array in zip(parts, arrays, strict=True):
            by_name.setdefault(name, []).append(_scalar_columns(name, line, rows, array))
        return _joined(session, [_by_step(tables) for tables in by_name.values()])

    return session.do(work)


def _by_mode_and_worker(sources: Sequence[Source]) -> list[int]:
    return sorted(range(len(sources)), key=lambda i: (sources[i].series.mode, sources[i].worker))


def _by_step(tables: Sequence[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    step = table.column("step").to_numpy()
    if (step[1:] >= step[:-1]).all():
        return table
    return table.take(pa.array(np.argsort(step, kind="stable")))


def _scalar_columns(name: str, line: Timeline, rows: _I64, array: NDArray[Any]) -> pa.Table:
    source = line.found.sources[int(line.source[rows[0]])]
    flat = array.reshape(-1)
    n = len(flat)
    is_text = flat.dtype == object
    return pa.table(
        {
            "step": line.step[rows],
            "mode_number": np.full(n, source.series.mode, np.int64),
            "mode": _repeated(MODE_NAMES[source.series.mode], n),
            "worker": np.full(n, source.worker, np.int64),
            "name": _repeated(name, n),
            "value": pa.nulls(n, pa.float64()) if is_text else flat.astype(np.float64),
            "text": pa.array(flat, pa.utf8()) if is_text else pa.nulls(n, pa.utf8()),
        }
    )


def _repeated(text: str, n: int) -> pa.Array:
    return pa.array([text], pa.utf8()).take(pa.array(np.zeros(n, np.int64)))


def _joined(session: Session, batches: Sequence[pa.Table]) -> pa.Table:
    """Put columns together, with wall times from the step table."""
    if not batches:
        return _SCALARS_SCHEMA.empty_table()
    table = pa.concat_tables(batches)
    step, mode, worker = (table.column(c).to_numpy() for c in ("step", "mode_number", "worker"))
    known = step_rows(session, None)
    wall = np.zeros(len(step), np.int64)
    is_known = np.zeros(len(step), np.bool_)
    for m, w in sorted(set(zip(known.mode.tolist(), known.worker.tolist(), strict=True))):
        theirs = (known.mode == m) & (known.worker == w)
        steps, times = known.step[theirs], known.wall_time_us[theirs]
        ours = np.flatnonzero((mode == m) & (worker == w))
        at = np.minimum(steps.searchsorted(step[ours]), len(steps) - 1)
        fits = steps[at] == step[ours]
        wall[ours[fits]] = times[at[fits]]
        is_known[ours[fits]] = True
    walls = pa.array(wall, pa.int64(), mask=~is_known)
    table = table.append_column("wall_time_us", walls).select(_SCALARS_SCHEMA.names)
    return table.cast(_SCALARS_SCHEMA).combine_chunks()


def statistics_table(session: Session, names: Sequence[str] | None) -> pa.Table:
    """Give the statistics that were saved, one row per name, step, mode, worker and part.

    Columns name, step, mode, worker, the ten of the spec, mean, std, l2. Values that lie in
    the index have none of their own: see `Tensor.stats`.
    """
    tables: list[pa.Table] = []

    def work(view: View) -> None:
        wanted = [n for n in _names(view, names) if view.sources(n, layout.KIND_STATS)]
        queries = [Query(name=name, kind=layout.KIND_STATS) for name in wanted]
        for query in queries[:1]:
            check_all_is_there(view, query)
        tables.clear()
        for name, every in zip(wanted, timelines(view, session.pages, queries), strict=True):
            line = every.saved()
            if not len(line):
                continue
            rows = stat_rows(session, line, np.arange(len(line)))
            sources = line.found.sources
            modes = np.array([s.series.mode for s in sources], np.int64)[line.source]
            workers = np.array([s.worker for s in sources], np.int64)[line.source]
            columns: dict[str, Any] = {
                "name": _repeated(name, len(line)),
                "step": line.step,
                "mode": pa.array(MODE_NAMES, pa.utf8()).take(pa.array(modes)),
                "worker": workers,
            }
            stored = dict(zip(layout.STATS_FIELDS, rows.T, strict=True))
            tables.append(pa.table(columns | stored | derived(stored)))

    session.do(work)
    if not tables:
        fields: list[tuple[str, pa.DataType]] = [
            ("name", pa.utf8()), ("step", pa.int64()), ("mode", pa.utf8()), ("worker", pa.int64()),
        ]  # fmt: skip
        floats = [*layout.STATS_FIELDS, "mean", "std", "l2"]
        return pa.schema(fields + [(f, pa.float64()) for f in floats]).empty_table()
    return pa.concat_tables(tables).combine_chunks()

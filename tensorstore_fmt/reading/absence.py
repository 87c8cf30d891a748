"""Absence: why a step is not there (spec, "What is not there")."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from tensorstore_fmt.errors import (
    AmbiguousError,
    FormatError,
    NotThereError,
    StepDroppedError,
    StepNotFoundError,
    StepNotYetWrittenError,
)
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.modes import MODE_NAMES
from tensorstore_fmt.reading.timeline import Timeline
from tensorstore_fmt.reading.view import View

__all__ = ["absence", "describe_query", "raise_ambiguous"]


def describe_query(query: Query) -> str:
    """Name what was asked for, for a message."""
    said = [repr(query.name)]
    if query.mode is not None:
        said.append(f"mode {MODE_NAMES[query.mode]}")
    if query.worker is not None:
        said.append(f"worker {query.worker}")
    if query.attempt is not None:
        said.append(f"attempt {query.attempt}")
    return ", ".join(said)


def absence(view: View, query: Query, line: Timeline, step: int) -> NotThereError | FormatError:
    """Give the error that says why a step is not there.

    In this order: it was dropped; the part of the index that may have had it is damaged; it
    was never saved; it is not yet written.
    """
    what = describe_query(query)
    facts: dict[str, Any] = {"name": query.name, "step": step}
    at = np.flatnonzero(line.step == step)
    if len(at) and line.is_dropped[at].any():
        return StepDroppedError(
            f"{what}: step {step} was dropped by its writer, which could not store it", **facts
        )
    problem = view.missing(step=step, worker=query.worker, attempt=query.attempt)
    if problem is not None:
        return FormatError(
            f"{what}: step {step} is not in the index, but the index is damaged: {problem}",
            code=problem.code,
            **{**problem.facts, **facts},
        )
    modes = sorted(
        {
            source.series.mode
            for kind in (layout.KIND_DATA, layout.KIND_STATS)
            for source in view.sources(query.name, kind)
        }
        if query.mode is None
        else {query.mode}
    )
    if query.kind == layout.KIND_DATA and _has_only_statistics(view, query):
        return StepNotFoundError(f"{what}: only statistics were saved: use .stats()", **facts)
    if all(view.complete_through(mode, query.worker) >= step for mode in modes):
        return StepNotFoundError(f"{what}: step {step} was never saved{_near(line, step)}", **facts)
    return StepNotYetWrittenError(
        f"{what}: step {step} is not there yet, but the run may still write it; call refresh() "
        f"or wait_for_step({step})",
        **facts,
    )


def _has_only_statistics(view: View, query: Query) -> bool:
    return not any(
        True
        for s in view.sources(query.name, layout.KIND_DATA)
        if query.mode in (None, s.series.mode)
    ) and any(
        True
        for s in view.sources(query.name, layout.KIND_STATS)
        if query.mode in (None, s.series.mode)
    )


def _near(line: Timeline, step: int) -> str:
    """Name the saved steps before and after, if they are known."""
    steps = line.saved().step
    before, after = steps[steps < step], steps[steps > step]
    said = []
    if len(before):
        said.append(f"{int(before[-1])} before it")
    if len(after):
        said.append(f"{int(after[0])} after it")
    return f"; the nearest saved steps are {' and '.join(said)}" if said else ""


def raise_ambiguous(line: Timeline, rows: np.ndarray, step: int) -> NoReturn:
    """Say between what a caller has to choose."""
    query = line.found.query
    sources = [line.found.sources[i] for i in line.source[rows].tolist()]
    modes = sorted({s.series.mode for s in sources})
    workers = sorted({s.worker for s in sources})
    facts: dict[str, Any] = {"name": query.name, "step": step}
    if len(modes) > 1:
        names = [MODE_NAMES[m] for m in modes]
        raise AmbiguousError(
            f"{describe_query(query)}: step {step} was saved in the modes {', '.join(names)}; "
            f"say which, e.g. mode={names[0]!r}",
            modes=names,
            **facts,
        )
    if len(workers) > 1:
        shown = ", ".join(map(str, workers[:10])) + (" …" if len(workers) > 10 else "")
        raise AmbiguousError(
            f"{describe_query(query)}: step {step} was saved by the workers {shown}; say which, "
            f"e.g. worker={workers[0]}",
            workers=workers,
            **facts,
        )
    raise AmbiguousError(
        f"{describe_query(query)}: worker {workers[0]} saved {len(sources)} parts of it at step "
        f"{step}; read it without worker= to get the whole tensor",
        workers=workers,
        **facts,
    )

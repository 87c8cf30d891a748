"""Reading: from what a caller asks for to arrays, all of it in one round of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import (
    FormatError,
    NameNotFoundError,
    NotThereError,
    StepNotFoundError,
)
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.absence import absence, describe_query
from tensorstore_fmt.reading.assembly import Assembly, assemble, choose
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.fetch import check_room, read_all
from tensorstore_fmt.reading.locate import AtStep, at_steps, locate, locate_all, read_located
from tensorstore_fmt.reading.one_step import assemble_step
from tensorstore_fmt.reading.selection import normalize
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.steps import StepSet, step_number
from tensorstore_fmt.reading.timeline import Timeline, timelines
from tensorstore_fmt.reading.view import View
from tensorstore_fmt.reading.whole import read_whole

__all__ = ["Ask", "check_all_is_there", "check_name", "read", "visible"]

_MOST_COMPARED = 20_000
_NEARBY = 1 << 20
_MOST_ALONE_NBYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Ask:
    """One result that a caller wants."""

    query: Query
    wanted: StepSet
    index: object = ()
    is_single: bool = False

    @classmethod
    def at(cls, name: str, step: SupportsIndex, index: object) -> Ask:
        """Ask for one step of a name."""
        number = step_number(step)
        query = Query(name=name, low=number, high=number)
        return cls(query, StepSet.one(number), index, is_single=True)


def check_name(view: View, name: object) -> None:
    """Raise `NameNotFoundError`, with names that look alike, if a name is not in the run.

    If flushes are missing it might be in these: then their damage is raised.
    """
    if isinstance(name, str) and view.has(name):
        return
    problem = view.missing()
    if problem is not None:
        raise FormatError(
            f"no tensor is named {name!r:.200} in what is there, but the index is damaged: "
            f"{problem}",
            code=problem.code,
            **{**problem.facts, "name": name},
        )
    near = get_close_matches(str(name), view.names[:_MOST_COMPARED], n=3)
    hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
    if not near and not view.is_closed:
        hint = "; it may be logged later: call refresh()"
    raise NameNotFoundError(
        f"no tensor is named {name!r:.200}{hint}", name=name, near=near, names=len(view.names)
    )


def check_all_is_there(view: View, query: Query) -> None:
    """Refuse to give all steps of a name while nobody knows whether these are all.

    Raises
    ------
    FormatError
        Code ``missing_segment``.
    """
    problem = view.missing(worker=query.worker, attempt=query.attempt)
    if problem is not None:
        raise FormatError(
            f"{describe_query(query)}: part of the index is damaged ({problem}), so steps may be "
            "missing; name the steps (steps=[...], see .steps) or try `tensorstore-fmt recover`",
            code=problem.code,
            **{**problem.facts, "name": query.name},
        )


def visible(session: Session, query: Query) -> Timeline:
    """Give what is visible of a name in a range of steps."""

    def work(view: View) -> Timeline:
        check_name(view, query.name) if query.name else None
        (line,) = timelines(view, session.pages, [query])
        return line

    return session.do(work)


def read(session: Session, asks: Sequence[Ask]) -> list[Any]:
    """Read all that is asked for: one round for the index, if needed, and one for the data.

    Returns
    -------
    list
        For each an array (n, *selection), without the first axis if it is single; for a
        single string of rank 0 a `str`.
    """

    def work(view: View) -> list[Any]:
        found = _at_steps(view, session, asks)
        values = _read_located(session, asks, found)
        rest = [i for i, value in enumerate(values) if value is None]
        planned = _read_planned(view, session, [(asks[i], found[i]) for i in rest])
        for i, value in zip(rest, planned, strict=True):
            values[i] = value
        return values

    return session.do(work)


def _at_steps(view: View, session: Session, asks: Sequence[Ask]) -> list[AtStep | None]:
    """Find what can be read without a timeline."""
    if not all(ask.is_single for ask in asks):
        return [None] * len(asks)
    return at_steps(view, session.pages, [ask.query for ask in asks])


def _read_located(
    session: Session, asks: Sequence[Ask], found: Sequence[AtStep | None]
) -> list[Any]:
    """Read what makes up a whole tensor without a plan; None for what has to be planned."""
    whole = {
        i: where
        for i, (ask, where) in enumerate(zip(asks, found, strict=True))
        if where is not None and isinstance(ask.index, tuple) and not ask.index
    }
    values: list[Any] = [None] * len(asks)
    if len(asks) == 1 and whole:
        return [_read_one(session, whole[0])]
    chunks = dict(zip(whole, locate_all(list(whole.values())), strict=True))
    nbytes = sum([each.nbytes for each in chunks.values() if each and not each.is_inline])
    for i, chunk in chunks.items():
        # Neighbours are better read together, in threads, if they are many bytes.
        if chunk is not None and (chunk.is_inline or nbytes <= _MOST_ALONE_NBYTES):
            values[i] = read_located(session.storage, chunk)
    return values


def _read_one(session: Session, where: AtStep) -> NDArray[Any] | None:
    chunk = locate(where)
    value = None if chunk is None else read_located(session.storage, chunk)
    return read_whole(session.storage, where) if value is None else value


def _read_planned(
    view: View, session: Session, asks: Sequence[tuple[Ask, AtStep | None]]
) -> list[Any]:
    """Read anything: one round for the index, if needed, and one for the data."""
    if not asks:
        return []
    ready = [
        None if where is None else assemble_step(where, ask.query, ask.index) for ask, where in asks
    ]
    rest = [ask for (ask, _), assembly in zip(asks, ready, strict=True) if assembly is None]
    for ask in rest:
        check_name(view, ask.query.name)
    lines = zip(rest, timelines(view, session.pages, [ask.query for ask in rest]), strict=True)
    assemblies = [each or _assembly(view, session, *next(lines)) for each in ready]
    arrays = iter(read_all(session.storage, [a for a in assemblies if isinstance(a, Assembly)]))
    return [
        _shaped(ask, next(arrays) if isinstance(each, Assembly) else each)
        for (ask, _), each in zip(asks, assemblies, strict=True)
    ]


def _assembly(view: View, session: Session, ask: Ask, line: Timeline) -> Assembly | NDArray[Any]:
    if ask.wanted.exact is None:
        check_all_is_there(view, ask.query)
    try:
        chosen = choose(view, line, ask.wanted)
    except StepNotFoundError as error:
        if ask.wanted.exact is None or len(line):
            raise
        raise _with_neighbours(view, session, ask, error) from None
    if len(chosen.steps):
        return assemble(chosen, ask.index)
    return _nothing(view, ask, line)


def _with_neighbours(view: View, session: Session, ask: Ask, error: NotThereError) -> Exception:
    """Look around, beyond the pages at hand, for a message that names what is near."""
    assert ask.wanted.exact is not None
    step = int(ask.wanted.exact[0])
    query = Query(
        name=ask.query.name,
        kind=ask.query.kind,
        low=max(0, step - _NEARBY),
        high=min(step + _NEARBY, layout.MAX_STEP),
        mode=ask.query.mode,
        worker=ask.query.worker,
        attempt=ask.query.attempt,
    )
    try:
        (line,) = timelines(view, session.pages, [query])
    except FormatError:  # of pages that the question does not need
        return error
    have = line.saved().step
    missing = ask.wanted.exact[~np.isin(ask.wanted.exact, have)]
    return absence(view, query, line, int(missing[0]) if len(missing) else step)


def _nothing(view: View, ask: Ask, line: Timeline) -> NDArray[Any]:
    """Give the result for a range in which nothing was saved."""
    query = ask.query
    sources = [
        s
        for s in view.sources(query.name, layout.KIND_DATA)
        if query.mode in (None, s.series.mode)
        and query.worker in (None, s.worker)
        and query.attempt in (None, s.attempt)
    ]
    if not sources:
        raise absence(view, query, line, max(ask.wanted.low, 0))
    is_global = query.worker is None
    shapes = {(is_global and s.series.global_shape) or s.series.shape for s in sources}
    names = {s.series.dtype for s in sources}
    (shape, *others), (name, *_) = shapes, names
    if others or -1 in shape:
        raise StepNotFoundError(
            f"{describe_query(query)}: no step was saved from {ask.wanted.low} to "
            f"{ask.wanted.high}, and its shape is not always the same",
            name=query.name,
        )
    found, dtype = (0, *normalize(ask.index, shape).shape), dtypes.numpy_dtype(name)
    check_room(query.name, found, dtype)
    return np.empty(found, dtype.newbyteorder("="))


def _shaped(ask: Ask, array: NDArray[Any]) -> Any:  # noqa: ANN401 - or a str
    if ask.is_single:
        if array.ndim == 1 and array.dtype == object:
            return array[0]
        return array.reshape(array.shape[1:])
    if ask.wanted.order is not None:
        return array[ask.wanted.order]
    return array

"""Assembly: from what is visible of a name to the chunks that make up a result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, FormatError, LimitError
from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.reading.absence import absence, raise_ambiguous
from tensorstore_fmt.reading.entries import Found
from tensorstore_fmt.reading.plan import Touched, n_touched, touched_chunks
from tensorstore_fmt.reading.selection import Selection, normalize
from tensorstore_fmt.reading.steps import StepSet
from tensorstore_fmt.reading.timeline import Timeline
from tensorstore_fmt.reading.view import Source, View

__all__ = ["Assembly", "Chosen", "Group", "assemble", "choose", "full_shape"]

_MAX_ITEMS_AT_ONCE = 1 << 20
_MOST_CHUNKS_AT_ONCE = 1 << 26  # 16 bytes each; of 256 KiB they would hold 16 TiB

_I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What of a timeline answers a request.

    Attributes
    ----------
    line
        What is visible, ascending by step.
    steps
        Shape (n,), int64: the steps of the result, ascending.
    rows
        Shape (p,), int64: the rows of `line` that make it up, ascending by step.
    number
        Shape (p,), int64: for each of these, which of `steps` it belongs to.
    is_parts
        Whether they are parts of a global tensor.
    """

    line: Timeline
    steps: _I64
    rows: _I64
    number: _I64
    is_parts: bool


def choose(view: View, line: Timeline, wanted: StepSet) -> Chosen:
    """Choose the saved values that are asked for (spec, "What is visible", rules 5 and 6).

    Raises
    ------
    NotThereError
        A step that was asked for exactly is not there.
    AmbiguousError
        Several workers or modes saved one of the steps.
    """
    query = line.found.query
    saved = line.saved()
    steps = saved.step
    is_unique = bool((steps[1:] > steps[:-1]).all())
    if wanted.exact is not None:
        if is_unique and len(wanted.exact) == 1:
            at = int(steps.searchsorted(wanted.exact[0]))
            is_there = at < len(steps) and steps[at] == wanted.exact[0]
            rows = np.array([at] if is_there else [], np.int64)
        else:
            rows = np.flatnonzero(np.isin(steps, wanted.exact))
        have = steps[rows]
        if len(have) < len(wanted.exact) or not is_unique:
            missing = wanted.exact[~np.isin(wanted.exact, have)]
            if len(missing):
                raise absence(view, query, line, int(missing[0]))
    elif len(steps) and wanted.has_all(steps):
        rows, have = np.arange(len(steps)), steps
    else:
        rows = np.flatnonzero(wanted.of_saved(steps))
        have = steps[rows]
    sources = line.found.sources
    if is_unique:
        chosen, number = have, np.arange(len(have))
    else:
        is_new = np.concatenate([[True], have[1:] != have[:-1]]) if len(have) else have > 0
        chosen, number = have[is_new], np.cumsum(is_new) - 1
    is_part = np.array([bool(s.series.global_shape) for s in sources], np.bool_)
    is_parts = False
    if query.worker is None and is_part.any():
        used = saved.source[rows]
        is_parts = bool(is_part[used].any())
    if len(rows) > len(chosen):
        _check_unambiguous(saved, rows, number, chosen, is_part if is_parts else None)
    return Chosen(saved, chosen, rows, number, is_parts)


def _check_unambiguous(
    line: Timeline,
    rows: _I64,
    number: _I64,
    steps: _I64,
    is_part: NDArray[np.bool_] | None,
) -> None:
    """Refuse steps saved more than once, unless they are parts in one mode."""
    n = np.bincount(number, minlength=len(steps))
    used = line.source[rows]
    if is_part is None:
        bad = n > 1
    else:
        mode = np.array([s.series.mode for s in line.found.sources], np.int64)[used]
        low = np.full(len(steps), 255)
        high = np.zeros(len(steps), np.int64)
        np.minimum.at(low, number, mode)
        np.maximum.at(high, number, mode)
        parts = np.bincount(number, weights=is_part[used], minlength=len(steps))
        bad = (n > 1) & ((low < high) | (parts < n))
    if bad.any():
        i = int(bad.argmax())
        raise_ambiguous(line, rows[number == i], int(steps[i]))


# --- what makes up the result --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Values with one shape and grid: n steps × m chunks.

    Attributes
    ----------
    series
        One of those they come from; all have its dtype, grid and origin.
    touched
        The m chunks that are needed.
    places
        Where what is picked of the tensor lies in the result, (start, stop) per axis.
    steps, number
        Shape (n,), int64: the steps, and which rows of the result they are.
    entry, inner
        Shape (n, m), int64: the entry with each chunk of each step, and which of the
        payload's steps it is.
    """

    series: Series
    touched: Touched
    places: tuple[tuple[int, int], ...]
    steps: _I64
    number: _I64
    entry: _I64
    inner: _I64


@dataclass(frozen=True, slots=True)
class Assembly:
    """All that is needed for one result.

    Attributes
    ----------
    chosen
        The steps, and the values that make them up.
    dtype
        As stored.
    selection
        Of the (global) tensor.
    groups
        Where its elements come from. Together they give each element once.
    """

    chosen: Chosen
    dtype: str
    selection: Selection
    groups: Sequence[Group]

    @property
    def found(self) -> Found:
        """The entries."""
        return self.chosen.line.found


def full_shape(found: Found, source: Source, row: int) -> tuple[int, ...]:
    """Give the shape of the value whose chunk 0 is this entry."""
    series = source.series
    return series.full_shape(found.entries.dims.row(row)) if -1 in series.shape else series.shape


def assemble(chosen: Chosen, index: object) -> Assembly:
    """Find the chunks for a selection of what was chosen.

    Raises
    ------
    ArgumentError
        Code ``shape_varies``: shapes or dtypes differ, so nothing can be stacked.
    SelectionError
        The tensor does not have the selection.
    FormatError
        The index contradicts itself, or parts leave a hole or overlap (``parts``).
    """
    found, line = chosen.line.found, chosen.line
    layouts = _layouts(chosen)
    shapes = {each.series.global_shape if chosen.is_parts else each.shape for each in layouts}
    names = {each.series.dtype for each in layouts}
    if len(shapes) > 1 or len(names) > 1:
        if chosen.is_parts:
            _check_alike(chosen)
        _raise_varies(chosen, shapes, names)
    (shape,), (dtype,) = shapes, names
    dtypes.numpy_dtype(dtype)  # refuse an unknown one here
    selection = normalize(index, shape)
    whole = tuple([(0, n) for n in selection.counts])
    groups = []
    covered: list[tuple[_I64, tuple[tuple[int, int], ...]]] = []
    for each in layouts:
        number = chosen.number[each.at]
        picked, places = selection, whole
        if each.series.global_shape and each.series.kind == layout.KIND_DATA:
            _check_inside(each)
        if chosen.is_parts:
            inside = selection.within(each.series.origin, each.shape)
            if inside is None:
                continue
            picked, places = inside
            covered.append((number, places))
        _check_claims(found, each, picked, len(number))
        touched = touched_chunks(picked, each.shape, each.series.grid)
        steps, rows = chosen.steps[number], chosen.rows[each.at]
        entry = _find_chunks(line, each, touched, steps, rows)
        inner = _inner(found, each, touched, steps, entry)
        groups.append(Group(each.series, touched, places, steps, number, entry, inner))
    if chosen.is_parts:
        _check_cover(chosen, selection, covered)
    return Assembly(chosen, dtype, selection, groups)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Values with one shape, grid, dtype and origin.

    Attributes
    ----------
    sources
        Numbers of the sources they come from.
    series
        Of one of these.
    shape
        Of the tensor, or of the part.
    at
        Which of the rows that were chosen they are; maybe all.
    """

    sources: tuple[int, ...]
    series: Series
    shape: tuple[int, ...]
    at: _I64 | slice


def _layouts(chosen: Chosen) -> list[_Layout]:
    """Split what was chosen by shape, grid, dtype and part."""
    found, line = chosen.line.found, chosen.line
    used = line.source[chosen.rows]
    alike: dict[tuple[object, ...], list[int]] = {}
    present = np.flatnonzero(np.bincount(used)).tolist()
    for number in present:
        series = found.sources[number].series
        key = (series.shape, series.grid, series.dtype, series.global_shape, series.origin)
        alike.setdefault(key, []).append(number)
    layouts = []
    for numbers in alike.values():
        series = found.sources[numbers[0]].series
        if -1 not in series.shape:
            every = slice(None) if len(alike) == 1 else np.flatnonzero(np.isin(used, numbers))
            layouts.append(_Layout(tuple(numbers), series, series.shape, every))
            continue
        at = np.flatnonzero(np.isin(used, numbers))
        dims = found.entries.dims.take(line.row[chosen.rows[at]]).values
        different, inverse = np.unique(dims.reshape(len(at), -1), axis=0, return_inverse=True)
        for i, lengths in enumerate(different.tolist()):
            some = at[inverse.reshape(-1) == i]
            layouts.append(_Layout(tuple(numbers), series, series.full_shape(lengths), some))
    return layouts


def _raise_varies(chosen: Chosen, shapes: set[tuple[int, ...]], names: set[str]) -> None:
    what = (
        f"{len(shapes)} different shapes, e.g. {' and '.join(map(str, sorted(shapes)[:2]))}"
        if len(shapes) > 1
        else f"the dtypes {', '.join(sorted(names))}"
    )
    raise ArgumentError(
        f"{chosen.line.found.query.name!r}: its {len(chosen.steps)} steps have {what} and cannot "
        "be stacked; read each with step=, or the steps of one shape with steps=[...]",
        code="shape_varies",
        name=chosen.line.found.query.name,
    )


# --- parts ------------------------------------------------------------------------------


def _parts_error(name: str, step: int, problem: str) -> FormatError:
    return FormatError(
        f"{name!r}, step {step}: the parts of the tensor {problem}; with worker= each can be read "
        "alone",
        code="parts",
        name=name,
        step=step,
    )


def _check_alike(chosen: Chosen) -> None:
    """Make sure that the parts of each step belong to tensors of one shape and dtype."""
    kinds: dict[object, int] = {}
    sources = chosen.line.found.sources
    kind = np.array(
        [kinds.setdefault((s.series.global_shape, s.series.dtype), len(kinds)) for s in sources],
        np.int64,
    )[chosen.line.source[chosen.rows]]
    is_bad = (np.diff(kind) != 0) & (np.diff(chosen.number) == 0)  # rows ascend by step
    if is_bad.any():
        step = int(chosen.steps[chosen.number[int(is_bad.argmax())]])
        name = chosen.line.found.query.name
        raise _parts_error(name, step, "differ in global shape or dtype")


def _check_inside(layout_: _Layout) -> None:
    series = layout_.series
    if any(
        o + n > length
        for o, n, length in zip(series.origin, layout_.shape, series.global_shape, strict=True)
    ):
        raise FormatError(
            f"{series.name!r}: a part of shape {layout_.shape} at {series.origin} is not inside "
            f"the tensor of shape {series.global_shape}",
            name=series.name,
        )


def _check_cover(
    chosen: Chosen,
    selection: Selection,
    covered: Sequence[tuple[_I64, tuple[tuple[int, int], ...]]],
) -> None:
    """Make sure that the parts give each selected element of each step exactly once."""
    name = chosen.line.found.query.name
    total = math.prod(selection.counts)
    if total == 0:
        return
    given = np.zeros(len(chosen.steps), np.float64)  # exact up to 2**53 elements
    for number, places in covered:
        np.add.at(given, number, float(math.prod(b - a for a, b in places)))
    if (given < total).any():
        raise _parts_error(name, int(chosen.steps[int((given < total).argmax())]), "leave a hole")
    # Those of one step cover all if their sizes add up and no two overlap.
    boxes = np.array([places for _, places in covered], np.int64)  # parts × axes × 2
    owner = np.concatenate([np.full(len(number), i) for i, (number, _) in enumerate(covered)])
    numbers = np.concatenate([number for number, _ in covered])
    checked: set[bytes] = set()
    order = np.lexsort((owner, numbers))
    begins = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for i, members in enumerate(np.split(owner[order], begins[1:].tolist())):
        if members.tobytes() in checked:
            continue
        checked.add(members.tobytes())
        if _overlap(boxes[members]):
            raise _parts_error(name, int(chosen.steps[i]), "overlap")


def _overlap(boxes: _I64) -> bool:
    """Say whether any two boxes share an element."""
    order = np.argsort(boxes[:, 0, 0], kind="stable")
    boxes = boxes[order]
    begins, ends = boxes[:, :, 0], boxes[:, :, 1]
    for i in range(len(boxes) - 1):
        reach = int(begins[:, 0].searchsorted(ends[i, 0], side="left"))
        later = slice(i + 1, max(reach, i + 1))
        if ((begins[later] < ends[i]) & (begins[i] < ends[later])).all(axis=1).any():
            return True
    return False


# --- entries of chunks ----------------------------------------------------------------------


def _check_claims(found: Found, layout_: _Layout, picked: Selection, n_steps: int) -> None:
    """Refuse what is claimed before it is listed.

    A catalog row of a few bytes may claim a shape and a grid with any number of chunks, of any
    size. But each chunk has an entry, which is longer; and a chunk is at most so long.
    """
    shape, grid, name = layout_.shape, layout_.series.grid, layout_.series.name
    number = n_touched(picked, shape, grid)
    if number > len(found.entries):
        raise _contradiction(found, layout_, "the index lacks a chunk of a saved tensor")
    if number * n_steps > _MOST_CHUNKS_AT_ONCE:  # their elements may be few
        raise LimitError(
            f"{name!r}: {number * n_steps:,} chunks ({n_steps:,} steps of {number:,}) are asked "
            f"for at once; at most {_MOST_CHUNKS_AT_ONCE:,} can be: read fewer steps, or less of "
            "each",
            name=name,
        )
    largest = math.prod(min(g or n, n) for n, g in zip(shape, grid, strict=True))
    if largest > layout.MAX_CHUNK_RAW_NBYTES:  # an element has a byte at least
        path = found.sources[layout_.sources[0]].segment.name.path
        raise LimitError(
            f"{path}: a chunk of {name!r} would have {largest:,} elements", file=path, name=name
        )


def _inner(found: Found, layout_: _Layout, touched: Touched, steps: _I64, entry: _I64) -> _I64:
    """Give which step of its payload each one is, and check the payloads' raw lengths."""
    rows = found.entries.rows
    is_used = np.zeros(len(rows), np.bool_)
    is_used[entry] = True
    used = np.flatnonzero(is_used)  # few, if an entry holds many steps
    repeats = (rows["flags"][used] & layout.ENTRY_REPEAT).astype(np.bool_)
    kept = np.where(repeats, 1, rows["count"][used].astype(np.int64))
    sizes = touched.sizes
    if len(sizes) and (sizes != sizes[0]).any():
        sizes = np.zeros(len(rows), np.int64)
        sizes[entry] = touched.sizes
        sizes = sizes[used]
    else:
        sizes = sizes[:1]
    if layout_.series.dtype == dtypes.STRING:
        is_wrong = rows["raw_nbytes"][used] < 4 * kept * sizes  # their offsets alone
    else:
        is_wrong = rows["raw_nbytes"][used] != (
            kept * sizes * dtypes.itemsize(layout_.series.dtype)
        )
    if is_wrong.any():
        raise _contradiction(found, layout_, "a chunk has another length than its box")
    if (kept == 1).all():
        return np.zeros(entry.shape, np.int64)
    # One-dimensional arrays and contiguous columns: both are several times as fast.
    flat = entry.reshape(-1)
    each = steps if len(touched) == 1 else np.repeat(steps, len(touched))
    inner = each - np.ascontiguousarray(rows["step"]).take(flat)
    if (rows["stride"][used] != 1).any():
        inner //= np.ascontiguousarray(rows["stride"]).take(flat)
    if repeats.any():
        inner[np.isin(flat, used[repeats])] = 0
    shaped: _I64 = inner.reshape(entry.shape)
    return shaped


def _find_chunks(
    line: Timeline, layout_: _Layout, touched: Touched, steps: _I64, rows_of_line: _I64
) -> _I64:
    """Find the entries of each step's chunks, shape (n, m).

    `rows_of_line` say where each step's chunk 0 is: all chunks of a saved tensor are in one
    segment.
    """
    found, source = line.found, line.source[rows_of_line]
    first = line.row[rows_of_line].astype(np.int64, copy=False)
    numbers = touched.numbers
    n, m = len(steps), len(numbers)
    if m == 0:
        return np.empty((n, 0), np.int64)
    if m == 1 and numbers[0] == 0:
        return first.reshape(n, 1)
    all_rows = found.entries.rows
    base, rows = None, all_rows
    if len(layout_.sources) < len(found.sources):
        begins = found.begins
        base = np.concatenate([np.arange(begins[i], begins[i + 1]) for i in layout_.sources])
        rows = all_rows[base]
    last = found.last_step if base is None else found.last_step[base]
    from_source = found.source if base is None else found.source[base]
    chunk, step, stride = rows["chunk"], rows["step"], rows["stride"]
    if m == 1:
        column = np.zeros(len(rows), np.int64)
        is_candidate = chunk == numbers[0]
    else:
        column = np.minimum(numbers.searchsorted(chunk), m - 1)
        is_candidate = numbers[column] == chunk
    is_candidate &= rows["codec"] != layout.CODEC_DROPPED
    candidates = np.flatnonzero(is_candidate)
    flush = rows["last_flush"][candidates]
    if (flush[1:] < flush[:-1]).any():
        # Where a step was saved twice the later one has to be written last below.
        candidates = candidates[np.argsort(flush, kind="stable")]
    low = steps.searchsorted(step[candidates], side="left")
    width = steps.searchsorted(last[candidates], side="right") - low
    entry = np.full((n, m), -1, np.int64)
    filled = 0
    for begin, end in _blocks(width):
        owner, position, n_steps = candidates[begin:end], low[begin:end], width[begin:end]
        if (n_steps != 1).any():
            ends = np.cumsum(n_steps)
            position = np.arange(ends[-1]) - np.repeat(ends - n_steps - position, n_steps)
            owner = np.repeat(owner, n_steps)
        fits = (steps[position] - step[owner]) % stride[owner] == 0
        fits &= from_source[owner] == source[position]
        owner, position = owner[fits], position[fits]
        entry[position, column[owner]] = owner if base is None else base[owner]
        filled += len(owner)
    if (entry < 0).any():
        raise _contradiction(found, layout_, "the index lacks a chunk of a saved tensor")
    if filled > n * m:  # something was saved twice: its chunks must be of the same time
        ours, zero = all_rows[entry], all_rows[first][:, None]
        if (
            (ours["first_flush"] > zero["last_flush"]) | (zero["first_flush"] > ours["last_flush"])
        ).any():
            raise _contradiction(
                found, layout_, "the index lacks a chunk of a tensor that was saved twice"
            )
    return entry


def _blocks(width: _I64) -> Iterator[tuple[int, int]]:
    """Cut so that not too many (entry, step) pairs are made at once."""
    total = np.cumsum(width)
    begin = 0
    while begin < len(width):
        base = int(total[begin - 1]) if begin else 0
        end = int(total.searchsorted(base + _MAX_ITEMS_AT_ONCE, side="right"))
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def _contradiction(found: Found, layout_: _Layout, problem: str) -> FormatError:
    path = found.sources[layout_.sources[0]].segment.name.path
    name = layout_.series.name
    return FormatError(f"{path}: {problem} ({name!r})", file=path, name=name)

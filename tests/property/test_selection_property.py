"""Selections against NumPy, and plans that cover exactly what is needed."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices

from tensorstore_fmt.format.grid import chunk_box, n_chunks
from tensorstore_fmt.reading.plan import merge_ranges, n_touched, touched_chunks
from tensorstore_fmt.reading.selection import normalize
from tensorstore_fmt.reading.step_runs import StepRuns

Case = tuple[tuple[int, ...], tuple[int, ...], object]

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def selections(draw: st.DrawFn) -> Case:
    shape = draw(shapes)
    grid = tuple(draw(st.integers(0, n + 2)) for n in shape)
    index = draw(basic_indices(shape, allow_newaxis=False))
    return shape, grid, index


@given(selections())
def test_chunks_put_together_are_what_numpy_gives(case: Case) -> None:
    shape, grid, index = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    expected = np.asarray(whole[index])
    selection = normalize(index, shape)
    assert selection.shape == expected.shape
    touched = touched_chunks(selection, shape, grid)
    assert len(touched) == n_touched(selection, shape, grid)
    result = np.full(selection.counts, -1)
    flips = tuple(slice(None, None, -1 if a.is_flipped else 1) for a in selection.axes)
    target = result[(..., *flips)]
    needed = set()
    for i, number in enumerate(touched.numbers.tolist()):
        box = chunk_box(shape, grid, number)
        chunk = np.asarray(whole[tuple(slice(a, b) for a, b in box)])
        assert chunk.shape == touched.boxes[i]
        assert chunk.size == touched.sizes[i]
        picked = np.asarray(chunk[touched.local[i]])
        assert touched.is_whole[i] == (picked.size == chunk.size)
        assert (target[touched.places[i]] == -1).all()  # no element comes twice
        target[touched.places[i]] = picked
        needed.update(picked.reshape(-1).tolist())
        assert picked.size
    np.testing.assert_array_equal(result.reshape(selection.shape), expected)
    assert needed == set(expected.reshape(-1).tolist())
    assert sorted(set(touched.numbers.tolist())) == touched.numbers.tolist()
    if len(touched):
        assert touched.numbers.max() < n_chunks(shape, grid)


@given(selections(), st.data())
def test_boxes_of_parts_cut_a_selection(case: Case, data: st.DataObject) -> None:
    shape, _, index = case
    if not shape or 0 in shape:
        return
    selection = normalize(index, shape)
    cut = data.draw(st.integers(0, shape[0]))
    seen = np.zeros(selection.counts, int)
    for begin, end in ((0, cut), (cut, shape[0])):
        inside = selection.within((begin, *(0,) * (len(shape) - 1)), (end - begin, *shape[1:]))
        if inside is not None:
            local, places = inside
            assert local.counts == tuple(b - a for a, b in places)
            seen[tuple(slice(a, b) for a, b in places)] += 1
    assert (seen == 1).all()


ranges = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3000), st.integers(1, 200)), max_size=40
)


@given(ranges, st.integers(0, 300), st.integers(1, 2000))
def test_requests_hold_all_ranges_and_little_else(
    items: list[tuple[int, int, int]], gap: int, most: int
) -> None:
    file, offset, nbytes = np.array(items, np.int64).reshape(-1, 3).T
    merged = merge_ranges(file, offset, nbytes, max_gap_bytes=gap, max_request_nbytes=most)
    needed = set()
    for f, o, n, request in zip(file, offset, nbytes, merged.request, strict=True):
        assert merged.file[request] == f
        assert merged.start[request] <= o
        assert o + n <= merged.stop[request]
        needed.update((f, i) for i in range(o, o + n))
    payloads = {tuple(item) for item in items}
    paid = sum(n for _, _, n in payloads)  # overlapping ranges are different payloads
    assert merged.nbytes <= 1.2 * paid
    for request in range(len(merged)):
        held = int((merged.request == request).sum())
        assert held
        assert held == 1 or merged.stop[request] - merged.start[request] <= most + 2 * 200 + gap
        covered = {
            i
            for f, i in needed
            if f == merged.file[request] and merged.start[request] <= i < merged.stop[request]
        }
        run = 0
        for i in range(merged.start[request], merged.stop[request]):
            run = 0 if i in covered else run + 1
            assert run <= gap
    held_by = {}
    for item, request in zip(items, merged.request.tolist(), strict=True):
        assert held_by.setdefault(tuple(item), request) == request  # nothing is fetched twice


batches = st.lists(st.sets(st.integers(0, 40)), max_size=6)


@given(batches, st.integers(1, 5), st.integers(0, 60))
def test_runs_of_steps_are_a_set(parts: list[set[int]], factor: int, cut: int) -> None:
    runs, known = StepRuns(), set()
    for part in parts:
        steps = np.array(sorted(factor * step for step in part), np.int64)
        assert runs.has(steps).tolist() == [step in known for step in steps.tolist()]
        new = steps[~runs.has(steps)]
        runs.add(new)
        known |= set(new.tolist())
    runs.cut(cut)
    assert np.flatnonzero(runs.has(np.arange(250))).tolist() == sorted(s for s in known if s < cut)


def test_runs_of_regular_steps_take_no_memory() -> None:
    runs = StepRuns()
    for step in range(0, 10_000, 5):
        runs.add(np.array([step]))
    runs.add(np.arange(10_000, 20_000, 5))
    assert len(runs) == 1

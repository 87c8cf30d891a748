"""What is there of a run: gaps between segments, and who is closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.build_run import RUN_ID

from tensorstore_fmt.format import layout, segment
from tensorstore_fmt.upkeep import inventory


def named(first: int, last: int, writer: int = 1) -> layout.SegmentName:
    key = layout.WriterKey(worker=0, attempt=0, writer=writer)
    return layout.SegmentName(key=key, last=last, count=last - first + 1)


@pytest.mark.parametrize(
    ("ranges", "first", "last", "gaps"),
    [
        ([], 0, -1, []),
        ([], 0, 3, [(0, 3)]),
        ([(0, 3)], 0, 3, []),
        ([(1, 1), (3, 4)], 0, 6, [(0, 0), (2, 2), (5, 6)]),
        ([(4, 9)], 0, 2, [(0, 2)]),
        ([(0, 5), (2, 3)], 0, 5, []),
    ],
)
def test_gaps(ranges: Sequence[tuple[int, int]], first: int, last: int, gaps: Any) -> None:
    assert inventory.gaps([named(a, b) for a, b in ranges], first, last) == gaps


def test_who_is_closed() -> None:
    def header(writer: int, *, closed: bool, recovers: int = 0, worker: int = 0) -> segment.Header:
        return segment.Header(
            run_id=RUN_ID, key=layout.WriterKey(worker=worker, attempt=0, writer=writer),
            num_workers=2, resume_step=0, first_flush=0, last_flush=0, opened_us=0, published_us=0,
            is_closed=closed, recovers=recovers,
        )  # fmt: skip

    assert not inventory.is_run_closed([])
    one, other = header(1, closed=False), header(5, closed=True, worker=1)
    assert not inventory.is_run_closed([one, other])
    chain = [one, header(2, closed=False, recovers=1), header(3, closed=True, recovers=2)]
    assert inventory.is_run_closed([*chain, other])
    assert not inventory.is_run_closed(chain)
    assert inventory.is_known_loss([]) is None

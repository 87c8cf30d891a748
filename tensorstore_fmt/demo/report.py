"""The end of a demo: what the run holds, and whether it gives back what was put in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import tensorstore_fmt as tsf
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import CountingStorage

__all__ = [
    "Check",
    "Stored",
    "bytes_text",
    "compare",
    "open_counting",
    "table",
    "take_stock",
]

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What the run holds of one name: how many steps, and bytes before and after encoding."""

    name: str
    steps: int
    dtype: str
    shape: tuple[int | None, ...]
    nbytes: int
    stored_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One read that was compared with memory.

    Attributes
    ----------
    call, shape, nbytes
        What was called, and what it gave.
    requests, fetched_nbytes, seconds
        What that took; nothing is fetched for what lies in a part of the index that is here.
    is_equal, comparison
        Whether it is what memory has, and in words.
    """

    call: str
    shape: tuple[int, ...]
    nbytes: int
    requests: int
    fetched_nbytes: int
    seconds: float
    is_equal: bool
    comparison: str

    def __str__(self) -> str:
        """Give what a person wants to know of it, without the call."""
        shape = " x ".join(map(str, self.shape)) or "scalar"
        source = "the index, nothing fetched"
        if self.requests:
            many = f"{self.requests} request" + ("s" if self.requests > 1 else "")
            source = f"{bytes_text(self.fetched_nbytes)} in {many}"
        milliseconds = f"{1e3 * self.seconds:.1f} ms"
        size = bytes_text(self.nbytes)
        return f"{shape}, {size} from {source}, {milliseconds}: {self.comparison}"


def open_counting(
    url: str, *, storage_options: Mapping[str, object] | None
) -> tuple[tsf.Run, CountingStorage]:
    """Open a run to read it as `open_run` does, and count what it fetches."""
    counting = CountingStorage(open_storage(url, storage_options=storage_options, writable=False))
    session = Session(url, storage_options, storage=counting)
    return tsf.Run(session), counting


def take_stock(run: tsf.Run) -> list[Stored]:
    """List what `run` holds, by name, from its index alone."""
    return [
        Stored(
            name=name,
            steps=len(run[name].steps),
            dtype=str(run[name].dtype),
            shape=tuple(run[name].shape),
            nbytes=run[name].nbytes,
            stored_nbytes=run[name].stored_nbytes,
        )
        for name in run.names()
    ]


def table(stored: Sequence[Stored]) -> list[str]:
    """Lay out `stored` as aligned lines: a heading, a line per name, a rule and the totals."""
    rows = [("name", "steps", "dtype", "shape", "raw", "stored", "ratio")]
    for row in stored:
        shape = " x ".join("?" if n is None else str(n) for n in row.shape) or "scalar"
        rows.append((row.name, str(row.steps), row.dtype, shape, *_sizes(row)))
    total = Stored(
        name="total",
        steps=0,
        dtype="",
        shape=(),
        nbytes=sum(row.nbytes for row in stored),
        stored_nbytes=sum(row.stored_nbytes for row in stored),
    )
    rows.append(("total", "", "", "", *_sizes(total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_left = (True, False, True, True, False, False, False)
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_left, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [*lines[:-1], "-" * max(map(len, lines)), lines[-1]]


def _sizes(row: Stored) -> tuple[str, str, str]:
    ratio = f"{row.nbytes / row.stored_nbytes:.2f}" if row.stored_nbytes else "-"
    return bytes_text(row.nbytes), bytes_text(row.stored_nbytes), ratio


def bytes_text(nbytes: int) -> str:
    """Give a number of bytes in the unit a person would choose (powers of 1000)."""
    if nbytes < 1000:
        return f"{nbytes} B"
    power = min(int(math.log10(nbytes) / 3 + 1e-4), 4)  # 999.9 kB is said as 1.0 MB
    value = nbytes / 1000**power
    return f"{value:.{1 if value < 99.95 else 0}f} {_UNITS[power]}"


def compare(
    counting: CountingStorage,
    call: str,
    read: Callable[[], npt.NDArray[np.generic]],
    expected: npt.NDArray[np.generic],
    *,
    tolerance: float | None = None,
) -> Check:
    """Read, count what that took, and compare with what is expected.

    Parameters
    ----------
    call
        What `read` calls, for people.
    tolerance
        Relative; by default each bit has to be the same.
    """
    counting.reset()
    began = time.perf_counter()
    got = np.asarray(read())
    seconds = time.perf_counter() - began
    is_equal = got.shape == expected.shape and got.dtype == expected.dtype
    if tolerance is None:
        is_equal = is_equal and got.tobytes() == expected.tobytes()
    else:
        is_equal = is_equal and np.allclose(
            got.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=0
        )
    good = "same bits" if tolerance is None else f"within {tolerance:g}"
    return Check(
        call=call,
        shape=got.shape,
        nbytes=got.nbytes,
        requests=len(counting.requests),
        fetched_nbytes=counting.nbytes,
        seconds=seconds,
        is_equal=is_equal,
        comparison=good if is_equal else "NOT what is in memory",
    )

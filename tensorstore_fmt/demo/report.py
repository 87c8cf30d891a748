"""The end of the demo: what the run holds, and whether it gives back what was put in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

import tensorstore_fmt as tsf
from tensorstore_fmt.demo.training import COPIED, Memory
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import CountingStorage

__all__ = [
    "Check",
    "Stored",
    "bytes_text",
    "open_counting",
    "read_back",
    "strongest_units",
    "table",
    "take_stock",
]

_UNITS = ("B", "kB", "MB", "GB", "TB")
_LOOKS_ALIKE = 0.5  # cosine of the angle between the incoming weights of two units


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


def strongest_units(weight: npt.NDArray[np.generic], *, count: int) -> list[int]:
    """Choose up to `count` units, those with the largest incoming weights, strongest first.

    Leaves out units that look like one already chosen: many learn nearly the same.
    """
    columns = weight.astype(np.float64)
    norms = np.linalg.norm(columns, axis=0)
    directions = columns / np.maximum(norms, np.finfo(np.float64).tiny)
    chosen: list[int] = []
    for unit in np.argsort(-norms, kind="stable"):
        if len(chosen) == count:
            break
        if np.all(directions[:, chosen].T @ directions[:, unit] < _LOOKS_ALIKE):
            chosen.append(int(unit))
    return chosen


def read_back(run: tsf.Run, counting: CountingStorage, memory: Memory) -> list[Check]:
    """Read slices of many kinds and compare each with `memory`, bit for bit.

    Statistics are compared to six digits instead: the store adds in float32 at first.
    """
    last = len(memory.loss) - 1
    unit = strongest_units(_array(memory.last[COPIED]), count=1)[0]
    copied = [memory.copies[step] for step in sorted(memory.copies)]
    end = max(memory.copies) + 1
    many = ("fc1.bias", "fc2.bias", "fc3.bias")
    slope = "gradient/fc2.weight"
    compare = partial(_compare, counting)
    return [
        compare(
            'run["loss"].read(mode="TRAIN")',
            lambda: run["loss"].read(mode="TRAIN"),
            np.array(memory.loss),
        ),
        compare(
            'run["accuracy"].read(mode="EVAL")',
            lambda: run["accuracy"].read(mode="EVAL"),
            np.array(list(memory.test_accuracy.values())),
        ),
        compare(
            f'run["{COPIED}"].read(steps=slice(0, {end}), index=np.s_[:, {unit}])',
            lambda: run[COPIED].read(steps=slice(0, end), index=np.s_[:, unit]),
            np.stack([copy[:, unit] for copy in copied]),
        ),
        compare(
            f'run["{COPIED}"].read(step=0)',
            lambda: run[COPIED].read(step=0),
            memory.copies[0],
        ),
        compare(
            f'run["{slope}"].at({last})[-16:, ::8]',
            lambda: run[slope].at(last)[-16:, ::8],
            _array(memory.last[slope])[-16:, ::8],
        ),
        compare(
            f'run["activation/fc1"].read(step={last}, index=0)',
            lambda: run["activation/fc1"].read(step=last, index=0),
            _array(memory.last["activation/fc1"])[0],
        ),
        compare(
            f'run.read([(f"fc{{i}}.bias", {last}, np.s_[:10]) for i in (1, 2, 3)])',
            lambda: np.stack(run.read([(name, last, np.s_[:10]) for name in many])),
            np.stack([_array(memory.last[name])[:10] for name in many]),
        ),
        compare(
            f'run["{slope}"].stats()["l2"]',
            lambda: run[slope].stats()["l2"],
            np.array(memory.gradient_l2[slope]),
            tolerance=1e-6,
        ),
    ]


def _array(value: object) -> npt.NDArray[np.generic]:
    assert isinstance(value, np.ndarray)  # the training put it there
    return value


def _compare(
    counting: CountingStorage,
    call: str,
    read: Callable[[], npt.NDArray[np.generic]],
    expected: npt.NDArray[np.generic],
    *,
    tolerance: float | None = None,
) -> Check:
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

"""Case 7: a small part of a tensor, at many steps, from files that lie in the page cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

import datasets
from peers import known
from peers.ours import Ours, OursBare, OursNumPy
from suite.case import Case, Figures, Place, Table, Verdict, tree_nbytes
from suite.contestant import Contestant, Item, Reader, Series, Store

NAME = "tensor"
QUICK_STEPS = 3
MOST_S = 1.0  # for each of both figures
MOST_TIMES = 40
MMAP = "safetensors"
COMPRESSING, MAPPING = 0.4, 1.5


@dataclass(frozen=True)
class Pattern:
    """What is read of which tensors.

    ``index`` gives another part for each number, so that nobody gains from keeping what is decoded.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    index: Callable[[int], tuple[Any, ...]]
    steps: int
    what: str

    def tensor(self, step: int, *, quick: bool) -> np.ndarray:
        """Give the tensor of a step; those beyond what the kind has are rolled along an axis."""
        tensors = np.asarray(datasets.load(self.kind, quick=quick))
        # Only of the quick data there is less than that.
        values = np.resize(tensors[step % len(tensors)], self.shape)
        return np.roll(values, step // len(tensors), axis=-1)


PATTERNS = (
    Pattern(
        "attention",
        "attention_f32",
        (6, 12, 128, 128),
        lambda n: np.s_[(3 + n) % 6, (5 + 7 * n) % 12, :20, :20],
        48,
        "a corner, [3, 5, :20, :20], of float32 attention (6, 12, 128, 128)",
    ),
    Pattern(
        "row",
        "weights_f32",
        (128, 9216),
        lambda n: np.s_[(77 + 13 * n) % 128, :],
        24,
        "a row, [77, :], of float32 weights (128, 9216)",
    ),
    Pattern(
        "column",
        "weights_f32",
        (1024, 1152),
        lambda n: np.s_[:, (77 + 131 * n) % 1152],
        24,
        "a column, [:, 77], of float32 weights as a matrix (1024, 1152)",
    ),
    Pattern(
        "filter",
        "weights_f32",
        (256, 512, 3, 3),
        lambda n: ((77 + 31 * n) % 256,),
        24,
        "a filter, [77], of float32 weights in the shape of a convolution's (256, 512, 3, 3)",
    ),
    Pattern(
        "odd",
        "attention_f16",
        (6, 12, 117, 117),
        lambda n: np.s_[(2 + n) % 6, (7 + 5 * n) % 12, 5:58, 3:116],
        48,
        "an odd part, [2, 7, 5:58, 3:116], of float16 attention (6, 12, 117, 117)",
    ),
)


class Slices(Case):
    """Write every step once; then read the same part of all steps, again and again."""

    number: ClassVar[int] = 7
    unit = "slice_seconds"

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self.name = f"slices-{pattern.name}"
        self.question = f"How long does it take to read {pattern.what}, at all steps?"
        self.data = (
            f"{pattern.steps} steps of {pattern.kind} (beyond what there are, rolled along the "
            "last axis), in default chunks; parts were read and compared before; each time another "
            "part of the same size, and the least time of about forty; with a handle that is open, "
            "and (with open) from opening to closing"
        )

    def contestants(self) -> Sequence[type[Contestant]]:
        return [Ours, OursNumPy, OursBare, *known.stores(reads_parts=True)]

    def _steps(self, *, quick: bool) -> int:
        return QUICK_STEPS if quick else self._pattern.steps

    def _series(self, *, quick: bool) -> Series:
        values = self._pattern.tensor(0, quick=quick)
        return Series(NAME, values.shape, values.dtype.name, self._steps(quick=quick))

    def prepare(self, contestant: Contestant, place: Place) -> None:
        assert isinstance(contestant, Store)

        def items() -> Any:
            for step in range(self._steps(quick=place.quick)):
                item: Item = (step, NAME, self._pattern.tensor(step, quick=place.quick))
                yield item

        contestant.write(place.kept / "run", [self._series(quick=place.quick)], items())

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, Store)
        series = [self._series(quick=place.quick)]
        steps, index = range(series[0].steps), self._pattern.index
        reader = contestant.reader(place.kept / "run", series)
        self._check(reader, contestant.name, steps, quick=place.quick)
        most = 0.05 if place.quick else MOST_S
        slice_s = _repeated(lambda n: reader.parts(NAME, steps, index(n)), most)
        reader.close()

        def from_the_start(n: int) -> None:
            opened = contestant.reader(place.kept / "run", series)
            opened.parts(NAME, steps, index(n))
            opened.close()

        nbytes = series[0].steps * int(np.prod(series[0].shape)) * series[0].numpy_dtype.itemsize
        return {
            "slice_seconds": slice_s,
            "with_open_seconds": _repeated(from_the_start, most),
            "ratio": nbytes / tree_nbytes(place.kept / "run"),
        }

    def _check(self, reader: Reader, who: str, steps: range, *, quick: bool) -> None:
        for n in (1, 0):
            index = self._pattern.index(n)
            expected = np.stack([self._pattern.tensor(s, quick=quick)[index] for s in steps])
            found = reader.parts(NAME, steps, index)
            if found.shape != expected.shape or found.tobytes() != expected.tobytes():
                raise RuntimeError(f"{who}: {self._pattern.what} came back otherwise")

    def judge(self, table: Table) -> list[Verdict]:
        compressing = [store.name for store in known.stores(compresses=True, reads_parts=True)]
        rival = table.best(compressing, self.unit)
        return [
            self._against(
                table, rival, COMPRESSING, f"≤ {COMPRESSING:g} × the fastest compressing"
            ),
            self._against(table, MMAP, MAPPING, f"≤ {MAPPING:g} × safetensors' mmap"),
        ]

    def _against(self, table: Table, rival: str | None, limit: float, must: str) -> Verdict:
        found = None if rival is None else table.ratio(Ours.name, rival, self.unit)
        if rival is None or found is None:
            return Verdict(must, "not measured", None)
        opened = table.ratio(Ours.name, rival, "with_open_seconds")
        raw = table.ratio(OursBare.name, rival, self.unit)
        more = f"with open {opened:.2f} ×" + ("" if raw is None else f"; ours-bare {raw:.2f} ×")
        return Verdict(must, f"{found:.2f} × {rival} ({more})", found <= limit)


def _repeated(action: Callable[[int], Any], most_s: float) -> float:
    """Give the least time of up to forty in about a second, of three at least.

    The middle would say how busy the machine is: what takes longer than a turn of the scheduler
    is interrupted, what is short is not.
    """
    times: list[float] = []
    while len(times) < 3 or (sum(times) < most_s and len(times) < MOST_TIMES):
        begin = time.perf_counter()
        action(len(times))
        times.append(time.perf_counter() - begin)
    return min(times)


CASES: list[Case] = [Slices(pattern) for pattern in PATTERNS]

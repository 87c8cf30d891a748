"""Case 8: many small tensors, as a hook that watches every layer of a small model saves them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

import datasets
from peers import known
from peers.ours import Ours, OursNumPy, OursSteps
from suite.case import Case, Figures, Place, Table, Verdict, tree_nbytes
from suite.contestant import Contestant, Item, Series, Store

TENSORS = 20
STEPS = 300
QUICK_STEPS = 5
SHAPE = (32, 32)  # float32: 4 KiB
RIVAL = "smdebug"
FACTOR = 8.0


class Small(Case):
    """The clock runs from the first tensor to the end of close."""

    number: ClassVar[int] = 8
    name = "small"
    question = "How long does it take to write 20 tensors of 4 KiB at each of 300 steps?"
    data = (
        "6,000 pieces (32, 32) of float32 hidden states, no two alike, in memory before the clock "
        "starts; each store was tried with one step before"
    )
    unit = "write_seconds"

    def contestants(self) -> Sequence[type[Contestant]]:
        return [Ours, OursSteps, OursNumPy, *known.stores()]

    def _items(self, steps: int, *, quick: bool) -> list[Item]:
        # Arrays of NumPy's own type, not of the mapped file's.
        flat = np.asarray(datasets.load("hidden_f32", quick=quick)).reshape(-1)
        size = SHAPE[0] * SHAPE[1]
        numbers = np.arange(steps * TENSORS) % (flat.size // size)
        return [
            (i // TENSORS, f"layer{i % TENSORS}", flat[n * size :][:size].reshape(SHAPE).copy())
            for i, n in enumerate(numbers)
        ]

    def _series(self, steps: int) -> list[Series]:
        return [Series(f"layer{i}", SHAPE, "float32", steps) for i in range(TENSORS)]

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, Store)
        steps = QUICK_STEPS if place.quick else STEPS
        contestant.write(place.scratch / "warm", self._series(1), self._items(1, quick=place.quick))
        items, series = self._items(steps, quick=place.quick), self._series(steps)
        begin, processor = time.perf_counter(), time.process_time()
        contestant.write(place.scratch / "run", series, items)
        seconds, processor = time.perf_counter() - begin, time.process_time() - processor
        nbytes = sum(values.nbytes for _, _, values in items)
        reader = contestant.reader(place.scratch / "run", series)
        for step, name, values in items[:: max(1, len(items) // 100)]:
            found = reader.whole(name, step)
            if found.shape != values.shape or found.tobytes() != values.tobytes():
                raise RuntimeError(f"{contestant.name}: {name} at {step} came back otherwise")
        reader.close()
        return {
            "write_seconds": seconds,
            "tensor_seconds": seconds / len(items),
            "tensor_processor_seconds": processor / len(items),
            "ratio": nbytes / tree_nbytes(place.scratch / "run"),
            "files": sum(1 for path in (place.scratch / "run").rglob("*") if path.is_file()),
        }

    def judge(self, table: Table) -> list[Verdict]:
        must = f"≥ {FACTOR:g} × {RIVAL}"
        speed = table.ratio(RIVAL, Ours.name, self.unit)
        if speed is None:
            return [Verdict(must, "not measured: its environment is missing", None)]
        others = {
            "a call of log a step": table.ratio(RIVAL, OursSteps.name, self.unit),
            "without the kernel": table.ratio(RIVAL, OursNumPy.name, self.unit),
            "in time of the processor": table.ratio(RIVAL, Ours.name, "tensor_processor_seconds"),
        }
        more = [f"{what} {value:.1f} ×" for what, value in others.items() if value is not None]
        return [Verdict(must, f"{speed:.1f} × ({', '.join(more)})", speed >= FACTOR)]


CASES: list[Case] = [Small()]

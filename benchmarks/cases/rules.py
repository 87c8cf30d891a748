"""Case 13: a rule over statistics against reading the tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from peers.npy import Npy
from peers.ours import Ours
from suite.case import Case, Figures, Place, Table, Verdict
from suite.contestant import Contestant, Reader, Series, Store

THRESHOLD = 1e-7
SAMPLE = (20, 50)  # series, steps
QUICK_SAMPLE = (5, 10)
SHAPE = (128, 128)  # 64 KiB of float32
LOOKS = 3


def names_of(count: int) -> list[str]:
    """Give names of gradients."""
    return [f"gradient/layer{i // 10:03d}/{i % 10}" for i in range(count)]


def size_of(*, quick: bool) -> tuple[int, int]:
    """Give how many series and steps the rule looks at."""
    return (50, 50) if quick else (1000, 1000)


def vanished(steps: int) -> dict[int, int]:
    """Say which series vanish, and from which step on."""
    return {1: steps // 2, 3: 0, 4: steps - 1}


def gradients(series: int, steps: int, shape: tuple[int, ...]) -> Callable[[int], np.ndarray]:
    """Give a function that makes the gradients of a step, one row a series."""
    base = np.random.default_rng(13).standard_normal((series, *shape)).astype(np.float32)
    since = np.full(series, steps)
    for number, step in vanished(steps).items():
        since[number] = step
    column = (slice(None), *(None for _ in shape))

    def at(step: int) -> np.ndarray:
        scale = np.where(step >= since, 1e-9, 1e-3 / (step + 1)).astype(np.float32)
        return base * scale[column]

    return at


class OursRule(Contestant):
    """The rule of the library, over what is in the index."""

    name = Ours.name
    settings = "rules.evaluate(url, [rules.VanishingGradient()], record=False)"
    needs = Ours.needs
    distributions = Ours.distributions
    environment = Ours.environment


class Reading(Contestant):
    """Reads each tensor whole, and computes the same with NumPy."""

    store: ClassVar[type[Store]]


class OursReading(Reading):
    """From a run of the library."""

    name = "ours-reading"
    settings = "tensor.read(step=…), np.abs(…).mean() of a sample, scaled up"
    needs = Ours.needs
    distributions = Ours.distributions
    environment = Ours.environment
    store = Ours


class NpyReading(Reading):
    """From files of NumPy."""

    name = "npy-reading"
    settings = "np.load(file), np.abs(…).mean() of a sample, scaled up"
    needs = Npy.needs
    distributions = Npy.distributions
    store = Npy


class StatisticsRule(Case):
    """Case 13."""

    number: ClassVar[int] = 13
    name = "rule"
    question = "How long does it take to find the vanishing gradients of a whole training?"
    data = (
        "statistics of 1,000 series × 1,000 steps. Whoever reads the data reads a sample of 20 "
        "series × 50 steps, float32 tensors of 64 KiB, and its time is scaled up to 1,000 × 1,000"
    )
    unit = "seconds"

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursRule, OursReading, NpyReading]

    def prepare(self, contestant: Contestant, place: Place) -> None:
        sample = QUICK_SAMPLE if place.quick else SAMPLE
        if isinstance(contestant, Reading):
            _write_sample(contestant.store(), place.kept / "sample", sample)
            return
        _write_sample(Ours(), place.kept / "sample", sample)
        _write_statistics(place.kept / "run", *size_of(quick=place.quick))

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        series, steps = size_of(quick=place.quick)
        sample = QUICK_SAMPLE if place.quick else SAMPLE
        if not isinstance(contestant, Reading):
            return _evaluate(place.kept, series, steps, sample)
        described = _described(sample)
        reader = contestant.store().reader(place.kept / "sample", described)
        _read(reader, (1, 1))
        begin = time.perf_counter()
        found = _read(reader, sample)
        seconds = time.perf_counter() - begin
        _check(found, _expected(*sample), contestant.name)
        tensors = sample[0] * sample[1]
        return {
            "seconds": seconds * (series * steps / tensors),
            "a_tensor_seconds": seconds / tensors,
            "chunk_reads": float(series * steps),
        }

    def judge(self, table: Table) -> list[Verdict]:
        reads = table.median(OursRule.name, "chunk_reads")
        verdicts = []
        if reads is not None:
            verdicts.append(Verdict("no chunk is read", f"{reads:g}", reads == 0))
        for other in (OursReading.name, NpyReading.name):
            speed = table.ratio(other, OursRule.name, self.unit)
            must = f"≥ 100 × as fast as {other}"
            if speed is None:
                verdicts.append(Verdict(must, "not measured", None))
            else:
                verdicts.append(Verdict(must, f"{speed:.0f} ×", speed >= 100))
        return verdicts


def _described(sample: tuple[int, int]) -> list[Series]:
    return [Series(name, SHAPE, "float32", sample[1]) for name in names_of(sample[0])]


def _write_sample(store: Store, place: Path, sample: tuple[int, int]) -> None:
    at = gradients(*sample, SHAPE)
    names = names_of(sample[0])
    items = (
        (step, name, values)
        for step in range(sample[1])
        for name, values in zip(names, at(step), strict=True)
    )
    store.write(place, _described(sample), items)


def _write_statistics(place: Path, series: int, steps: int) -> None:
    """Statistics of small tensors: those of large ones are as many."""
    import tensorstore_fmt as tsf

    # Smaller ones would be kept in the index themselves.
    at, names = gradients(series, steps, (128,)), names_of(series)
    with tsf.create_run(place, stats="only", flush_interval_s=3600) as run:
        for step in range(steps):
            run.log(dict(zip(names, at(step), strict=True)), step=step)
            if step % 50 == 49:
                run.flush()


def _evaluate(kept: Path, series: int, steps: int, sample: tuple[int, int]) -> Figures:
    from tensorstore_fmt import rules
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.reading.session import Session
    from tensorstore_fmt.storage import open_storage
    from tensorstore_fmt.testing.storage import CountingStorage

    rule = rules.VanishingGradient
    # The run with tensors in it shows whether any is read.
    counting = CountingStorage(open_storage(kept / "sample", writable=False))
    run = Run(Session(str(kept / "sample"), None, storage=counting))
    report = rules.evaluate(run, [rule(threshold=THRESHOLD)], record=False)
    _check({(f.series, f.step) for f in report.findings}, _expected(*sample), "sample")
    reads = sum(op.path.startswith("shards/") for op in counting.operations)
    times = []
    for _ in range(LOOKS):
        begin = time.perf_counter()
        report = rules.evaluate(str(kept / "run"), [rule(threshold=THRESHOLD)], record=False)
        times.append(time.perf_counter() - begin)
    _check({(f.series, f.step) for f in report.findings}, _expected(series, steps), "run")
    return {"seconds": min(times), "chunk_reads": float(reads)}


def _read(reader: Reader, sample: tuple[int, int]) -> set[tuple[str, int]]:
    """Find where a series begins to vanish."""
    found = set()
    for name in names_of(sample[0]):
        was = False
        for step in range(sample[1]):
            fires = bool(np.abs(reader.whole(name, step)).mean(dtype=np.float64) < THRESHOLD)
            if fires and not was:
                found.add((name, step))
            was = fires
    return found


def _expected(series: int, steps: int) -> set[tuple[str, int]]:
    names = names_of(series)
    return {(names[number], step) for number, step in vanished(steps).items()}


def _check(found: set[tuple[str, int]], expected: set[tuple[str, int]], where: str) -> None:
    if found != expected:
        raise RuntimeError(f"{where}: found {sorted(found)[:5]}, not {sorted(expected)[:5]}")


CASES: list[Case] = [StatisticsRule()]

"""Case 11: cold reads from an S3 bucket, near and far away."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import ClassVar

import numpy as np

from peers import known
from peers.ours import Ours
from suite.bucket import Bucket, rounds, serving
from suite.case import Case, Figures, Place, Table, Verdict
from suite.contestant import Contestant, Item, Reader, Series, Store

LATENCIES_MS = (0, 30, 100)
MOST_SECONDS = 20.0  # a read that would take longer is not waited for
ENOUGH_SECONDS = 2.0  # then a read is not repeated
REPEATS = 3
KEY = "data"


class Cold(Case):
    """Open, read, close; nothing is known of the bucket before, but connections may be there."""

    number: ClassVar[int] = 11
    cache = "cold"
    unit = "at_100_ms_seconds"
    without: ClassVar[Sequence[str]] = ()

    def contestants(self) -> Sequence[type[Contestant]]:
        peers = [store for store in known.stores(takes_s3=True) if store.name not in self.without]
        return [Ours, *peers]

    def series(self, *, quick: bool) -> list[Series]:
        """Say what is stored."""
        raise NotImplementedError

    def values(self, series: Series, step: int) -> np.ndarray:
        """Make the values of one name at one step."""
        raise NotImplementedError

    def read(self, reader: Reader, series: Sequence[Series]) -> np.ndarray:
        """Do what is measured."""
        raise NotImplementedError

    def expected(self, series: Sequence[Series]) -> np.ndarray:
        """Make what that must give."""
        raise NotImplementedError

    def _items(self, series: Sequence[Series]) -> Iterator[Item]:
        for step in range(max(s.steps for s in series)):
            for s in series:
                yield step, s.name, self.values(s, step)

    def prepare(self, contestant: Contestant, place: Place) -> None:
        assert isinstance(contestant, Store)
        series = self.series(quick=place.quick)
        with serving(place.kept / "objects") as bucket:
            contestant.write(bucket.url(KEY), series, self._items(series))

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, Store)
        series = self.series(quick=place.quick)
        expected = self.expected(series)
        with serving(place.kept / "objects") as bucket:

            def once() -> float:
                _forget()
                begin = time.perf_counter()
                reader = contestant.reader(bucket.url(KEY), series)
                found = self.read(reader, series)
                seconds = time.perf_counter() - begin
                reader.close()
                if found.shape != expected.shape or found.tobytes() != expected.tobytes():
                    raise RuntimeError(f"{contestant.name}: {self.name}: other values came back")
                return seconds

            once()  # imports, and threads
            return _over_latencies(bucket, once, 1 if place.quick else REPEATS)

    def judge(self, table: Table) -> list[Verdict]:
        peers = [name for name in table.trials if not name.startswith("ours")]
        verdicts = [_fewest_rounds(table, peers)]
        for latency in LATENCIES_MS[1:]:
            figure = f"at_{latency}_ms_seconds"
            rival = table.best(peers, figure)
            must = f"at {latency} ms: ≤ 0.7 × the time of the best peer"
            ratio = None if rival is None else table.ratio(Ours.name, rival, figure)
            if ratio is None:
                verdicts.append(Verdict(must, "no peer was measured", None))
                continue
            verdicts.append(Verdict(must, f"{ratio:.2f} × {rival}", ratio <= 0.7))
        return verdicts

    def draw(self, table: Table, path: Path) -> None:
        """Draw time over latency, and what was asked for."""
        from suite.lines import Line, Panel, draw_panels

        lines = []
        for name in table.trials:
            found = [(ms, table.median(name, f"at_{ms}_ms_seconds")) for ms in LATENCIES_MS]
            points = [(ms, value) for ms, value in found if value is not None]
            count = table.median(name, "rounds") or 0
            lines.append(Line(name, f"{name}, {count:.0f} rounds", points))
        lines.sort(key=lambda line: line.points[-1][1] if line.points else 0)
        panel = Panel("", lines, "milliseconds of latency", "seconds", "y")
        draw_panels(path, self.question, [panel])


def _fewest_rounds(table: Table, peers: Sequence[str]) -> Verdict:
    own, rival = table.median(Ours.name, "rounds"), table.best(peers, "rounds")
    must = "no peer needs fewer rounds of requests"
    if own is None or rival is None:
        return Verdict(must, "no peer was measured", None)
    least = table.median(rival, "rounds")
    assert least is not None
    return Verdict(must, f"{own:g}; {rival} {least:g}", own <= least)


def _over_latencies(bucket: Bucket, once: Callable[[], float], repeats: int) -> Figures:
    figures: Figures = {}
    chain = 0
    for latency in LATENCIES_MS:
        at_once = figures.get("at_0_ms_seconds", 0.0)
        if latency and at_once + chain * latency / 1e3 > MOST_SECONDS:
            break
        bucket.set_latency(latency / 1e3)
        bucket.take_log()
        times: list[float] = []
        while len(times) < repeats and sum(times) < ENOUGH_SECONDS:
            times.append(once())
            log = bucket.take_log()
        figures[f"at_{latency}_ms_seconds"] = median(times)
        chain = rounds(log)
        figures["rounds"] = chain
        figures["requests"] = len(log)
        figures["received_bytes"] = sum(request.nbytes for request in log)
    return figures


def _forget() -> None:
    """Drop what clients know of the bucket, but not the clients: listings of directories."""
    gc.collect()
    if "s3fs" in sys.modules:
        import s3fs

        for filesystem in list(s3fs.S3FileSystem._cache.values()):
            filesystem.invalidate_cache()


class ColdSlice(Cold):
    """A small part of one large tensor."""

    name = "bucket-slice"
    question = "How long does a first small slice of a tensor in a bucket take, from nothing?"
    data = (
        "attention of 12 layers and 12 heads, float32 (12, 12, 128, 128), at 10 steps; read "
        "[3, 5, :20, :20] of one step"
    )

    def series(self, *, quick: bool) -> list[Series]:
        shape = (4, 6, 64, 64) if quick else (12, 12, 128, 128)
        return [Series("attention", shape, "float32", 2 if quick else 10)]

    def values(self, series: Series, step: int) -> np.ndarray:
        x = np.random.default_rng([11, step]).standard_normal(series.shape).astype(np.float32)
        x = np.exp(2 * x)
        return x / x.sum(-1, keepdims=True)

    def read(self, reader: Reader, series: Sequence[Series]) -> np.ndarray:
        return reader.part("attention", series[0].steps - 1, np.s_[3, 5, :20, :20])

    def expected(self, series: Sequence[Series]) -> np.ndarray:
        return self.values(series[0], series[0].steps - 1)[3, 5, :20, :20]


class ColdCurve(Cold):
    """All steps of one number."""

    name = "bucket-curve"
    question = "How long does a loss curve take from a bucket, from nothing?"
    data = (
        "four float64 numbers saved at each of 1,000 steps; read all steps of one (without "
        "smdebug, which keeps float32 of them)"
    )
    without = ("smdebug",)

    def series(self, *, quick: bool) -> list[Series]:
        steps = 12 if quick else 1000
        return [Series(name, (), "float64", steps) for name in ("loss", "accuracy", "lr", "norm")]

    def values(self, series: Series, step: int) -> np.ndarray:
        return np.float64(len(series.name) / (step + 1) + np.sin(step)).reshape(())

    def read(self, reader: Reader, series: Sequence[Series]) -> np.ndarray:
        return reader.parts("loss", range(series[0].steps), ())

    def expected(self, series: Sequence[Series]) -> np.ndarray:
        return np.stack([self.values(series[0], step) for step in range(series[0].steps)])


class ColdSteps(Cold):
    """A small part of a tensor at many steps."""

    name = "bucket-steps"
    question = "How long does a row's beginning at each of 1,000 steps take from a bucket?"
    data = (
        "two float32 weights (16, 1024) that a random walk changes, at each of 1,000 steps; read "
        "[3, :20] of all steps of one (without smdebug, which takes minutes to store a file a step)"
    )
    without = ("smdebug",)

    def __init__(self) -> None:
        self._walks: dict[str, tuple[np.random.Generator, np.ndarray, int]] = {}

    def series(self, *, quick: bool) -> list[Series]:
        steps = 12 if quick else 1000
        return [Series(name, (16, 1024), "float32", steps) for name in ("up", "down")]

    def values(self, series: Series, step: int) -> np.ndarray:
        rng, values, at = self._walks.get(series.name) or (
            np.random.default_rng(len(series.name)),
            np.zeros(series.shape, np.float32),
            -1,
        )
        if at >= step:
            rng, values, at = np.random.default_rng(len(series.name)), np.zeros_like(values), -1
        for _ in range(at, step):
            values = values + rng.standard_normal(series.shape, np.float32) * np.float32(1e-3)
        self._walks[series.name] = rng, values, step
        return values

    def read(self, reader: Reader, series: Sequence[Series]) -> np.ndarray:
        return reader.parts("up", range(series[0].steps), np.s_[3, :20])

    def expected(self, series: Sequence[Series]) -> np.ndarray:
        return np.stack([self.values(series[0], s)[3, :20] for s in range(series[0].steps)])


CASES: list[Case] = [ColdSlice(), ColdCurve(), ColdSteps()]

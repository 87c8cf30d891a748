"""Cases 1 and 2: a stream of large tensors, as training gives them, to the end of ``close``."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

import datasets
from peers import known
from peers.ours import Ours, OursBare, OursNumPy, OursRaw
from suite.case import Case, Figures, Place, Table, Verdict, tree_nbytes
from suite.contestant import Contestant, Item, Series, Store
from suite.memory import PeakMemory

RATIO_TOLERANCE = 0.02  # rivals are those whose ratio is within 2 % of ours, or better


def described(pieces: Sequence[datasets.Piece]) -> list[Series]:
    """Say in advance what a stream holds."""
    found: dict[str, list[datasets.Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.name, []).append(piece)
    return [
        Series(name, tuple(ps[0].array.shape), ps[0].dtype, max(p.step for p in ps) + 1)
        for name, ps in found.items()
    ]


def in_memory(pieces: Sequence[datasets.Piece]) -> Iterator[Item]:
    """Give the tensors of a stream as arrays of their own, as training would have them."""
    for piece in pieces:
        yield piece.step, piece.name, np.array(piece.array)


class Stream(Case):
    """Write a gigabyte until all of it is in files; then (durable) until they are on the disk."""

    cache = "warm"
    unit = "write_seconds"

    def __init__(self, name: str, dtype: str, question: str, stores: Sequence[type[Store]]) -> None:
        self.name = name
        self.question = question
        self._dtype = dtype
        self._stores = stores
        self.data = (
            f"1 GB of {datasets.STREAMS[dtype]} tensors of 1 to 16 MB: weights, gradients, moments "
            "and activations of a training, in its order, in memory before the clock starts"
        )

    def contestants(self) -> Sequence[type[Contestant]]:
        return self._stores

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, Store)
        pieces = datasets.load_stream(self._dtype, quick=place.quick)
        series = described(pieces)
        _warm_up(contestant, place)
        items = list(in_memory(pieces))
        nbytes = sum(values.nbytes for _, _, values in items)
        _touch(2 * nbytes)
        memory = PeakMemory()
        begin = time.perf_counter()
        contestant.write(place.scratch / "stream", series, items)
        end = time.perf_counter()
        seconds = (contestant.in_files or end) - begin
        _sync(place.scratch / "stream")
        durable_s = time.perf_counter() - begin
        stored = tree_nbytes(place.scratch / "stream")
        _check(contestant, place, series, items)
        return {
            "write_seconds": seconds,
            "gb_per_second": nbytes / seconds / 1e9,
            "ratio": nbytes / stored,
            "durable_seconds": durable_s,
            "peak_memory_bytes": memory.over_before(),
            "stored_bytes": stored,
        }


def _touch(nbytes: int) -> None:
    """Use so much memory once and give it back: a virtual machine's host may not have given it yet.

    What that costs would fall on whoever comes first.
    """
    np.ones(nbytes, np.uint8)


def _sync(folder: Path) -> None:
    """Make files durable, whose writer did not."""
    for parent, _, files in os.walk(folder):
        for file in files:
            descriptor = os.open(os.path.join(parent, file), os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _warm_up(store: Store, place: Place) -> None:
    """Import, start threads and touch the disk with one small tensor, before the clock starts."""
    values = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    series = [Series("warm", values.shape, "float32", 1)]
    store.write(place.scratch / "warm", series, [(0, "warm", values)])
    shutil.rmtree(place.scratch / "warm", ignore_errors=True)


def _check(store: Store, place: Place, series: Sequence[Series], items: Sequence[Item]) -> None:
    """Read the last tensor back: who stores other bits takes no part."""
    step, name, values = items[-1]
    reader = store.reader(place.scratch / "stream", series)
    found = reader.whole(name, step)
    reader.close()
    if found.shape != values.shape or found.tobytes() != values.tobytes():
        raise RuntimeError(f"{store.name}: {name} at step {step} came back otherwise")


class CompressedStream(Stream):
    """Case 1."""

    number: ClassVar[int] = 1

    def judge(self, table: Table) -> list[Verdict]:
        verdicts = []
        for ours, factor in ((Ours.name, 2.0), (OursNumPy.name, 1.0)):
            own_ratio = table.median(ours, "ratio")
            if own_ratio is None:
                continue
            rivals = [
                name
                for name in table.trials
                if not name.startswith("ours")
                and (table.median(name, "ratio") or 0) >= own_ratio * (1 - RATIO_TOLERANCE)
            ]
            rival = table.best(rivals, self.unit)
            must = f"{ours}: ≥ {factor:g} × the fastest peer of similar ratio or better"
            if rival is None:
                verdicts.append(Verdict(must, "no peer of such a ratio was measured", None))
                continue
            speed = table.ratio(rival, ours, self.unit)
            assert speed is not None
            durable = table.ratio(rival, ours, "durable_seconds")
            more = "" if durable is None else f"; until it is durable {durable:.2f} ×"
            measured = f"{speed:.2f} × {rival} (ratio {own_ratio:.3f}){more}"
            verdicts.append(Verdict(must, measured, speed >= factor))
        return verdicts


class RawStream(Stream):
    """Case 2."""

    number: ClassVar[int] = 2

    def judge(self, table: Table) -> list[Verdict]:
        verdicts = []
        for rival in ("safetensors", "npy"):
            speed = table.ratio(rival, OursBare.name, self.unit)
            must = f"statistics off: ≥ 0.9 × {rival}"
            if speed is None:
                verdicts.append(Verdict(must, "not measured", None))
                continue
            on = table.ratio(rival, OursRaw.name, self.unit)
            more = "" if on is None else f"; with statistics {on:.2f} ×"
            verdicts.append(Verdict(must, f"{speed:.2f} ×{more}", speed >= 0.9))
        return verdicts


CASES: list[Case] = [
    CompressedStream(
        "stream-f32",
        "f32",
        "How long does a stream of 1 GB of float32 tensors take, compressed?",
        [Ours, OursNumPy, *known.stores(compresses=True)],
    ),
    CompressedStream(
        "stream-bf16",
        "bf16",
        "How long does a stream of 1 GB of bfloat16 tensors take, compressed?",
        [Ours, OursNumPy, *known.stores(compresses=True)],
    ),
    RawStream(
        "stream-raw",
        "f32",
        "How long does a stream of 1 GB of float32 tensors take, stored raw?",
        [OursBare, OursRaw, *known.stores(compresses=False)],
    ),
]

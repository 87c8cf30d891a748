"""Cases 5 and 6: whole tensors, from files that lie in the page cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import ClassVar

import numpy as np

import datasets
from cases.streaming import RATIO_TOLERANCE, described
from peers import known
from peers.npy import Npy
from peers.ours import Ours, OursBare, OursMapped, OursNumPy, OursRaw
from suite.case import Case, Figures, Place, Table, Verdict, tree_nbytes
from suite.contestant import Contestant, Store

NBYTES = 256_000_000
PASSES = 3
VIEWS = 16
VIEW_LIMIT_S = 50e-6


def sample(dtype: str, *, quick: bool) -> list[datasets.Piece]:
    """Take tensors of the stream, spread over all of it; steps are counted anew, without gaps."""
    pieces = datasets.load_stream(dtype, quick=quick)
    total = sum(piece.array.nbytes for piece in pieces)
    every = max(1, round(total / NBYTES))
    seen: dict[str, int] = {}
    found = []
    for piece in pieces[::every]:
        step = seen.get(piece.name, 0)
        seen[piece.name] = step + 1
        found.append(piece._replace(step=step))
    return sorted(found, key=lambda piece: piece.step)


class Whole(Case):
    """Write once; then read each tensor whole, in the order it was written."""

    unit = "read_seconds"

    def __init__(self, name: str, dtype: str, question: str, stores: Sequence[type[Store]]) -> None:
        self.name = name
        self.question = question
        self._dtype = dtype
        self._stores = stores
        self.data = (
            f"256 MB of {datasets.STREAMS[dtype]} tensors of 1 to 16 MB, spread over the stream; "
            "read once and compared before the clock starts; the middle of three passes, each with "
            "everything opened anew before the clock starts"
        )

    def contestants(self) -> Sequence[type[Contestant]]:
        return self._stores

    def prepare(self, contestant: Contestant, place: Place) -> None:
        assert isinstance(contestant, Store)
        pieces = sample(self._dtype, quick=place.quick)
        items = ((piece.step, piece.name, np.array(piece.array)) for piece in pieces)
        contestant.write(place.kept / "run", described(pieces), items)

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, Store)
        pieces = sample(self._dtype, quick=place.quick)
        nbytes = sum(piece.array.nbytes for piece in pieces)
        stored = tree_nbytes(place.kept / "run")
        self._check(contestant, place, pieces)
        passes = []
        for _ in range(1 if place.quick else PASSES):
            # Opened anew: some keep decoded chunks, and a tensor is seldom read twice.
            reader = contestant.reader(place.kept / "run", described(pieces))
            begin = time.perf_counter()
            for piece in pieces:
                reader.whole(piece.name, piece.step)
            passes.append(time.perf_counter() - begin)
            reader.close()
        return {
            "read_seconds": median(passes),
            "gb_per_second": nbytes / median(passes) / 1e9,
            "ratio": nbytes / stored,
            "stored_bytes": stored,
        }

    def _check(self, store: Store, place: Place, pieces: Sequence[datasets.Piece]) -> None:
        """Read everything once, so that it is in the page cache, and compare."""
        reader = store.reader(place.kept / "run", described(pieces))
        for piece in pieces:
            found = reader.whole(piece.name, piece.step)
            if found.shape != piece.array.shape or found.tobytes() != piece.array.tobytes():
                raise RuntimeError(f"{store.name}: {piece.name} came back otherwise")
        reader.close()


class WholeCompressed(Whole):
    """Case 5."""

    number: ClassVar[int] = 5

    def judge(self, table: Table) -> list[Verdict]:
        own_ratio = table.median(Ours.name, "ratio")
        must = "≥ 1.5 × the fastest peer of similar ratio or better"
        if own_ratio is None:
            return [Verdict(must, "not measured", None)]
        rivals = [
            name
            for name in table.trials
            if not name.startswith("ours")
            and (table.median(name, "ratio") or 0) >= own_ratio * (1 - RATIO_TOLERANCE)
        ]
        rival = table.best(rivals, self.unit)
        if rival is None:
            return [Verdict(must, "no peer of such a ratio was measured", None)]
        speed = table.ratio(rival, Ours.name, self.unit)
        assert speed is not None
        without = table.ratio(rival, OursNumPy.name, self.unit)
        measured = f"{speed:.2f} × {rival} (ratio {own_ratio:.3f})"
        if without is not None:
            measured += f"; without the kernel {without:.2f} ×"
        return [Verdict(must, measured, speed >= 1.5)]


class WholeRaw(Whole):
    """Case 6."""

    number: ClassVar[int] = 6

    def judge(self, table: Table) -> list[Verdict]:
        must = "≥ 0.8 × np.load"
        speed = table.ratio(Npy.name, OursBare.name, self.unit)
        if speed is None:
            return [Verdict(must, "not measured", None)]
        raw = table.ratio(Npy.name, OursRaw.name, self.unit)
        more = "" if raw is None else f" (with statistics stored: {raw:.2f} ×)"
        return [Verdict(must, f"{speed:.2f} ×{more}", speed >= 0.8)]


class View(Case):
    """Case 6, the view: only ours takes part, beside the checksum of the same bytes alone."""

    number: ClassVar[int] = 6
    name = "whole-view"
    question = "How long does a view of a raw chunk take, without a copy?"
    data = (
        "4 MB float32 tensors of one chunk each, stored raw, in one shard; a first view computes "
        "the checksum, as does the reference over the same bytes, newly mapped; then the same "
        "views again"
    )
    unit = "first_seconds"

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursMapped]

    def _tensors(self, *, quick: bool) -> np.ndarray:
        flat = datasets.load("weights_f32", quick=quick).reshape(-1)
        count = 4 if quick else VIEWS
        side = 128 if quick else 512
        width = min(2048, flat.size // (side * count))
        return np.array(flat[: count * side * width]).reshape(count, side, width)

    def prepare(self, contestant: Contestant, place: Place) -> None:
        assert isinstance(contestant, Store)
        tensors = self._tensors(quick=place.quick)
        items = [(step, "x", values) for step, values in enumerate(tensors)]
        contestant.write(place.kept / "run", [], items)
        tensors.tofile(place.kept / "plain")

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        import crc32c

        import tensorstore_fmt as tsf

        tensors = self._tensors(quick=place.quick)
        first, checksum, again = [], [], []
        for _ in range(3):
            plain = np.memmap(place.kept / "plain", tensors.dtype, "r", shape=tensors.shape)
            run = tsf.open_run(place.kept / "run")
            handle = run["x"]
            handle.view(step=0)  # reads the page of the index
            crc32c.crc32c(plain[0])
            for step in range(1, len(tensors)):
                values = plain[step]
                begin = time.perf_counter()
                crc32c.crc32c(values)
                between = time.perf_counter()
                found = handle.view(step=step)
                end = time.perf_counter()
                handle.view(step=step)
                again.append(time.perf_counter() - end)
                checksum.append(between - begin)
                first.append(end - between)
                if found.tobytes() != tensors[step].tobytes() or found.flags.writeable:
                    raise RuntimeError(f"the view of step {step} is another, or can be written to")
            del found
            run.close()
        return {
            "first_seconds": median(first),
            "checksum_seconds": median(checksum),
            "over_checksum_seconds": float(np.median(np.subtract(first, checksum))),
            "again_seconds": median(again),
        }

    def judge(self, table: Table) -> list[Verdict]:
        verdicts = []
        for figure, must in (
            ("over_checksum_seconds", "a first view ≤ its checksum's time + 50 µs"),
            ("again_seconds", "a view of what was checked ≤ 50 µs"),
        ):
            found = table.median(OursMapped.name, figure)
            if found is None:
                verdicts.append(Verdict(must, "not measured", None))
                continue
            plus = "+ " if figure.startswith("over") else ""
            verdicts.append(Verdict(must, f"{plus}{found * 1e6:.0f} µs", found <= VIEW_LIMIT_S))
        return verdicts


_COMPRESSED = [Ours, OursNumPy, *known.stores(compresses=True)]

CASES: list[Case] = [
    WholeCompressed(
        "whole-f32",
        "f32",
        "How long does it take to read 256 MB of compressed float32 tensors?",
        _COMPRESSED,
    ),
    WholeCompressed(
        "whole-bf16",
        "bf16",
        "How long does it take to read 256 MB of compressed bfloat16 tensors?",
        _COMPRESSED,
    ),
    WholeRaw(
        "whole-raw",
        "f32",
        "How long does it take to read 256 MB of float32 tensors that are stored raw?",
        [OursBare, OursRaw, *known.stores(compresses=False)],
    ),
    View(),
]

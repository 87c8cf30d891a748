"""Case 15: how much memory reading, opening and streaming take at most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from cases import opening
from peers.ours import Ours
from suite.case import Case, Figures, Place, Table, Verdict
from suite.contestant import CHUNK_NBYTES, Contestant
from suite.memory import PeakMemory

MIB = 1024 * 1024
QUEUE_NBYTES = 256 * MIB  # the default


class OursMemory(Contestant):
    """The library, default settings."""

    name = Ours.name
    settings = "default settings"
    needs = Ours.needs
    distributions = Ours.distributions
    environment = Ours.environment


class Memory(Case):
    """Whatever is done is done once to something small before: imports and threads are there."""

    number: ClassVar[int] = 15
    unit = "over_imports_bytes"

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursMemory]

    def verdict(self, table: Table, must: str, figure: str, most: float) -> Verdict:
        """Compare a figure with what it may be at most."""
        found = table.median(Ours.name, figure)
        if found is None:
            return Verdict(must, "not measured", None)
        return Verdict(must, f"{found / 1e6:.1f} MB of {most / 1e6:.1f} MB", found <= most)


def stream(folder: Path, side: int, steps: int) -> None:
    """Log square tensors of floats, all different."""
    import tensorstore_fmt as tsf

    values = np.random.default_rng(15).standard_normal((side, side)).astype(np.float32)
    with tsf.create_run(folder) as run:
        for step in range(steps):
            values[:, 0] = step
            run.log({"weights": values}, step=step)


class SliceMemory(Memory):
    """Of slices of a large run."""

    name = "memory-slice"
    question = "How much memory does a slice of a 4 GB run take, beside its result?"
    data = (
        "256 float32 tensors (2048, 2048), 16 MB each; read [100, :20] of one, and [100:110] of "
        "all, opening the run each time"
    )
    unit = "all_steps_over_result_bytes"

    def _size(self, *, quick: bool) -> tuple[int, int]:
        return (512, 8) if quick else (2048, 256)

    def prepare(self, contestant: Contestant, place: Place) -> None:
        stream(place.kept / "run", *self._size(quick=place.quick))
        stream(place.kept / "small", 512, 4)

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        side, steps = self._size(quick=place.quick)
        row, rows = np.s_[100, :20], np.s_[100:110]
        _read(place.kept / "small", slice(0, 1), row)
        _read(place.kept / "small", slice(None), rows)
        figures: Figures = {}
        for label, which, index in (
            ("one_step", slice(steps // 2, steps // 2 + 1), row),
            ("all_steps", slice(None), rows),
        ):
            memory = PeakMemory()
            found = _read(place.kept / "run", which, index)
            figures[f"{label}_over_result_bytes"] = max(0, memory.over_before() - found.nbytes)
            figures[f"{label}_result_bytes"] = found.nbytes
            if found.shape[0] != len(range(steps)[which]) or found.shape[-1] not in (20, side):
                raise RuntimeError(f"{self.name}: {label} has the shape {found.shape}")
        return figures

    def judge(self, table: Table) -> list[Verdict]:
        most = 8 * CHUNK_NBYTES
        return [
            self.verdict(
                table,
                f"{text}: the result + 8 chunks of 256 KiB",
                f"{label}_over_result_bytes",
                most,
            )
            for label, text in (("one_step", "one step"), ("all_steps", "all steps"))
        ]


def _read(folder: Path, steps: slice, index: object) -> np.ndarray:
    import tensorstore_fmt as tsf

    with tsf.open_run(folder) as run:
        return run["weights"].read(steps=steps, index=index)


class OpeningMemory(Memory):
    """Of looking into a large run."""

    name = "memory-opening"
    question = "How much memory does opening a run of 10⁷ entries take?"
    data = "that of the case opening: names of the run, steps of one, closed and live"
    timeout_s: ClassVar[float] = opening.Opening.timeout_s

    def _folder(self, place: Place) -> Path:
        return place.kept.parents[1] / opening.Opening.name / Ours.name

    def prepare(self, contestant: Contestant, place: Place) -> None:
        there = Place(self._folder(place), place.scratch, place.quick)
        if not there.is_prepared():
            there.begin_preparing()
            opening.Opening().prepare(opening.OursLooking(), there)
            there.end_preparing()

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        sizes = opening.QUICK_SIZES if place.quick else opening.SIZES
        looking = opening.OursLooking()
        looking.look(self._folder(place) / f"live-{sizes[0]}")
        figures: Figures = {}
        for state in ("closed", "live"):
            memory = PeakMemory()
            looking.look(self._folder(place) / f"{state}-{sizes[-1]}")
            figures[f"{state}_over_imports_bytes"] = memory.over_before()
        return {"over_imports_bytes": max(figures.values()), **figures}

    def judge(self, table: Table) -> list[Verdict]:
        return [self.verdict(table, "≤ 100 MB", "over_imports_bytes", 100e6)]


class StreamingMemory(Memory):
    """Of logging more than fits the queue."""

    name = "memory-streaming"
    question = "How much memory does streaming 1 GB take?"
    data = "float32 tensors (2048, 2048), 16 MB each, as fast as they are taken"

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        stream(place.scratch / "small", 512, 4)
        memory = PeakMemory()
        stream(place.scratch / "run", 2048, 4 if place.quick else 64)
        return {"over_imports_bytes": memory.over_before()}

    def judge(self, table: Table) -> list[Verdict]:
        most = QUEUE_NBYTES + 128e6
        return [self.verdict(table, "queue_bytes + 128 MB", "over_imports_bytes", most)]


CASES: list[Case] = [SliceMemory(), OpeningMemory(), StreamingMemory()]

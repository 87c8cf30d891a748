"""Case 10: what it costs to look into a run, over the number of its entries."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from peers.ours import Ours
from suite.case import Case, Figures, Place, Table, Verdict
from suite.contestant import Contestant

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
QUICK_SIZES = (1_000, 10_000)
NBYTES = 300  # of a tensor: more than is kept in the index itself
FLUSHES = 200  # at most
LOOKS = 9


def names_of(entries: int) -> list[str]:
    """Give the names: 1,000, or a tenth of the entries where those are few."""
    count = min(1000, entries // 10)
    return [f"block{i // 10:03d}/weight{i % 10}" for i in range(count)]


def label(entries: int) -> str:
    """Name a size in figures."""
    return f"10_{len(str(entries)) - 1}"


def build(folder: Path, entries: int) -> None:
    """Make a run of so many tensors, and a copy of it from before its end.

    The copy is what a reader finds while a run is written, or after its writer was killed. It
    shares the tensors' files: only the index differs.
    """
    import tensorstore_fmt as tsf

    names = names_of(entries)
    steps = entries // len(names)
    data = np.random.default_rng(0).integers(0, 256, (len(names), NBYTES)).astype(np.uint8)
    closed = folder / f"closed-{entries}"
    run = tsf.create_run(closed, compression="none", stats=False, flush_interval_s=3600)
    every = max(1, steps // FLUSHES)
    for step in range(steps):
        data[:, :4] = np.frombuffer(np.int32(step).tobytes(), np.uint8)
        run.log(dict(zip(names, data, strict=True)), step=step)
        if (step + 1) % every == 0:
            run.flush()
    run.flush()
    _copy_of_index(closed, folder / f"live-{entries}")
    run.close()


def _copy_of_index(run: Path, copy: Path) -> None:
    """Copy all that lies there now; the writer may be about to merge and delete."""
    while True:
        shutil.rmtree(copy, ignore_errors=True)
        try:
            shutil.copytree(run, copy, copy_function=_copy, ignore=lambda *_: ["locks"])
        except shutil.Error:
            time.sleep(0.5)
        else:
            return


def _copy(source: str, target: str) -> None:
    if f"{os.sep}index{os.sep}" in source:
        shutil.copy2(source, target)
    else:
        os.link(source, target)


class Looking(Contestant):
    """Opens what holds many tensors, lists the names, and the steps of one name."""

    sizes: ClassVar[int | None] = None  # the most entries that can be made in reasonable time

    def make(self, folder: Path, entries: int) -> None:
        """Store so many tensors; what a reader sees is in ``closed-…`` and perhaps ``live-…``."""
        raise NotImplementedError

    def look(self, place: Path) -> tuple[int, int]:
        """Give how many names there are, and steps of the middle one."""
        raise NotImplementedError


class OursLooking(Looking):
    """The library."""

    name = Ours.name
    settings = "open_run(url), .names(), [name].steps"
    needs = Ours.needs
    distributions = Ours.distributions
    environment = Ours.environment

    def make(self, folder: Path, entries: int) -> None:
        build(folder, entries)

    def look(self, place: Path) -> tuple[int, int]:
        import tensorstore_fmt as tsf

        with tsf.open_run(place) as run:
            names = run.names()
            return len(names), len(run[names[len(names) // 2]].steps)


class H5pyLooking(Looking):
    """A data set for each tensor, a group for each name."""

    name = "h5py-groups"
    settings = "a data set a tensor, a group a name, libver='latest'; list(file), list(group)"
    needs = ("h5py",)
    distributions = ("h5py",)
    sizes = 10_000

    def make(self, folder: Path, entries: int) -> None:
        import h5py

        names = names_of(entries)
        with h5py.File(folder / f"closed-{entries}", "w", libver="latest") as file:
            for name in names:
                group = file.create_group(name.replace("/", "."))
                for step in range(entries // len(names)):
                    group.create_dataset(str(step), data=np.zeros(NBYTES, np.uint8))

    def look(self, place: Path) -> tuple[int, int]:
        import h5py

        with h5py.File(place, "r") as file:
            names = list(file)
            return len(names), len(sorted(map(int, file[names[len(names) // 2]])))


class ZarrLooking(Looking):
    """An array for each tensor, a group for each name, one document that describes all."""

    name = "zarr-groups"
    settings = "an array a tensor, a group a name, format 3, metadata consolidated"
    needs = ("zarr",)
    distributions = ("zarr",)
    sizes = 10_000

    def make(self, folder: Path, entries: int) -> None:
        import zarr

        names = names_of(entries)
        root = zarr.open_group(folder / f"closed-{entries}", mode="w", zarr_format=3)
        for name in names:
            group = root.create_group(name.replace("/", "."))
            for step in range(entries // len(names)):
                group.create_array(str(step), shape=(NBYTES,), dtype="uint8")
        zarr.consolidate_metadata(root.store)

    def look(self, place: Path) -> tuple[int, int]:
        import zarr

        root = zarr.open_consolidated(place, mode="r")
        names = sorted(root.group_keys())
        return len(names), len(sorted(map(int, root[names[len(names) // 2]].array_keys())))


class NpyLooking(Looking):
    """A file for each tensor, a folder for each name: what listing a file system costs."""

    name = "npy-folders"
    settings = "a file a tensor, a folder a name; os.listdir of both"
    needs = ("numpy",)
    distributions = ("numpy",)
    sizes = 100_000

    def make(self, folder: Path, entries: int) -> None:
        names = names_of(entries)
        values = np.zeros(NBYTES, np.uint8)
        for name in names:
            place = folder / f"closed-{entries}" / name.replace("/", ".")
            place.mkdir(parents=True)
            for step in range(entries // len(names)):
                np.save(place / f"{step}.npy", values)

    def look(self, place: Path) -> tuple[int, int]:
        names = sorted(os.listdir(place))
        steps = os.listdir(place / names[len(names) // 2])
        return len(names), len(sorted(int(step.removesuffix(".npy")) for step in steps))


def seconds(operation: Callable[[], object], repeats: int) -> float:
    """Give the least time of an operation, after one that is not counted.

    What disturbs a process only adds to its times, and these are compared with fixed limits.
    """
    operation()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        operation()
        times.append(time.perf_counter() - begin)
    return min(times)


class Opening(Case):
    """Case 10."""

    number: ClassVar[int] = 10
    name = "opening"
    question = "How long does it take to open a run, list its names and the steps of one name?"
    data = (
        "1,000 names of 10 to 10,000 steps, 300 random bytes each, stored raw, in up to 200 "
        "flushes; closed, and as they lie there while they are written; the best of nine looks. "
        "Peers only as many as they can be made of in a minute"
    )
    unit = "closed_10_4_seconds"  # what all have been asked for
    timeout_s: ClassVar[float] = 1800  # to build it, once

    def contestants(self) -> Sequence[type[Looking]]:
        return [OursLooking, NpyLooking, H5pyLooking, ZarrLooking]

    def sizes(self, contestant: Looking, *, quick: bool) -> list[int]:
        """Say how many entries are looked at."""
        if quick:
            return list(QUICK_SIZES[: None if contestant.sizes is None else 1])
        return [n for n in SIZES if contestant.sizes is None or n <= contestant.sizes]

    def prepare(self, contestant: Contestant, place: Place) -> None:
        assert isinstance(contestant, Looking)
        for entries in self.sizes(contestant, quick=place.quick):
            contestant.make(place.kept, entries)

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, Looking)
        figures: Figures = {}
        for state in ("closed", "live"):
            for entries in self.sizes(contestant, quick=place.quick):
                run = place.kept / f"{state}-{entries}"
                if not run.exists():
                    continue
                names = len(names_of(entries))
                expected = names, entries // names
                found = contestant.look(run)
                if found != expected:
                    raise RuntimeError(f"{contestant.name}: {run}: {found}, not {expected}")
                looks = 3 if place.quick else LOOKS
                figures[f"{state}_{label(entries)}_seconds"] = seconds(
                    lambda run=run: contestant.look(run), looks
                )
        return figures

    def judge(self, table: Table) -> list[Verdict]:
        verdicts = []
        for state, most_ms in (("closed", 50), ("live", 100)):
            largest = table.median(Ours.name, f"{state}_10_7_seconds")
            must = f"{state}, 10⁷ entries: ≤ {most_ms} ms"
            if largest is None:
                verdicts.append(Verdict(must, "not measured", None))
                continue
            verdicts.append(Verdict(must, f"{largest * 1e3:.1f} ms", largest * 1e3 <= most_ms))
            smaller = [
                value
                for n in SIZES[:-1]
                if (value := table.median(Ours.name, f"{state}_{label(n)}_seconds")) is not None
            ]
            growth = largest / max(smaller)
            must = f"{state}, flat in steps: 10⁷ entries ≤ 2 × the slowest of 10⁴, 10⁵ and 10⁶"
            verdicts.append(Verdict(must, f"{growth:.2f} ×", growth <= 2))
        return verdicts

    def draw(self, table: Table, path: Path) -> None:
        """Draw time over entries."""
        from suite.lines import Line, Panel, draw_panels

        lines = []
        for contestant in table.trials:
            for state in ("closed", "live"):
                points = [
                    (n, value * 1e3)
                    for n in (*QUICK_SIZES[:1], *SIZES)
                    if (value := table.median(contestant, f"{state}_{label(n)}_seconds"))
                ]
                if points:
                    text = f"{contestant}, {state}"
                    lines.append(Line(contestant, text, points, is_dashed=state == "live"))
        panel = Panel("", lines, "entries", "milliseconds", "xy")
        draw_panels(path, self.question, [panel])


CASES: list[Case] = [Opening()]

"""Case 16: what an hour of flushes leaves behind, over time and over writers."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from cases.opening import seconds
from peers.ours import Ours
from suite.case import Case, Figures, Place, Table, Verdict, tree_nbytes
from suite.contestant import Contestant

HOUR_S = 3600
LOOKS = 4
SAMPLES = 8  # looked at after each eighth
SCALARS = 10  # numbers, and
TENSORS = 2  # tensors of 4 KiB, in every flush of every writer
MOST_GROWTH = 1.5  # what is linear doubles; what is logarithmic goes up and down, and grows by less
START_US = 1_700_000_000_000_000


@dataclass(frozen=True)
class Setting:
    """Where the writers write, how often they flush, and for how long so many do.

    Many writers that flush every second take minutes of work: they are not made to for an hour.
    """

    place: str
    interval_s: float
    is_local: bool
    lengths_s: Mapping[int, float]


DISK = Setting("disk", 1.0, is_local=True, lengths_s={1: HOUR_S, 4: HOUR_S / 2, 16: HOUR_S / 6})
BUCKET = Setting("bucket", 30.0, is_local=False, lengths_s=dict.fromkeys((1, 4, 16), HOUR_S))


class OneWriter(Contestant):
    """The library, default settings; time is simulated."""

    name = Ours.name
    settings = "one writer, default settings, flushed as its clock says; the clock is simulated"
    needs = Ours.needs
    distributions = Ours.distributions
    environment = Ours.environment
    writers: ClassVar[int] = 1


class FourWriters(OneWriter):
    """The same in four workers."""

    name = "ours-4-writers"
    settings = "four writers"
    writers: ClassVar[int] = 4


class SixteenWriters(OneWriter):
    """The same in sixteen workers."""

    name = "ours-16-writers"
    settings = "sixteen writers"
    writers: ClassVar[int] = 16


class Clock:
    """A time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Stand in for `time.monotonic`."""
        return self.now_s

    def microseconds(self) -> int:
        """Stand in for the clock on the wall."""
        return START_US + round(self.now_s * 1e6)


@contextmanager
def simulated() -> Iterator[Clock]:
    """Let the grace time, after which what was merged is deleted, go by the clock."""
    from tensorstore_fmt.writing import segments

    clock, there = Clock(), segments.time
    segments.time = SimpleNamespace(monotonic=clock.monotonic)  # type: ignore[attr-defined]
    try:
        yield clock
    finally:
        segments.time = there  # type: ignore[attr-defined]


def open_writers(storages: Sequence[Any], clock: Clock) -> list[Any]:
    """Open a writer in each storage of the same run, with a clock of ours."""
    from tensorstore_fmt.writing.options import check_options
    from tensorstore_fmt.writing.run import open_writer

    ids = iter(range(1, 1 << 20))
    options = check_options(
        is_local=True,
        flush_interval_s=1e6,
        flush_bytes=64 << 20,
        queue_bytes=256 << 20,
        when_full="block",
        compression="auto",
        chunks=None,
        stats=True,
        on_error="raise",
        sleep=lambda _: None,
        clock_us=clock.microseconds,
        new_id=lambda: next(ids),
    )
    return [
        open_writer(storage, options, attrs={}, worker=worker, num_workers=len(storages))
        for worker, storage in enumerate(storages)
    ]


def settle(writers: Sequence[Any], clock: Clock) -> None:
    """Wait until the merging that a flush has begun is over: there would be time enough."""
    for writer in writers:
        log = writer._segments
        while True:
            with log._lock:
                is_due = log._covered and log._covered[0][0] <= clock.now_s
                if not log._mergeable() and not is_due:
                    break
                log._wake.notify_all()
            time.sleep(0.0005)


_KEPT = (
    "index_files",
    "shard_files",
    "index_bytes_a_value",
    "writes_a_flush",
    "deletes_a_flush",
    "reads_a_flush",
    "written_bytes_a_value",
)
_FLAT = (
    ("index files", "index_files_after_{}_eighths"),
    ("opening", "open_after_{}_eighths_seconds"),
    ("index bytes of a value", "index_bytes_a_value_after_{}_eighths"),
    ("writes of a flush", "writes_a_flush_after_{}_eighths"),
    ("index bytes written for a value", "written_bytes_a_value_after_{}_eighths"),
)


class Growth(Case):
    """Case 16: counts are made once; how long opening takes is measured in each trial."""

    number: ClassVar[int] = 16
    unit = "open_after_8_eighths_seconds"
    timeout_s: ClassVar[float] = 3600
    shown = (
        "open_after_4_eighths_seconds",
        "index_after_8_eighths_bytes",
        *(f"{what}_after_8_eighths" for what in _KEPT),
    )

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.name = f"growth-{setting.place}"
        self.question = (
            f"What grows while 1, 4 and 16 writers flush every {setting.interval_s:g} s"
            + (" on a disk?" if setting.is_local else " to a bucket?")
        )
        self.data = (
            f"{SCALARS} numbers and {TENSORS} tensors of 4 KiB in every flush of every writer; "
            f"{' / '.join(f'{s / 60:g}' for s in setting.lengths_s.values())} minutes, looked at "
            "after each eighth"
        )

    def contestants(self) -> Sequence[type[OneWriter]]:
        return [OneWriter, FourWriters, SixteenWriters]

    def prepare(self, contestant: Contestant, place: Place) -> None:
        assert isinstance(contestant, OneWriter)
        from tensorstore_fmt.storage import open_storage
        from tensorstore_fmt.testing.storage import CountingStorage

        length = self._setting.lengths_s[contestant.writers]
        flushes = 2 * SAMPLES if place.quick else round(length / self._setting.interval_s)
        url = str(place.kept / "run") if self._setting.is_local else "memory://growth"
        storages = [
            CountingStorage(open_storage(url, writable=True)) for _ in range(contestant.writers)
        ]
        names = [f"metric/{i}" for i in range(SCALARS)]
        rng = np.random.default_rng(16)
        tensors = rng.standard_normal((TENSORS, 32, 32)).astype(np.float32)
        samples = []
        with simulated() as clock:
            writers = open_writers(storages, clock)
            for flush in range(flushes):
                clock.now_s += self._setting.interval_s
                tensors[:, 0] += np.float32(1e-3)
                data = dict(zip(names, rng.standard_normal(SCALARS).tolist(), strict=True))
                data |= {f"weights/{i}": tensor for i, tensor in enumerate(tensors)}
                for writer in writers:
                    writer.log(data, step=flush)
                for writer in writers:
                    writer.flush()
                settle(writers, clock)
                if (flush + 1) % (flushes // SAMPLES) == 0:
                    copy = place.kept / f"after-{len(samples) + 1}"
                    samples.append(_look(url, storages, copy, flush + 1))
            for writer in writers:  # what was counted is kept already
                writer.close()
        (place.kept / "samples.json").write_text(json.dumps(samples))

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, OneWriter)
        import tensorstore_fmt as tsf

        figures: Figures = {}
        samples = json.loads((place.kept / "samples.json").read_text())
        for eighth, sample in enumerate(samples, 1):
            after = f"after_{eighth}_eighths"
            copy = place.kept / f"after-{eighth}"

            def look(copy: Path = copy) -> None:
                with tsf.open_run(copy) as run:
                    run.names()

            with tsf.open_run(copy) as run:
                steps = len(run["metric/0"].select(worker=0).steps)
            if steps != sample["flushes"]:
                raise RuntimeError(f"{copy}: {steps} steps, not {sample['flushes']}")
            figures[f"open_{after}_seconds"] = seconds(look, LOOKS)
            figures |= {f"{key}_{after}": sample[key] for key in _KEPT}
            figures[f"index_{after}_bytes"] = sample["index_bytes"]
        return figures

    def judge(self, table: Table) -> list[Verdict]:
        verdicts = []
        half = SAMPLES // 2
        for contestant in self.contestants():
            growths = {}
            for text, figure in _FLAT:
                found = [
                    table.median(contestant.name, figure.format(n)) for n in range(1, SAMPLES + 1)
                ]
                values = [value for value in found if value is not None]
                if len(values) == SAMPLES:
                    growths[text] = max(values[half:]) / max(values[:half])
            if growths:
                must = (
                    f"{contestant.writers} writer{'s' * (contestant.writers > 1)}: at most "
                    f"{MOST_GROWTH:g} × as much in the second half as in the first"
                )
                measured = ", ".join(f"{text} {growth:.2f} ×" for text, growth in growths.items())
                verdicts.append(Verdict(must, measured, max(growths.values()) <= MOST_GROWTH))
        return verdicts

    def draw(self, table: Table, path: Path) -> None:
        """Draw everything over time."""
        from suite.lines import Line, Panel, draw_panels

        minutes = {n: length / 60 for n, length in self._setting.lengths_s.items()}

        def lines(figure: str, scale: float = 1) -> list[Line]:
            return [
                Line(
                    c.name,
                    f"{c.writers} writer{'s' * (c.writers > 1)}",
                    [
                        (minutes[c.writers] * eighth / SAMPLES, value * scale)
                        for eighth in range(1, SAMPLES + 1)
                        if (value := table.median(c.name, figure.format(eighth))) is not None
                    ],
                )
                for c in self.contestants()
            ]

        shown = [
            ("index files", "files", "index_files_after_{}_eighths", 1),
            ("files of tensors", "files", "shard_files_after_{}_eighths", 1),
            ("index", "MB", "index_after_{}_eighths_bytes", 1e-6),
            ("open and names", "milliseconds", "open_after_{}_eighths_seconds", 1e3),
            ("writes, a flush", "requests", "writes_a_flush_after_{}_eighths", 1),
            (
                "index bytes written, merges too",
                "bytes a value",
                "written_bytes_a_value_after_{}_eighths",
                1,
            ),
        ]
        panels = [
            Panel(title, lines(figure, scale), "minutes", unit, _SCALES.get(title, ""))
            for title, unit, figure, scale in shown
        ]
        draw_panels(path, self.question, panels)


_SCALES = {"index files": "y", "index": "y", "open and names": "y", "files of tensors": "y"}


def _look(url: str, storages: Sequence[Any], copy: Path, flushes: int) -> dict[str, float]:
    """Count what there is and what was asked for; keep a copy of the index."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(url)
    for path in filesystem.find(root):
        relative = path[len(root.rstrip("/")) + 1 :]
        target = copy / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if relative.startswith("shards/"):
            target.touch()  # opening reads none of them
        elif not relative.startswith("locks/"):
            with suppress(FileNotFoundError):  # merged before, and deleted now
                target.write_bytes(filesystem.cat_file(path))
    operations = [op for storage in storages for op in storage.operations]
    ops = Counter(op.op for op in operations)
    published = sum(op.stop for op in operations if _is_index(op) and op.op == "publish")
    index = tree_nbytes(copy / "index")
    a_flush = 1 / (flushes * len(storages))
    return {
        "flushes": flushes,
        "index_files": len(list((copy / "index").iterdir())),
        "shard_files": len(list((copy / "shards").iterdir())),
        "index_bytes": index,
        "index_bytes_a_value": index * a_flush / (SCALARS + TENSORS),
        "written_bytes_a_value": published * a_flush / (SCALARS + TENSORS),
        "writes_a_flush": sum(ops[op] for op in ("publish", "create", "append")) * a_flush,
        "deletes_a_flush": ops["delete"] * a_flush,
        "reads_a_flush": sum(ops[op] for op in ("range", "prefix", "listing")) * a_flush,
    }


def _is_index(op: Any) -> bool:
    return op.path.startswith("index/")


CASES: list[Case] = [Growth(DISK), Growth(BUCKET)]

"""Numbers in TensorBoard's event files, and in Parquet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suite.scalars import ScalarStore


class TensorBoardEvents(ScalarStore):
    """TensorBoard's own writer, used so that it writes the least."""

    name = "tensorboard-events"
    settings = (
        "EventFileWriter.add_event, one event a step with all values, max_queue_size 10,000; "
        "EventAccumulator, nothing thinned out; writes a quarter of the steps"
    )
    needs = ("tensorboard",)
    distributions = ("tensorboard", "protobuf")
    share = 0.25

    def write(self, place: Path, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        value = Summary.Value
        writer = EventFileWriter(str(place), max_queue_size=10_000)
        for step, row in enumerate(rows):
            values = [value(tag=n, simple_value=v) for n, v in zip(names, row, strict=True)]
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
            writer.add_event(event)
        writer.close()

    def _load(self, place: Path) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import (
            SCALARS,
            EventAccumulator,
        )

        events = EventAccumulator(str(place), size_guidance={SCALARS: 0})
        events.Reload()
        return events

    def series(self, place: Path, name: str) -> np.ndarray:
        events = self._load(place).Scalars(name)
        return np.array([event.value for event in events])

    def last(self, place: Path, names: Sequence[str]) -> list[float]:
        events = self._load(place)
        return [events.Scalars(name)[-1].value for name in names]


class TensorBoardTorch(TensorBoardEvents):
    """What users of torch call."""

    name = "tensorboard-torch"
    settings = (
        "torch.utils.tensorboard.SummaryWriter.add_scalar for each value, max_queue 10,000; "
        "EventAccumulator, nothing thinned out; writes a fiftieth of the steps"
    )
    needs = ("torch", "tensorboard")
    distributions = ("torch", "tensorboard", "protobuf")
    share = 0.02

    def write(self, place: Path, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(place), max_queue=10_000) as writer:
            for step, row in enumerate(rows):
                for name, value in zip(names, row, strict=True):
                    writer.add_scalar(name, value, step)


class TensorBoardX(TensorBoardEvents):
    """The same files by tensorboardX, whose checksums are computed in C."""

    name = "tensorboardx-events"
    settings = (
        "tensorboardX's EventFileWriter.add_event, one event a step with all values, crc32c in C, "
        "max_queue_size 10,000; writes a quarter of the steps"
    )
    needs = ("tensorboardX", "crc32c", "tensorboard")
    distributions = ("tensorboardx", "crc32c", "tensorboard", "protobuf")

    def write(self, place: Path, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        from tensorboardX.event_file_writer import EventFileWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        value = Summary.Value
        writer = EventFileWriter(str(place), max_queue_size=10_000)
        for step, row in enumerate(rows):
            values = [value(tag=n, simple_value=v) for n, v in zip(names, row, strict=True)]
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
            writer.add_event(event)
        writer.close()


class ParquetScalars(ScalarStore):
    """A reference for reading: nothing is in the file before all of it is."""

    name = "parquet-columns"
    settings = "rows gathered in memory, then write_table: a column a name, zstd; read_table"
    needs = ("pyarrow",)
    distributions = ("pyarrow",)

    def write(self, place: Path, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        place.mkdir(parents=True)
        gathered = []
        for row in rows:
            gathered.append(row)  # noqa: PERF402 (as they come)
        values = np.array(gathered)
        columns = {"step": np.arange(len(values)), **dict(zip(names, values.T, strict=True))}
        table = pa.table({name: np.ascontiguousarray(column) for name, column in columns.items()})
        parquet.write_table(table, place / "scalars.parquet", compression="zstd")

    def series(self, place: Path, name: str) -> np.ndarray:
        from pyarrow import parquet

        table = parquet.read_table(place / "scalars.parquet", columns=["step", name])
        return table[name].to_numpy()

    def last(self, place: Path, names: Sequence[str]) -> list[float]:
        from pyarrow import parquet

        file = parquet.ParquetFile(place / "scalars.parquet")
        group = file.read_row_group(file.num_row_groups - 1, columns=list(names))
        return [group[name][-1].as_py() for name in names]

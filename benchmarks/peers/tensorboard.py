"""Event files of TensorBoard, for scalars: by its fastest writers, read by its own reader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suite.contestant import Item, Reader, Series, Store


class TensorBoard(Store):
    """What PyTorch's users have: ``torch.utils.tensorboard``."""

    name = "tensorboard"
    settings = (
        "torch.utils.tensorboard.SummaryWriter(max_queue=1000), add_scalar; "
        "EventAccumulator(scalars: all)"
    )
    needs = ("torch", "tensorboard")
    distributions = ("torch", "tensorboard", "protobuf", "numpy")
    compresses = False
    reads_parts = False
    takes_tensors = False  # but scalars

    def _writer(self, place: str | Path) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(place), max_queue=1000)

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Add each scalar as it comes."""
        writer = self._writer(place)
        for step, name, value in items:
            writer.add_scalar(name, value, step)
        writer.close()

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Read the whole run: event files have no index."""
        return TensorBoardReader(place, series)


class TensorBoardX(TensorBoard):
    """The same files from ``tensorboardX``, with checksums in C."""

    name = "tensorboardx"
    settings = (
        "tensorboardX.SummaryWriter(max_queue=1000, write_to_disk), crc32c in C, add_scalar; "
        "EventAccumulator(scalars: all)"
    )
    needs = ("tensorboardX", "tensorboard", "crc32c")
    distributions = ("tensorboardx", "tensorboard", "crc32c", "protobuf", "numpy")

    def _writer(self, place: str | Path) -> Any:
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(place), max_queue=1000)


class TensorBoardReader(Reader):
    """Scalars are float32 in the files."""

    def __init__(self, place: str | Path, series: Sequence[Series]) -> None:
        from tensorboard.backend.event_processing.event_accumulator import (
            SCALARS,
            EventAccumulator,
        )

        self._dtypes = {s.name: s.numpy_dtype for s in series}
        self._accumulator = EventAccumulator(str(place), size_guidance={SCALARS: 0})
        self._accumulator.Reload()

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Give all steps and values of one name."""
        events = self._accumulator.Scalars(name)
        steps = np.fromiter((event.step for event in events), np.int64, len(events))
        values = np.fromiter((event.value for event in events), self._dtypes[name], len(events))
        return steps, values

    def whole(self, name: str, step: int) -> np.ndarray:
        steps, values = self.series(name)
        return values[np.searchsorted(steps, step)]

    def parts(self, name: str, steps: range, index: tuple) -> np.ndarray:
        found, values = self.series(name)
        return values[np.searchsorted(found, np.arange(steps.start, steps.stop, steps.step))]

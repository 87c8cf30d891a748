"""SageMaker Debugger: the library that this one succeeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from peers.layout import by_step
from suite.contestant import Item, Reader, Series, Store

_WORKER = "worker_0"


class SmDebug(Store):
    """A file of protobuf records and one of JSON a step."""

    name = "smdebug"
    settings = "smdebug.core.writer.FileWriter, a file a step; create_trial; compiled protobuf"
    needs = ("smdebug",)
    distributions = ("smdebug", "protobuf", "numpy")
    environment = "smdebug"
    # Without these it prints, and waits a second at a run's end.
    variables: ClassVar = {
        "SMDEBUG_LOG_LEVEL": "ERROR",
        "SMDEBUG_TRAINING_END_DELAY_REFRESH": "0",
    }
    compresses = False
    reads_parts = False
    takes_s3 = True

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Open a writer for each step."""
        from smdebug.core.access_layer.utils import training_has_ended
        from smdebug.core.collection_manager import CollectionManager
        from smdebug.core.modes import ModeKeys
        from smdebug.core.writer import FileWriter

        out = str(place)
        for step, tensors in by_step(items):
            writer = FileWriter(trial_dir=out, step=step, worker=_WORKER)
            for name, values in tensors.items():
                writer.write_tensor(_readable(values), name, mode=ModeKeys.TRAIN, mode_step=step)
            writer.close()
        collections = CollectionManager()
        collections.set_num_workers(1)
        collections.export(out, f"{_WORKER}_collections.json")
        training_has_ended(out)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open the run: reads the index of every step."""
        return _SmDebugReader(place, series)


class _SmDebugReader(Reader):
    def __init__(self, place: str | Path, series: Sequence[Series]) -> None:
        from smdebug.trials import create_trial

        self._trial = create_trial(str(place))
        self._dtypes = {s.name: s.numpy_dtype for s in series}

    def whole(self, name: str, step: int) -> np.ndarray:
        found = self._trial.tensor(name).value(step)
        return found.view(self._dtypes[name])


def _readable(values: np.ndarray) -> np.ndarray:
    """Give bits that it can read back: it knows no unsigned integers of 16 bits and more."""
    if values.dtype.kind == "u" and values.itemsize > 1:
        return values.view({2: "f2", 4: "i4", 8: "i8"}[values.itemsize])
    return values

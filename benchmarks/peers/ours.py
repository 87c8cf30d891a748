"""The library itself, in several settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from suite.contestant import Item, Reader, Series, Store


class Ours(Store):
    """Default settings, with the compiled kernel where it is built."""

    name = "ours"
    settings = "create_run(url): compression auto, statistics on"
    needs = ("tensorstore_fmt",)
    distributions = ("tensorstore-fmt", "pyarrow", "zstandard", "numpy")
    environment = "ours"
    compresses = True
    reads_parts = True
    takes_s3 = True
    options: ClassVar[dict] = {}

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Log each tensor as it comes."""
        import tensorstore_fmt as tsf

        halves = {s.name for s in series if s.dtype == "bfloat16"}
        if halves:
            import ml_dtypes
        with tsf.create_run(place, **self.options) as run:
            for step, name, values in items:
                if name in halves:
                    values = values.view(ml_dtypes.bfloat16)  # noqa: PLW2901 (same bits)
                run.log({name: values}, step=step)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open the run."""
        return OursReader(place, series)


class OursReader(Reader):
    """A view of a run."""

    def __init__(self, place: str | Path, series: Sequence[Series]) -> None:
        import tensorstore_fmt as tsf

        self.run = tsf.open_run(place)
        self._dtypes = {s.name: s.numpy_dtype for s in series}

    def whole(self, name: str, step: int) -> np.ndarray:
        return self.run[name].read(step=step).view(self._dtypes[name])

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        return self.run[name].read(step=step, index=index).view(self._dtypes[name])

    def parts(self, name: str, steps: range, index: tuple) -> np.ndarray:
        chosen = slice(steps.start, steps.stop, steps.step)
        return self.run[name].read(steps=chosen, index=index).view(self._dtypes[name])

    def close(self) -> None:
        self.run.close()


class OursNumPy(Ours):
    """Without the compiled kernel."""

    name = "ours-numpy"
    settings = "as ours, but TENSORSTORE_FMT_KERNEL=0: pure NumPy"
    variables: ClassVar = {"TENSORSTORE_FMT_KERNEL": "0"}


class OursRaw(Ours):
    """Stored raw, with statistics."""

    name = "ours-raw"
    settings = "compression='none', statistics on"
    compresses = False
    options: ClassVar = {"compression": "none"}


class OursBare(Ours):
    """Stored raw, nothing computed."""

    name = "ours-bare"
    settings = "compression='none', stats=False"
    compresses = False
    options: ClassVar = {"compression": "none", "stats": False}

"""The library itself, in several settings."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import by_step
from suite.contestant import Codec, Item, Parts, Reader, Series, Store
from suite.scalars import ScalarStore


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
            run.flush()
            self.in_files = time.perf_counter()  # closing also syncs, which peers do not

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


class OursSteps(Ours):
    """All of a step in one call of log, as a training has it."""

    name = "ours-steps"
    settings = "as ours, but one call of log for all tensors of a step"

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        import tensorstore_fmt as tsf

        with tsf.create_run(place, **self.options) as run:
            for step, tensors in by_step(items):
                run.log(tensors, step=step)


class OursMapped(Ours):
    """Stored raw, each tensor in one piece, so that it can be used where it lies."""

    name = "ours-mapped"
    settings = "compression='none', stats=False, chunks={'*': None}: one chunk; read with view()"
    compresses = False
    options: ClassVar = {"compression": "none", "stats": False, "chunks": {"*": (None, None)}}


class OursCodec(Codec):
    """The codec alone, as a writer and a reader use it."""

    name = "ours-codec"
    settings = "compression auto: a sample chooses, then again after 32 MiB; CRC-32C when encoding"
    needs = ("tensorstore_fmt",)
    distributions = ("tensorstore-fmt", "zstandard", "numpy")
    environment = "ours"

    def __init__(self) -> None:
        from tensorstore_fmt.format import codec, sampling

        self._codec = codec
        self._sampling = sampling
        self._encoder = codec.Encoder()
        self._hint = sampling.Hint()
        self._out = np.empty(0, np.uint8)

    def begin(self) -> None:
        """Forget what chunks before have taught: another series follows."""
        self._hint = self._sampling.Hint()

    def encode(self, values: np.ndarray, dtype: str) -> OursParts:
        return OursParts(self._encoder.encode(values.view(np.uint8), dtype=dtype, hint=self._hint))

    def decode(self, data: bytes, like: np.ndarray, dtype: str) -> np.ndarray:
        if self._out.nbytes < like.nbytes:
            self._out = np.empty(like.nbytes, np.uint8)
        out = self._out[: like.nbytes]
        self._codec.decode(memoryview(data)[1:], out, codec=data[0], dtype=dtype)
        return out.view(like.dtype)


class OursParts(Parts):
    """What the encoder gives, after the number of its codec."""

    def __init__(self, encoded: Any) -> None:
        self._encoded = encoded

    def to_bytes(self) -> bytes:
        return bytes([self._encoded.codec]) + self._encoded.to_bytes()


class OursCodecNumPy(OursCodec):
    """Without the compiled kernel."""

    name = "ours-codec-numpy"
    settings = "as ours-codec, but TENSORSTORE_FMT_KERNEL=0: pure NumPy"
    variables: ClassVar = {"TENSORSTORE_FMT_KERNEL": "0"}


class OursScalars(ScalarStore):
    """Numbers, with default settings."""

    name = "ours"
    settings = Ours.settings
    needs = ("tensorstore_fmt",)
    distributions = Ours.distributions
    environment = "ours"

    def write(self, place: Path, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        import tensorstore_fmt as tsf

        with tsf.create_run(place) as run:
            for step, row in enumerate(rows):
                run.log(dict(zip(names, row, strict=True)), step=step)

    def series(self, place: Path, name: str) -> np.ndarray:
        import tensorstore_fmt as tsf

        with tsf.open_run(place) as run:
            return run[name].read()

    def last(self, place: Path, names: Sequence[str]) -> list[float]:
        import tensorstore_fmt as tsf

        with tsf.open_run(place) as run:
            items = [(name, run[name].step_summary[2], ()) for name in names]
            return [float(value) for value in run.read(items)]

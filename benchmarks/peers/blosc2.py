"""Blosc2's n-dimensional arrays, a frame a name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import (
    SteppedReader,
    batched,
    file_name,
    is_remote,
    joined,
    steps_in_shard,
    steps_together,
    upload,
)
from suite.contestant import Item, Reader, Series, Store

_THREADS = 2


class _Blosc2(Store):
    """Chunks of one tensor, in blocks that are the chunks of others."""

    needs = ("blosc2",)
    distributions = ("blosc2", "numpy")
    compresses = True
    reads_parts = True
    takes_s3 = True
    codec: ClassVar[str]
    level: ClassVar[int]
    filter: ClassVar[str]

    def _cparams(self) -> Any:
        import blosc2

        return blosc2.CParams(
            codec=getattr(blosc2.Codec, self.codec),
            clevel=self.level,
            filters=[getattr(blosc2.Filter, self.filter)],
            nthreads=_THREADS,
        )

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Create every array, then assign each tensor, or a chunk of small ones."""
        if is_remote(place):  # frames are written to local files alone
            with tempfile.TemporaryDirectory() as folder:
                self.write(folder, series, items)
                upload(Path(folder), str(place))
            return
        import blosc2

        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        together = {s.name: steps_in_shard(s) for s in series}
        arrays = {
            s.name: blosc2.uninit(
                (s.steps, *s.shape),
                dtype=s.numpy_dtype,
                chunks=(together[s.name], *s.shape),
                blocks=(steps_together(s), *s.chunk),
                urlpath=str(folder / file_name(s.name, ".b2nd")),
                contiguous=True,
                mode="w",
                cparams=self._cparams(),
                dparams=blosc2.DParams(nthreads=_THREADS),
            )
            for s in series
        }
        for steps, name, values in batched(items, together):
            arrays[name][steps[0] : steps[-1] + 1] = values

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open each array when it is first read."""
        return _Blosc2Reader(place)


class _Blosc2Reader(SteppedReader):
    def __init__(self, place: str | Path) -> None:
        self._place = place
        self._arrays: dict[str, Any] = {}

    def array(self, name: str) -> Any:
        import blosc2

        if name not in self._arrays:
            path = joined(self._place, file_name(name, ".b2nd"))
            if is_remote(path):
                self._arrays[name] = blosc2.open(path, lazy=True)
            else:
                threads = blosc2.DParams(nthreads=_THREADS)
                self._arrays[name] = blosc2.open(path, mode="r", mmap_mode="r", dparams=threads)
        return self._arrays[name]

    def whole(self, name: str, step: int) -> np.ndarray:
        return np.asarray(self.array(name)[step])


class Blosc2Zstd1(_Blosc2):
    """A good ratio at good speed."""

    name = "blosc2-zstd1"
    settings = "b2nd, chunk a tensor, blocks as our chunks; zstd 1 + shuffle; 2 threads; mmap"
    codec, level, filter = "ZSTD", 1, "SHUFFLE"


class Blosc2Lz4(_Blosc2):
    """The quickest."""

    name = "blosc2-lz4"
    settings = "b2nd, chunk a tensor, blocks as our chunks; LZ4 5 + bitshuffle; 2 threads; mmap"
    codec, level, filter = "LZ4", 5, "BITSHUFFLE"

"""Google's TensorStore, zarr version 3 with shards."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import SteppedReader, batched, file_name, steps_in_shard, steps_together
from suite.contestant import Item, Reader, Series, Store

_CACHE_NBYTES = 1 << 20
_IN_FLIGHT = 4


class _TensorStore(Store):
    """An array a name, one shard for each step's tensor, the same chunks as ours."""

    needs = ("tensorstore",)
    distributions = ("tensorstore", "numpy")
    compresses = True
    reads_parts = True
    takes_s3 = True
    codec: ClassVar[dict]

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Hand over tensors, or shards of small ones; a few are on their way at a time."""
        import tensorstore as ts

        # The shard's index is read again for every chunk, unless there is a cache.
        context = _context()
        opening = [
            (s.name, ts.open(self._spec(place, s), context=context, create=True, open=False))
            for s in series
        ]
        arrays = {name: future.result() for name, future in opening}
        underway: deque = deque()
        together = {s.name: steps_in_shard(s) for s in series}
        for steps, name, values in batched(items, together):
            if len(underway) == _IN_FLIGHT:
                underway.popleft().result()
            # No copy: nobody changes the values.
            target = arrays[name][steps[0] : steps[-1] + 1]
            future = target.write(values, can_reference_source_data_indefinitely=True)
            underway.append(future)
        for future in underway:
            future.result()

    def _spec(self, place: str | Path, series: Series) -> dict:
        pairs = zip(series.shape, series.chunk, strict=True)
        shard = [-(-length // chunk) * chunk for length, chunk in pairs]
        inner = {
            "chunk_shape": [steps_together(series), *series.chunk],
            "codecs": [{"name": "bytes"}, self.codec],
            "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        }
        return {
            "driver": "zarr3",
            "kvstore": _kvstore(place, series.name),
            "metadata": {
                "shape": [series.steps, *series.shape],
                "data_type": series.numpy_dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [steps_in_shard(series), *shard]},
                },
                "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            },
            "store_data_equal_to_fill_value": True,
        }

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open each array when it is first read."""
        return _TensorStoreReader(place)


class _TensorStoreReader(SteppedReader):
    def __init__(self, place: str | Path) -> None:
        self._place = place
        self._context = _context()
        self._arrays: dict[str, Any] = {}

    def array(self, name: str) -> Any:
        import tensorstore as ts

        if name not in self._arrays:
            spec = {"driver": "zarr3", "kvstore": _kvstore(self._place, name)}
            self._arrays[name] = ts.open(spec, context=self._context, read=True).result()
        return self._arrays[name]

    def whole(self, name: str, step: int) -> np.ndarray:
        return self.array(name)[step].read().result()

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        return self.array(name)[(step, *index)].read().result()

    def parts(self, name: str, steps: range, index: tuple) -> np.ndarray:
        chosen = slice(steps.start, steps.stop, steps.step)
        return self.array(name)[(chosen, *index)].read().result()


def _context() -> Any:
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_NBYTES}})


def _kvstore(place: str | Path, name: str) -> dict:
    text = str(place)
    if not text.startswith("s3://"):
        return {"driver": "file", "path": f"{text}/{file_name(name)}/"}
    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    found: dict[str, Any] = {
        "driver": "s3",
        "bucket": bucket,
        "path": f"{prefix}/{file_name(name)}/",
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    found |= {"aws_region": region, **({"endpoint": endpoint} if endpoint else {})}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        found["aws_credentials"] = {"type": "environment"}  # else it looks for files first
    return found


class TensorStoreZstd(_TensorStore):
    """Plain zstd."""

    name = "tensorstore-zstd"
    settings = "zarr3, a shard a tensor; zstd 1; 1 MiB of cache (shard indexes); 4 writes underway"
    codec: ClassVar = {"name": "zstd", "configuration": {"level": 1}}


class TensorStoreBlosc(_TensorStore):
    """Of the settings of Blosc 1 the quickest, and smaller than zstd 1 + shuffle, save for ReLU."""

    name = "tensorstore-blosc"
    settings = "as tensorstore-zstd, with blosc LZ4 5 + bitshuffle"
    codec: ClassVar = {
        "name": "blosc",
        "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"},
    }

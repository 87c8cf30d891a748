"""zarr-python with shards, with its own pipeline of codecs and with the one of zarrs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from peers.layout import SteppedReader, batched, file_name, steps_in_shard, steps_together
from suite.contestant import Item, Reader, Series, Store


class _Zarr(Store):
    """An array a name, one shard for each step's tensor, the same chunks as ours."""

    needs = ("zarr",)
    distributions = ("zarr", "numcodecs", "numpy")
    compresses = True
    reads_parts = True
    takes_s3 = True
    pipeline: ClassVar[str | None] = None
    shuffles: ClassVar[bool] = True

    def _configure(self) -> None:
        import zarr

        # Chunks of one value are rare here, and looking for them costs time.
        settings: dict[str, Any] = {"array.write_empty_chunks": True}
        if self.pipeline:
            settings["codec_pipeline.path"] = self.pipeline
        zarr.config.set(settings)

    def _compressors(self) -> list:
        from zarr import codecs

        if self.shuffles:
            return [codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")]
        return [codecs.ZstdCodec(level=1)]

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Create every array, then assign each tensor, or a shard of small ones."""
        import zarr

        self._configure()
        store = _open(place, writes=True)
        arrays, together = {}, {}
        for s in series:
            pairs = zip(s.shape, s.chunk, strict=True)
            shard = tuple(-(-length // chunk) * chunk for length, chunk in pairs)
            together[s.name] = steps_in_shard(s)
            arrays[s.name] = zarr.create_array(
                store,
                name=file_name(s.name),
                shape=(s.steps, *s.shape),
                chunks=(steps_together(s), *s.chunk),
                shards=(together[s.name], *shard),
                dtype=s.numpy_dtype,
                compressors=self._compressors(),
            )
        for steps, name, values in batched(items, together):
            arrays[name][steps[0] : steps[-1] + 1] = values

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open the store; each array when it is first read."""
        self._configure()
        return _ZarrReader(_open(place, writes=False))


class _ZarrReader(SteppedReader):
    def __init__(self, store: Any) -> None:
        self._store = store
        self._arrays: dict[str, Any] = {}

    def array(self, name: str) -> Any:
        import zarr

        if name not in self._arrays:
            # With its format said, it does not look for the files of the other one.
            self._arrays[name] = zarr.open_array(
                self._store, path=file_name(name), mode="r", zarr_format=3
            )
        return self._arrays[name]


def _open(place: str | Path, *, writes: bool) -> Any:
    import zarr.storage

    if not str(place).startswith("s3://"):
        return zarr.storage.LocalStore(place, read_only=not writes)
    import obstore.store

    options = {"allow_http": True}
    remote = obstore.store.from_url(str(place), client_options=options)
    return zarr.storage.ObjectStore(remote, read_only=not writes)


class ZarrZstd(_Zarr):
    """The codec that zarr takes by default, at its quickest level."""

    name = "zarr-zstd"
    settings = "sharded, a shard a tensor; zstd 1; write_empty_chunks; S3 through obstore"
    shuffles = False


class ZarrBlosc(_Zarr):
    """Of the settings of Blosc 1 the quickest, and smaller than zstd 1 + shuffle, save for ReLU."""

    name = "zarr-blosc"
    settings = "sharded, a shard a tensor; blosc LZ4 5 + bitshuffle; write_empty_chunks; obstore"


class ZarrZarrs(_Zarr):
    """The pipeline in Rust."""

    name = "zarr-zarrs"
    settings = "as zarr-blosc, with zarrs.ZarrsCodecPipeline"
    needs = ("zarr", "zarrs")
    distributions = ("zarr", "zarrs", "numpy")
    pipeline = "zarrs.ZarrsCodecPipeline"


class ZarrFused(_Zarr):
    """The newest zarr, which needs Python 3.12, with the pipeline it has for local files."""

    name = "zarr-fused"
    settings = "as zarr-blosc, with zarr's FusedCodecPipeline (since 3.3), on a newer Python"
    needs = ("zarr", "zarr.core._coalesce")
    environment = "peers-3.13"
    pipeline = "zarr.core.codec_pipeline.FusedCodecPipeline"

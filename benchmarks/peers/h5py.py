"""HDF5 through h5py, raw and with the filters of hdf5plugin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from peers.layout import SteppedReader, batched, file_name, steps_together
from suite.contestant import Item, Reader, Series, Store

_FILE = "run.h5"
# HDF5 2 keeps 8 MiB of decoded chunks for each dataset: repeated, a read would not read.
_CACHE_NBYTES = 0


class _H5py(Store):
    """One file, a dataset a name."""

    needs = ("h5py",)
    distributions = ("h5py", "numpy")
    reads_parts = True

    def _filter(self) -> dict:
        return {}

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Create every dataset, then assign each tensor, or a chunk of small ones."""
        import h5py

        filters = self._filter()
        together = {s.name: steps_together(s) for s in series}
        Path(place).mkdir(parents=True, exist_ok=True)
        with h5py.File(Path(place) / _FILE, "w", libver="latest") as file:
            datasets = {
                s.name: file.create_dataset(
                    file_name(s.name),
                    shape=(s.steps, *s.shape),
                    dtype=s.numpy_dtype,
                    chunks=(together[s.name], *s.chunk),
                    fill_time="never",  # whatever is read was written
                    **filters,
                )
                for s in series
            }
            for steps, name, values in batched(items, together):
                # One call for the whole selection, without a copy.
                space = np.s_[steps[0] : steps[-1] + 1]
                datasets[name].write_direct(values, dest_sel=space)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open the file."""
        self._filter()
        return _H5pyReader(Path(place) / _FILE)


class _H5pyReader(SteppedReader):
    def __init__(self, path: Path) -> None:
        import h5py

        self._file = h5py.File(path, "r", rdcc_nbytes=_CACHE_NBYTES)
        self._datasets: dict[str, Any] = {}

    def array(self, name: str) -> Any:
        if name not in self._datasets:
            self._datasets[name] = self._file[file_name(name)]
        return self._datasets[name]

    def close(self) -> None:
        self._file.close()


class H5pyRaw(_H5py):
    """No filter."""

    name = "h5py-raw"
    settings = (
        "libver latest, the same chunks, no filter; reads keep no decoded chunks (rdcc_nbytes=0)"
    )
    compresses = False


class H5pyBlosc2(_H5py):
    """Blosc2 inside each chunk."""

    name = "h5py-blosc2"
    settings = "as h5py-raw, hdf5plugin.Blosc2(zstd, 1, SHUFFLE), BLOSC_NTHREADS=2"
    needs = ("h5py", "hdf5plugin")
    distributions = ("h5py", "hdf5plugin", "numpy")
    variables: ClassVar = {"BLOSC_NTHREADS": "2"}
    compresses = True

    def _filter(self) -> dict:
        import hdf5plugin

        return dict(hdf5plugin.Blosc2(cname="zstd", clevel=1, filters=hdf5plugin.Blosc2.SHUFFLE))


class H5pyZstd(_H5py):
    """HDF5's own shuffle, then zstd."""

    name = "h5py-zstd"
    settings = "as h5py-raw, shuffle and hdf5plugin.Zstd(1)"
    needs = ("h5py", "hdf5plugin")
    distributions = ("h5py", "hdf5plugin", "numpy")
    compresses = True

    def _filter(self) -> dict:
        import hdf5plugin

        return {"shuffle": True, **hdf5plugin.Zstd(clevel=1)}

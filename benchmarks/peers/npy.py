"""NumPy's own files: one ``.npy`` a tensor, or one ``.npz`` a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from suite.contestant import Item, Reader, Series, Store


class Npy(Store):
    """A file a tensor."""

    name = "npy"
    settings = "np.save, a file a tensor; parts through np.load(mmap_mode='r')"
    needs = ("numpy",)
    distributions = ("numpy",)
    compresses = False
    reads_parts = True

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Save each tensor as it comes."""
        folder = Path(place)
        for s in series:
            (folder / s.name).mkdir(parents=True, exist_ok=True)
        for step, name, values in items:
            np.save(folder / name / f"{step}.npy", values)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Give a reader of the folder."""
        return NpyReader(Path(place))


class NpyReader(Reader):
    """Opens a file for each read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def whole(self, name: str, step: int) -> np.ndarray:
        return np.load(self._folder / name / f"{step}.npy")

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        mapped = np.load(self._folder / name / f"{step}.npy", mmap_mode="r")
        return np.array(mapped[index])


class Npz(Store):
    """A compressed archive a step."""

    name = "npz"
    settings = "np.savez_compressed (zlib), an archive a step"
    needs = ("numpy",)
    distributions = ("numpy",)
    compresses = True
    reads_parts = False

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Save the tensors of each step together."""
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        for step, group in groupby(items, key=lambda item: item[0]):
            arrays = {name: values for _, name, values in group}
            np.savez_compressed(folder / f"{step}.npz", **arrays)

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Give a reader of the folder."""
        return NpzReader(Path(place))


class NpzReader(Reader):
    """Opens an archive for each read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def whole(self, name: str, step: int) -> np.ndarray:
        with np.load(self._folder / f"{step}.npz") as archive:
            return archive[name]

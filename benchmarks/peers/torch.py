"""What PyTorch saves by itself: a pickle with the tensors' bytes beside it, in a zip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from peers.layout import file_name
from suite.contestant import Item, Reader, Series, Store


class TorchSave(Store):
    """A file a tensor."""

    name = "torch-save"
    settings = "torch.save, a file a tensor; torch.load(mmap=True, weights_only=True)"
    needs = ("torch",)
    distributions = ("torch", "numpy")
    compresses = False
    reads_parts = True

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Save each tensor as it comes."""
        import torch

        folder = Path(place)
        for s in series:
            (folder / file_name(s.name)).mkdir(parents=True, exist_ok=True)
        for step, name, values in items:
            torch.save(
                torch.from_numpy(np.asarray(values)), folder / file_name(name) / f"{step}.pt"
            )

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Give a reader of the folder."""
        return _TorchReader(Path(place))


class _TorchReader(Reader):
    """Opens a file for each read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def whole(self, name: str, step: int) -> np.ndarray:
        import torch

        # Not mapped: the caller owns the result.
        path = self._folder / file_name(name) / f"{step}.pt"
        return torch.load(path, weights_only=True).numpy()

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        import torch

        path = self._folder / file_name(name) / f"{step}.pt"
        return torch.load(path, weights_only=True, mmap=True).numpy()[index].copy()

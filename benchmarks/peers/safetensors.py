"""safetensors, a file a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peers.layout import by_step
from suite.contestant import Item, Reader, Series, Store


class SafeTensors(Store):
    """A header in JSON, then the bytes; read through a map."""

    name = "safetensors"
    settings = "save_file, a file a step; parts by get_slice, files kept open"
    needs = ("safetensors",)
    distributions = ("safetensors", "numpy")
    compresses = False
    reads_parts = True

    def write(self, place: str | Path, series: Sequence[Series], items: Iterable[Item]) -> None:
        """Save the tensors of each step together."""
        from safetensors.numpy import save_file

        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        for step, tensors in by_step(items):
            save_file(tensors, folder / f"{step}.safetensors")

    def reader(self, place: str | Path, series: Sequence[Series]) -> Reader:
        """Open each step's file when it is first read."""
        return _SafeTensorsReader(Path(place))


class _SafeTensorsReader(Reader):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, Any] = {}

    def _file(self, step: int) -> Any:
        from safetensors import safe_open

        if step not in self._files:
            self._files[step] = safe_open(self._folder / f"{step}.safetensors", framework="np")
        return self._files[step]

    def whole(self, name: str, step: int) -> np.ndarray:
        return self._file(step).get_tensor(name)

    def part(self, name: str, step: int, index: tuple) -> np.ndarray:
        # A selection of nothing but whole axes is the tensor; get_slice wants at least one axis.
        return self._file(step).get_slice(name)[index] if index else self.whole(name, step)

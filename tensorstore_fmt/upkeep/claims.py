"""What entries say of shards: which bytes hold which chunk; and which names and steps that are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.page import Entries
from tensorstore_fmt.format.segment import Catalog
from tensorstore_fmt.upkeep.report import Names

__all__ = ["CLAIM", "Claims", "expand", "names_of"]

CLAIM: Final = np.dtype(
    [
        ("offset", "i8"),
        ("nbytes", "u4"),
        ("raw_nbytes", "u4"),
        ("crc32c", "u4"),
        ("codec", "u1"),
        ("flags", "u1"),
        ("digest", "u8"),
        ("elements", "i8"),
        ("series", "u4"),
        ("count", "u4"),
        ("step", "i8"),
        ("stride", "i8"),
    ]
)
"""One chunk in a shard; ``series`` is a number of `Claims.series`, ``elements`` are strings."""

_MOST_STEPS: Final = 100_000


def expand(runs: Iterable[tuple[int, int, int]], most: int = _MOST_STEPS) -> list[int]:
    """Give the steps of (step, stride, count), ascending, each once; no more than `most`."""
    parts: list[np.ndarray] = []
    total = 0
    for step, stride, count in runs:
        parts.append(step + stride * np.arange(min(count, most), dtype=np.int64))
        total += len(parts[-1])
        if total > 4 * most:
            parts = [np.unique(np.concatenate(parts))[:most]]
            total = len(parts[0])
    if not parts:
        return []
    found: list[int] = np.unique(np.concatenate(parts))[:most].tolist()
    return found


def names_of(hits: Iterable[tuple[str, int, int, int]]) -> Names:
    """Put (name, step, stride, count) together by name."""
    runs: dict[str, list[tuple[int, int, int]]] = {}
    for name, step, stride, count in hits:
        runs.setdefault(name, []).append((step, stride, count))
    return tuple((name, tuple(expand(runs[name]))) for name in sorted(runs))


class Claims:
    """The chunks that entries name in shards; some 60 bytes each."""

    def __init__(self) -> None:
        self._arrays: dict[layout.ShardName, list[np.ndarray]] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self.series: list[tuple[str, str]] = []
        self.needed: dict[layout.ShardName, int] = {}

    def need(self, shards: Sequence[tuple[layout.ShardName, int]]) -> None:
        """Note how long shards have to be."""
        for name, nbytes in shards:
            self.needed[name] = max(nbytes, self.needed.get(name, 0))

    def add(
        self,
        catalog: Catalog,
        shards: Sequence[tuple[layout.ShardName, int]],
        entries: Entries,
        elements: np.ndarray,
    ) -> None:
        """Add all of these entries that lie in shards."""
        is_stored = entries.rows["shard"] != layout.INLINE_SHARD
        if not is_stored.any():
            return
        rows = entries.rows[is_stored]
        made = np.empty(len(rows), CLAIM)
        for field in ("offset", "nbytes", "raw_nbytes", "crc32c", "codec", "flags", "digest"):
            made[field] = rows[field]
        for field in ("count", "step", "stride"):
            made[field] = rows[field]
        made["elements"] = elements[is_stored]
        unique, inverse = np.unique(rows["series"], return_inverse=True)
        made["series"] = np.fromiter(
            (self._number(catalog, n) for n in unique.tolist()), np.uint32, len(unique)
        )[inverse]
        for number in np.unique(rows["shard"]).tolist():
            part = made[rows["shard"] == number]
            self._arrays.setdefault(shards[number][0], []).append(part)

    def _number(self, catalog: Catalog, row: int) -> int:
        series = catalog[row]
        key = (series.name, series.dtype)
        number = self._numbers.setdefault(key, len(self.series))
        if number == len(self.series):
            self.series.append(key)
        return number

    def shards(self) -> list[layout.ShardName]:
        """Give all shards that are named."""
        return sorted(self._arrays.keys() | self.needed.keys())

    def of(self, name: layout.ShardName) -> np.ndarray:
        """Give the claims on a shard, by offset."""
        arrays = self._arrays.get(name)
        if not arrays:
            return np.empty(0, CLAIM)
        claims = np.concatenate(arrays)
        return claims[np.argsort(claims["offset"], kind="stable")]

    def names(self, claims: np.ndarray) -> Names:
        """Give the names and steps of some claims."""
        return names_of(
            (self.series[c["series"]][0], int(c["step"]), int(c["stride"]), int(c["count"]))
            for c in claims
        )

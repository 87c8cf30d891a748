"""From a save to chunks in a shard, entries and statistics."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from typing import Final

import crc32c
import numpy as np
import xxhash

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import codec, grid, layout, statistics
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.progressions import runs_of_steps
from tensorstore_fmt.format.shard import ShardRow
from tensorstore_fmt.format.strings import pack_strings
from tensorstore_fmt.writing.pending import PendingEntry, Placed, Save
from tensorstore_fmt.writing.shards import ShardSink

__all__ = ["DigestTable", "SaveEncoder"]

_SMALL_PAYLOAD_NBYTES: Final = 256  # such payloads are kept in the index
_MAX_STATS_STEPS: Final = layout.JOINED_INLINE_NBYTES // (8 * layout.STATS_LEN)


class DigestTable:
    """Remembers the last payload of each chunk, so that the same bytes are stored once.

    What was not committed is never reused, but within its own flush: it is published with it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._placed: dict[tuple[object, ...], tuple[Placed, int]] = {}
        self._committed = -1

    def find(
        self, series: Series, chunk: int, digest: int, raw_nbytes: int, flush: int
    ) -> Placed | None:
        """Give the payload that the chunk had last, if it is the same and may be used again."""
        with self._lock:
            found = self._placed.get((series.identity, chunk))
            if found is None:
                return None
            placed, in_flush = found
            if placed.is_lost or not (in_flush <= self._committed or in_flush == flush):
                return None
        is_same = placed.digest == digest and placed.raw_nbytes == raw_nbytes
        return placed if is_same else None

    def learn(self, series: Series, chunk: int, placed: Placed, flush: int) -> None:
        """Remember a payload written in this flush."""
        with self._lock:
            self._placed[series.identity, chunk] = (placed, flush)

    def committed(self, flush: int) -> None:
        """All flushes up to this one are published."""
        with self._lock:
            self._committed = max(self._committed, flush)


class SaveEncoder:
    """Encodes one save: chunks to the sink, entries to the save.

    Attributes
    ----------
    encoder
        Of the thread that goes on with it.
    chunks
        Does it; after each chunk of a large tensor another thread may go on.
    """

    def __init__(
        self,
        save: Save,
        flush: int,
        sink: ShardSink,
        *,
        encoder: codec.Encoder,
        digests: DigestTable,
        compression: str,
    ) -> None:
        self.encoder = encoder
        self.chunks = self._run(sink)
        self._save = save
        self._digests = digests
        self._has_digests = compression != "none"
        self._flush = flush
        self._steps = [row[0] for row in save.rows]
        self._arrays = [row[1] for row in save.rows]
        self._kept = save.kept
        self._rows: list[tuple[ShardRow, Placed]] = []
        self._entries: list[PendingEntry] = []

    def abandon(self) -> None:
        """Say that what is not stored never will be: others may have found it by its digest."""
        for _, placed in self._rows:
            placed.is_dropped |= placed.shard is None

    def _run(self, sink: ShardSink) -> Iterator[None]:
        kept = self._kept
        if kept.series.dtype == dtypes.STRING:
            self._strings()
        elif kept.storing == "gridded" and kept.has_data:
            for step, array in zip(self._steps, self._arrays, strict=True):
                yield from self._gridded(step, array)
        else:
            self._together()
        if self._rows:
            sink.add(self._rows)
        self._save.entries = self._entries

    # --- k steps to a chunk, or statistics alone --------------------------------------

    def _together(self) -> None:
        kept, arrays = self._kept, self._arrays
        if len(arrays) == 1:
            rows = arrays[0].reshape(1, -1)
        else:
            rows = np.concatenate(arrays, axis=None).reshape(len(arrays), -1)
        if kept.stats is not None:
            self._statistics(kept.stats, statistics.compute_rows(rows, dtype=kept.series.dtype))
        if not kept.has_data:
            return
        raw = rows.view(np.uint8)
        for at, stop in self._runs(grid.DEFAULT_CHUNK_NBYTES // max(1, kept.step_nbytes)):
            steps = np.array(self._steps[at:stop], np.int64)
            if stop - at > 1 and self._has_digests and _all_equal(raw[at:stop]):
                self._chunk(kept.series, steps, 0, raw[at], is_repeat=True)
            else:
                self._chunk(kept.series, steps, 0, raw[at:stop].reshape(-1))

    def _statistics(self, series: Series, vectors: np.ndarray) -> None:
        for at, stop in self._runs(_MAX_STATS_STEPS):
            steps = np.array(self._steps[at:stop], np.int64)
            data = vectors[at:stop].astype("<f8").tobytes()
            self._entry(series, steps, 0, _inline(data))

    def _runs(self, most: int) -> Iterator[tuple[int, int]]:
        """Give where runs of at most so many steps begin and end."""
        for begin, end in runs_of_steps(np.array(self._steps, np.int64)):
            for at in range(begin, end, max(1, most)):
                yield at, min(at + max(1, most), end)

    # --- large: a grid of chunks ----------------------------------------------------

    def _gridded(self, step: int, array: np.ndarray) -> Iterator[None]:
        series, stats = self._kept.series, self._kept.stats
        steps = np.array([step], np.int64)
        n = grid.n_chunks(series.shape, series.grid)
        # Each chunk is summed up where it is encoded: it is in the cache then.
        vectors = np.empty((n if stats is not None else 0, layout.STATS_LEN))
        for number, chunk in enumerate(_chunks(array, series.grid)):
            if stats is not None:
                vectors[number] = statistics.compute(chunk, dtype=series.dtype)
            self._chunk(series, steps, number, chunk.view(np.uint8))
            yield
        if stats is not None:
            whole = statistics.combine(vectors)
            if not np.isfinite(whole[-3:]).all():  # the sums
                whole = statistics.compute(array, dtype=series.dtype)
            self._statistics(stats, whole[None])

    def _strings(self) -> None:
        series = self._kept.series
        if self._kept.storing == "joined":
            most = grid.DEFAULT_CHUNK_NBYTES // max(1, self._kept.step_nbytes)
            for at, stop in self._runs(most):
                texts = [s for a in self._arrays[at:stop] for s in a.reshape(-1).tolist()]
                steps = np.array(self._steps[at:stop], np.int64)
                self._chunk(series, steps, 0, _bytes_of_strings(texts))
            return
        for step, array in zip(self._steps, self._arrays, strict=True):
            for number in range(grid.n_chunks(series.shape, series.grid)):
                box = grid.chunk_box(series.shape, series.grid, number)
                raw = _bytes_of_strings(array[_slices(box)].reshape(-1).tolist())
                self._chunk(series, np.array([step], np.int64), number, raw)

    # --- one chunk ------------------------------------------------------------------

    def _chunk(
        self,
        series: Series,
        steps: np.ndarray,
        number: int,
        raw: np.ndarray,
        *,
        is_repeat: bool = False,
    ) -> None:
        digest = None
        if self._has_digests and raw.nbytes > _SMALL_PAYLOAD_NBYTES:
            digest = xxhash.xxh3_64_intdigest(raw.data)
            found = self._digests.find(series, number, digest, raw.nbytes, self._flush)
            if found is not None and (is_repeat or len(steps) == 1):
                self._entry(series, steps, number, found, is_repeat=is_repeat, is_new=False)
                return
        encoded = self.encoder.encode(raw, dtype=series.dtype, hint=self._kept.hint)
        placed = Placed(
            codec=encoded.codec,
            raw_nbytes=raw.nbytes,
            nbytes=encoded.nbytes,
            crc32c=encoded.crc32c,
            digest=digest,
        )
        if encoded.nbytes <= _SMALL_PAYLOAD_NBYTES:
            placed.inline = encoded.to_bytes()
        if encoded.codec == layout.CODEC_CONSTANT and len(steps) > 1 and not is_repeat:
            # One step's worth says the same, and can be joined with what follows.
            placed.raw_nbytes //= len(steps)
            placed.digest, is_repeat = None, True
        entry = self._entry(series, steps, number, placed, is_repeat=is_repeat)
        if placed.inline is not None:
            return
        self._rows.append(
            (
                ShardRow(
                    series=series,
                    step=entry.step,
                    stride=entry.stride,
                    count=entry.count,
                    chunk=number,
                    flush=self._flush,
                    codec=placed.codec,
                    flags=_flags(placed, is_repeat=is_repeat),
                    nbytes=placed.nbytes,
                    raw_nbytes=placed.raw_nbytes,
                    crc32c=placed.crc32c,
                    digest=digest or 0,
                    parts=encoded.parts,
                ),
                placed,
            )
        )
        # After it is among the rows: see `abandon`.
        if digest is not None and (is_repeat or len(steps) == 1):
            self._digests.learn(series, number, placed, self._flush)

    def _entry(
        self,
        series: Series,
        steps: np.ndarray,
        number: int,
        placed: Placed,
        *,
        is_repeat: bool = False,
        is_new: bool = True,
    ) -> PendingEntry:
        entry = PendingEntry(
            series=series,
            step=int(steps[0]),
            stride=_stride(steps),
            count=len(steps),
            chunk=number,
            placed=placed,
            is_repeat=is_repeat,
            is_new=is_new,
        )
        self._entries.append(entry)
        return entry


def _flags(placed: Placed, *, is_repeat: bool) -> int:
    return (layout.ENTRY_REPEAT if is_repeat else 0) | (
        layout.ENTRY_HAS_DIGEST if placed.digest is not None else 0
    )


def _stride(steps: np.ndarray) -> int:
    return int(steps[1] - steps[0]) if len(steps) > 1 else 1


def _inline(data: bytes) -> Placed:
    return Placed(
        codec=layout.CODEC_RAW,
        raw_nbytes=len(data),
        nbytes=len(data),
        crc32c=crc32c.crc32c(data),
        inline=data,
    )


def _chunks(array: np.ndarray, cut: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Give the elements of each box of a grid, flat and contiguous, in the order of the chunks."""
    shape = array.shape
    counts = grid.chunk_counts(shape, cut)
    # Boxes that are whole along all axes but the first are slices of memory as it lies.
    if all(n <= 1 for n in counts[1:]):
        flat = array.reshape(-1)
        size = math.prod(shape[1:]) * (grid.steps_lengths(shape, cut)[0] if shape else 1)
        for number in range(math.prod(counts)):
            yield flat[number * size : (number + 1) * size]
        return
    for number in range(math.prod(counts)):
        box = array[_slices(grid.chunk_box(shape, cut, number))]
        yield np.ascontiguousarray(box).reshape(-1)


def _slices(box: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(begin, end) for begin, end in box)


def _bytes_of_strings(texts: list[str]) -> np.ndarray:
    return np.frombuffer(pack_strings(texts), np.uint8)


def _all_equal(rows: np.ndarray) -> bool:
    """Say whether all rows have the same bits, giving up at the first that differs."""
    return all(np.array_equal(rows[0], row) for row in rows[1:])

"""The threads that turn snapshots into payloads, entries and statistics."""

from __future__ import annotations

import math
import queue
import threading
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
from tensorstore_fmt.writing.buffers import BufferPool
from tensorstore_fmt.writing.failures import Failures
from tensorstore_fmt.writing.options import MIB, WriterOptions
from tensorstore_fmt.writing.pending import Generation, PendingEntry, Placed, Save
from tensorstore_fmt.writing.quota import Quota
from tensorstore_fmt.writing.shards import ShardSink

__all__ = ["DigestTable", "EncoderPool"]

_PAYLOADS_NBYTES: Final = 32 * MIB  # a batch that is written, one that grows, two encoders' blocks
_BYTE: Final = np.dtype(np.uint8)
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


class EncoderPool:
    """A few threads that encode saves in the background."""

    def __init__(
        self,
        sink: ShardSink,
        options: WriterOptions,
        *,
        quota: Quota,
        failures: Failures,
    ) -> None:
        self._sink = sink
        self._options = options
        self._quota = quota
        self._failures = failures
        self._digests = DigestTable()
        self._blocks = BufferPool(_PAYLOADS_NBYTES)
        self._queue: queue.SimpleQueue[tuple[Generation, Save] | None] = queue.SimpleQueue()
        self._own = threading.local()
        self._threads = [
            threading.Thread(target=self._run, name=f"tensorstore_fmt-encoder-{i}", daemon=True)
            for i in range(options.encoders)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, generation: Generation, save: Save) -> None:
        """Take a save that is closed."""
        self._queue.put((generation, save))

    def has_work(self) -> bool:
        """Say whether saves wait that no encoder has taken yet."""
        return not self._queue.empty()

    def committed(self, flush: int) -> None:
        """Let payloads of flushes up to this one be reused."""
        self._digests.committed(flush)

    def stop(self) -> None:
        """Let the threads end when all work is done, and wait for them."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            generation, save = work
            del work
            if generation.claim(save):
                self._quota.begin()
                self._encode(generation, save)

    def _encoder(self) -> codec.Encoder:
        """Give the encoder of this thread."""
        if not hasattr(self._own, "encoder"):
            self._own.encoder = codec.Encoder(self._options.compression, empty=self._empty)
        found: codec.Encoder = self._own.encoder
        return found

    def _empty(self, nbytes: int) -> np.ndarray:
        return self._blocks.empty((nbytes,), _BYTE)

    def _encode(self, generation: Generation, save: Save) -> None:
        try:
            if save.rows:
                save.entries = _SaveEncoder(
                    self._encoder(),
                    self._digests,
                    self._options.compression,
                    generation.number,
                    save,
                ).run(self._sink)
        except Exception as error:  # noqa: BLE001 - a bug here must not stop training; it is counted
            save.is_lost = True
            self._failures.note(error)
        finally:
            rows, save.rows = save.rows, []
            self._quota.end(row[2] for row in rows)
            generation.finish()


class _SaveEncoder:
    """Encodes one save: chunks to the sink, entries to the caller."""

    def __init__(
        self,
        encoder: codec.Encoder,
        digests: DigestTable,
        compression: str,
        flush: int,
        save: Save,
    ) -> None:
        self._encoder = encoder
        self._digests = digests
        self._has_digests = compression != "none"
        self._flush = flush
        self._steps = [row[0] for row in save.rows]
        self._arrays = [row[1] for row in save.rows]
        self._kept = save.kept
        self._rows: list[tuple[ShardRow, Placed]] = []
        self._entries: list[PendingEntry] = []

    def run(self, sink: ShardSink) -> list[PendingEntry]:
        kept = self._kept
        if kept.stats is not None:
            self._statistics(kept.stats)
        if kept.has_data:
            if kept.storing == "gridded":
                for step, array in zip(self._steps, self._arrays, strict=True):
                    self._gridded(step, array)
            else:
                self._joined()
        if self._rows:
            sink.add(self._rows)
        return self._entries

    # --- statistics -----------------------------------------------------------------

    def _statistics(self, series: Series) -> None:
        dtype = self._kept.series.dtype
        if len(self._arrays) == 1:
            vectors = statistics.compute(self._arrays[0], dtype=dtype)[None]
        else:
            stacked = np.stack([a.reshape(-1) for a in self._arrays])
            vectors = statistics.compute_rows(stacked, dtype=dtype)
        steps = np.array(self._steps, np.int64)
        for begin, end in runs_of_steps(steps):
            for at in range(begin, end, _MAX_STATS_STEPS):
                stop = min(at + _MAX_STATS_STEPS, end)
                data = vectors[at:stop].astype("<f8").tobytes()
                self._entry(series, steps[at:stop], 0, _inline(data))

    # --- middle-sized: k steps to a chunk ------------------------------------------

    def _joined(self) -> None:
        series = self._kept.series
        steps = np.array(self._steps, np.int64)
        is_string = series.dtype == dtypes.STRING
        k = max(1, grid.DEFAULT_CHUNK_NBYTES // max(1, self._kept.step_nbytes))
        for begin, end in runs_of_steps(steps):
            for at in range(begin, end, k):
                stop = min(at + k, end)
                arrays = self._arrays[at:stop]
                if is_string:
                    raw = _bytes_of_strings([s for a in arrays for s in a.reshape(-1).tolist()])
                elif len(arrays) > 1 and self._has_digests and _all_equal(arrays):
                    self._chunk(series, steps[at:stop], 0, _bytes_of(arrays[0]), is_repeat=True)
                    continue
                else:
                    raw = np.concatenate([_bytes_of(a) for a in arrays])
                self._chunk(series, steps[at:stop], 0, raw)

    # --- large: a grid of chunks ----------------------------------------------------

    def _gridded(self, step: int, array: np.ndarray) -> None:
        series = self._kept.series
        steps = np.array([step], np.int64)
        if series.dtype == dtypes.STRING:
            self._strings(steps, array)
            return
        shape, lengths = series.shape, grid.steps_lengths(series.shape, series.grid)
        counts = grid.chunk_counts(shape, series.grid)
        # Boxes that are whole along all axes but the first are slices of memory as it lies.
        if all(n <= 1 for n in counts[1:]):
            flat = _bytes_of(array)
            row_nbytes = math.prod(shape[1:]) * array.itemsize
            size = (lengths[0] if shape else 1) * row_nbytes
            for number in range(math.prod(counts)):
                self._chunk(series, steps, number, flat[number * size : (number + 1) * size])
            return
        for number in range(math.prod(counts)):
            box = tuple(slice(a, b) for a, b in grid.chunk_box(shape, series.grid, number))
            self._chunk(series, steps, number, _bytes_of(np.ascontiguousarray(array[box])))

    def _strings(self, steps: np.ndarray, array: np.ndarray) -> None:
        series = self._kept.series
        for number in range(grid.n_chunks(series.shape, series.grid)):
            box = tuple(slice(a, b) for a, b in grid.chunk_box(series.shape, series.grid, number))
            raw = _bytes_of_strings(array[box].reshape(-1).tolist())
            self._chunk(series, steps, number, raw)

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
        encoded = self._encoder.encode(raw, dtype=series.dtype, hint=self._kept.hint)
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
        self._entry(series, steps, number, placed, is_repeat=is_repeat)
        if placed.inline is not None:
            return
        if digest is not None and (is_repeat or len(steps) == 1):
            self._digests.learn(series, number, placed, self._flush)
        self._rows.append(
            (
                ShardRow(
                    series=series,
                    step=int(steps[0]),
                    stride=_stride(steps),
                    count=len(steps),
                    chunk=number,
                    flush=self._flush,
                    codec=placed.codec,
                    flags=_flags(placed, is_repeat=is_repeat),
                    nbytes=placed.nbytes,
                    raw_nbytes=placed.raw_nbytes,
                    crc32c=placed.crc32c,
                    digest=digest or 0,
                    parts=(encoded.payload,),
                ),
                placed,
            )
        )

    def _entry(
        self,
        series: Series,
        steps: np.ndarray,
        number: int,
        placed: Placed,
        *,
        is_repeat: bool = False,
        is_new: bool = True,
    ) -> None:
        self._entries.append(
            PendingEntry(
                series=series,
                step=int(steps[0]),
                stride=_stride(steps),
                count=len(steps),
                chunk=number,
                placed=placed,
                is_repeat=is_repeat,
                is_new=is_new,
            )
        )


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


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _bytes_of_strings(texts: list[str]) -> np.ndarray:
    return np.frombuffer(pack_strings(texts), np.uint8)


def _all_equal(arrays: list[np.ndarray]) -> bool:
    """Say whether all have the same bits, giving up at the first that differs."""
    first = _bytes_of(arrays[0])
    return all(np.array_equal(first, _bytes_of(a)) for a in arrays[1:])

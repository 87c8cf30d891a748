"""Builds runs from explicit entries, byte by byte the same each time; also wrong ones.

No well-behaved writer makes parts by hand, segments that overlap, or steps saved twice in
one flush; tests of the reader need them. Nothing here chooses, buffers or merges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import bundle, grid, layout, page, runfile, segment, strings
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.codec import encode_delta
from tensorstore_fmt.format.page import ENTRY_ROW, Entries
from tensorstore_fmt.format.ragged import Ragged
from tensorstore_fmt.format.shard import ShardEncoder, ShardRow

RUN_ID = bytes(range(16))

_Stored = tuple[bytes, int]  # a payload, and the length of its raw chunk


@dataclass(frozen=True, kw_only=True)
class Put:
    """One saved tensor, or `count` steps of one, as it shall stand in the index.

    Attributes
    ----------
    value
        An array; with ``count > 1`` (and no ``repeat``) one more leading axis. A `str` or a
        list of these is a string tensor. None: the steps were dropped.
    shape
        Of the series; −1 for what varies. None: that of the value.
    grid
        Chunk lengths; None: one chunk.
    inline
        Whether the payload lies in the index.
    codec
        RAW, CONSTANT (the value must be constant), DELTA, or any number for a wrong one.
    skip_chunks, change
        Chunks left out; columns of the entries to be changed. With an ``offset`` the payload
        is not stored: the entry points to what is there in the flush's shard.
    """

    name: str = "x"
    step: int = 0
    value: Any = None
    stride: int = 1
    count: int = 1
    repeat: bool = False
    mode: int = 0
    kind: int = layout.KIND_DATA
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    grid: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] = ()
    origin: tuple[int, ...] = ()
    inline: bool = False
    codec: int = layout.CODEC_RAW
    flush: int | None = None
    last_flush: int | None = None
    skip_chunks: Sequence[int] = ()
    change: dict[str, int] | None = None


@dataclass
class _Row:
    series: tuple[Any, ...]
    columns: dict[str, int]
    dims: tuple[int, ...]
    payload: bytes


class WriterBuilder:
    """One writer of a run under construction."""

    def __init__(self, run: RunBuilder, header: segment.Header) -> None:
        self.run = run
        self.header = header
        self.next_flush = 0
        self._next_shard = 0

    @property
    def key(self) -> layout.WriterKey:
        return self.header.key

    def flush(
        self,
        *puts: Put,
        first: int | None = None,
        last: int | None = None,
        closed: bool = False,
        through: int | Sequence[int] = -1,
        **header: Any,
    ) -> layout.SegmentName:
        """Publish one segment; by default it covers the next flush alone."""
        last = (self.next_flush if first is None else first) if last is None else last
        first = last if first is None else first
        self.next_flush = max(self.next_flush, last + 1)
        steps_by_mode = [through] * 4 if isinstance(through, int) else list(through)
        rows: list[_Row] = []
        for put in puts:
            rows += _rows(put, last if put.flush is None else put.flush)
        shards = self._store(rows)
        series, entries = _index(rows)
        made = replace(
            self.header,
            first_flush=first,
            last_flush=last,
            is_closed=closed,
            complete_through=tuple(steps_by_mode),
            **header,
        )
        data = b"".join(segment.encode(made, series, shards, page.encode_entries(entries)))
        path = self.run.root / made.name.path
        path.parent.mkdir(exist_ok=True)
        # Whole or not at all, as storages do it: readers may be looking.
        unseen = self.run.root / f"{made.name.path.replace('/', '-')}.tmp"
        unseen.write_bytes(data)
        unseen.replace(path)
        return made.name

    def _store(self, rows: list[_Row]) -> list[tuple[layout.ShardName, int]]:
        """Put the payloads that are not inline into one shard."""
        large = [row for row in rows if "offset" not in row.columns]
        if not large:
            return []
        name = layout.ShardName(key=self.key, number=self._next_shard)
        self._next_shard += 1
        encoder = ShardEncoder(self.run.run_id, name)
        parts, offsets = encoder.batch(
            [
                ShardRow(
                    series=_series(_with_all_lengths(row)),
                    parts=[row.payload],
                    flush=row.columns["last_flush"],
                    **{
                        key: row.columns[key]
                        for key in (
                            "step", "stride", "count", "chunk", "codec", "flags", "nbytes",
                            "raw_nbytes", "crc32c", "digest",
                        )
                    },
                )
                for row in large
            ]
        )  # fmt: skip
        for row, offset in zip(large, offsets, strict=True):
            row.columns |= {"shard": 0, "offset": offset}
        data = b"".join(bytes(part) for part in [*parts, *encoder.seal()])
        path = self.run.root / name.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return [(name, len(data))]


class RunBuilder:
    """A run under construction in a local folder."""

    def __init__(self, root: Path, *, attrs: dict[str, object] | None = None) -> None:
        self.root = root
        self.run_id = RUN_ID
        root.mkdir(parents=True, exist_ok=True)
        info = runfile.RunInfo(run_id=RUN_ID, created_us=1_700_000_000_000_000, attrs=attrs or {})
        (root / layout.RUN_JSON).write_bytes(runfile.encode(info))
        (root / layout.INDEX_DIR).mkdir(exist_ok=True)

    @property
    def url(self) -> str:
        return str(self.root)

    def writer(
        self,
        worker: int = 0,
        *,
        attempt: int = 0,
        writer: int | None = None,
        num_workers: int = 1,
        resume_step: int = 0,
        opened_us: int = 1,
        recovers: int = 0,
    ) -> WriterBuilder:
        """Begin a writer; nothing is published yet."""
        number = 0x100 * (attempt + 1) + worker if writer is None else writer
        header = segment.Header(
            run_id=self.run_id,
            key=layout.WriterKey(worker=worker, attempt=attempt, writer=number),
            num_workers=num_workers,
            resume_step=resume_step,
            first_flush=0,
            last_flush=0,
            opened_us=opened_us,
            published_us=opened_us + 1,
            recovers=recovers,
        )
        return WriterBuilder(self, header)

    def bundle(self, *, whole: bool = True) -> None:
        """Write the bundle of all segments that are there."""
        rows = []
        for path in sorted((self.root / layout.INDEX_DIR).iterdir()):
            name = layout.parse_segment_name(path.name)
            assert name is not None
            data = path.read_bytes()
            header = segment.decode_header(data, where=path.name)
            rows.append((name, len(data), data if whole else data[: header.head_nbytes]))
        parts = bundle.encode(self.run_id, rows)
        (self.root / layout.BUNDLE).write_bytes(b"".join(bytes(p) for p in parts))


def step_row(step: int, *, mode: int = 0, mode_step: int | None = None, wall_us: int = 0) -> Put:
    """Give the row of the step table for one step."""
    number = step if mode_step is None else mode_step
    return Put(
        name="",
        kind=layout.KIND_STEPS,
        step=step,
        mode=mode,
        value=np.array([number, wall_us], np.int64),
        inline=True,
    )


def _rows(put: Put, flush: int) -> Iterable[_Row]:
    """Give the entries of one `Put`."""
    value, dtype, shape = _value(put)
    declared = shape if put.shape is None else put.shape
    dims = tuple(n for n, d in zip(shape, declared, strict=True) if d < 0)
    lengths = put.grid or (0,) * len(shape)
    series = (
        put.name, put.kind, put.mode, dtype, lengths, put.global_shape, put.origin, declared,
    )  # fmt: skip
    base = {
        "step": put.step,
        "stride": put.stride,
        "count": put.count,
        "first_flush": flush,
        "last_flush": flush if put.last_flush is None else put.last_flush,
        "digest": 0,
    }
    if value is None:
        inline = {"shard": layout.INLINE_SHARD, "offset": 0}
        yield _finish(
            series,
            base | inline | {"chunk": 0, "codec": layout.CODEC_DROPPED, "flags": 0},
            dims,
            (b"", 0),
        )
        return
    kept = 1 if put.repeat else put.count
    for chunk in range(grid.n_chunks(shape, lengths)):
        if chunk in put.skip_chunks:
            continue
        box = grid.chunk_box(shape, lengths, chunk)
        part = value[(slice(None), *(slice(a, b) for a, b in box))]
        stored = _payload(put, part, dtype, kept)
        columns = base | {
            "chunk": chunk,
            "codec": put.codec,
            "flags": layout.ENTRY_REPEAT if put.repeat else 0,
        }
        if put.inline or not stored[0]:
            columns |= {"shard": layout.INLINE_SHARD, "offset": 0}
        row = _finish(series, columns, dims, stored)
        row.columns |= put.change or {}
        yield row


def _value(put: Put) -> tuple[np.ndarray | None, str, tuple[int, ...]]:
    """Give the value with a leading axis of steps, its dtype and its shape."""
    value = put.value
    is_text = isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(v, str) for v in value)
    )
    if value is None:
        return None, put.dtype or "float32", tuple(max(n, 0) for n in put.shape or ())
    array = np.array(value, object if is_text else None)
    dtype = put.dtype or (dtypes.STRING if is_text else dtypes.dtype_name(array.dtype))
    if put.count == 1 or put.repeat:
        array = array[None]
    assert put.repeat or len(array) == put.count
    return array, dtype, array.shape[1:]


def _payload(put: Put, part: np.ndarray, dtype: str, kept: int) -> _Stored:
    if dtype == dtypes.STRING:
        raw = strings.pack_strings(part.reshape(-1).tolist()) if part.size else b""
        return raw, len(raw)
    raw = np.ascontiguousarray(part).tobytes()
    if put.codec == layout.CODEC_CONSTANT:
        return raw[: dtypes.itemsize(dtype)], len(raw)
    if put.codec == layout.CODEC_DELTA:
        return encode_delta(np.frombuffer(raw, np.uint8), rows=kept).to_bytes(), len(raw)
    return raw, len(raw)


def _finish(
    series: tuple[Any, ...], columns: dict[str, int], dims: tuple[int, ...], stored: _Stored
) -> _Row:
    payload, raw_nbytes = stored
    columns |= {
        "nbytes": len(payload),
        "raw_nbytes": raw_nbytes,
        "crc32c": crc32c.crc32c(payload),
    }
    return _Row(series, columns, dims, payload)


def _series(identity: tuple[Any, ...], **sums: int) -> Series:
    name, kind, mode, dtype, lengths, global_shape, origin, shape = identity
    return Series(
        name=name, kind=kind, mode=mode, dtype=dtype, grid=lengths, global_shape=global_shape,
        origin=origin, shape=tuple(shape), **sums,
    )  # fmt: skip


def _with_all_lengths(row: _Row) -> tuple[Any, ...]:
    """Give what a shard's row says of its series: every length of the shape."""
    *identity, declared = row.series
    dims = iter(row.dims)
    return (*identity, tuple(next(dims) if n < 0 else n for n in declared))


def _index(rows: list[_Row]) -> tuple[list[Series], Entries]:
    """Give the catalog and the entries in the order of the spec."""
    identities = sorted({row.series for row in rows})
    number = {identity: i for i, identity in enumerate(identities)}
    rows = sorted(
        rows,
        key=lambda r: (
            number[r.series], r.columns["step"], r.columns["chunk"], r.columns["first_flush"],
        ),
    )  # fmt: skip
    table = np.zeros(len(rows), ENTRY_ROW)
    for i, row in enumerate(rows):
        table[i]["series"] = number[row.series]
        for key, value in row.columns.items():
            table[i][key] = value
    catalog = []
    for identity in identities:
        mine = [row for row in rows if row.series == identity]
        last = [r.columns["step"] + r.columns["stride"] * (r.columns["count"] - 1) for r in mine]
        catalog.append(
            _series(
                identity,
                first_step=min(r.columns["step"] for r in mine),
                last_step=max(last),
                steps=sum(r.columns["count"] for r in mine if r.columns["chunk"] == 0),
                raw_nbytes=sum(r.columns["raw_nbytes"] for r in mine),
                stored_nbytes=sum(r.columns["nbytes"] for r in mine),
            )
        )
    is_inline = table["shard"] == layout.INLINE_SHARD
    payloads = [row.payload if i else b"" for row, i in zip(rows, is_inline, strict=True)]
    entries = Entries(table, Ragged.of_ints([row.dims for row in rows]), Ragged.of_bytes(payloads))
    return catalog, entries

"""Runs and what a reader must give for them: the words in which the cases are written.

A case saves values with `Writer.save`; that makes the entries, and notes what is expected. What is
expected is written down from the values themselves, never read back from the bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import build
import numpy as np
import payloads
import xxhash
from build import CATALOG, ENTRIES, HAS_DIGEST, NO_SHARD, REPEAT, SHARDS, Page, Row, Segment, Shard
from numpy.typing import NDArray

WALL_US: Final = 1_750_000_000_000_000

ITEMSIZE: Final = {
    "bool": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16, "bfloat16": 2,
    "float8_e3m4": 1, "float8_e4m3": 1, "float8_e4m3b11fnuz": 1, "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float6_e2m3fn": 1, "float6_e3m2fn": 1, "float4_e2m1fn": 1,
    "int4": 1, "int2": 1, "uint4": 1, "uint2": 1,
}  # fmt: skip
"""Bytes of an element; the order is that of the table in `format.md`."""

Value = NDArray[Any] | list[str]


@dataclass(frozen=True, order=True)
class S:
    """A series: what stands in its catalog row. A length of −1 varies."""

    name: str
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    grid: tuple[int, ...] | None = None
    mode: int = 0
    kind: int = 0
    global_shape: tuple[int, ...] = ()
    origin: tuple[int, ...] = ()

    @property
    def cut(self) -> tuple[int, ...]:
        """The grid; whole axes if none was given."""
        return (0,) * len(self.shape) if self.grid is None else self.grid

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes a series, in the order of a catalog."""
        return (
            self.name.encode(), self.kind, self.mode, self.dtype.encode(), self.cut,
            self.global_shape, self.origin,
        )  # fmt: skip


def stats_series(of: S) -> S:
    """Give the series of the statistics of a series."""
    return S(
        of.name, "float64", (10,), mode=of.mode, kind=1,
        global_shape=of.global_shape, origin=of.origin,
    )  # fmt: skip


def steps_series(mode: int) -> S:
    """Give the series of a step table."""
    return S("", "int64", (2,), mode=mode, kind=2)


def statistics(values: NDArray[Any]) -> NDArray[np.float64]:
    """Give the ten statistics; the values of a case are such that all of them are exact."""
    x = values.astype(np.float64).ravel()
    finite, number = x[np.isfinite(x)], x[~np.isnan(x)]
    low, high = (number.min(), number.max()) if len(number) else (np.nan, np.nan)
    counts = [len(x), len(x) - len(number), (x == np.inf).sum(), (x == -np.inf).sum()]
    sums = [finite.sum(), (finite * finite).sum(), np.abs(finite).sum()]
    return np.array([*counts, (x == 0).sum(), low, high, *sums], np.float64)


def chunk_boxes(shape: Sequence[int], grid: Sequence[int]) -> list[tuple[slice, ...]]:
    """Cut a shape by a grid ("Grid")."""
    if 0 in shape:
        return [tuple(slice(0, n) for n in shape)]
    axes = [range(0, n, g or n) for n, g in zip(shape, grid, strict=True)]
    counts = [len(axis) for axis in axes]
    boxes = []
    for number in range(math.prod(counts)):
        at = np.unravel_index(number, counts) if counts else ()
        boxes.append(
            tuple(
                slice(axis[int(i)], min(axis[int(i)] + (axis.step), n))
                for axis, i, n in zip(axes, at, shape, strict=True)
            )
        )
    return boxes


def element_bytes(value: Value) -> bytes:
    """Give elements as they are stored."""
    if isinstance(value, list):
        return payloads.strings(value)
    return value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()


@dataclass
class Writer:
    """One writer; what it saves waits until it publishes a segment."""

    run: RunCase
    header: dict[str, Any]
    flush: int = 1
    first: int = 0
    pending: list[Row] = field(default_factory=list)

    @property
    def worker(self) -> int:
        """Its rank."""
        return int(self.header["worker"])

    @property
    def attempt(self) -> int:
        """Its attempt."""
        return int(self.header["attempt"])

    def shard(self, number: int = 0) -> Shard:
        """Begin a shard."""
        shard = Shard(self.run.run_id, self.worker, self.attempt, self.header["writer"], number)
        self.run.shards[shard.name] = shard
        return shard

    # --- saving ---------------------------------------------------------------------

    def save(
        self,
        series: S,
        steps: Sequence[int],
        values: Sequence[Value],
        *,
        codec: int | Mapping[int, int] = payloads.RAW,
        rotated: bool = False,
        wide: bool = False,
        shard: Shard | None = None,
        is_repeat: bool = False,
        has_digest: bool = False,
        flushes: tuple[int, int] | None = None,
        code: str | None = None,
        is_visible: bool = True,
    ) -> list[Row]:
        """Save steps that are evenly spaced, one entry a chunk; give the entries.

        Parameters
        ----------
        codec
            Of all chunks, or of each by number.
        is_repeat
            All values are the same, and stored once.
        code
            The failure that reading them must give, if they cannot be read.
        is_visible
            Whether a reader shows these steps.
        """
        shape = self._shape(series, values[0])
        entries = []
        for number, box in enumerate(chunk_boxes(shape, series.cut)):
            raw = self._raw(series, values[:1] if is_repeat else values, box)
            which = codec if isinstance(codec, int) else codec.get(number, payloads.RAW)
            size = ITEMSIZE.get(series.dtype, 0)
            payload = payloads.encode(
                which, raw, itemsize=size, word=size // 2 if "complex" in series.dtype else size,
                rows=1 if is_repeat else len(steps), rotated=rotated, wide=wide,
            )  # fmt: skip
            entry = self._entry(
                series, steps, payload, chunk=number, codec=which, raw_nbytes=len(raw),
                flushes=flushes,
            )  # fmt: skip
            entry["dims"] = [n for n, m in zip(shape, series.shape, strict=True) if m < 0]
            entry["flags"] = REPEAT if is_repeat else 0
            if has_digest:
                entry["flags"] |= HAS_DIGEST
                entry["digest"] = xxhash.xxh3_64_intdigest(raw)
            if shard is not None:
                self._put(entry, shard, shape)
            entries.append(entry)
        self.pending += entries
        if is_visible:
            self.expect(series, steps, values, shape, code=code)
        return entries

    def _shape(self, series: S, value: Value) -> tuple[int, ...]:
        if isinstance(value, list):
            return () if series.shape == () else (len(value),)
        return tuple(value.shape)

    def _raw(self, series: S, values: Sequence[Value], box: tuple[slice, ...]) -> bytes:
        if series.dtype == "string":
            texts = [t for v in values for t in (list(v)[box[0]] if box else list(v))]
            return payloads.strings(texts)
        return b"".join(element_bytes(np.asarray(v)[box]) for v in values)

    def _entry(
        self,
        series: S,
        steps: Sequence[int],
        payload: bytes = b"",
        *,
        chunk: int = 0,
        codec: int = payloads.DROPPED,
        raw_nbytes: int = 0,
        flushes: tuple[int, int] | None = None,
    ) -> Row:
        stride = steps[1] - steps[0] if len(steps) > 1 else 1
        if list(steps) != list(range(steps[0], steps[-1] + 1, stride)):
            raise ValueError(f"these steps are not evenly spaced: {steps}")
        first, last = flushes or (self.flush, self.flush)
        return {
            "series": series, "step": steps[0], "stride": stride, "count": len(steps),
            "chunk": chunk, "dims": [], "first_flush": first, "last_flush": last, "codec": codec,
            "flags": 0, "shard": None, "offset": 0, "nbytes": len(payload),
            "raw_nbytes": raw_nbytes, "crc32c": build.crc(payload), "digest": 0, "inline": payload,
        }  # fmt: skip

    def _put(self, entry: Row, shard: Shard, shape: tuple[int, ...]) -> None:
        """Move a payload from the entry to a shard."""
        series: S = entry["series"]
        row = {
            "name": series.name, "kind": series.kind, "mode": series.mode, "dtype": series.dtype,
            "shape": list(shape), "grid": list(series.cut),
            "global_shape": list(series.global_shape), "origin": list(series.origin),
            "flush": entry["first_flush"], "payload": entry["inline"],
        }  # fmt: skip
        for column in ("step", "stride", "count", "chunk", "codec", "flags"):
            row[column] = entry[column]
        for column in ("nbytes", "raw_nbytes", "crc32c", "digest"):
            row[column] = entry[column]
        shard.put(entry, row)
        entry |= {"shard": shard, "inline": b""}

    def drop(self, series: S, steps: Sequence[int]) -> Row:
        """Record steps as dropped."""
        entry = self._entry(series, steps)
        entry |= {"dims": [0] * series.shape.count(-1), "crc32c": 0}
        self.pending.append(entry)
        return entry

    def log(self, mode: int, steps: Sequence[int], first_mode_step: int = 0) -> list[Row]:
        """Write rows of the step table: evenly spaced steps, a millisecond apart."""
        pairs = [
            (first_mode_step + i, WALL_US + 1000 * (step % 10**6)) for i, step in enumerate(steps)
        ]
        values: list[Value] = [np.array(pair, "<i8") for pair in pairs]
        rows = self.save(steps_series(mode), steps, values, codec=payloads.DELTA, is_visible=False)
        for step, (mode_step, wall_us) in zip(steps, pairs, strict=True):
            self.run.step_table.append(
                {
                    "worker": self.worker, "attempt": self.attempt, "mode": mode,
                    "step": str(step), "mode_step": str(mode_step), "wall_us": str(wall_us),
                }
            )  # fmt: skip
        return rows

    def stats(self, of: S, steps: Sequence[int], values: Sequence[NDArray[Any]]) -> list[Row]:
        """Write the statistics of saved values."""
        vectors: list[Value] = [statistics(value) for value in values]
        return self.save(stats_series(of), steps, vectors)

    def expect(
        self,
        series: S,
        steps: Sequence[int],
        values: Sequence[Value],
        shape: tuple[int, ...],
        *,
        code: str | None = None,
    ) -> None:
        """Note what a reader must give."""
        for step, value in zip(steps, values, strict=True):
            row: dict[str, Any] = {
                "name": series.name, "kind": series.kind, "mode": series.mode,
                "worker": self.worker, "attempt": self.attempt, "step": str(step),
                "dtype": series.dtype, "shape": list(shape),
            }  # fmt: skip
            if series.global_shape:
                row |= {"global_shape": list(series.global_shape), "origin": list(series.origin)}
            row |= {"code": code} if code else content(value)
            self.run.tensors.append(row)

    # --- publishing -----------------------------------------------------------------

    def publish(
        self,
        *,
        entries: Sequence[Row] | None = None,
        flushes: tuple[int, int] | None = None,
        is_closed: bool = False,
        complete: tuple[int, int, int, int] = (-1, -1, -1, -1),
        page_rows: int = 1000,
        **header: object,
    ) -> Segment:
        """Publish what waits as one segment, or, with `entries` and `flushes`, a merged one."""
        for shard in self.run.shards.values():
            shard.flush()
        if entries is None:
            entries, self.pending = self.pending, []
        if flushes is None:
            flushes = (self.first, self.flush)
            self.first = self.flush + 1
            self.flush += 1
        fields = self.header | {
            "first_flush": flushes[0], "last_flush": flushes[1], "flags": int(is_closed),
            "complete_through": complete,
            "published_us": self.header["opened_us"] + 1000 * flushes[1],
        }  # fmt: skip
        segment = Segment(self.run.run_id, fields | header, make_pages(entries, page_rows))
        self.run.segments.append((segment.name, segment))
        return segment

    def begin(self) -> Segment:
        """Publish flush 0, which says that the writer is there."""
        self.first = 1
        return self.publish(entries=[], flushes=(0, 0))


def content(value: Value) -> dict[str, Any]:
    """Give elements as a JSON document says them."""
    return {"strings": value} if isinstance(value, list) else {"data": element_bytes(value).hex()}


def make_pages(entries: Sequence[Row], page_rows: int) -> list[Page]:
    """Give catalog, shard and entry pages of entries that name series and shards as objects."""
    by_identity: dict[tuple[object, ...], S] = {}
    for entry in entries:
        series: S = entry["series"]
        by_identity.setdefault(series.identity, series)
    ordered = sorted(by_identity)
    shards = sorted({e["shard"].key: e["shard"] for e in entries if e["shard"]}.items())
    shard_numbers = {key: i for i, (key, _) in enumerate(shards)}
    rows = [
        entry
        | {
            "series": ordered.index(entry["series"].identity),
            "shard": shard_numbers[entry["shard"].key] if entry["shard"] else NO_SHARD,
        }
        for entry in entries
    ]
    rows.sort(key=lambda r: (r["series"], r["step"], r["chunk"], r["first_flush"]))
    catalog = [
        _catalog_row(by_identity[identity], [r for r in rows if r["series"] == i])
        for i, identity in enumerate(ordered)
    ]
    shard_rows = [
        dict(zip(("worker", "attempt", "writer", "number"), key, strict=True))
        | {"nbytes": max(e["offset"] + e["nbytes"] for e in entries if e["shard"] is shard)}
        for key, shard in shards
    ]
    return [
        *[Page(CATALOG, part) for part in _cut(catalog, page_rows)],
        *([Page(SHARDS, shard_rows)] if shard_rows else []),
        *[Page(ENTRIES, part) for part in _cut(rows, page_rows)],
    ]


def _cut(rows: list[Row], page_rows: int) -> list[list[Row]]:
    return [rows[i : i + page_rows] for i in range(0, len(rows), page_rows)]


def _catalog_row(series: S, rows: Sequence[Row]) -> Row:
    stored = [r for r in rows if r["codec"] != payloads.DROPPED]
    return {
        "name": series.name, "kind": series.kind, "mode": series.mode, "dtype": series.dtype,
        "shape": list(series.shape), "grid": list(series.cut),
        "global_shape": list(series.global_shape), "origin": list(series.origin),
        "first_step": min(r["step"] for r in rows),
        "last_step": max(r["step"] + (r["count"] - 1) * r["stride"] for r in rows),
        "steps": sum(r["count"] for r in stored if r["chunk"] == 0),
        "raw_nbytes": sum(
            r["raw_nbytes"] * (r["count"] if r["flags"] & REPEAT else 1) for r in stored
        ),
        "stored_nbytes": sum(r["nbytes"] for r in stored),
    }  # fmt: skip


@dataclass
class RunCase:
    """A run that becomes a vector."""

    name: str
    about: str
    attrs: dict[str, Any] = field(default_factory=dict)
    names: list[str] | None = None
    is_closed: bool = True
    tensors: list[dict[str, Any]] = field(default_factory=list)
    step_table: list[dict[str, Any]] = field(default_factory=list)
    reads: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    segments: list[tuple[str, Segment]] = field(default_factory=list)
    shards: dict[str, Shard] = field(default_factory=dict)
    unsealed: set[str] = field(default_factory=set)
    files: dict[str, bytes | None] = field(default_factory=dict)
    json_members: dict[str, Any] = field(default_factory=dict)
    unlistable: dict[str, str] = field(default_factory=dict)
    is_code_only: bool = False

    def __post_init__(self) -> None:
        self.run_id = build.noise(f"run {self.name}", 16)

    def writer(
        self, worker: int = 0, attempt: int = 0, *, also: str = "", **header: object
    ) -> Writer:
        """Open a writer; `also` tells two of one worker and attempt apart."""
        seed = build.noise(f"writer {self.name} {worker} {attempt} {also}", 8)
        fields = {
            "worker": worker, "attempt": attempt, "writer": struct.unpack("<Q", seed)[0] | 1,
            "opened_us": WALL_US + 1_000_000 * attempt,
        }  # fmt: skip
        return Writer(self, fields | header)

    # --- what is asked ----------------------------------------------------------------

    def ask(
        self,
        name: str,
        step: int,
        value: Value,
        *,
        dtype: str = "float32",
        index: Sequence[int | tuple[int | None, int | None, int | None]] = (),
        **which: int,
    ) -> None:
        """Expect a value; an index has an integer or (start, stop, step) for each axis."""
        question: dict[str, Any] = {"name": name, "step": str(step)} | which
        if index:
            question["index"] = [list(i) if isinstance(i, tuple) else i for i in index]
        shape = [] if isinstance(value, list) else list(value.shape)
        self.reads.append(question | {"dtype": dtype, "shape": shape} | content(value))

    def say(self, name: str, step: int, state: str, **which: int) -> None:
        """Expect an answer about a step that cannot be read: absent, or ambiguous."""
        self.absent.append({"name": name, "step": str(step)} | which | {"state": state})

    def fail(self, name: str, step: int, code: str, **which: object) -> None:
        """Expect a failure."""
        self.failures.append({"name": name, "step": str(step)} | which | {"code": code})

    # --- the result -------------------------------------------------------------------

    def bundle_of(self, *, heads_only: bool = False) -> bytes:
        """Add a bundle of all segments, and give its bytes."""
        copied = []
        for name, segment in self.segments:
            data = segment.encode()
            (head_nbytes,) = struct.unpack_from("<Q", data, 96)
            copied.append((name, len(data), data[:head_nbytes] if heads_only else data))
        data = build.bundle(self.run_id, sorted(copied))
        self.files["index.bundle"] = data
        return data

    def bytes(self) -> dict[str, bytes]:
        """Give the files of the folder; what a case put into `files` replaces what was made."""
        made = {"run.json": build.run_json(self.run_id, self.attrs, **self.json_members)}
        for name, segment in self.segments:
            made[f"index/{name}"] = segment.encode()
        for name, shard in self.shards.items():
            is_open = name in self.unsealed
            made[f"shards/{name}"] = shard.unsealed() if is_open else shard.sealed()
        return {path: data for path, data in (made | self.files).items() if data is not None}

    def document(self) -> dict[str, Any]:
        """Give what a reader must give."""
        names = self.names
        if names is None:
            names = sorted({t["name"] for t in self.tensors}, key=str.encode)
        document: dict[str, Any] = {"about": self.about, "type": "run"}
        if self.is_code_only:
            return document
        document |= {
            "run_id": self.run_id.hex(), "attrs": self.attrs,
            "is_closed": self.is_closed, "names": names,
            "tensors": sorted(self.tensors, key=_tensor_order),
            "step_table": sorted(self.step_table, key=_step_order),
        }  # fmt: skip
        for key in ("reads", "absent", "failures", "unlistable", "damage"):
            if value := getattr(self, key):
                document[key] = value
        return document


def _tensor_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    columns = (row["kind"], row["mode"], row["worker"], row["attempt"], int(row["step"]))
    return (row["name"].encode(), *columns, row.get("origin", []))


def _step_order(row: Mapping[str, Any]) -> tuple[int, ...]:
    return (row["mode"], row["worker"], int(row["step"]), row["attempt"])


@dataclass
class FileCase:
    """One file that becomes a vector, with what a reader must say of it."""

    name: str
    about: str
    type: str  # segment, bundle, run.json, payload, strings
    data: bytes
    facts: dict[str, Any]

    @property
    def extension(self) -> str:
        """Of the file."""
        return {"segment": ".seg", "bundle": ".bundle", "run.json": ".runjson"}.get(
            self.type, ".payload"
        )

    def document(self) -> dict[str, Any]:
        """Give what a reader must say."""
        return {"about": self.about, "type": self.type} | self.facts

"""The files of a run, built by hand after `format.md`: nothing of the library is used here.

A case says what stands in a file; these classes give the bytes. Whatever a case sets itself (a
field of the header, of a root row, a page's bytes) is taken as it is, also if it is wrong: that is
how the invalid vectors are made. Checksums are computed last, over what was set.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import crc32c as crc32c_c
import payloads
import pyarrow as pa

CATALOG, SHARDS, ENTRIES = 1, 2, 3
NO_SHARD: Final = 0xFFFFFFFF
REPEAT, HAS_DIGEST = 1, 2
SEGMENT_MAGIC: Final = b"\x89TSFSEG\n"
BUNDLE_MAGIC: Final = b"\x89TSFIDX\n"

_LIST: Final = pa.list_(pa.int64())
COLUMNS: Final[dict[int, dict[str, pa.DataType]]] = {
    CATALOG: {
        "name": pa.utf8(), "kind": pa.uint8(), "mode": pa.uint8(), "dtype": pa.utf8(),
        "shape": _LIST, "grid": _LIST, "global_shape": _LIST, "origin": _LIST,
        "first_step": pa.int64(), "last_step": pa.int64(), "steps": pa.int64(),
        "raw_nbytes": pa.int64(), "stored_nbytes": pa.int64(),
    },
    SHARDS: {
        "worker": pa.uint32(), "attempt": pa.uint32(), "writer": pa.uint64(),
        "number": pa.int64(), "nbytes": pa.int64(),
    },
    ENTRIES: {
        "series": pa.uint32(), "step": pa.int64(), "stride": pa.int64(), "count": pa.uint32(),
        "chunk": pa.uint32(), "dims": _LIST, "first_flush": pa.int64(), "last_flush": pa.int64(),
        "codec": pa.uint8(), "flags": pa.uint8(), "shard": pa.uint32(), "offset": pa.int64(),
        "nbytes": pa.uint32(), "raw_nbytes": pa.uint32(), "crc32c": pa.uint32(),
        "digest": pa.uint64(), "inline": pa.binary(),
    },
}  # fmt: skip
SHARD_COLUMNS: Final[dict[str, pa.DataType]] = {
    "name": pa.utf8(), "kind": pa.uint8(), "mode": pa.uint8(), "dtype": pa.utf8(),
    "shape": _LIST, "grid": _LIST, "global_shape": _LIST, "origin": _LIST,
    "step": pa.int64(), "stride": pa.int64(), "count": pa.uint32(), "chunk": pa.uint32(),
    "flush": pa.int64(), "codec": pa.uint8(), "flags": pa.uint8(), "nbytes": pa.uint32(),
    "raw_nbytes": pa.uint32(), "crc32c": pa.uint32(), "digest": pa.uint64(),
    "row_crc": pa.uint32(), "payload": pa.large_binary(),
}  # fmt: skip

Row = dict[str, Any]


def crc(data: bytes) -> int:
    """CRC32C."""
    return int(crc32c_c.crc32c(data))


def noise(seed: str, nbytes: int) -> bytes:
    """Give bytes that look random and are the same on every machine and for ever."""
    return hashlib.shake_256(seed.encode()).digest(nbytes)


def arrow_stream(columns: Mapping[str, pa.DataType], rows: Sequence[Row]) -> bytes:
    """Give an Arrow IPC stream with one record batch."""
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in columns.items()]
    batch = pa.RecordBatch.from_arrays(arrays, names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


# --- segment ---------------------------------------------------------------------------


@dataclass
class Page:
    """One page: its rows, or whatever stands in their place; `root` overrides its root row."""

    kind: int
    rows: list[Row]
    raw: bytes | None = None
    stored: bytes | None = None
    root: dict[str, int] = field(default_factory=dict)

    def content(self) -> bytes:
        """Give the Arrow stream."""
        return arrow_stream(COLUMNS[self.kind], self.rows) if self.raw is None else self.raw

    def frame(self) -> bytes:
        """Give the stored bytes."""
        return payloads.zstd(self.content(), level=19) if self.stored is None else self.stored


@dataclass
class Segment:
    """A segment; fields of the header that are not given follow from the pages."""

    run_id: bytes
    header: dict[str, Any]
    pages: list[Page]

    @property
    def name(self) -> str:
        """The file name that its header asks for."""
        h = self.header
        return segment_name(
            h["worker"], h["attempt"], h["writer"], h["last_flush"],
            h["last_flush"] - h["first_flush"] + 1,
        )  # fmt: skip

    def page(self, kind: int, number: int = 0) -> Page:
        """Give one of the pages of a kind."""
        return [page for page in self.pages if page.kind == kind][number]

    @property
    def borders(self) -> list[tuple[str, int]]:
        """Where its parts begin, with their names, and where the file ends."""
        root = 64 * len(self.pages)
        places = [("header", 0), ("root", 256)]
        at = 256 + root
        kinds = {CATALOG: "catalog", SHARDS: "shards", ENTRIES: "entries"}
        for page in self.pages:
            places.append((kinds[page.kind], at))
            at += len(page.frame())
        return [*places, ("root-copy", at), ("header-copy", at + root), ("end", at + root + 256)]

    def encode(self) -> bytes:
        """Give the bytes of the file."""
        frames = [page.frame() for page in self.pages]
        place = 256 + 64 * len(frames)
        rows, series = [], 0
        head_nbytes = place
        for page, frame in zip(self.pages, frames, strict=True):
            row = self._root_row(page, frame, place, series)
            rows.append(pack_root_row(row))
            place += len(frame)
            series += len(page.rows) if page.kind == CATALOG else 0
            head_nbytes = head_nbytes if page.kind == ENTRIES else place
        root = b"".join(rows)
        header = pack_header(
            {
                "run_id": self.run_id,
                "root_crc32c": crc(root),
                "file_nbytes": place + len(root) + 256,
                "head_nbytes": head_nbytes,
                "root_nbytes": len(root),
                "series": series,
            }
            | self.header
        )
        return b"".join([header, root, *frames, root, header])

    def _root_row(self, page: Page, frame: bytes, place: int, series: int) -> dict[str, int]:
        row = {
            "offset": place, "nbytes": len(frame), "raw_nbytes": len(page.content()),
            "crc32c": crc(frame), "rows": len(page.rows), "kind": page.kind,
            "first_series": 0, "last_series": 0, "min_step": 0, "max_step": 0, "reserved": 0,
        }  # fmt: skip
        if page.kind == CATALOG:
            row |= {"first_series": series, "last_series": series + len(page.rows) - 1}
        elif page.kind == ENTRIES:
            last = [r["step"] + (r["count"] - 1) * r["stride"] for r in page.rows]
            row |= {
                "first_series": page.rows[0]["series"],
                "last_series": page.rows[-1]["series"],
                "min_step": min(r["step"] for r in page.rows),
                "max_step": max(last),
            }
        return row | page.root


def segment_name(worker: int, attempt: int, writer: int, last: int, count: int) -> str:
    """Give the file name of a segment."""
    return f"{worker:06d}-{attempt:06d}-{writer:016x}-{last:012d}-{count:012d}.seg"


HEADER_DEFAULTS: Final[dict[str, Any]] = {
    "magic": SEGMENT_MAGIC, "major": 1, "minor": 0, "flags": 0, "num_workers": 1,
    "resume_step": 0, "required": 0, "complete_through": (-1, -1, -1, -1), "recovers": 0,
    "reserved": bytes(84),
}  # fmt: skip


def pack_header(fields: Mapping[str, Any]) -> bytes:
    """Give the 256 bytes of a segment's header, with its checksum."""
    f = HEADER_DEFAULTS | dict(fields)
    head = struct.pack(
        "<8sHHI16sQIIIIqQQQQQIIqq4qQ84s",
        f["magic"], f["major"], f["minor"], f["flags"], f["run_id"], f["writer"], f["worker"],
        f["attempt"], f["num_workers"], f["root_crc32c"], f["resume_step"], f["first_flush"],
        f["last_flush"], f["required"], f["file_nbytes"], f["head_nbytes"], f["root_nbytes"],
        f["series"], f["opened_us"], f["published_us"], *f["complete_through"], f["recovers"],
        f["reserved"],
    )  # fmt: skip
    return head + struct.pack("<I", crc(head))


def pack_root_row(row: Mapping[str, int]) -> bytes:
    """Give the 64 bytes of a root row."""
    return struct.pack(
        "<QIIIIIIqqB15s",
        row["offset"], row["nbytes"], row["raw_nbytes"], row["crc32c"], row["rows"],
        row["first_series"], row["last_series"], row["min_step"], row["max_step"], row["kind"],
        row["reserved"].to_bytes(15, "little"),
    )  # fmt: skip


# --- bundle ----------------------------------------------------------------------------


def bundle(
    run_id: bytes,
    segments: Sequence[tuple[str, int, bytes]],
    *,
    header: Mapping[str, Any] | None = None,
    rows: Mapping[int, Mapping[str, Any]] | None = None,
) -> bytes:
    """Give a bundle; of each segment: file name, length, copied bytes."""
    place = 64 + 64 * len(segments)
    table = b""
    for i, (name, file_nbytes, data) in enumerate(segments):
        worker, attempt, writer, last, count = name.removesuffix(".seg").split("-")
        row = {
            "worker": int(worker), "attempt": int(attempt), "writer": int(writer, 16),
            "last": int(last), "count": int(count), "file_nbytes": file_nbytes,
            "offset": place, "nbytes": len(data), "reserved": 0,
        } | dict((rows or {}).get(i, {}))  # fmt: skip
        table += struct.pack("<IIQQQQQQQ", *row.values())
        place += len(data)
    f = {
        "magic": BUNDLE_MAGIC, "major": 1, "minor": 0, "count": len(segments), "run_id": run_id,
        "file_nbytes": place, "required": 0, "table_crc32c": crc(table), "reserved": 0,
    } | dict(header or {})  # fmt: skip
    head = struct.pack("<8sHHI16sQQIQ", *f.values())
    head += struct.pack("<I", crc(head))
    return head + table + b"".join(data for _, _, data in segments)


# --- run.json --------------------------------------------------------------------------


def run_json(run: bytes, settings: Mapping[str, Any], /, **members: object) -> bytes:
    """Give a run.json; `members` override or add to what stands in it."""
    document = {
        "format": "tensorstore_fmt", "format_version": [1, 0], "run_id": run.hex(),
        "created_us": 1_750_000_000_000_000, "required": [], "attrs": settings,
    } | members  # fmt: skip
    return sealed_json(json.dumps(document, separators=(",", ":"))[:-1].encode())


def sealed_json(body: bytes) -> bytes:
    """End the bytes of a run.json, given without their closing brace, with its checksum."""
    return body + b',"crc32c":"%08x"}\n' % crc(body)


# --- shard -----------------------------------------------------------------------------


class Shard:
    """A shard that grows by record batches; `sealed` gives it with its footer."""

    def __init__(self, run_id: bytes, worker: int, attempt: int, writer: int, number: int) -> None:
        self.key = (worker, attempt, writer, number)
        self._run_id = run_id
        about = {
            "format_version": [1, 0], "run_id": run_id.hex(), "worker": worker,
            "attempt": attempt, "writer": f"{writer:016x}", "number": number,
        }  # fmt: skip
        metadata = {"tensorstore_fmt": json.dumps(about, separators=(",", ":"))}
        self._schema = pa.schema(list(SHARD_COLUMNS.items()), metadata=metadata)
        self._waiting: list[tuple[Row, Row]] = []
        self._batches: list[list[Row]] = []

    @property
    def name(self) -> str:
        """Its file name."""
        worker, attempt, writer, number = self.key
        return f"{worker:06d}-{attempt:06d}-{writer:016x}-{number:012d}.arrow"

    def put(self, entry: Row, row: Row) -> None:
        """Take a chunk; `flush` sets the offset in its entry."""
        row["row_crc"] = self._row_crc(row)
        row["payload"] += bytes(-len(row["payload"]) % 64)
        self._waiting.append((entry, row))

    def flush(self) -> None:
        """Write what waits as one record batch."""
        if not self._waiting:
            return
        self._batches.append([row for _, row in self._waiting])
        data, starts, _ = self._encode()
        place = self._payload_place(data, starts[-1])
        for entry, row in self._waiting:
            entry["offset"] = place
            place += len(row["payload"])
        self._waiting = []

    def _encode(self) -> tuple[bytes, list[int], int]:
        """Give the whole file, where its batches begin, and where the last one ends."""
        sink = pa.BufferOutputStream()
        writer = pa.ipc.new_file(sink, self._schema)
        starts = []
        for rows in self._batches:
            starts.append(sink.tell())
            arrays = [pa.array([r[n] for r in rows], kind) for n, kind in SHARD_COLUMNS.items()]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        end = sink.tell()
        writer.close()
        return bytes(sink.getvalue().to_pybytes()), starts, end

    def _payload_place(self, data: bytes, start: int) -> int:
        """Find the payload buffer of the record batch that begins at or behind `start`."""
        source = pa.BufferReader(data)
        source.seek(start or 8)  # the magic
        message = pa.ipc.read_message(source)
        while message.type != "record batch":
            message = pa.ipc.read_message(source)
        payload = pa.ipc.read_record_batch(message, self._schema).column("payload").buffers()[2]
        body = message.body
        return int(source.tell() - body.size + payload.address - body.address)

    def _row_crc(self, row: Row) -> int:
        worker, attempt, writer, _ = self.key
        name, dtype = row["name"].encode(), row["dtype"].encode()

        def ints(key: str) -> bytes:
            return struct.pack(f"<{len(row[key])}q", *row[key])

        return crc(
            self._run_id
            + struct.pack("<QIII", writer, worker, attempt, len(name))
            + name
            + struct.pack("<BBI", row["kind"], row["mode"], len(dtype))
            + dtype
            + struct.pack("<I", len(row["shape"]))
            + ints("shape")
            + ints("grid")
            + struct.pack("<I", len(row["global_shape"]))
            + ints("global_shape")
            + ints("origin")
            + struct.pack(
                "<qqIIq", *(row[c] for c in ("step", "stride", "count", "chunk", "flush"))
            )
            + struct.pack("<BBII", *(row[c] for c in ("codec", "flags", "nbytes", "raw_nbytes")))
            + struct.pack("<QI", row["digest"], row["crc32c"])
        )

    @property
    def borders(self) -> tuple[list[int], int]:
        """Where the record batches begin, and where the last one ends."""
        _, starts, end = self._encode()
        return starts, end

    def unsealed(self) -> bytes:
        """Give what stands in the file while its writer lives."""
        data, _, end = self._encode()
        return data[:end]

    def sealed(self) -> bytes:
        """Give the whole Arrow IPC file."""
        return self._encode()[0]

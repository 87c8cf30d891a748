"""The child process in which Arrow opens shards: ``python -m tensorstore_fmt.upkeep.shard_check``.

Arrow is not made for damaged or hostile bytes: it may abort, or ask for any amount of
memory. Here that costs a child process with bounded memory, never the one of the user.

Both ways the pipe carries frames: length of a JSON text (u32), length of bytes (u64), both.
The other end is `shard_child.ShardChild`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Final

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.ipc

from tensorstore_fmt.format import layout
from tensorstore_fmt.format.catalog import Series
from tensorstore_fmt.format.columns import has_columns, has_nulls
from tensorstore_fmt.format.shard import SHARD_SCHEMA, ShardRow, row_crc
from tensorstore_fmt.upkeep import arrow_file

FRAME: Final = struct.Struct("<IQ")
MEMORY_NBYTES: Final = 6 * 1024**3  # address space; Arrow alone takes 1.4 GB of it

Answer = tuple[dict[str, Any], bytes]


class _Checker:
    """Answers requests about one shard after the other."""

    def __init__(self) -> None:
        self._schema: pa.Schema | None = None
        self._run_id = b""
        self._key = layout.WriterKey(worker=0, attempt=0, writer=0)

    def answer(self, request: dict[str, Any], data: bytes) -> Answer:
        """Do what is asked."""
        operations: Mapping[str, Callable[[dict[str, Any], bytes], Answer]] = {
            "schema": self._on_schema,
            "batch": self._on_batch,
            "footer": self._on_footer,
            "seal": self._on_seal,
            "open": self._on_open,
        }
        return operations[request["op"]](request, data)

    def _on_schema(self, request: dict[str, Any], data: bytes) -> Answer:
        self._run_id = bytes.fromhex(request["run_id"])
        self._key = layout.WriterKey(
            worker=request["worker"], attempt=request["attempt"], writer=request["writer"]
        )
        self._schema = SHARD_SCHEMA  # rows prove what they are, also if the schema cannot be read
        schema = self._schema = pa.ipc.read_schema(pa.py_buffer(data))
        if not has_columns(schema, SHARD_SCHEMA):
            return {"code": "malformed", "what": "other columns than those of the spec"}, b""
        try:
            about = json.loads((schema.metadata or {})[layout.FORMAT_NAME.encode()])
            found = [about[k] for k in ("run_id", "worker", "attempt", "writer", "number")]
            major = about["format_version"][0]
        except (KeyError, ValueError, TypeError, IndexError):
            return {"code": "malformed", "what": "the metadata of the schema are damaged"}, b""
        if major != layout.MAJOR:
            return {"code": "unsupported_version", "what": f"format version {major}"}, b""
        key = self._key
        wanted = [request["run_id"], key.worker, key.attempt, f"{key.writer:016x}"]
        wanted.append(request["number"])
        if found != wanted:
            return {"code": "wrong_run", "what": f"it says that it is {found}"}, b""
        return {}, b""

    def _read_batch(self, data: bytes) -> pa.RecordBatch:
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(data)), self._schema)
        batch.validate(full=True)
        if has_nulls(batch):
            raise ValueError("it has nulls")
        return batch

    def _on_batch(self, request: dict[str, Any], data: bytes) -> Answer:
        batch = self._read_batch(data)
        rows = _Rows(batch, self._run_id, self._key, request["payload_at"])
        wanted = request["flushes"]
        found = []
        bad = []
        for i in range(batch.num_rows):
            reason = rows.check(i)
            if reason:
                bad.append([i, *reason, rows.names[i], rows.steps(i)])
            elif any(first <= rows.row(i).flush <= last for first, last in wanted):
                found.append(rows.as_dict(i))
        places = [rows.at.tolist(), rows.columns["nbytes"]]
        return {"rows": batch.num_rows, "bad": bad, "found": found, "places": places}, b""

    def _on_footer(self, request: dict[str, Any], data: bytes) -> Answer:
        source = _Sparse(data, request["nbytes"])
        with pa.ipc.open_file(pa.PythonFile(source, mode="r")) as reader:
            if not reader.schema.equals(self._schema, check_metadata=True):
                return {"what": "the schema in the footer is another one"}, b""
            if reader.num_record_batches != request["batches"]:
                return {"what": f"the footer lists {reader.num_record_batches} batches"}, b""
        return {}, b""

    def _on_seal(self, request: dict[str, Any], data: bytes) -> Answer:
        """Make the end of a file: pyarrow's, with the places of the batches put in."""
        schema = pa.ipc.read_schema(pa.py_buffer(data))
        blocks = tuple((a, b, c) for a, b, c in request["blocks"])
        empty = pa.RecordBatch.from_arrays(
            [pa.nulls(0, field.type) for field in schema], schema=schema
        )
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, schema) as writer:
            for _ in blocks:
                writer.write_batch(empty)
        made = sink.getvalue()
        frame = arrow_file.walk(lambda start, stop: made[start:stop], len(made))
        if frame.problem or not frame.is_sealed:
            return {"what": f"this version of pyarrow writes files otherwise: {frame.problem}"}, b""
        return {}, arrow_file.patch_footer(made[frame.end :], blocks)

    def _on_open(self, request: dict[str, Any], data: bytes) -> Answer:  # noqa: ARG002 - as the others
        """Open a local file as anybody would, and compare it with what a stream of it gives."""
        path, nbytes = request["path"], request["nbytes"]
        with pa.memory_map(path) as source, pa.ipc.open_file(source) as reader:
            if source.size() != nbytes:
                return {"what": f"the file has {source.size():,} bytes, not {nbytes:,}"}, b""
            source_again = pa.memory_map(path)
            source_again.seek(len(arrow_file.MAGIC))
            with source_again, pa.ipc.open_stream(source_again) as stream:
                for i in range(reader.num_record_batches):
                    ours, theirs = reader.get_batch(i), stream.read_next_batch()
                    ours.validate()
                    if not _same(ours, theirs):
                        return {"what": f"record batch {i} differs"}, b""
                if next(iter(stream), None) is not None:
                    return {"what": "the stream has more record batches"}, b""
            return {"batches": reader.num_record_batches}, b""


def _same(a: pa.RecordBatch, b: pa.RecordBatch) -> bool:
    """Compare two batches of one file: values of small columns, the place of the payloads."""
    small = [name for name in a.schema.names if name != "payload"]
    if a.num_rows != b.num_rows or not a.select(small).equals(b.select(small)):
        return False
    ours, theirs = a.column("payload"), b.column("payload")
    return bool(
        ours.buffers()[1].equals(theirs.buffers()[1])
        and ours.buffers()[2].size == theirs.buffers()[2].size
    )


class _Rows:
    """The rows of one batch of a shard."""

    def __init__(
        self, batch: pa.RecordBatch, run_id: bytes, key: layout.WriterKey, payload_at: int
    ) -> None:
        self._run_id, self._key = run_id, key
        self.columns = {
            name: batch.column(name).to_pylist() for name in batch.schema.names if name != "payload"
        }
        self.names: list[str] = self.columns["name"]
        _, offsets, values = batch.column("payload").buffers()
        self._offsets = np.frombuffer(offsets, np.int64)[: batch.num_rows + 1]
        self._values = memoryview(values if values is not None else b"")
        self.at = self._offsets[:-1] + payload_at

    def row(self, i: int) -> ShardRow:
        column = {name: values[i] for name, values in self.columns.items()}
        series = Series(
            name=column["name"],
            kind=column["kind"],
            mode=column["mode"],
            dtype=column["dtype"],
            shape=tuple(column["shape"]),
            grid=tuple(column["grid"]),
            global_shape=tuple(column["global_shape"]),
            origin=tuple(column["origin"]),
        )
        rest = ("step", "stride", "count", "chunk", "flush", "codec", "flags", "nbytes")
        more = ("raw_nbytes", "crc32c", "digest")
        return ShardRow(series=series, parts=(), **{k: column[k] for k in (*rest, *more)})

    def steps(self, i: int) -> list[int]:
        c = self.columns
        count = min(c["count"][i], layout.MAX_ENTRY_STEPS)
        return [c["step"][i] + k * c["stride"][i] for k in range(count)]

    def as_dict(self, i: int) -> dict[str, Any]:
        values = {name: column[i] for name, column in self.columns.items()}
        values["offset"] = int(self.at[i])
        return values

    def check(self, i: int) -> tuple[str, str, int] | None:
        """Give code, sentence and offset of what is wrong with a row; None if it is good."""
        row = self.row(i)
        begin, end = int(self._offsets[i]), int(self._offsets[i + 1])
        at = int(self.at[i])
        try:
            proof = row_crc(self._run_id, self._key, row)
        except struct.error as error:
            return "malformed", f"row {i} cannot be: {error}", at
        if proof != self.columns["row_crc"][i]:
            return "checksum", f"row {i} does not have the checksum that it should", at
        if any(n < 0 for n in row.series.shape):
            return "malformed", f"row {i} does not say all lengths of its shape", at
        unit = layout.PAYLOAD_ALIGNMENT
        if end - begin != -(-row.nbytes // unit) * unit or at % 8:
            return "malformed", f"the payload of row {i} has {end - begin:,} bytes at {at:,}", at
        if crc32c.crc32c(self._values[begin : begin + row.nbytes]) != row.crc32c:
            return "checksum", f"the payload of row {i} is damaged", at
        if any(self._values[begin + row.nbytes : end]):
            return "malformed", f"the padding behind the payload of row {i} is not zero", at
        return None


class _Sparse(io.RawIOBase):
    """A file of which only the end, and zeros in the place of the rest, are there."""

    def __init__(self, tail: bytes, nbytes: int) -> None:
        self._tail, self._nbytes, self._at = tail, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._nbytes if size < 0 else min(self._at + size, self._nbytes)
        begin = self._nbytes - len(self._tail)
        if self._at < begin:
            if stop > len(arrow_file.MAGIC):
                raise OSError("only the footer of the file is there")
            data = arrow_file.MAGIC[self._at : stop]
        else:
            data = self._tail[self._at - begin : stop - begin]
        self._at = stop
        return data


def _requests(source: BinaryIO) -> Iterator[tuple[dict[str, Any], bytes]]:
    while len(head := source.read(FRAME.size)) == FRAME.size:
        text_nbytes, data_nbytes = FRAME.unpack(head)
        text, data = source.read(text_nbytes), source.read(data_nbytes)
        if len(text) + len(data) < text_nbytes + data_nbytes:
            return
        yield json.loads(text), data


def main() -> None:
    """Answer requests from standard input until it ends."""
    with contextlib.suppress(ValueError, OSError):  # not possible here: the timeout stays
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_NBYTES, MEMORY_NBYTES))
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    checker = _Checker()
    for request, data in _requests(source):
        try:
            answer, made = checker.answer(request, data)
        except (pa.ArrowException, ValueError, TypeError, KeyError, OSError, MemoryError) as error:
            answer, made = {"code": "malformed", "what": f"{type(error).__name__}: {error}"}, b""
        text = json.dumps(answer).encode()
        sink.write(FRAME.pack(len(text), len(made)) + text + made)
        sink.flush()


if __name__ == "__main__":
    main()

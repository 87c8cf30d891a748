"""H1: small files that claim much; each is tried in a forked process with little address space.

The second number of a case is how many MiB it may take: what its limits in the spec allow.
"""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import crc32c
import numpy as np
import pyarrow as pa
import zstandard
from robustness.fuzz_corpus import by_hand
from robustness.fuzz_format import limit_memory
from support.build_run import Put, RunBuilder
from support.editing import SegmentEditor, run_json
from support.goals import record
from support.memory import peak_kib
from support.mutate import Files, opened, save

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import TensorStoreError
from tensorstore_fmt.format import layout, page, segment
from tensorstore_fmt.format.catalog import Series

TESTS = Path(__file__).resolve().parents[1]
MIB = 1 << 20
CHUNK = layout.MAX_CHUNK_RAW_NBYTES


def _code(work: Callable[[], object]) -> str:
    try:
        work()
    except TensorStoreError as error:
        return error.code
    return ""


def _edited(change: Callable[[SegmentEditor], None]) -> Files:
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    editor = SegmentEditor(files[path])
    change(editor)
    return {**files, path: editor.encode()}


def page_of_zeros() -> None:
    """16 MiB of zeros in 2 KB: a page that is no Arrow stream."""
    raw = bytes(layout.MAX_PAGE_RAW_NBYTES)

    def change(editor: SegmentEditor) -> None:
        editor.set_raw(len(editor.rows) - 1, raw)

    run = opened(_edited(change))
    assert _code(run["d"].read) == "malformed"


def page_above_limit() -> None:
    def change(editor: SegmentEditor) -> None:
        editor.set_raw(len(editor.rows) - 1, bytes(layout.MAX_PAGE_RAW_NBYTES + 8))

    run = opened(_edited(change))
    assert {p.code for p in run.damage} >= {"limit"}


def frame_that_lies() -> None:
    """A frame that says 2^40 bytes, a root row that says 16 MiB, and the other way round."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + b"\x03\x00\x00" + b"\0"

    def change(editor: SegmentEditor) -> None:
        editor.set_stored(len(editor.rows) - 1, frame, raw_nbytes=layout.MAX_PAGE_RAW_NBYTES)

    assert _code(opened(_edited(change))["d"].read) == "malformed"


def _with_chunk(codec: int, payload: bytes) -> tsf.Run:
    """Give a run whose "x" is one chunk of 128 MiB."""
    place = Path(tempfile.mkdtemp())
    builder = RunBuilder(place / "run")
    zeros = np.zeros(8, np.uint8)
    change = {"codec": codec, "nbytes": len(payload), "raw_nbytes": CHUNK}
    change["crc32c"] = crc32c.crc32c(payload)
    builder.writer().flush(Put(name="x", value=zeros, inline=True, change=change))
    (path,) = (place / "run" / "index").iterdir()
    editor = SegmentEditor(path.read_bytes())
    editor.set_columns(0, {"shape": [[CHUNK]]})
    editor.set_columns(1, {"inline": [payload]})
    path.write_bytes(editor.encode())
    return tsf.open_run(place / "run")


def zstd_chunk() -> None:
    """128 MiB of zeros in some KB are legal: the right values, in the memory of a few chunks."""
    payload = zstandard.ZstdCompressor(level=1).compress(bytes(CHUNK))
    assert len(payload) < 20_000
    run = _with_chunk(layout.CODEC_ZSTD, payload)
    assert run["x"].read(step=0, index=np.s_[-2:]).tolist() == [0, 0]


def constant_chunk() -> None:
    run = _with_chunk(layout.CODEC_CONSTANT, b"\7")
    assert run["x"].read(step=0, index=np.s_[-2:]).tolist() == [7, 7]


def planes_chunk() -> None:
    """128 MiB in 9 bytes: each plane is one byte, repeated."""
    payload = bytes([0, 1, 0, 0]) + (1).to_bytes(4, "little") + b"\x09"
    run = _with_chunk(layout.CODEC_PLANES, payload)
    assert run["x"].read(step=0, index=np.s_[-2:]).tolist() == [9, 9]


def sparse_chunk() -> None:
    """128 MiB in 14 bytes: the map is one byte, and so is what it leaves."""
    payload = bytes([0, 1, 0, 0]) + 2 * (1).to_bytes(4, "little") + b"\x09\xf0"
    run = _with_chunk(layout.CODEC_SPARSE, payload)
    assert run["x"].read(step=0, index=np.s_[-6:]).tolist() == [0, 0, 9, 9, 9, 9]


def planes_chunk_that_lies() -> None:
    """A plane whose frame says another length than the plane has."""
    for size in (0, 1000, 2**40):
        frame = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + b"\x03\x00\x00" + b"\0"
        payload = bytes([0, 1, 0, 0]) + len(frame).to_bytes(4, "little") + frame
        run = _with_chunk(layout.CODEC_PLANES, payload)
        assert _code(partial(run["x"].read, step=0)) == "malformed"


def lz4_page() -> None:
    """A page whose columns are compressed by Arrow, and say 2^40 bytes each."""

    def change(editor: SegmentEditor) -> None:
        number = len(editor.rows) - 1
        batch, sink = editor.batch(number), io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        nbytes = (8 * batch.num_rows).to_bytes(8, "little")
        assert nbytes in sink.getvalue()
        editor.set_raw(number, sink.getvalue().replace(nbytes, (2**40).to_bytes(8, "little")))

    assert _code(opened(_edited(change))["d"].read) == "malformed"


def zstd_chunk_with_window() -> None:
    """A frame with a window of 2 GiB, as `--long=31` makes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(64 * 1024))
    run = _with_chunk(layout.CODEC_ZSTD, frame)
    assert _code(lambda: run["x"].read(step=0)) in ("malformed", "limit")


def steps_beyond_listing() -> None:
    """4,096 rows of 2^20 steps each: some KB claim 2^32 steps."""
    place = Path(tempfile.mkdtemp())
    rows = 4096
    puts = [Put(name="x", step=0, value=np.zeros(1, np.int8), inline=True)]
    RunBuilder(place / "run").writer().flush(*puts)
    (path,) = (place / "run" / "index").iterdir()
    editor = SegmentEditor(path.read_bytes())
    batch = editor.batch(1)
    columns = {name: batch.column(name).to_pylist() * rows for name in batch.schema.names}
    columns["step"] = [i << 20 for i in range(rows)]
    columns["count"], columns["flags"] = [1 << 20] * rows, [layout.ENTRY_REPEAT] * rows
    arrays = [pa.array(columns[f.name], f.type) for f in batch.schema]
    editor.set_batch(1, pa.RecordBatch.from_arrays(arrays, schema=batch.schema))
    editor.set_columns(0, {"last_step": [(rows << 20) - 1]})
    path.write_bytes(editor.encode())
    assert path.stat().st_size < 100_000
    run = tsf.open_run(place / "run")
    assert _code(lambda: run["x"].steps) == "limit"
    assert _code(run["x"].read) == "limit"
    assert run["x"].read(step=rows << 19).tolist() == [0]  # one step of them costs nothing


def many_series() -> None:
    """60,000 series of one name: sorted by their grids alone."""
    n = 60_000
    series = [
        Series(name="x", kind=0, mode=0, dtype="int8", shape=(1,), grid=(i + 1,)) for i in range(n)
    ]
    files = _of_series(series)
    run = opened(files)
    assert len(run) == 1


def many_names() -> None:
    n = 200_000
    series = [
        Series(name=f"{i:08d}", kind=0, mode=0, dtype="int8", shape=(1,), grid=(0,))
        for i in range(n)
    ]
    files = _of_series(series)
    run = opened(files)
    assert len(run) == n
    assert len(run.names("*" * 50 + "7")) == n // 10
    assert len(run._repr_html_()) < 100_000


def _of_series(series: list[Series]) -> Files:
    files = {p: d for p, d in by_hand()[0].items() if p == layout.RUN_JSON}
    header = segment.Header(
        run_id=bytes(range(16)), key=layout.WriterKey(worker=0, attempt=0, writer=1),
        num_workers=1, resume_step=0, first_flush=0, last_flush=0, opened_us=1, published_us=1,
    )  # fmt: skip
    entries = page.encode_entries(page.Entries.empty())
    data = b"".join(segment.encode(header, series, [], entries))
    return {**files, header.name.path: data}


def attrs_of_lists() -> None:
    """16 MiB of empty lists."""
    files = by_hand()[0]
    body = files[layout.RUN_JSON]
    body = body[: body.index(b'"attrs"')] + b'"attrs":{"a":[' + b"[]," * (5 << 20) + b"0]}"
    run = opened({**files, layout.RUN_JSON: run_json(body)})
    assert len(run.attrs) == 1


def sparse_head() -> None:
    """A sparse file whose head of 256 MiB has right checksums, and is all zeros."""
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    editor = SegmentEditor(files[path])
    pages, size = 16, layout.MAX_PAGE_RAW_NBYTES
    editor.rows = np.repeat(editor.rows[:1], pages)
    editor.rows["first_series"] = np.arange(pages) * 65536
    editor.rows["last_series"] = np.arange(pages) * 65536 + 65535
    editor.rows["rows"], editor.rows["raw_nbytes"] = 65536, size
    editor.stored = [bytes(size)] * pages
    folder = save(files, Path(tempfile.mkdtemp()))
    data = editor.encode()
    del editor
    (folder / path).write_bytes(data)
    del data
    gc.collect()
    limit_memory(3 * 256)
    assert {p.code for p in tsf.open_run(folder).damage} >= {"malformed"}


CASES: list[tuple[Callable[[], None], int]] = [
    (page_of_zeros, 128), (page_above_limit, 128), (frame_that_lies, 64), (zstd_chunk, 600),
    (constant_chunk, 400), (planes_chunk, 400), (planes_chunk_that_lies, 400), (sparse_chunk, 600),
    (lz4_page, 64), (zstd_chunk_with_window, 600), (steps_beyond_listing, 256),
    (many_series, 1024), (many_names, 1024), (attrs_of_lists, 1024), (sparse_head, 2048),
]  # fmt: skip


def try_all() -> list[dict[str, object]]:
    """Try each in a fork."""
    os.environ["PYTHONWARNINGS"] = "ignore"
    import warnings

    warnings.simplefilter("ignore")
    opened(by_hand()[0])["d"].read()
    results = []
    for work, mib in CASES:
        sys.stdout.flush()
        begin = time.perf_counter()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                limit_memory(mib)
                work()
                status = 0
            except BaseException:  # noqa: BLE001 - the parent sees that there was one
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status, usage = os.wait4(child, 0)
        results.append(
            {
                "case": work.__name__, "status": status, "mib": mib,
                "seconds": round(time.perf_counter() - begin, 2),
                "max_rss_mib": usage.ru_maxrss >> 10,
            }
        )  # fmt: skip
    results.append({"self_rss_mib": peak_kib() >> 10})
    return results


def test_bombs_stay_small() -> None:
    code = (
        "import json; from robustness.test_hostile_bombs import try_all; "
        "print(json.dumps(try_all()))"
    )
    places = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    *cases, own = json.loads(done.stdout.splitlines()[-1])
    record("H2", len(cases), cases=cases, **own)
    assert own["self_rss_mib"] < 400
    for case in cases:
        assert case["status"] == 0, f"{case}: {done.stderr[-3000:]}"

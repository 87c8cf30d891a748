"""Faults that this harness found and that are not mended yet; each test fails once it is mended."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from robustness.fuzz_corpus import by_hand
from support.build_run import Put, RunBuilder
from support.mutate import SegmentEditor, opened, run_json, save

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import FormatError


def claiming(shape: list[int], grid: list[int], **columns: Any) -> tsf.Run:
    """Give a run in which the tensor "z", one entry without bytes, claims a shape and a grid."""
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    editor = SegmentEditor(files[path])
    batch = editor.batch(0)
    row = batch.column("name").to_pylist().index("z")
    changed = {"shape": shape, "grid": grid, **columns}
    lists = {key: batch.column(key).to_pylist() for key in changed}
    for key, value in changed.items():
        lists[key][row] = value
    editor.set_columns(0, lists)
    return opened({**files, path: editor.encode()})


def test_chunks_without_entries_are_not_listed() -> None:
    with pytest.raises(FormatError):
        claiming([2**44], [1])["z"].read(step=0)


@pytest.mark.xfail(raises=AssertionError, reason="the same, with memory that exists: 100 B a chunk")
def test_memory_of_chunks_without_entries() -> None:
    run = claiming([2**16], [1])
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            run["z"].read(step=0)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.xfail(raises=ValueError, reason="sizes of boxes overflow int64 to 0")
def test_elements_beyond_64_bits() -> None:
    with pytest.raises(FormatError):
        claiming([2**32, 2**32], [0, 0])["z"].read(step=0)


def test_numbers_of_chunks_do_not_wrap() -> None:
    """Chunk (2^16, 0) of a grid of 2^48 × 2^48 is not chunk 0."""
    run = claiming([2**48, 2**48, 0], [1, 1, 0])
    assert run["z"].read(step=0, index=np.s_[2**16, 0]).shape == (0,)


def test_numbers_of_chunks_do_not_wrap_to_others(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.writer().flush(Put(name="x", value=np.full((1, 1), 7.0), grid=(1, 1), inline=True))
    (path,) = (tmp_path / "run" / "index").iterdir()
    editor = SegmentEditor(path.read_bytes())
    editor.set_columns(0, {"shape": [[2**48, 2**48]]})
    path.write_bytes(editor.encode())
    with pytest.raises(FormatError):
        tsf.open_run(builder.url)["x"].read(step=0, index=np.s_[2**16, 0])


@pytest.mark.xfail(raises=AssertionError, reason="2^28 steps may be listed: up to 14 GiB")
def test_memory_of_claimed_steps(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    puts = [
        Put(name="x", step=i << 21, value=np.float32(1), count=1 << 20, repeat=True, inline=True)
        for i in range(16)
    ]
    builder.writer().flush(*puts)
    run = tsf.open_run(builder.url)
    tracemalloc.start()
    try:
        assert len(run["x"].steps) == 16 << 20  # or LimitError
        assert tracemalloc.get_traced_memory()[1] < 3 * 8 * (16 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.xfail(raises=AssertionError, reason="num_workers has no limit: up to 2^32 lists")
def test_memory_of_claimed_workers() -> None:
    files = by_hand()[0]
    for path in [p for p in files if p.startswith("index/")]:
        editor = SegmentEditor(files[path])
        editor.header |= {"num_workers": 2**19, "flags": 0}
        files = {**files, path: editor.encode()}
    run = opened(files)
    tracemalloc.start()
    try:
        assert not run.is_closed
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.xfail(raises=OverflowError, reason="sums of informative columns of several segments")
def test_informative_sums_do_not_overflow() -> None:
    files = by_hand()[0]
    for path in [p for p in files if p.startswith("index/")][1:]:
        editor = SegmentEditor(files[path])
        n = editor.batch(0).num_rows
        editor.set_columns(0, {"raw_nbytes": [2**63 - 1] * n})
        files = {**files, path: editor.encode()}
    opened(files).table()


@pytest.mark.xfail(raises=AssertionError, reason="dtypes come from strangers, too")
def test_repr_shows_no_dtype_as_it_is() -> None:
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    editor = SegmentEditor(files[path])
    dtypes = editor.batch(0).column("dtype").to_pylist()
    dtypes[-1] = "\x1b[2J"
    editor.set_columns(0, {"dtype": dtypes})
    run = opened({**files, path: editor.encode()})
    assert all(repr(run[name]).isprintable() for name in run)


@pytest.mark.xfail(raises=AssertionError, reason="the spec says: a value that is found is given")
def test_an_older_save_does_not_come_back_where_the_newer_is_damaged() -> None:
    files, _ = by_hand()
    path = [p for p in files if p.startswith("index/")][2]
    data = bytearray(files[path])
    data[450] ^= 1  # in its catalog
    with pytest.warns(RuntimeWarning, match="damaged"):
        run = opened({**files, path: bytes(data)})
    try:
        found = run["t"].read(step=0)
    except FormatError:
        return
    assert found.tolist() == [1, 1, 1]


def _ends_well(folder: Path, body: bytes) -> None:
    """Show a run with this `run.json` on the command line."""
    save({**by_hand()[0], "run.json": run_json(RUN_JSON % body)}, folder)
    done = subprocess.run(
        [sys.executable, "-m", "tensorstore_fmt", "info", str(folder)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr


RUN_JSON = (
    b'{"format":"tensorstore_fmt","format_version":[1,0],'
    b'"run_id":"000102030405060708090a0b0c0d0e0f","required":[],%s'
)


@pytest.mark.xfail(raises=AssertionError, reason="cli: a year beyond 9999 ends in a traceback")
@pytest.mark.parametrize("created", [b"1" + b"0" * 30, b"1" + b"0" * 400, b"-1" + b"0" * 18])
def test_command_line_shows_any_time_of_creation(created: bytes, tmp_path: Path) -> None:
    _ends_well(tmp_path / "run", b'"created_us":%s,"attrs":{}' % created)


@pytest.mark.xfail(raises=AssertionError, reason="cli: attrs 900 lists deep end in a traceback")
def test_command_line_shows_deep_attrs(tmp_path: Path) -> None:
    deep = b"[" * 900 + b"]" * 900
    _ends_well(tmp_path / "run", b'"created_us":1,"attrs":{"a":%s}' % deep)


@pytest.mark.xfail(raises=AssertionError, reason="pyarrow's own extension types are registered")
def test_custom_metadata_of_columns_are_ignored() -> None:
    """As the spec says ("Pages"), also where they name an extension type."""
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    editor = SegmentEditor(files[path])
    batch, sink = editor.batch(0), io.BytesIO()
    named = {"ARROW:extension:name": "arrow.json", "ARROW:extension:metadata": ""}
    schema = pa.schema([f.with_metadata(named if f.name == "name" else {}) for f in batch.schema])
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
    editor.set_raw(0, sink.getvalue())
    with warnings.catch_warnings(action="ignore"):
        assert not opened({**files, path: editor.encode()}).damage

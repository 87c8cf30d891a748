"""H1: what is claimed costs nothing until it is there: chunks, elements, steps, workers, sums."""

from __future__ import annotations

import io
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from robustness.fuzz_corpus import by_hand
from support.build_run import Put, RunBuilder
from support.editing import SegmentEditor
from support.mutate import opened

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import FormatError, LimitError


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
    assert code(lambda: claiming([2**44], [1])["z"].read(step=0)) == "malformed"


def traced(work: Callable[[], object]) -> int:
    """Give the most memory that something took."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def code(work: Callable[[], object]) -> str:
    """Give the code of a typed error."""
    with pytest.raises(FormatError) as caught:
        work()
    return caught.value.code


def test_memory_of_chunks_without_entries() -> None:
    tensor = claiming([2**16], [1])["z"]
    assert traced(lambda: code(lambda: tensor.read(step=0))) < 4 << 20


@pytest.mark.parametrize("shape", [[2**32, 2**32], [2**48] * 32, [2**27 + 1]])
def test_elements_beyond_a_chunk(shape: list[int]) -> None:
    """Their product may be 0 in 64 bits."""
    tensor = claiming(shape, [0] * len(shape))["z"]
    assert code(lambda: tensor.read(step=0)) == "limit"
    assert code(lambda: tensor.read(step=0, index=(0,) * len(shape))) == "limit"


def test_results_that_no_array_can_be() -> None:
    tensor = claiming([2**48, 2**48, 0], [0, 0, 0])["z"]
    assert code(lambda: tensor.read(step=0)) == "limit"
    assert code(lambda: tensor.read(steps=slice(100, 200))) == "limit"


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


def test_memory_of_claimed_steps(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    puts = [
        Put(name="x", step=i << 21, value=np.float32(1), count=1 << 20, repeat=True, inline=True)
        for i in range(16)
    ]
    builder.writer().flush(*puts)
    tensor = tsf.open_run(builder.url)["x"]
    found: list[np.ndarray] = []
    assert traced(lambda: found.append(tensor.steps)) < 3 * 8 * (16 << 20)
    expected = (np.arange(16) << 21)[:, None] + np.arange(1 << 20)
    assert np.array_equal(found[0], expected.reshape(-1))


def interlaced(folder: Path, n: int) -> tsf.Run:
    """Give a run of n entries whose steps lie between each other's, and one saved again."""
    builder = RunBuilder(folder)
    writer = builder.writer()
    writer.flush(
        *(
            Put(name="x", step=i, stride=n, value=np.float32(i), count=1 << 20, repeat=True,
                inline=True)
            for i in range(n)
        )
    )  # fmt: skip
    writer.flush(Put(name="x", step=3 * n, value=np.float32(-1), inline=True))
    return tsf.open_run(builder.url)


def test_steps_that_are_resolved_in_pieces(tmp_path: Path) -> None:
    tensor = interlaced(tmp_path / "run", 5)["x"]
    assert np.array_equal(tensor.steps, np.arange(5 << 20))
    steps = [0, 1, 2, 3, 4, 15, 16, 2**21 - 1, 2**21, 2**21 + 1, (5 << 20) - 1]
    assert tensor.read(steps=steps).tolist() == [-1 if step == 15 else step % 5 for step in steps]
    assert tensor.read(steps=slice(2**21 - 2, None))[:9].tolist() == [
        step % 5 for step in range(2**21 - 2, 2**21 + 7)
    ]


def test_steps_above_the_limit_can_still_be_named(tmp_path: Path) -> None:
    tensor = interlaced(tmp_path / "run", 65)["x"]
    assert traced(lambda: code(lambda: tensor.steps)) < 8 << 20
    with pytest.raises(LimitError, match="ask for fewer"):
        tensor.read()
    assert tensor.read(step=65 << 19).tolist() == 0
    assert tensor.read(steps=slice(65 << 19, (65 << 19) + 3)).tolist() == [0, 1, 2]


def test_chunks_of_many_steps_are_not_all_looked_up_at_once(tmp_path: Path) -> None:
    """128 entries stand for 2^27 chunks of one byte."""
    builder = RunBuilder(tmp_path / "run")
    value = np.zeros(128, np.int8)
    builder.writer().flush(
        Put(name="x", value=value, grid=(1,), count=1 << 20, repeat=True, inline=True)
    )
    tensor = tsf.open_run(builder.url)["x"]
    with pytest.raises(LimitError, match="read fewer steps"):
        tensor.read()
    assert not tensor.read(steps=slice(0, 5)).any()


def test_memory_of_claimed_workers() -> None:
    files = by_hand()[0]
    for path in [p for p in files if p.startswith("index/")]:
        editor = SegmentEditor(files[path])
        editor.header |= {"num_workers": 10**6}
        files = {**files, path: editor.encode()}

    def work() -> None:
        run = opened(files)
        assert not run.is_closed
        assert run.num_workers == 10**6
        assert not len(run.complete_steps())
        with pytest.raises(tsf.StepNotYetWrittenError):
            run["d"].read(step=100)

    assert traced(work) < 4 << 20


def test_informative_sums_do_not_overflow() -> None:
    files = by_hand()[0]
    for path in [p for p in files if p.startswith("index/")][1:]:
        editor = SegmentEditor(files[path])
        n = editor.batch(0).num_rows
        editor.set_columns(0, {"raw_nbytes": [2**63 - 1] * n, "steps": [-(2**63)] * n})
        files = {**files, path: editor.encode()}
    table = opened(files).table().to_pylist()
    (twice,) = (row for row in table if row["name"] == "t")
    assert (twice["raw_nbytes"], twice["steps"]) == (2**63 - 1, -(2**63))


def test_repr_shows_no_dtype_as_it_is() -> None:
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    editor = SegmentEditor(files[path])
    dtypes = editor.batch(0).column("dtype").to_pylist()
    dtypes[-1] = "\x1b[2J"
    editor.set_columns(0, {"dtype": dtypes})
    run = opened({**files, path: editor.encode()})
    assert all(repr(run[name]).isprintable() for name in run)


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

"""What the hot paths cost, in counts that hardly differ between machines.

No clock: functions called for each chunk or tensor, and bytes allocated. A bound that is broken
means that something was added to what happens each time. The bounds leave about a fifth of room.
"""

from __future__ import annotations

import shutil
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.format import codec, sampling, statistics

pytestmark = pytest.mark.usefixtures("implementation")

CHUNK = 256 * 1024
MIB = 1024 * 1024
PACKAGE = str(Path(tsf.__file__).parent)


def weights(nbytes: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(nbytes // 4) * 0.02).astype(np.float32)


def calls(action: Callable[[], object]) -> int:
    """Count what the package calls in all threads, compiled functions too."""
    counts: Counter[int] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE):
            counts[threading.get_ident()] += 1  # of its own, so that none is lost

    threading.setprofile(note)  # for threads that begin now
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type] # typeshed does not know that it may be
    return counts.total()


def peak(action: Callable[[], object]) -> int:
    """Give the most bytes that are allocated at once while something is done."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- calls for each chunk and each tensor ---------------------------------------------


def write(folder: Path, tensors: dict[str, np.ndarray], **options: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with tsf.create_run(folder, flush_interval_s=3600, **options) as run:
        run.log(tensors, step=0)


def for_one(action: Callable[[int], object], few: int, many: int) -> float:
    """Count what one more of something costs: what is called once falls out."""
    action(few)  # the first time, modules and caches are filled
    return (calls(lambda: action(many)) - calls(lambda: action(few))) / (many - few)


@pytest.mark.parametrize(
    ("compression", "most"), [("auto", {"numpy": 215, "compiled": 170}),
                              ("none", {"numpy": 120, "compiled": 95})],
)  # fmt: skip
def test_calls_for_each_chunk_that_is_written(
    tmp_path: Path, compression: str, most: dict[str, int], implementation: str
) -> None:
    def action(chunks: int) -> None:
        tensor = weights(chunks * CHUNK)
        write(tmp_path / f"{chunks}", {"w": tensor}, compression=compression)

    assert for_one(action, 28, 44) <= most[implementation]  # sampling is over


def test_calls_for_each_chunk_that_is_read(tmp_path: Path, implementation: str) -> None:
    # So small that all is done in one thread: those of the pool may be older than the counting.
    tensors = {f"{n}": weights(n * 4096).reshape(n, 1024) for n in (20, 100)}
    write(tmp_path / "run", tensors, chunks={"*": (1, None)})

    def action(chunks: int) -> None:
        with tsf.open_run(tmp_path / "run") as run:
            np.testing.assert_array_equal(run[f"{chunks}"].read(step=0), tensors[f"{chunks}"])

    assert for_one(action, 20, 100) <= {"numpy": 55, "compiled": 41}[implementation]


def test_calls_for_each_value_that_is_read(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(100)]
    with tsf.create_run(tmp_path / "run", flush_interval_s=3600) as run:
        for step in range(20):
            run.log(dict.fromkeys(names, float(step)), step=step)

    def action(values: int) -> None:
        with tsf.open_run(tmp_path / "run") as run:
            assert run.read([(name, 19, ()) for name in names[:values]]) == [19.0] * values

    assert for_one(action, 20, 100) <= 95


def test_calls_for_a_view(tmp_path: Path) -> None:
    write(tmp_path / "run", {"w": weights(CHUNK)}, compression="none")
    with tsf.open_run(tmp_path / "run") as run:
        tensor = run["w"]

        def action(views: int) -> None:
            for _ in range(views):
                tensor.view(step=0)

        assert for_one(action, 1, 11) <= 90


def test_calls_for_each_small_tensor(tmp_path: Path) -> None:
    tensors = {f"{i}": weights(4096) for i in range(20)}

    def action(steps: int) -> None:
        shutil.rmtree(tmp_path)
        with tsf.create_run(tmp_path, flush_interval_s=3600) as run:
            for step in range(steps):
                run.log(tensors, step=step)

    assert for_one(action, 10, 50) / len(tensors) <= 50


# --- memory ---------------------------------------------------------------------------


def test_bytes_allocated_for_a_chunk() -> None:
    encoder, hint, raw = codec.Encoder(), sampling.Hint(), weights(CHUNK).view(np.uint8)
    out = np.empty(CHUNK, np.uint8)
    for _ in range(10):  # until nothing is sampled any more
        encoded = encoder.encode(raw, dtype="float32", hint=hint)
    payload, number = encoded.to_bytes(), encoded.codec
    assert len(payload) < 0.9 * CHUNK

    def encode() -> None:
        encoder.encode(raw, dtype="float32", hint=hint)

    def decode() -> None:
        codec.decode(payload, out, codec=number, dtype="float32")

    decode()
    # One of four planes, which zstd gives anew.
    assert peak(encode) <= 0.3 * CHUNK
    assert peak(decode) <= 0.3 * CHUNK


def test_statistics_copy_nothing() -> None:
    big = weights(16 * MIB)
    statistics.compute(big, dtype="float32")
    assert peak(lambda: statistics.compute(big, dtype="float32")) <= 128 * 1024


def test_the_next_log_takes_the_memory_of_the_last(tmp_path: Path) -> None:
    big = weights(16 * MIB)

    def action() -> None:
        run.log({"w": big}, step=1)
        run.flush()

    with tsf.create_run(tmp_path, flush_interval_s=3600) as run:
        run.log({"w": big}, step=0)
        run.flush()
        assert peak(action) <= 0.1 * big.nbytes

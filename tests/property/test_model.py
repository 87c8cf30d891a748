"""One run against a dict: writers, flushes, merges, attempts, overwritten steps, several readers.

The oracle keeps NumPy arrays as they were logged. Every value that is visible must have the same
bits, every name and step that was flushed must be there, and nothing else may be.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tensorstore_fmt as tsf
from tensorstore_fmt.testing.writers import create_test_run, ticking_clock
from tensorstore_fmt.writing.run import RunWriter

NAMES = ["loss", "layer/weight", "état/β", "x" * 40]
MODES = [None, "TRAIN", "EVAL"]
DTYPES = [
    *("bool", "int8", "uint16", "int32", "int64", "uint64", "float16", "float32", "float64"),
    *("complex64", "bfloat16", "float8_e4m3fn", "int4"),
]
SHAPES = [(), (1,), (0,), (7,), (3, 5), (64, 65), (2, 0, 3), (5, 40, 11), (300, 200)]

Key = tuple[str, int, int]  # name, number of the mode, step


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def random_array(seed: int, dtype: str, shape: tuple[int, ...], kind: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wanted = dtype_of(dtype)
    n = int(np.prod(shape, dtype=np.int64))
    if dtype == "bool":
        flat = rng.integers(0, 2, n).astype(bool)
    elif dtype == "int4":
        flat = rng.integers(-8, 8, n).astype(np.int8).astype(wanted)
    else:  # all bits: NaN payloads, infinities, subnormals
        flat = np.frombuffer(rng.bytes(n * wanted.itemsize), wanted).copy()
    if kind == 1 and n:
        flat[:] = flat[0]
    if kind == 2 and dtype.startswith(("float", "bfloat")) and dtype != "float8_e4m3fn":
        flat = (rng.standard_normal(n) * 0.02).astype(wanted)
    array = flat.reshape(shape)
    if kind == 3 and len(shape) >= 2:
        array = np.asfortranarray(array)
    if kind == 4 and len(shape) >= 1:
        array = array[::-1]
    return array


def same_bits(a: object, b: object) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    x, y = np.asarray(a), np.asarray(b)
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.dtype == ml_dtypes.int4:  # NumPy leaves what it likes in the unused bits
        return x.astype(np.int8).tobytes() == y.astype(np.int8).tobytes()
    return x.tobytes() == y.tobytes()


@dataclass
class Oracle:
    """What was logged, and how much of it readers may see."""

    logged: dict[Key, object] = field(default_factory=dict)
    visible: dict[Key, object] = field(default_factory=dict)

    def flush(self) -> None:
        self.visible = dict(self.logged)


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tsf-model-"))
        self.oracle = Oracle()
        self.readers: list[tuple[tsf.Run, dict[Key, object]]] = []
        self.writer: RunWriter | None = None
        self.step = 0
        self.seed = 0

    @property
    def url(self) -> str:
        return str(self.folder / "run")

    @initialize(
        compression=st.sampled_from(["auto", "none", "zstd"]),
        stats=st.booleans(),
        chunk=st.sampled_from([None, (17, 13), (1, 64)]),
    )
    def open(self, *, compression: str, stats: bool, chunk: tuple[int, int] | None) -> None:
        self.options: dict[str, object] = {"compression": compression, "stats": stats}
        if chunk is not None:
            self.options["chunks"] = {"layer/*": chunk}
        self.rank = None if chunk is None else len(chunk)
        self.ids = itertools.count(1)
        self.clock = ticking_clock()
        self.create()

    def create(self, **more: object) -> None:
        self.writer = create_test_run(
            self.url, clock_us=self.clock, new_id=self.ids.__next__, **self.options, **more
        )

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True),
        mode=st.sampled_from(MODES),
        dtype=st.sampled_from(DTYPES),
        shape=st.sampled_from(SHAPES),
        kind=st.integers(0, 4),
        jump=st.sampled_from([1, 1, 1, 2, 10, -1, -3, 0]),
        repeats=st.sampled_from([1, 1, 3, 12]),
    )
    def log(
        self,
        *,
        names: list[str],
        mode: str | None,
        dtype: str,
        shape: tuple[int, ...],
        kind: int,
        jump: int,
        repeats: int,
    ) -> None:
        assert self.writer is not None
        if self.rank is not None and len(shape) != self.rank:
            names = [name for name in names if not name.startswith("layer/")]
        for _ in range(repeats if names else 0):
            self.step = max(0, self.step + jump)
            self.seed += 1
            values: dict[str, object] = {}
            for i, name in enumerate(names):
                values[name] = random_array(self.seed // 3 * 10 + i, dtype, shape, kind)
            self.writer.log(values, step=self.step, mode=mode)
            for name, value in values.items():
                copy = np.array(value, order="C")
                self.oracle.logged[name, MODES.index(mode), self.step] = copy

    @rule(value=st.one_of(st.floats(), st.text(max_size=20)), jump=st.sampled_from([1, 1, 0, 5]))
    def log_plain(self, *, value: float | str, jump: int) -> None:
        assert self.writer is not None
        for _ in range(3):
            self.step += jump
            self.writer.log({"plain": value}, step=self.step)
            kept = value if isinstance(value, str) else np.array(value)
            self.oracle.logged["plain", 0, self.step] = kept

    @rule(durable=st.booleans())
    def flush(self, *, durable: bool) -> None:
        assert self.writer is not None
        assert self.writer.flush(durable=durable)
        self.oracle.flush()

    @rule()
    def merge(self) -> None:
        """Flush often enough that segments are merged."""
        assert self.writer is not None
        for _ in range(9):
            self.step += 1
            self.writer.log({"loss": float(self.step)}, step=self.step)
            self.oracle.logged["loss", 0, self.step] = np.array(float(self.step))
            self.writer.flush()
        self.oracle.flush()

    @rule(back=st.integers(0, 4))
    def resume(self, *, back: int) -> None:
        assert self.writer is not None
        self.writer.close()
        self.oracle.flush()
        start = max(0, self.step - back)
        self.create(resume_from=start)
        self.oracle.logged = {k: v for k, v in self.oracle.logged.items() if k[2] < start}
        self.oracle.flush()
        self.step = start

    @rule()
    def open_reader(self) -> None:
        run = tsf.open_run(self.url)
        self.readers.append((run, dict(self.oracle.visible)))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def refresh_reader(self, *, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.readers) - 1))
        run, _ = self.readers[at]
        run.refresh()
        self.readers[at] = (run, dict(self.oracle.visible))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read(self, *, data: st.DataObject) -> None:
        run, seen = self.readers[data.draw(st.integers(0, len(self.readers) - 1))]
        check(run, seen)

    @invariant()
    def fresh_reader_sees_what_was_flushed(self) -> None:
        if self.writer is not None:
            run = tsf.open_run(self.url)
            names = {name for name, _, _ in self.oracle.visible}
            assert names <= set(run.names())

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.oracle.flush()
            check(tsf.open_run(self.url), self.oracle.visible)
        for run, seen in self.readers[-2:]:
            check(run, seen)
        shutil.rmtree(self.folder)


def check(run: tsf.Run, seen: dict[Key, object]) -> None:
    """Compare all that a reader shows with what it should show."""
    by_name: dict[str, dict[tuple[int, int], object]] = {}
    for (name, mode, step), value in seen.items():
        by_name.setdefault(name, {})[mode, step] = value
    for name, values in by_name.items():
        tensor = run[name]
        assert tensor.steps.tolist() == sorted({step for _, step in values})
        for (mode, step), value in values.items():
            chosen = tensor.select(mode=MODES[mode]) if MODES[mode] else tensor
            modes_here = {m for m, s in values if s == step}
            if MODES[mode] is None and len(modes_here) > 1:
                continue
            found = chosen.read(step=step)
            assert same_bits(found, value), (name, mode, step, found, value)
            if isinstance(value, np.ndarray) and value.ndim == 2 and value.size:
                part = chosen.read(step=step, index=np.s_[-2:, ::-2])
                assert same_bits(part, np.ascontiguousarray(value[-2:, ::-2]))


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)

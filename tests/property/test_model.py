"""One run against a dict: write, flush, commit, crash, reopen, read, compact, refresh (goal N6).

The oracle keeps NumPy arrays as they were logged. Every value that is visible must have the same
bits, every name and step that was flushed must be there, and nothing else may be.

An example costs about as many milliseconds as it has steps: the folder is in memory where there
is one (no fsync), one reader that is refreshed looks at the run after each change (opening
anew costs ten times as much, so that has a rule of its own), and checks read a name's equal shapes
at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.concurrent_storage import MortalStorage
from support.goals import SEED, record, trials

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.writers import create_test_run, ticking_clock
from tensorstore_fmt.upkeep import compact, compacting, recover
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
    """What was logged, how much of it readers may see, and how much survives a power cut."""

    logged: dict[Key, object] = field(default_factory=dict)
    visible: dict[Key, object] = field(default_factory=dict)
    durable: dict[Key, object] = field(default_factory=dict)
    later: dict[Key, list[object]] = field(default_factory=dict)  # logged since that flush

    def log(self, key: Key, value: object) -> None:
        self.logged[key] = value
        self.later.setdefault(key, []).append(value)

    def flush(self, *, durable: bool = False) -> None:
        self.visible = dict(self.logged)
        if durable:
            self.durable = dict(self.logged)
            self.later = {}

    def resume(self, start: int) -> None:
        """Begin an attempt; that it has begun is not durable, but what it hides stays known."""
        self.logged = {k: v for k, v in self.visible.items() if k[2] < start}
        self.visible = dict(self.logged)
        for key, value in self.durable.items():
            if key[2] >= start:
                self.later.setdefault(key, []).append(value)
        self.durable = {k: v for k, v in self.durable.items() if k[2] < start}


has_writer = precondition(lambda self: self.writer is not None)
has_readers = precondition(lambda self: self.readers)


class Model(RuleBasedStateMachine):
    done: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="tsf-model-", dir=memory))
        self.oracle = Oracle()
        self.readers: list[tuple[tsf.Run, dict[Key, object]]] = []
        self.writer: RunWriter | None = None
        self.watcher: tsf.Run | None = None
        self.step = 0
        self.seed = 0
        self.tended: set[str] = set()  # what was done since the last writer
        self.is_synced = False  # a power cut may leave nothing at all before

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
        self.done["examples"] += 1

    def create(self, **more: object) -> None:
        self.tended = set()
        self.storage = MortalStorage(open_storage(self.url, writable=True), self.url)
        self.writer = create_test_run(
            self.storage, clock_us=self.clock, new_id=self.ids.__next__, **self.options, **more
        )

    def look(self) -> None:
        """See with a reader that stays open what was flushed."""
        if self.watcher is None:
            self.watcher = tsf.open_run(self.url)
        self.watcher.refresh()
        steps: dict[str, set[int]] = {}
        for name, _, step in self.oracle.visible:
            steps.setdefault(name, set()).add(step)
        for name, wanted in steps.items():
            assert self.watcher[name].steps.tolist() == sorted(wanted), name

    @has_writer
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
        asked = self.writer._committer._wanted
        for _ in range(repeats if names else 0):
            self.step = max(0, self.step + jump)
            self.seed += 1
            values: dict[str, object] = {}
            for i, name in enumerate(names):
                values[name] = random_array(self.seed // 3 * 10 + i, dtype, shape, kind)
            self.writer.log(values, step=self.step, mode=mode)
            for name, value in values.items():
                copy = np.array(value, order="C")
                self.oracle.log((name, MODES.index(mode), self.step), copy)
        if self.writer._committer._wanted > asked:  # a part is published: let all be visible
            assert self.writer.flush()
            self.oracle.flush()
        self.done["log"] += 1

    @has_writer
    @rule(value=st.one_of(st.floats(), st.text(max_size=20)), jump=st.sampled_from([1, 1, 0, 5]))
    def log_plain(self, *, value: float | str, jump: int) -> None:
        assert self.writer is not None
        for _ in range(3):
            self.step += jump
            self.writer.log({"plain": value}, step=self.step)
            kept = value if isinstance(value, str) else np.array(value)
            self.oracle.log(("plain", 0, self.step), kept)
        self.done["log"] += 1

    @has_writer
    @rule(durable=st.booleans())
    def flush(self, *, durable: bool) -> None:
        assert self.writer is not None
        assert self.writer.flush(durable=durable)
        self.oracle.flush(durable=durable)
        self.is_synced |= durable
        self.done["commit" if durable else "flush"] += 1
        self.look()

    @has_writer
    @rule()
    def merge(self) -> None:
        """Flush often enough that segments are merged."""
        assert self.writer is not None
        for _ in range(9):
            self.step += 1
            self.writer.log({"loss": float(self.step)}, step=self.step)
            self.oracle.log(("loss", 0, self.step), np.array(float(self.step)))
            self.writer.flush()
        self.oracle.flush()
        self.done["merge"] += 1
        self.look()

    @has_writer
    @rule()
    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.writer = None
        self.oracle.flush(durable=True)
        self.is_synced = True
        self.done["close"] += 1
        self.look()
        assert self.watcher is not None
        assert self.watcher.is_closed

    @has_writer
    @rule()
    def crash(self) -> None:
        """End the process without a word: what was flushed is there, nothing else is."""
        self.storage.die()
        self.bury()
        self.oracle.logged = dict(self.oracle.visible)
        self.done["crash"] += 1
        self.look()
        assert self.watcher is not None
        assert not self.watcher.is_closed

    @precondition(lambda self: self.writer is not None and self.is_synced)
    @rule()
    def cut_power(self) -> None:
        """Lose all that was not synced; what came after the last commit may be there, or not.

        The next attempt resumes before that, so that what is visible is known again.
        """
        self.storage.cut_power()
        self.bury()
        self.readers = []  # their segments may be gone
        self.watcher = None
        first = min((key[2] for key in self.oracle.later), default=self.step + 1)
        with tsf.open_run(self.url) as run:
            check(run, {k: v for k, v in self.oracle.durable.items() if k[2] < first}, first)
            for (name, mode, step), versions in self.oracle.later.items():
                known = self.oracle.durable.get((name, mode, step))
                allowed = [*versions, *([] if known is None else [known])]
                may_lack = known is None
                check_later(run, (name, mode, step), allowed, may_lack=may_lack)
        self.oracle.visible = {k: v for k, v in self.oracle.durable.items() if k[2] < first}
        self.oracle.later = {}
        self.create(resume_from=first)
        assert self.writer is not None
        assert self.writer.flush(durable=True)  # else the next cut brings back what it hides
        self.oracle.resume(first)
        self.oracle.flush(durable=True)
        self.step = first
        self.done["power cut"] += 1
        self.look()

    def bury(self) -> None:
        """End the threads of a writer that died; nothing that they do reaches the disk."""
        assert self.writer is not None
        with contextlib.suppress(tsf.StorageFailedError, OSError):
            self.writer.close()
        self.writer = None

    @rule(back=st.integers(0, 4))
    def resume(self, *, back: int) -> None:
        if self.writer is not None:
            self.writer.close()
            self.oracle.flush(durable=True)
            self.is_synced = True
        start = max(0, self.step - back)
        self.create(resume_from=start)
        self.oracle.resume(start)
        self.step = start
        self.done["resume"] += 1
        self.look()

    @has_writer
    @rule(upkeep=st.sampled_from([compact, recover]))
    def upkeep_beside_writer(self, *, upkeep: Callable[[str], object]) -> None:
        with pytest.raises(tsf.StateError) as caught:
            upkeep(self.url)
        assert caught.value.code == "locked"
        self.done["refused"] += 1

    @precondition(lambda self: self.writer is None and "compact" not in self.tended)
    @rule()
    def compact(self) -> None:
        self.tended.add("compact")
        compact(self.url)
        self.done["compact"] += 1
        self.look()

    @precondition(lambda self: self.writer is None and "recover" not in self.tended)
    @rule()
    def recover(self) -> None:
        """What was not committed is not brought back."""
        self.tended.add("recover")
        recover(self.url)
        self.done["recover"] += 1
        self.look()

    @rule()
    def open_reader(self) -> None:
        self.readers.append((tsf.open_run(self.url), dict(self.oracle.visible)))
        self.done["open"] += 1

    @has_readers
    @rule(data=st.data())
    def refresh_reader(self, *, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.readers) - 1))
        run, _ = self.readers[at]
        run.refresh()
        self.readers[at] = (run, dict(self.oracle.visible))
        self.done["refresh"] += 1

    @has_readers
    @rule(data=st.data())
    def read(self, *, data: st.DataObject) -> None:
        check(*self.readers[data.draw(st.integers(0, len(self.readers) - 1))])
        self.done["read"] += 1

    def teardown(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.oracle.flush()
            self.writer = None
        with tsf.open_run(self.url) as run:
            check(run, self.oracle.visible)
        for run, seen in self.readers[-2:]:
            check(run, seen)
        for run, _ in self.readers:
            run.close()
        shutil.rmtree(self.folder)


def check(run: tsf.Run, seen: dict[Key, object], below: int | None = None) -> None:
    """Compare all that a reader shows (below a step) with what it should show."""
    by_name: dict[str, dict[tuple[int, int], object]] = {}
    for (name, mode, step), value in seen.items():
        by_name.setdefault(name, {})[mode, step] = value
    for name, values in by_name.items():
        tensor = run[name]
        steps = [step for step in tensor.steps.tolist() if below is None or step < below]
        assert steps == sorted({step for _, step in values})
        modes_of: dict[int, set[int]] = {}
        for mode, step in values:
            modes_of.setdefault(step, set()).add(mode)
        groups: dict[tuple[object, ...], list[int]] = {}
        for (mode, step), value in values.items():
            if mode or len(modes_of[step]) == 1:
                kind = "str" if isinstance(value, str) else (value.dtype, value.shape)
                groups.setdefault((mode, kind), []).append(step)
        for (mode, _), group in groups.items():
            chosen = tensor.select(mode=MODES[mode]) if MODES[mode] else tensor
            check_equals(name, chosen, {step: values[mode, step] for step in group})


def check_equals(name: str, chosen: tsf.Tensor, values: dict[int, object]) -> None:
    """Compare steps of one shape and dtype: all at once, one alone, and a part of it."""
    for step, found in zip(values, chosen.read(steps=list(values)), strict=True):
        assert same_bits(found, values[step]), (name, step, found, values[step])
    step, value = next(reversed(values.items()))
    assert same_bits(chosen.read(step=step), value)
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.size:
        part = chosen.read(step=step, index=np.s_[-2:, ::-2])
        assert same_bits(part, np.ascontiguousarray(value[-2:, ::-2]))


def check_later(run: tsf.Run, key: Key, allowed: list[object], *, may_lack: bool) -> None:
    """Check what a power cut left of a value that was logged after the last commit."""
    name, mode, step = key
    try:
        found = run[name].read(step=step, mode=MODES[mode] or "NONE")
    except tsf.NotThereError:
        assert may_lack, key
        return
    except tsf.FormatError:  # its entry is there, the end of its shard is not
        return
    assert any(same_bits(found, value) for value in allowed), (key, found)


@pytest.mark.slow
def test_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacting, "_GRACE_US", 0)  # its readers are in this thread
    examples = trials(200)
    Model.done.clear()
    chosen = settings(max_examples=examples, stateful_step_count=40, deadline=None)
    try:
        run_state_machine_as_test(seed(SEED)(Model), settings=chosen)
    finally:
        record("N6", examples, **Model.done)
    if examples >= 100:
        wanted = {"log", "flush", "commit", "crash", "power cut", "close", "resume", "open"}
        wanted |= {"read", "refresh", "compact", "recover", "merge", "refused"}
        assert wanted <= Model.done.keys()

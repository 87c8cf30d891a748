"""What is logged under one name, whatever its kinds, is what is read: a dict is the oracle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.saving import LastingChild

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.upkeep import compact, compacting, verify, verifying

QUIET_NAN = np.array(0x7FF80000_DEADBEEF, np.uint64).view(np.float64)
KINDS: dict[str, Callable[[int], object]] = {
    "float": lambda i: i / 7,
    "float64": lambda i: np.float64(i / 7),
    "float64 array": lambda i: np.array(i / 7),
    "nan": lambda _: QUIET_NAN,
    "int": lambda i: i,
    "bool": lambda i: i % 2 == 0,
    "float32": np.float32,
    "text": lambda i: f"text {i}",
    "small": lambda i: np.full(3, i / 7),
    "empty": lambda _: np.empty((0, 2)),
    "joined": lambda i: np.arange(1000) * (i / 7),
    "gridded": lambda i: np.arange(50_000) * (i / 7),
}  # each way a value takes: floats, inline, strings, joined, in chunks

calls = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(sorted(KINDS)), min_size=1),
        st.integers(0, 5),
        st.sampled_from([None, "TRAIN"]),
        st.booleans(),  # whether a flush follows
    ),
    max_size=16,
)
options = st.fixed_dictionaries(
    {
        "compression": st.sampled_from(["auto", "none", "zstd"]),
        "stats": st.sampled_from([True, False, "only", {"x": "only"}]),
        "chunks": st.sampled_from([None, {"y": (1000,)}]),
        "flush_bytes": st.sampled_from([1, 10_000, 1_000_000]),
        "queue_bytes": st.sampled_from([10_000, 10_000_000]),
    }
)


@pytest.fixture(scope="module", autouse=True)
def quick_upkeep() -> Iterator[None]:
    """No reader has to be waited for; one child process serves all that is verified."""
    child = LastingChild()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compacting, "_GRACE_US", 0)
        patch.setattr(verifying, "ShardChild", lambda: child)
        yield
    child.end()


def bits(value: object) -> tuple[object, ...]:
    if isinstance(value, str):
        return (value,)
    array = np.asarray(value)
    return array.dtype.str, array.shape, array.tobytes()


def same_statistics(row: dict[str, float], value: object) -> bool:
    array = np.asarray(value).astype(np.float64)
    numbers = array[~np.isnan(array)]
    return (row["count"], row["nan"]) == (array.size, array.size - numbers.size) and (
        not numbers.size or (row["min"], row["max"]) == (numbers.min(), numbers.max())
    )


def fits(kind: str, chunks: object) -> bool:
    """Say whether a value has one axis: all that `chunks` for a name are for."""
    return chunks is None or kind in ("small", "joined", "gridded")


@given(calls=calls, options=options)
def test_whatever_is_logged_under_a_name_is_read(
    calls: list[tuple[dict[str, str], int, str | None, bool]], options: dict[str, object]
) -> None:
    oracle: dict[tuple[str, str | None, int], object] = {}
    with tempfile.TemporaryDirectory() as folder:
        url = str(Path(folder) / "run")
        run = create_test_run(url, **options)
        for i, (kinds, step, mode, flushes) in enumerate(calls):
            values = {
                name: KINDS[kind](i)
                for name, kind in kinds.items()
                if name != "y" or fits(kind, options["chunks"])
            }
            run.log(values, step=step, mode=mode)
            oracle |= {(name, mode, step): value for name, value in values.items()}
            if flushes:
                run.flush()
        assert run.close().dropped == 0
        check_run(url, options["stats"], oracle)
        compact(url)
        assert not verify(url).problems
        check_run(url, options["stats"], oracle)


def check_run(url: str, stats: object, oracle: dict[tuple[str, str | None, int], object]) -> None:
    """Compare a run with what was logged."""
    with tsf.open_run(url) as reader:
        assert set(reader.names()) == {name for name, _, _ in oracle}
        for name, mode in {(name, mode) for name, mode, _ in oracle}:
            saved = {s: value for (n, m, s), value in oracle.items() if (n, m) == (name, mode)}
            check(reader[name].select(mode=mode or "NONE"), stats, saved)
        numbers = {
            (name, mode or "NONE", step): float(np.asarray(value).item())
            for (name, mode, step), value in oracle.items()
            if not isinstance(value, str) and np.asarray(value).size == 1
        }
        table = reader.scalars().to_pylist()
        found = {(row["name"], row["mode"], row["step"]): row["value"] for row in table}
        texts = {k for k, row in zip(found, table, strict=True) if row["text"] is not None}
        np.testing.assert_equal({k: v for k, v in found.items() if k not in texts}, numbers)


def check(tensor: tsf.Tensor, stats: object, saved: dict[int, object]) -> None:
    """Compare one name in one mode with what was logged."""
    choice = stats.get(tensor.name, True) if isinstance(stats, dict) else stats
    found = tensor.stats()
    columns = {key: found[key].tolist() for key in ("count", "nan", "min", "max")}
    rows = {s: {k: c[i] for k, c in columns.items()} for i, s in enumerate(found.step.tolist())}
    for step, value in saved.items():
        size = 0 if isinstance(value, str) else np.asarray(value).nbytes
        if choice == "only" and size > layout.INLINE_STEP_NBYTES:
            with pytest.raises(tsf.NotThereError):
                tensor.read(step=step)
        else:
            assert bits(tensor.read(step=step)) == bits(value)
        is_number = not isinstance(value, bool | str)
        if is_number and (choice or size <= layout.INLINE_STEP_NBYTES):
            assert step in rows
        if step in rows:
            assert is_number
            assert same_statistics(rows[step], value)

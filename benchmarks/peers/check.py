"""Say whether each peer gives back, bit for bit, what it was given: whole, in part, over steps.

    python benchmarks/peers/check.py [--folder DIR] [NAME ...]

Runs each in its own environment, and prints a table. Ends with 1 if one of them is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = str(Path(__file__).resolve().parents[1])
# The script's own folder would hide the peers' packages behind the modules that are named so.
sys.path[0] = BENCHMARKS

import numpy as np  # noqa: E402 (after the path)

from environments import FOLDER  # noqa: E402
from peers import known  # noqa: E402
from suite.case import tree_nbytes  # noqa: E402
from suite.contestant import Series, Store  # noqa: E402
from suite.pythons import Pythons  # noqa: E402

STEPS = 3
MANY = 130
SHAPES = (
    Series("encoder.0/attention", (3, 4, 40, 40), "float32", STEPS),
    Series("odd", (2, 5, 117, 117), "float16", STEPS),
    Series("weights", (300, 700), "bfloat16", STEPS),
    Series("double", (70, 333), "float64", STEPS),
    Series("bias", (100_000,), "float32", STEPS),
    Series("ids", (64, 128), "int64", STEPS),
    Series("more ids", (64, 128), "int32", STEPS),
    Series("mask", (9, 33, 65), "bool", STEPS),
    Series("pixels", (16, 28, 28), "uint8", STEPS),
    Series("small", (8, 128), "float32", MANY),
    Series("norm", (), "float64", MANY),
)
PARTS: dict[str, list[tuple]] = {
    "encoder.0/attention": [(2, 3, slice(0, 20), slice(0, 20)), (slice(None), 1), (0, 0, 0, 0)],
    "odd": [(1, slice(1, 4), slice(3, 115), slice(100, 117)), (0, 4)],
    "weights": [(17,), (slice(None), 5), (slice(10, 200), slice(600, 700))],
    "double": [(slice(60, 70),), (3, slice(1, 2))],
    "bias": [(slice(65_000, 70_000),), (99_999,)],
    "ids": [(slice(5, 6),), (slice(None), slice(0, 1))],
    "more ids": [(63, slice(100, 128))],
    "mask": [(8, slice(0, 33), slice(60, 65))],
    "small": [(3, slice(5, 9)), (slice(0, 8, 3),)],
    "norm": [()],
    "pixels": [(3,), (slice(2, 5), slice(10, 12))],
}


def tensors(series: Series) -> list[np.ndarray]:
    """Give a tensor a step: some numbers, with zeros and, where there is one, a NaN of odd bits."""
    rng = np.random.default_rng([7, *series.name.encode()])
    found = []
    for _ in range(series.steps):
        values = np.asarray(rng.standard_normal(series.shape) * 100)
        values[values < -50] = 0
        array = (
            values.astype("float32").view("uint32") >> 16 if series.dtype == "bfloat16" else values
        )
        array = np.asarray(array, series.numpy_dtype, order="C")
        if array.dtype == np.float32 and array.ndim:
            array.reshape(-1)[3] = np.array(0x7FC12345, np.uint32).view(np.float32)
        found.append(array)
    return found


def check(store: Store, folder: Path) -> dict:
    """Write and read; give what went wrong, with the seconds and the bytes it took."""
    data = {s.name: tensors(s) for s in SHAPES}
    items = [
        (step, s.name, data[s.name][step]) for step in range(MANY) for s in SHAPES if step < s.steps
    ]
    begin = time.perf_counter()
    store.write(folder, SHAPES, items)
    written = time.perf_counter()
    reader = store.reader(folder, SHAPES)
    wrong = []
    for name, steps in data.items():
        for step, values in enumerate(steps):
            if not _same(reader.whole(name, step), values):
                wrong.append(f"{name} at {step}")
            wrong += [
                f"{name}{index} at {step}"
                for index in PARTS[name]
                if not _same(reader.part(name, step, index), values[index])
            ]
        stacked = np.stack(steps)
        wrong += [
            f"{name}{index} of all"
            for index in PARTS[name]
            if not _same(
                reader.parts(name, range(len(steps)), index), stacked[(slice(None), *index)]
            )
        ]
    reader.close()
    nbytes = sum(array.nbytes for _, _, array in items)
    return {
        "wrong": wrong,
        "write": written - begin,
        "read": time.perf_counter() - written,
        "ratio": nbytes / tree_nbytes(folder),
    }


def _same(found: np.ndarray, values: np.ndarray) -> bool:
    found = np.asarray(found)
    is_alike = found.dtype == values.dtype and found.shape == values.shape
    return is_alike and found.tobytes() == values.tobytes()


def main() -> int:
    """Check those that are named, or all."""
    parser = argparse.ArgumentParser(
        description="Check that each peer gives back what it was given."
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the environments")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(check(known.store(given.names[0])(), Path(scratch) / "run")))
        return 0
    pythons, failed = Pythons(given.folder), 0
    for store in known.stores():
        if given.names and store.name not in given.names:
            continue
        found = pythons.find(store)
        if isinstance(found, str):
            print(f"{store.name:18} {found}")
            continue
        python, versions = found
        done = subprocess.run(
            [python, __file__, "--one", store.name],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **store.variables},
        )
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        if done.returncode:
            failed += 1
            print(f"{store.name:18} FAILED: {done.stderr.strip()[-1500:]}")
            continue
        facts = json.loads(done.stdout.splitlines()[-1])
        failed += bool(facts["wrong"])
        verdict = f"WRONG: {'; '.join(facts['wrong'][:6])}" if facts["wrong"] else "same"
        times = f"write {facts['write']:6.3f} s, read {facts['read']:6.3f} s"
        print(f"{store.name:18} {verdict}, {times}, ratio {facts['ratio']:.3f} ({told})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

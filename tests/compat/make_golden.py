"""Write the golden runs of a release: runs as its writer makes them, and what they must give.

    PYTHONPATH=.:tests python tests/compat/make_golden.py v1.0

Golden runs are never edited (spec/policy.md): the script refuses to write over what is there. What
must be given comes from what was logged, not from a reader; only statistics are read back.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from support.damage import merged

import tensorstore_fmt as tsf
from tensorstore_fmt import dtypes
from tensorstore_fmt.format import layout
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing.staging import Part

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = "manifest.json"
ATTRS = {"lr": 0.1, "text": "é\u202e\x00", "list": [1, None, True, 2**53 + 1], "nested": {"a": {}}}


class Expected:
    """What a run must give."""

    def __init__(self, *, is_closed: bool) -> None:
        self.document: dict[str, Any] = {"attrs": ATTRS, "is_closed": is_closed, "values": []}

    def add(self, name: str, step: int, value: Any, **select: Any) -> None:
        """Note one tensor; None: its step was dropped."""
        self.document["values"].append(
            {"name": name, "step": step, "select": select, **_as_json(value)}
        )

    def finish(self, folder: Path) -> dict[str, Any]:
        """Add names and statistics."""
        self.document["names"] = sorted({v["name"] for v in self.document["values"]})
        run = tsf.open_run(folder)
        self.document["statistics"] = [
            {
                "name": name,
                "step": step,
                "numbers": [float(x).hex() for x in _numbers(run, name, step)],
            }
            for name, step in (("planes", 1), ("zstd", 0), ("loss", 0))
            if name in run.names() and self.document["is_closed"]
        ]
        return self.document


def _numbers(run: tsf.Run, name: str, step: int) -> list[float]:
    found = run[name].stats([step])
    return [found[key][0] for key in layout.STATS_FIELDS]


def _as_json(value: Any) -> dict[str, Any]:
    if value is None:
        return {"state": "dropped"}
    if isinstance(value, str | list):
        array = np.asarray(value, object)
        return {"dtype": "string", "shape": array.shape, "texts": array.ravel().tolist()}
    array = np.asarray(value)
    return {
        "dtype": dtypes.dtype_name(array.dtype),
        "shape": array.shape,
        "bytes": base64.b64encode(array.tobytes()).decode(),
    }


def logged(step: int) -> dict[str, Any]:
    """Give what is logged at a step: all codecs, strings, lengths that vary, equal payloads."""
    rng = np.random.default_rng([7, step])
    floats = (rng.standard_normal(400) * 0.02).astype(np.float32)
    return {
        "loss": 1.0 / (step + 1),
        "count": np.int64(2**62 + step),
        "planes": floats.astype(ml_dtypes.bfloat16),
        "complex": floats[:80].view(np.complex64),
        "nan": np.array([0x7FF8000000000001 + step, 0xFFF0000000000000], np.uint64).view(
            np.float64
        ),
        "zstd": np.repeat(rng.integers(0, 250, 300).astype(np.uint8), 4),
        "noise": rng.integers(0, 256, 700).astype(np.uint8),
        "constant": np.full(300, step + 7.0),
        "grid": rng.integers(0, 200, (6, 40)).astype(np.int32),
        "frozen": np.arange(500, dtype=np.float32),
        "varies": np.arange(60 * (step % 3), dtype=np.uint8),
        "bools": np.arange(9) % 2 == 0,
        "empty": np.zeros((0, 4), np.int16),
        "texts": ["a" * 9, "ü\u202e" * step, "\0b", ""],
        "text": "one" * step,
        "naïve/名前\n": np.float16(step),
    }


def _write(run: Any, steps: range, expected: Expected, *names: str) -> None:
    for step in steps:
        values = {name: v for name, v in logged(step).items() if not names or name in names}
        run.log(values, step=step)
        run.flush()
        for name, value in values.items():
            expected.add(name, step, value)


def closed(folder: Path) -> Expected:
    """Make a closed run with its bundle."""
    expected = Expected(is_closed=True)
    with create_test_run(folder, attrs=ATTRS, chunks={"grid": (6, 16)}, grace_s=60.0) as run:
        _write(run, range(3), expected)
    return expected


def live(folder: Path) -> Expected:
    """Make a run whose writer was killed: shards without end, a merged segment, covered ones."""
    expected = Expected(is_closed=False)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place) / "run"
        with create_test_run(source, attrs=ATTRS, chunks={"grid": (6, 16)}, grace_s=60.0) as run:
            _write(run, range(10), expected, "loss", "grid", "noise", "texts")
            while not merged(source):
                run.flush()
            shutil.copytree(source, folder)
    return expected


def workers(folder: Path) -> Expected:
    """Make a run of two workers, two attempts, parts of one tensor, and modes."""
    expected = Expected(is_closed=True)
    whole = {step: np.arange(240, dtype=np.float32).reshape(4, 60) + step for step in range(4)}
    for attempt, worker in itertools.product((0, 1), (0, 1)):
        ids = itertools.count(worker * 10 + attempt * 100 + 1)
        with create_test_run(
            folder, worker=worker, num_workers=2, attrs=ATTRS, new_id=ids.__next__,
            resume_from=2 if attempt else None,
        ) as run:  # fmt: skip
            for step in range(3) if not attempt else range(2, 4):
                shift = float(not attempt and step == 2)
                half = whole[step][2 * worker : 2 * worker + 2] + np.float32(shift)
                run.log(
                    {"w": Part(value=half, global_shape=(4, 60), origin=(2 * worker, 0))}, step=step
                )
                run.log({"own": np.array([worker, attempt, step])}, step=step)
                if not worker:
                    run.log({"accuracy": np.float32(step / 4)}, step=step, mode="EVAL")
                run.flush()
    for step, value in whole.items():
        expected.add("w", step, value)
        expected.add("w", step, value[2:], worker=1)
        expected.add("own", step, np.array([1, int(step > 1), step]), worker=1)
        expected.add("accuracy", step, np.float32(step / 4), mode="EVAL")
    expected.add("w", 2, whole[2] + np.float32(1), attempt=0)
    return expected


def dropped(folder: Path) -> Expected:
    """Make a run that had no room for all tensors."""
    expected = Expected(is_closed=True)
    with create_test_run(folder, attrs=ATTRS, queue_bytes=8192, when_full="drop") as run:
        for step in range(3):
            values = {name: np.arange(50, dtype=np.int64) + step for name in ("v", "w")}
            if step == 1:
                values = {name: np.arange(800, dtype=np.int64) for name in ("v", "w")}
            run.log({**values, "loss": step / 2}, step=step)
            run.flush()
            expected.add("loss", step, step / 2)
            for name, value in values.items():
                is_there = tsf.open_run(folder).state(name, step) == "here"
                expected.add(name, step, value if is_there else None)
    states = [value.get("state") for value in expected.document["values"]]
    assert 0 < states.count("dropped") < 3
    return expected


RUNS: dict[str, Callable[[Path], Expected]] = {
    "closed": closed, "live": live, "workers": workers, "dropped": dropped,
}  # fmt: skip


def checksums(release: Path) -> dict[str, str]:
    """Give the SHA-256 of each file but the manifest itself."""
    return {
        str(path.relative_to(release)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(release.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def main() -> int:
    """Write the runs of a release."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "release", help="version of the format, and what tells it from earlier ones"
    )
    release = GOLDEN / parser.parse_args().release
    if release.exists():
        sys.stderr.write(f"{release} is there; golden runs are never edited\n")
        return 1
    for name, make in RUNS.items():
        folder = release / name
        expected = make(folder)
        document = json.dumps(expected.finish(folder), indent=1, ensure_ascii=True)
        (release / f"{name}.json").write_text(document + "\n")
    (release / MANIFEST).write_text(json.dumps(checksums(release), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

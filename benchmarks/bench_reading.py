"""What it costs to open a run, and to read slices of it, on a warm local disk.

Data: seeded; runs are built once below ``--cache``. Each case is a child process; figures are
medians of several openings or reads. ``python benchmarks/bench_reading.py [CASE ...] [--quick]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tensorstore_fmt as tsf


def milliseconds(operation: Callable[[], object], repeats: int = 15) -> float:
    """Give the median time of an operation."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        operation()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def peak_mb() -> float:
    """Give the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def import_everything() -> None:
    """Read and write a tiny run, so that all imports are done before memory is measured."""
    with tsf.create_run("memory://imports") as run:
        run.log({"a": np.zeros((300, 300))}, step=0)
    tsf.open_run("memory://imports")["a"].read(step=0)


def _built(folder: Path, build: Callable[[Path], None]) -> Path:
    if not (folder / "run.json").exists():
        child = [sys.executable, __file__, "--build", build.__name__, "--cache", str(folder)]
        subprocess.run(child, check=True)
    return folder


def build_entries(folder: Path, steps: int = 1000) -> None:
    """1,000 names x `steps` steps, one chunk each: as many entries."""
    names = [f"block{i // 10:03d}/weight{i % 10}" for i in range(1000)]
    data = np.random.default_rng(0).integers(0, 256, (1000, 300)).astype(np.uint8)
    run = tsf.create_run(folder, stats=False, flush_interval_s=3600)
    for step in range(steps):
        data[:, :4] = np.frombuffer(np.int32(step).tobytes(), np.uint8)
        run.log(dict(zip(names, data, strict=True)), step=step)
        run.flush()
    run.close()


def build_entries_quick(folder: Path) -> None:
    """The same with 20 steps."""
    build_entries(folder, 20)


def build_entries_many(folder: Path) -> None:
    """The same with ten times the steps."""
    build_entries(folder, 10_000)


def build_shapes(folder: Path, steps: int = 1_000_000) -> None:
    """One name whose shape differs from step to step."""
    data = np.arange(64, dtype=np.float32)
    with tsf.create_run(folder, stats=False) as run:
        for step in range(steps):
            run.log({"ragged": data[: 1 + step % 61]}, step=step)


def build_shapes_quick(folder: Path) -> None:
    """The same with 2,000 steps."""
    build_shapes(folder, 2000)


def build_live(folder: Path, flushes: int = 10_000) -> None:
    """A writer that was killed after many flushes of 1,000 scalars."""
    names = [f"layer{i // 10:03d}/{i % 10}" for i in range(1000)]
    values = np.random.default_rng(0).standard_normal(1000).tolist()
    data = dict(zip(names, values, strict=True))
    run = tsf.create_run(folder, flush_interval_s=3600)
    for step in range(flushes):
        run.log(data, step=step)
        run.flush()
    time.sleep(12)  # merges end, and covered files are deleted
    import os

    os._exit(0)


def build_live_quick(folder: Path) -> None:
    """The same with 50 flushes."""
    build_live(folder, 50)


def build_curve(folder: Path, steps: int = 100_000) -> None:
    """Ten scalar series."""
    values = np.random.default_rng(0).standard_normal((steps, 10)).tolist()
    with tsf.create_run(folder) as run:
        for step in range(steps):
            run.log({f"m{i}": v for i, v in enumerate(values[step])}, step=step)


def build_curve_quick(folder: Path) -> None:
    """The same with 2,000 steps."""
    build_curve(folder, 2000)


def build_attention(folder: Path) -> None:
    """10 steps of softmax attention, f32 (12, 12, 128, 128)."""
    rng = np.random.default_rng(0)
    with tsf.create_run(folder) as run:
        for step in range(10):
            x = rng.standard_normal((12, 12, 128, 128)).astype("f4") * 2
            x = np.exp(x - x.max(-1, keepdims=True))
            run.log({"attention": x / x.sum(-1, keepdims=True)}, step=step)


def _opening(run: Path, name: str, step: int) -> dict[str, float]:
    import_everything()
    before = peak_mb()

    def first_slice() -> float:
        opened = tsf.open_run(run)
        opened.names()
        begin = time.perf_counter()
        opened[name].read(step=step)
        return time.perf_counter() - begin

    open_ms = milliseconds(lambda: tsf.open_run(run).names())
    slices = statistics.median(first_slice() for _ in range(15)) * 1e3
    files = len(list((run / "index").iterdir()))
    return {
        "open_names_ms": open_ms,
        "first_slice_ms": slices,
        "mb_over_imports": peak_mb() - before,
        "index_files": files,
        "index_mb": sum(f.stat().st_size for f in (run / "index").iterdir()) / 1e6,
    }


def entries(cache: Path, *, quick: bool) -> dict[str, float]:
    """Open a closed run of 1,000,000 entries, list its names, read a first slice."""
    build = build_entries_quick if quick else build_entries
    run = _built(cache / build.__name__, build)
    return _opening(run, "block050/weight5", 10)


def entries_many(cache: Path, *, quick: bool) -> dict[str, float]:
    """The same with ten times the steps."""
    build = build_entries_quick if quick else build_entries_many
    return _opening(_built(cache / build.__name__, build), "block050/weight5", 10)


def shapes(cache: Path, *, quick: bool) -> dict[str, float]:
    """Open a run with a name whose shape differs at each of 1,000,000 steps."""
    build = build_shapes_quick if quick else build_shapes
    return _opening(_built(cache / build.__name__, build), "ragged", 1000)


def live(cache: Path, *, quick: bool) -> dict[str, float]:
    """Open a run that was not closed, after 10,000 flushes of 1,000 names."""
    build = build_live_quick if quick else build_live
    return _opening(_built(cache / build.__name__, build), "layer050/5", 40)


def curve(cache: Path, *, quick: bool) -> dict[str, float]:
    """Read one scalar series of 100,000 steps."""
    build = build_curve_quick if quick else build_curve
    run = tsf.open_run(_built(cache / build.__name__, build))
    return {"warm_ms": milliseconds(run["m3"].read)}


def attention(cache: Path, *, quick: bool) -> dict[str, float]:
    """Read ``[3, 5, :20, :20]`` of 10 steps, and one whole tensor."""
    run = tsf.open_run(_built(cache / "attention", build_attention))
    tensor = run["attention"]
    index = np.s_[3, 5, :20, :20]
    tensor.read(index=index)
    raw = tensor.read(step=0)
    whole = milliseconds(lambda: tensor.read(step=0))
    return {
        "slice_ms": milliseconds(lambda: tensor.read(index=index), 5 if quick else 50),
        "whole_gb_per_s": raw.nbytes / whole / 1e6,
        "ratio": tensor.nbytes / tensor.stored_nbytes,
    }


CASES = {c.__name__: c for c in (entries, entries_many, shapes, live, curve, attention)}


def main() -> None:
    """Run cases in child processes and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tsf-bench")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        globals()[args.build](args.cache)
        return
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.child:
        print(json.dumps(CASES[args.cases[0]](args.cache, quick=args.quick)))
        return
    for name in args.cases or [c for c in CASES if c != "entries_many"]:
        command = [sys.executable, __file__, name, "--child", "--cache", str(args.cache)]
        command += ["--quick"] * args.quick
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            sys.exit(1)
        figures = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:14}" + "  ".join(f"{k} {v:,.3f}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    main()

"""How fast a writer takes scalars, small tensors and large ones, and with how much memory.

Data: seeded. Each case is a child process. Times run from `create_run` to the end of `close`,
which syncs to the disk; for streams also to the end of `flush`, as other writers count.
``python benchmarks/bench_writing.py [CASE ...] [--quick]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import tensorstore_fmt as tsf


def peak_mb() -> float:
    """Give the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def on_disk(folder: Path) -> int:
    """Give the bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def scalars(folder: Path, *, quick: bool) -> dict[str, float]:
    """1,000,000 points in dicts of ten: points a second, bytes against the raw values."""
    steps = 10_000 if quick else 100_000
    values = np.random.default_rng(0).standard_normal((steps, 10)).tolist()
    names = [f"metric/{i}" for i in range(10)]
    begin = time.perf_counter()
    with tsf.create_run(folder) as run:
        for step in range(steps):
            run.log(dict(zip(names, values[step], strict=True)), step=step)
        logged = time.perf_counter() - begin
    seconds = time.perf_counter() - begin
    points = steps * 10
    return {
        "points_per_s": points / seconds,
        "log_us_per_call": logged / steps * 1e6,
        "disk_over_raw": on_disk(folder) / (points * 8),
    }


def small(folder: Path, *, quick: bool) -> dict[str, float]:
    """20 tensors of 4 KiB at each of many steps: microseconds a tensor, all in."""
    steps = 100 if quick else 1500
    data = np.random.default_rng(0).standard_normal((20, 64, 16)).astype("f4")
    tensors = {f"layer{i}/weight": data[i] for i in range(20)}
    begin = time.perf_counter()
    with tsf.create_run(folder) as run:
        for step in range(steps):
            data += np.float32(1e-3)
            run.log(tensors, step=step)
    seconds = time.perf_counter() - begin
    return {"us_per_tensor": seconds / (20 * steps) * 1e6, "files": len(list(folder.rglob("*")))}


def _stream(folder: Path, *, quick: bool, **options: object) -> dict[str, float]:
    total = 100_000_000 if quick else 1_000_000_000
    rng = np.random.default_rng(0)
    sizes = [1, 2, 4, 8, 16]
    tensors = {
        f"w{mb}": (rng.standard_normal((mb * 256, 1024)) * 0.02).astype("f4") for mb in sizes
    }
    a_step = sum(t.nbytes for t in tensors.values())
    tsf.create_run(f"memory://{folder.name}").close()  # so that all imports are done
    idle = peak_mb()
    steps = max(1, round(total / a_step))
    for tensor in tensors.values():
        np.copyto(np.empty_like(tensor), tensor)
    begin = time.perf_counter()
    run = tsf.create_run(folder, **options)
    for step in range(steps):
        for tensor in tensors.values():
            tensor[:, 0] += np.float32(1e-4)
        run.log(tensors, step=step)
    run.flush()
    seconds = time.perf_counter() - begin
    report = run.close()
    durable = time.perf_counter() - begin
    peak = peak_mb() - idle
    begin = time.perf_counter()
    for step in range(steps):
        for name, tensor in tensors.items():
            np.save(folder / f"{name}-{step}.npy", tensor)
    npy = time.perf_counter() - begin
    return {
        "gb_per_s": steps * a_step / seconds / 1e9,
        "times_np_save": npy / seconds,
        "gb_per_s_synced": steps * a_step / durable / 1e9,
        "ratio": report.raw_nbytes / report.stored_nbytes,
        "mb_over_imports": peak,
        "stalled_s": report.stalled_s,
        "seconds": seconds,
    }


def stream_auto(folder: Path, *, quick: bool) -> dict[str, float]:
    """1 GB of f32 tensors of 1 to 16 MB, compression auto, statistics on."""
    return _stream(folder, quick=quick)


def stream_none(folder: Path, *, quick: bool) -> dict[str, float]:
    """The same, stored raw, statistics on."""
    return _stream(folder, quick=quick, compression="none")


def stream_none_bare(folder: Path, *, quick: bool) -> dict[str, float]:
    """The same, stored raw, without statistics."""
    return _stream(folder, quick=quick, compression="none", stats=False)


def flushes(folder: Path, *, quick: bool) -> dict[str, float]:
    """Many flushes of 1,000 names: milliseconds a flush, live index files at the end."""
    count = 100 if quick else 10_000
    names = [f"layer{i // 10:03d}/{i % 10}" for i in range(1000)]
    values = np.random.default_rng(0).standard_normal(1000).tolist()
    data = dict(zip(names, values, strict=True))
    run = tsf.create_run(folder, flush_interval_s=3600)
    begin = time.perf_counter()
    for step in range(count):
        run.log(data, step=step)
        run.flush()
    seconds = time.perf_counter() - begin
    live = len(run._segments.segments)
    index_mb = on_disk(folder) / 1e6
    run.close()
    return {"ms_per_flush": seconds / count * 1e3, "live_segments": live, "index_mb": index_mb}


CASES = {
    case.__name__: case
    for case in (scalars, small, stream_auto, stream_none, stream_none_bare, flushes)
}


def main() -> None:
    """Run cases in child processes and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="run folder of a single case, kept afterwards")
    args = parser.parse_args()
    if args.child:
        folder = args.keep or Path(tempfile.mkdtemp(prefix="tsf-bench-")) / "run"
        try:
            print(json.dumps(CASES[args.cases[0]](folder, quick=args.quick)))
        finally:
            if args.keep is None:
                shutil.rmtree(folder.parent, ignore_errors=True)
        return
    for name in args.cases or CASES:
        command = [sys.executable, __file__, name, "--child"] + ["--quick"] * args.quick
        if args.keep:
            command += ["--keep", str(args.keep)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            sys.exit(1)
        figures = json.loads(done.stdout)
        print(f"{name:18}" + "  ".join(f"{k} {v:,.3f}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    main()

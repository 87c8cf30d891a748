"""Say how small and how fast codec and statistics are, one thread, seeded kinds of data.

Warm cache, no I/O: each kind is cut into 256 KiB chunks that fit the caches together with
nothing else. Everything is done with the compiled kernel, if there is one, and with NumPy.
Machines differ and swing, so each time is given as a multiple of the time that ``np.copyto`` of
the same bytes took just before: the median over repeats in which all take their turns.

    python benchmarks/bench_codec.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics as averages
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.format import codec, kernel, layout, planes, sampling, statistics

Bytes = NDArray[np.uint8]

CHUNK_NBYTES = 256 * 1024


def kinds(nbytes: int) -> dict[str, tuple[str, NDArray[Any]]]:
    """Give arrays of about `nbytes` bytes with their dtype names, by kind."""
    rng = np.random.default_rng(7)
    n = nbytes // 4
    weights = (rng.standard_normal(n) * 0.02).astype(np.float32)
    logits = rng.standard_normal((n // 128, 128), np.float32) * 2
    attention = np.exp(logits - logits.max(axis=1, keepdims=True))
    attention /= attention.sum(axis=1, keepdims=True)
    # A moving average of squares whose scale differs from row to row, as in Adam.
    scales = np.exp(rng.standard_normal((n // 128, 1)) * 2).astype(np.float32)
    gradient = rng.standard_normal((n // 128, 128), np.float32) * 1e-4 * scales
    ids = rng.zipf(1.3, n // 2) % 50_000
    return {
        "f32 weights": ("float32", weights),
        "bf16 weights": ("bfloat16", np.tile(weights, 2).astype(ml_dtypes.bfloat16)),
        "f16 weights": ("float16", np.tile(weights, 2).astype(np.float16)),
        "f64 weights": ("float64", weights[: n // 2].astype(np.float64) * np.pi),
        "f32 softmax attention": ("float32", attention),
        "f32 ReLU output": ("float32", np.maximum(logits - 1.5, 0)),
        "f32 second moment": ("float32", gradient**2),
        "f8 weights": ("float8_e4m3fn", np.tile(weights * 50, 4).astype(ml_dtypes.float8_e4m3fn)),
        "i64 ids": ("int64", ids.astype(np.int64)),
        "i32 ids": ("int32", np.tile(ids, 2).astype(np.int32)),
        "bool mask": ("bool", rng.random(4 * n) < 0.1),
        "f32 noise": ("float32", rng.integers(0, 2**32, n, np.uint32).view(np.float32)),
        "f32 zeros": ("float32", np.zeros(n, np.float32)),
    }


@contextmanager
def using(which: kernel.Kernel | None) -> Iterator[None]:
    """Let the package use this kernel, or NumPy if it is none."""
    before, kernel.active = kernel.active, which
    try:
        yield
    finally:
        kernel.active = before


def in_turns(
    copying: Callable[[], object], actions: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
    """Give how many times slower than copying each action is, done by either implementation.

    The keys are those of the actions, with ``kernel`` or ``numpy`` before them.
    """
    both = {"numpy": None} | ({"kernel": kernel.active} if kernel.active is not None else {})
    ratios: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        for name, which in both.items():
            for title, action in actions.items():
                with using(which):
                    start = time.perf_counter()
                    copying()
                    between = time.perf_counter()
                    action()
                    end = time.perf_counter()
                if repeat:  # the first warms up
                    key = f"{name} {title}"
                    ratios.setdefault(key, []).append((end - between) / (between - start))
    return {key: averages.median(found) for key, found in ratios.items()}


def line(name: str, left: str, found: dict[str, float], titles: list[str], right: str) -> None:
    """Print one row: NumPy's columns, then the kernel's."""
    cells = [found.get(f"{who} {title}") for who in ("numpy", "kernel") for title in titles]
    text = "".join(f"{'-':>8}" if cell is None else f"{cell:8.1f}" for cell in cells)
    print(f"{name:23}{left:>8} {text}  {right}".rstrip())


def head(title: str, left: str, titles: list[str]) -> None:
    """Print the two lines above a table."""
    width = 8 * len(titles)
    print(f"{title:23}{'':8} {'NumPy':>{width}}{'kernel':>{width}}")
    print(f"{'':23}{left:>8} " + "".join(f"{t:>8}" for t in titles * 2))


def copy(chunks: list[Bytes], out: Bytes) -> None:
    """Do the least anybody could."""
    for chunk in chunks:
        np.copyto(out[: len(chunk)], chunk)


def encode(
    encoder: codec.Encoder, chunks: list[Bytes], dtype: str, hint: sampling.Hint
) -> list[codec.Encoded]:
    """Encode all chunks of a series."""
    return [encoder.encode(chunk, dtype=dtype, hint=hint) for chunk in chunks]


def decode(
    payloads: list[bytes], encoded: list[codec.Encoded], chunks: list[Bytes], dtype: str, out: Bytes
) -> None:
    """Decode all chunks, each over the one before."""
    for payload, one, chunk in zip(payloads, encoded, chunks, strict=True):
        codec.decode(payload, out[: len(chunk)], codec=one.codec, dtype=dtype)


def show_codec(nbytes: int, repeats: int) -> None:
    """Encode, decode and look at each kind of data."""
    titles = ["encode", "decode", "stats"]
    head("times slower than a copy", "ratio", titles)
    for kind, (dtype, array) in kinds(nbytes).items():
        flat = array.reshape(-1).view(np.uint8)
        chunks = [flat[at : at + CHUNK_NBYTES] for at in range(0, flat.nbytes, CHUNK_NBYTES)]
        encoder, hint, out = codec.Encoder(), sampling.Hint(), np.empty(CHUNK_NBYTES, np.uint8)
        encoded = encode(encoder, chunks, dtype, hint)
        payloads = [one.to_bytes() for one in encoded]
        actions: dict[str, Callable[[], object]] = {
            "encode": partial(encode, encoder, chunks, dtype, hint),
            "decode": partial(decode, payloads, encoded, chunks, dtype, out),
        }
        if statistics.supports(dtype):
            actions["stats"] = partial(statistics.compute, array, dtype=dtype)
        found = in_turns(partial(copy, chunks, out), actions, repeats)
        ratio = flat.nbytes / sum(map(len, payloads))
        names = sorted({layout.CODEC_NAMES[one.codec] for one in encoded})
        line(kind, f"{ratio:.3f}", found, titles, " ".join(names))


def show_planes(nbytes: int, repeats: int) -> None:
    """Cut and join alone, which is what the kernel is for; one chunk over and over."""
    titles = ["split", "join"]
    print()
    head("times slower than a copy", "", titles)
    chunk = np.random.default_rng(7).integers(0, 256, CHUNK_NBYTES, np.uint8)
    out = np.empty_like(chunk)
    rounds = nbytes // CHUNK_NBYTES
    for w in (1, 2, 4, 8):
        cut = list(np.empty((w, CHUNK_NBYTES // w), np.uint8))
        for rotated in (False, True):
            actions: dict[str, Callable[[], object]] = {
                "split": partial(again, rounds, partial(planes.split, chunk, cut, rotated=rotated)),
                "join": partial(again, rounds, partial(planes.join, cut, out, rotated=rotated)),
            }
            copying = partial(again, rounds, partial(np.copyto, out, chunk))
            found = in_turns(copying, actions, repeats)
            line(f"words of {w} bytes", "rotated" if rotated else "", found, titles, "")


def again(rounds: int, action: Callable[[], object]) -> None:
    """Do it several times."""
    for _ in range(rounds):
        action()


def main() -> None:
    """Print one line for each kind of data, and for each width of words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once, little data: a smoke test")
    quick = parser.parse_args().quick
    nbytes = 1 << 20 if quick else 8 << 20
    repeats = 1 if quick else 9
    found = kernel.describe()
    print(f"kernel: {found['compiler'] or found['why']}\n")
    show_codec(nbytes, repeats)
    show_planes(nbytes, repeats)


if __name__ == "__main__":
    main()

"""Say how small and how fast codec and statistics are, one thread, seeded kinds of data.

Warm cache, no I/O: each kind is cut into 256 KiB chunks that fit the caches together with
nothing else. Machines differ and swing, so the columns to compare are the ratios against
``np.copyto`` of the same bytes in the same run.

    python benchmarks/bench_codec.py [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.format import codec, layout, statistics

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


def best_s(action: Callable[[], object], repeats: int) -> float:
    """Give the time of the fastest of some runs."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def copy(chunks: list[Bytes], out: Bytes) -> None:
    """Do the least anybody could."""
    for chunk in chunks:
        np.copyto(out[: len(chunk)], chunk)


def encode(
    encoder: codec.Encoder, chunks: list[Bytes], dtype: str, hint: codec.Hint
) -> list[codec.Encoded]:
    """Encode all chunks of a series."""
    return [encoder.encode(chunk, dtype=dtype, hint=hint) for chunk in chunks]


def decode(
    payloads: list[bytes], encoded: list[codec.Encoded], chunks: list[Bytes], dtype: str, out: Bytes
) -> None:
    """Decode all chunks, each over the one before."""
    for payload, one, chunk in zip(payloads, encoded, chunks, strict=True):
        codec.decode(payload, out[: len(chunk)], codec=one.codec, dtype=dtype)


def main() -> None:
    """Print one line for each kind of data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once, little data: a smoke test")
    quick = parser.parse_args().quick
    nbytes = 1 << 20 if quick else 8 << 20
    repeats = 1 if quick else 5
    print(f"{'':23}{'':9}{'GB/s':^27}{'times slower than a copy':^27}")
    print(f"{'kind':23}{'ratio':>8} {'encode':>9}{'decode':>9}{'stats':>9}"
          f"{'encode':>9}{'decode':>9}{'stats':>9}  codec")  # fmt: skip
    for kind, (dtype, array) in kinds(nbytes).items():
        flat = array.reshape(-1).view(np.uint8)
        chunks = [flat[at : at + CHUNK_NBYTES] for at in range(0, flat.nbytes, CHUNK_NBYTES)]
        encoder, hint, out = codec.Encoder(), codec.Hint(), np.empty(CHUNK_NBYTES, np.uint8)

        encoded = encode(encoder, chunks, dtype, hint)
        payloads = [one.to_bytes() for one in encoded]
        copy_s = best_s(partial(copy, chunks, out), repeats)
        encode_s = best_s(partial(encode, encoder, chunks, dtype, hint), repeats)
        decode_s = best_s(partial(decode, payloads, encoded, chunks, dtype, out), repeats)
        stats_s = float("nan")
        if statistics.supports(dtype):
            stats_s = best_s(partial(statistics.compute, array, dtype=dtype), repeats)
        ratio = flat.nbytes / sum(map(len, payloads))
        names = sorted({layout.CODEC_NAMES[one.codec] for one in encoded})
        times = [flat.nbytes / s / 1e9 for s in (encode_s, decode_s, stats_s)]
        times += [s / copy_s for s in (encode_s, decode_s, stats_s)]
        print(f"{kind:23}{ratio:8.3f} " + "".join(f"{t:9.2f}" for t in times) + f"  {names}")


if __name__ == "__main__":
    main()

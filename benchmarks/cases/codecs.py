"""Case 4: how small and how fast, for each kind of tensor; chunks in memory, one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import ClassVar

import numpy as np

import datasets
from peers import known
from peers.codecs import Blosc2Zstd5, PcodecLarge, ZipNN, Zstd3
from peers.ours import OursCodec, OursCodecNumPy
from suite import dots
from suite.case import Case, Figures, Place, Table, Verdict
from suite.contestant import Codec, Contestant, Encoded

NBYTES = 4 << 20  # of each kind
QUICK_NBYTES = 1 << 20
PASSES = 3
FIGURES = {"ratio": "Ratio", "encode": "Encoding, GB/s", "decode": "Decoding, GB/s"}
LEAST = {"transformer_weights_bf16": 1.48, "transformer_weights_f32": 1.20}


def spread_chunks(kind: str, chunk_nbytes: int, *, quick: bool) -> list[np.ndarray]:
    """Take chunks, as copies, from places that are spread evenly over all tensors of a kind."""
    tensors = datasets.load(kind, quick=quick)
    flat = tensors.reshape(-1)
    length = min(chunk_nbytes // flat.itemsize, flat.size)
    count = flat.size // length
    wanted = min(count, max(1, (QUICK_NBYTES if quick else NBYTES) // chunk_nbytes))
    starts = [count * i // wanted * length for i in range(wanted)]
    return [flat[start : start + length].copy() for start in starts]


def _as_bytes(encoded: Encoded) -> bytes:
    return (
        bytes(encoded)
        if isinstance(encoded, (bytes, bytearray, memoryview))
        else (encoded.to_bytes())
    )


def _measure(codec: Codec, kind: datasets.Kind, *, quick: bool) -> dict[str, float]:
    """Give ratio, seconds to encode and to decode, and bytes, of one kind."""
    chunks = spread_chunks(kind.name, codec.chunk_nbytes, quick=quick)
    nbytes = sum(chunk.nbytes for chunk in chunks)
    codec.begin()
    stored = [_as_bytes(codec.encode(chunk.copy(), kind.dtype)) for chunk in chunks]
    for chunk, data in zip(chunks, stored, strict=True):
        if codec.decode(data, chunk, kind.dtype).tobytes() != chunk.tobytes():
            raise RuntimeError(f"{codec.name}: a chunk of {kind.name} came back otherwise")
    passes = range(1 if quick else PASSES)
    encode_s = [_encode_times(codec, chunks, kind.dtype) for _ in passes]
    decode_s = [_decode_times(codec, chunks, stored, kind.dtype) for _ in passes]
    return {
        "nbytes": nbytes,
        "stored": sum(map(len, stored)),
        "encode_s": float(np.min(encode_s, axis=0).sum()),
        "decode_s": float(np.min(decode_s, axis=0).sum()),
    }


def _encode_times(codec: Codec, chunks: Sequence[np.ndarray], dtype: str) -> list[float]:
    times = []
    for copy in [chunk.copy() for chunk in chunks]:
        begin = time.perf_counter()
        codec.encode(copy, dtype)
        times.append(time.perf_counter() - begin)
    return times


def _decode_times(
    codec: Codec, chunks: Sequence[np.ndarray], stored: Sequence[bytes], dtype: str
) -> list[float]:
    times = []
    for chunk, data in zip(chunks, stored, strict=True):
        begin = time.perf_counter()
        codec.decode(data, chunk, dtype)
        times.append(time.perf_counter() - begin)
    return times


class Codecs(Case):
    """One trial has all kinds for one codec; figures end in the name of the kind."""

    number: ClassVar[int] = 4
    cache = "none"
    name = "codecs"
    question = "How small does each kind of tensor get, and how fast, on one thread?"
    data = (
        "4 MiB of each kind in chunks of 256 KiB, from places spread over all its tensors, in "
        "memory; each codec's output was decoded and compared before the clock started; a chunk's "
        "time is the least of three passes"
    )
    unit = "encode_gb_per_second"
    least_is_best = False

    def contestants(self) -> Sequence[type[Contestant]]:
        return [OursCodec, OursCodecNumPy, *known.codecs()]

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        assert isinstance(contestant, Codec)
        figures: Figures = {}
        totals = dict.fromkeys(("nbytes", "stored", "encode_s", "decode_s"), 0.0)
        for kind in datasets.KINDS:
            if not contestant.takes(kind.dtype):
                continue
            found = _measure(contestant, kind, quick=place.quick)
            figures[f"ratio {kind.name}"] = found["nbytes"] / found["stored"]
            for what in ("encode", "decode"):
                figures[f"{what} {kind.name}"] = found["nbytes"] / found[f"{what}_s"] / 1e9
            for key, value in found.items():
                totals[key] += value
        figures["ratio"] = totals["nbytes"] / totals["stored"]
        for what in ("encode", "decode"):
            figures[f"{what}_gb_per_second"] = totals["nbytes"] / totals[f"{what}_s"] / 1e9
        return figures

    # --- what is shown ----------------------------------------------------------

    def rows(self, table: Table) -> list[str]:
        """Give a table of kinds and codecs for each figure."""
        names = [c.name for c in self.contestants() if c.name in table.trials]
        lines: list[str] = []
        for figure, title in FIGURES.items():
            heads = [name.replace("-codec", "") for name in names]
            lines += ["", f"| {title} | {' | '.join(heads)} |", "|---" * (len(names) + 1) + "|"]
            for kind in datasets.KINDS:
                values = [table.median(name, f"{figure} {kind.name}") for name in names]
                best = max((v for v in values if v is not None), default=None)
                digits = 3 if figure == "ratio" else 2
                cells = [_cell(value, digits, is_best=value == best) for value in values]
                lines.append(f"| {kind.name} | {' | '.join(cells)} |")
        return [*lines, ""]

    def draw(self, table: Table, path: Path) -> None:
        """Draw a dot for each codec and kind, in three columns."""
        kinds = [kind.name for kind in datasets.KINDS]
        names = [c.name for c in self.contestants()]
        dots.draw(table, path, kinds, names, FIGURES, title=self.question, relative="ratio")

    # --- what must hold ---------------------------------------------------------

    def judge(self, table: Table) -> list[Verdict]:
        kinds = [kind.name for kind in datasets.KINDS]
        verdicts = [self._ratios(table, kinds)]
        for kind, least in LEAST.items():
            found = table.median(OursCodec.name, f"ratio {kind}")
            must = f"ratio of {kind} ≥ {least:.2f}"
            measured = "not measured" if found is None else f"{found:.3f}"
            verdicts.append(Verdict(must, measured, None if found is None else found >= least))
        for rival, what, factor in (
            (Blosc2Zstd5, "encode", 3.0),
            (ZipNN, "encode", 2.0),
            (ZipNN, "decode", 0.7),
        ):
            verb = {"encode": "encodes", "decode": "decodes"}[what]
            must = f"{verb} every kind ≥ {factor:g} × as fast as {rival.name}"
            speeds = partial(_speed, table, rival, what)
            verdicts.append(_worst(must, kinds, speeds, factor))
        return verdicts

    def _ratios(self, table: Table, kinds: Sequence[str]) -> Verdict:
        must = f"ratio of every kind ≥ the better of {Zstd3.name} and blosc2 zstd 5 − 1 %"

        def relative(kind: str) -> float | None:
            figure = f"ratio {kind}"
            own = table.median(OursCodec.name, figure)
            others = [table.median(rival.name, figure) for rival in (Zstd3, Blosc2Zstd5)]
            known_others = [value for value in others if value is not None]
            return own / max(known_others) if own and known_others else None

        verdict = _worst(must, kinds, relative, 0.99)
        behind = _behind(table, kinds)
        if verdict.is_met is None or not behind:
            return verdict
        return Verdict(must, f"{verdict.measured}; pcodec 8 is better at {behind}", verdict.is_met)


def _behind(table: Table, kinds: Sequence[str]) -> str:
    """Name the kinds at which pcodec, the aim, has a ratio better by more than 1 %."""
    found = []
    for kind in kinds:
        ratio = table.ratio(OursCodec.name, PcodecLarge.name, f"ratio {kind}")
        if ratio is not None and ratio < 0.99:
            found.append(f"{kind} ({ratio:.2f} ×)")
    return ", ".join(found)


def _speed(table: Table, rival: type[Codec], what: str, kind: str) -> float | None:
    return table.ratio(OursCodec.name, rival.name, f"{what} {kind}")


def _worst(
    must: str, kinds: Sequence[str], relative: Callable[[str], float | None], least: float
) -> Verdict:
    """Judge the kind with the least ratio, and name all that miss."""
    found = {kind: value for kind in kinds if (value := relative(kind)) is not None}
    if not found:
        return Verdict(must, "not measured", None)
    worst = min(found, key=found.__getitem__)
    measured = f"{median(found.values()):.2f} × in the middle, least {found[worst]:.3f} ({worst})"
    missed = [f"{kind} {value:.2f}" for kind, value in found.items() if value < least]
    if missed:
        measured += f"; below: {', '.join(missed)}"
    return Verdict(must, measured, not missed)


def _cell(value: float | None, digits: int, *, is_best: bool) -> str:
    if value is None:
        return "–"
    text = f"{value:.{digits}f}" if value < 100 else f"{value:.0f}"
    return f"**{text}**" if is_best else text


CASES: list[Case] = [Codecs()]

"""Sampling: what is worth compressing, and how, found out from a part of a chunk now and then.

A run of bytes (a chunk, or one of its planes) has a *setting*: how it is stored. `choose` tries
them on a sample; a `Hint` remembers for a series what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import zstandard
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import layout, planes

__all__ = ["LEVEL_3", "RAW", "Choice", "Compressors", "Hint", "choose", "compressors"]

_Bytes = NDArray[np.uint8]

Compressors = Mapping[int, zstandard.ZstdCompressor]
"""What compresses, by setting; `RAW` has none."""

# --- settings -------------------------------------------------------------------
RAW: Final = 0
_ENTROPY: Final = 1  # zstd for exponents: nothing to match, only entropy
_LEVEL_1: Final = 2
LEVEL_3: Final = 3

_ENTROPY_PARAMETERS: Final = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    window_log=17,
    search_log=1,
    target_length=0,
)


def compressors() -> Compressors:
    """Give new compressors, for one thread."""
    return {
        _ENTROPY: zstandard.ZstdCompressor(compression_params=_ENTROPY_PARAMETERS),
        _LEVEL_1: zstandard.ZstdCompressor(level=1),
        LEVEL_3: zstandard.ZstdCompressor(level=3),
    }


# --- what a sample looks like, and what pays ------------------------------------
_WHOLE_SAMPLE_NBYTES: Final = 64 * 1024
_PLANE_SAMPLE_WORDS: Final = 8192
_STRETCHES: Final = 4

# A slower setting has to save this fraction of its bytes more than the next faster one.
_PAYS: Final = {_ENTROPY: 1 / 64, _LEVEL_1: 1 / 64, LEVEL_3: 1 / 64}
_WHOLE_PAYS: Final = 0.97
_ROTATION_PAYS: Final = 0.995  # it costs a tenth of the time to encode, more to decode

_FIRST_INTERVAL_NBYTES: Final = 32 * 1024 * 1024
_LAST_INTERVAL_NBYTES: Final = 256 * 1024 * 1024
_DRIFT: Final = 0.05
_DRIFT_CHUNKS: Final = 16
_GROWTH: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a sample said: codec, and a setting for the whole chunk or for each plane."""

    codec: int
    settings: tuple[int, ...]
    rotated: bool
    expected: float
    sampled_nbytes: int

    def agrees(self, other: Choice) -> bool:
        """Say whether both store chunks in the same way."""
        return (self.codec, self.settings, self.rotated) == (
            other.codec,
            other.settings,
            other.rotated,
        )


class Hint:
    """What was learned from earlier chunks of a series, so that sampling is rare.

    The caller keeps one per series and passes it to each `Encoder.encode`. A sample is taken
    at the first chunk, then every 32 MiB, at most twice as rarely each time it says the
    same again (up to 256 MiB), when chunks become much larger, and when what was
    achieved drifts from what the sample promised. Several threads may use one: a race
    costs or saves a sample, never correctness.
    """

    __slots__ = ("_choice", "_chunks", "_interval", "_nbytes")

    def __init__(self) -> None:
        self._choice: Choice | None = None
        self._interval = _FIRST_INTERVAL_NBYTES
        self._nbytes = 0
        self._chunks = 0

    def usable(self, nbytes: int, nsettings: int) -> Choice | None:
        """Give what was chosen, if that will do for a chunk of words of so many bytes."""
        choice = self._choice
        if (
            choice is None
            or self._nbytes >= self._interval
            or nbytes >= _GROWTH * choice.sampled_nbytes
            or (choice.codec == layout.CODEC_PLANES and len(choice.settings) != nsettings)
        ):
            return None
        return choice

    def learn(self, choice: Choice) -> None:
        """Take what a new sample said."""
        same = self._choice is not None and self._choice.agrees(choice)
        self._interval = (
            min(2 * self._interval, _LAST_INTERVAL_NBYTES) if same else _FIRST_INTERVAL_NBYTES
        )
        self._choice = choice
        self._nbytes = self._chunks = 0

    def note(self, nbytes: int, stored: int) -> None:
        """Take how many bytes of a chunk were left."""
        self._nbytes += nbytes
        self._chunks += 1
        choice = self._choice
        if (
            choice is not None
            and self._chunks >= _DRIFT_CHUNKS
            and abs(stored / nbytes - choice.expected) > _DRIFT
        ):
            self._nbytes = self._interval


# --- choosing -------------------------------------------------------------------


def choose(raw: _Bytes, dtype: str, zstd: Compressors) -> Choice:
    """Choose codec and settings from samples of a chunk."""
    size, w = dtypes.itemsize(dtype), dtypes.word_nbytes(dtype)
    best = Choice(
        codec=layout.CODEC_RAW,
        settings=(),
        rotated=False,
        expected=1 - _PAYS[_ENTROPY],  # what anything else has to beat
        sampled_nbytes=raw.nbytes,
    )
    if w > 1:
        sample = _sample(raw, size)
        is_float = not dtypes.is_integer(dtype)
        for rotated in (False, True) if is_float else (False,):
            settings, expected = _of_planes(sample, w, zstd, rotated=rotated)
            expected += (layout.PLANES_HEADER_NBYTES + 4 * w) / raw.nbytes
            if expected < best.expected * (_ROTATION_PAYS if rotated else 1):
                best = Choice(
                    codec=layout.CODEC_PLANES,
                    settings=settings,
                    rotated=rotated,
                    expected=expected,
                    sampled_nbytes=raw.nbytes,
                )
    # The middle: chunks often begin and end with padding.
    middle = max(0, (raw.nbytes - _WHOLE_SAMPLE_NBYTES) // 2)
    whole = raw[middle : middle + _WHOLE_SAMPLE_NBYTES]
    tried = (_ENTROPY, _LEVEL_1, LEVEL_3) if w == 1 else (_LEVEL_1, LEVEL_3)
    setting, expected = _of_run(whole, tried, zstd)
    if expected < best.expected * _WHOLE_PAYS:
        best = Choice(
            codec=layout.CODEC_ZSTD,
            settings=(setting,),
            rotated=False,
            expected=expected,
            sampled_nbytes=raw.nbytes,
        )
    return best


def _of_planes(
    sample: _Bytes, w: int, zstd: Compressors, *, rotated: bool
) -> tuple[tuple[int, ...], float]:
    """Choose for each plane of a sample; give the fraction of the whole that remains."""
    n = len(sample) // w
    cut = list(np.empty((w, n), np.uint8))
    planes.split(sample, cut, rotated=rotated)
    chosen = [_of_run(plane, (_ENTROPY, _LEVEL_1, LEVEL_3), zstd) for plane in cut]
    settings = tuple(setting for setting, _ in chosen)
    if not any(settings):
        return settings, 1.0
    return settings, sum(expected for _, expected in chosen) / w


def _of_run(run: _Bytes, settings: tuple[int, ...], zstd: Compressors) -> tuple[int, float]:
    """Choose how to store a run of bytes; give the fraction of it that remains."""
    best, remains = RAW, 1.0
    for setting in settings:
        fraction = len(zstd[setting].compress(run.data)) / len(run)
        if fraction < remains - _PAYS[setting]:
            best, remains = setting, fraction
    return best, remains


def _sample(raw: _Bytes, size: int) -> _Bytes:
    """Take whole elements from a few places of a chunk."""
    count = len(raw) // size
    if count <= _PLANE_SAMPLE_WORDS:
        return raw
    stretch = _PLANE_SAMPLE_WORDS // _STRETCHES
    starts = [(count - stretch) * i // (_STRETCHES - 1) for i in range(_STRETCHES)]
    return np.concatenate([raw[s * size : (s + stretch) * size] for s in starts])

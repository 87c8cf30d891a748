"""Sampling: what is worth compressing, and how, found out from a part of a chunk now and then.

A run of bytes (a chunk, or one of its planes) has a *setting*: how it is stored. `choose` tries
them on a sample; a `Hint` remembers for a series what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.format import layout, planes

__all__ = ["LEVEL_3", "RAW", "Choice", "Compressors", "Hint", "Sample", "choose", "compressors"]

_Bytes = NDArray[np.uint8]

Compressors = Mapping[int, zstandard.ZstdCompressor]
"""What compresses, by setting; `RAW` has none."""

# --- settings -------------------------------------------------------------------
RAW: Final = 0
_ENTROPY: Final = 1  # zstd for exponents: nothing to match, only entropy
_ENTROPY_8K: Final = 2  # the same with a table for each 8 KiB: for what changes within a chunk
_LEVEL_1: Final = 3
LEVEL_3: Final = 4
_LEVEL_3_8K: Final = 5
_LEVEL_4: Final = 6
_LAZY: Final = 7  # a better match may follow, in tables that stay in the first cache


def _parameters(
    strategy: int, *, logs: int, window_log: int
) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(
        strategy=strategy,
        min_match=6 if strategy == zstandard.STRATEGY_LAZY else 7,
        hash_log=logs,
        chain_log=logs,
        window_log=window_log,
        search_log=1,
        target_length=0,
    )


def compressors() -> Compressors:
    """Give new compressors, for one thread."""
    fast, lazy = zstandard.STRATEGY_FAST, zstandard.STRATEGY_LAZY
    of_level = zstandard.ZstdCompressionParameters.from_level
    parameters = {
        _ENTROPY: _parameters(fast, logs=6, window_log=17),
        _ENTROPY_8K: _parameters(fast, logs=6, window_log=13),
        _LEVEL_3_8K: of_level(3, source_size=64 * 1024, window_log=13),
        _LEVEL_4: of_level(4, source_size=64 * 1024),
        _LAZY: _parameters(lazy, logs=10, window_log=14),
    }
    levels = {_LEVEL_1: 1, LEVEL_3: 3}
    return {
        **{n: zstandard.ZstdCompressor(compression_params=of) for n, of in parameters.items()},
        **{n: zstandard.ZstdCompressor(level=level) for n, level in levels.items()},
    }


# --- what a sample looks like, and what pays ------------------------------------
_STRETCH_NBYTES: Final = 32 * 1024  # shorter, and nothing is found twice that is
_STRETCHES: Final = 4

# From fast to slow. Of whole chunks only what encodes them fast enough is tried.
_FAST_OF_PLANES: Final = (_ENTROPY, _ENTROPY_8K, _LEVEL_1)
_SLOW_OF_PLANES: Final = (LEVEL_3, _LEVEL_3_8K, _LEVEL_4)
_OF_BYTES: Final = (_ENTROPY, _ENTROPY_8K, _LEVEL_1, LEVEL_3, _LAZY)

# A slower setting has to save this fraction of what the faster ones leave.
_PAYS: Final = {
    RAW: 0,
    _ENTROPY: 1 / 64,
    _ENTROPY_8K: 1 / 64,
    _LEVEL_1: 1 / 64,
    LEVEL_3: 1 / 128,
    _LEVEL_3_8K: 1 / 64,
    _LEVEL_4: 1 / 128,
    _LAZY: 1 / 16,
}
_NOISE: Final = 0.98  # what is left of bytes that no setting makes smaller
_HOPELESS: Final = 1.05  # a level that leaves so much more than the best: nor do those above it
_FAR: Final = 0.85  # words that leave so much less than planes will not be beaten by them
_REPEATS: Final = 0.7  # if level 1 leaves less of words, higher levels may find much more
_WHOLE_PAYS: Final = 0.98
_WHOLE_FOR_SPARSE: Final = 1.05  # one frame is made and read faster than words without zeros
_ROTATION_PAYS: Final = 0.997  # it costs a tenth of the time to encode, more to decode
_SPARSE_PAYS: Final = 0.98
_LEAST_ZEROS: Final = 1 / 16  # of the words: with fewer a map takes what leaving them out gives

_FIRST_INTERVAL_NBYTES: Final = 32 * 1024 * 1024
_LAST_INTERVAL_NBYTES: Final = 256 * 1024 * 1024
_DRIFT: Final = 0.05
_DRIFT_WEIGHT: Final = 1 / 8  # of a chunk in the mean that drifts: single ones may be unlike others
_DRIFT_CHUNKS: Final = 4
_MOST_DRIFT_CHUNKS: Final = 64
_SAMPLES: Final = 3  # that count together: the first chunk alone may be unlike the others
_FIRST_PAUSE: Final = 2  # chunks between the first samples
_FIRST_PAUSE_NBYTES: Final = 2 * 1024 * 1024  # a sample costs as much as encoding 1 MiB
_GROWTH: Final = 4


_PLAIN: Final = 0
_ROTATED: Final = layout.PLANES_ROTATED
_WIDE: Final = layout.PLANES_WIDE
_SPARSE: Final = 4

_Run = tuple[int, int]  # how words are cut, and number of the plane; that of a map is w
Sample = Mapping[_Run, Mapping[int, float]]
"""What is left of each run, by setting: of those that were worth trying.

As a fraction of a plane of all words, or of the whole chunk.
"""

_WHOLE: Final = (_PLAIN, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What samples said: codec, and a setting for the whole chunk or for each plane (and a map)."""

    codec: int
    settings: tuple[int, ...]
    flags: int
    word_nbytes: int
    expected: float
    sampled_nbytes: int
    samples: tuple[Sample, ...]

    def agrees(self, other: Choice) -> bool:
        """Say whether both store chunks in the same way."""
        return (self.codec, self.settings, self.flags) == (
            other.codec,
            other.settings,
            other.flags,
        )


class Hint:
    """What was learned from earlier chunks of a series, so that sampling is rare.

    The caller keeps one per series and passes it to each `Encoder.encode`. A sample is taken
    at the first chunk and twice in the next 6 MiB, which count together, then every 32 MiB, at most
    twice as rarely each time it says the same again (up to 256 MiB), when chunks become much
    larger, and, with growing patience, when the moving mean of what is achieved drifts from what
    was promised.
    Several threads may use one: a race costs or saves a sample, never correctness.
    """

    __slots__ = (
        "_choice", "_chunks", "_has_drifted", "_interval", "_nbytes", "_patience", "_remains"
    )  # fmt: skip

    def __init__(self) -> None:
        self._choice: Choice | None = None
        self._interval = _FIRST_INTERVAL_NBYTES
        self._patience = _DRIFT_CHUNKS
        self._has_drifted = False
        self._remains = 0.0  # of the last chunks, as a fraction
        self._nbytes = 0
        self._chunks = 0

    def usable(self, nbytes: int, word_nbytes: int) -> Choice | None:
        """Give what was chosen, if that will do for a chunk of words of so many bytes."""
        choice = self._choice
        if (
            choice is None
            or self._nbytes >= self._interval
            or nbytes >= _GROWTH * choice.sampled_nbytes
            or choice.word_nbytes != word_nbytes
            or self._is_unsure(choice)
        ):
            return None
        return choice

    def _is_unsure(self, choice: Choice) -> bool:
        found = len(choice.samples)
        if self._has_drifted or found >= _SAMPLES:
            return self._has_drifted
        return self._chunks >= _FIRST_PAUSE * found and self._nbytes >= _FIRST_PAUSE_NBYTES * found

    @property
    def earlier(self) -> tuple[Sample, ...]:
        """The samples that count together with the next."""
        return () if self._choice is None else self._choice.samples

    def learn(self, choice: Choice) -> None:
        """Take what a new sample said."""
        if self._choice is None or not self._choice.agrees(choice):
            self._interval = _FIRST_INTERVAL_NBYTES
        elif self._nbytes >= self._interval:
            self._interval = min(2 * self._interval, _LAST_INTERVAL_NBYTES)
        if self._has_drifted:
            self._patience = min(2 * self._patience, _MOST_DRIFT_CHUNKS)
        self._has_drifted = False
        self._choice = choice
        self._remains = choice.expected
        self._nbytes = self._chunks = 0

    def note(self, nbytes: int, stored: int) -> None:
        """Take how many bytes of a chunk were left."""
        self._nbytes += nbytes
        self._chunks += 1
        self._remains += _DRIFT_WEIGHT * (stored / nbytes - self._remains)
        choice = self._choice
        if choice is not None and self._chunks >= self._patience:
            self._has_drifted = abs(self._remains - choice.expected) > _DRIFT


# --- choosing -------------------------------------------------------------------


def choose(raw: _Bytes, dtype: str, zstd: Compressors, earlier: Sequence[Sample] = ()) -> Choice:
    """Choose codec and settings from a sample of a chunk and earlier ones of its series."""
    w = dtypes.word_nbytes(dtype)
    sample = _look(raw, dtype, zstd)
    like_it = [other for other in earlier if other.keys() == sample.keys()]
    samples = (*like_it[1 - _SAMPLES :], sample)
    mean = _mean(samples)
    best: tuple[int, tuple[int, ...], int] = (layout.CODEC_RAW, (), 0)
    least = 1 - _PAYS[_ENTROPY]  # what anything else has to beat
    for cut in sorted({cut for cut, plane in mean if plane >= 0}):
        chosen = [_choose_one(mean[cut, plane]) for plane in range(_count(w, cut))]
        settings = tuple(setting for setting, _ in chosen)
        if not cut & _SPARSE and not any(settings):
            continue
        head = layout.PLANES_HEADER_NBYTES + 4 * len(chosen)
        expected = sum(remains for _, remains in chosen) / w + head / raw.nbytes
        if expected < least * _pays(cut):
            codec = layout.CODEC_SPARSE if cut & _SPARSE else layout.CODEC_PLANES
            best, least = (codec, settings, cut & ~_SPARSE), expected
    setting, expected = _choose_one(mean[_WHOLE])
    if expected < least * (_WHOLE_FOR_SPARSE if best[0] == layout.CODEC_SPARSE else _WHOLE_PAYS):
        best, least = (layout.CODEC_ZSTD, (setting,), 0), expected
    return Choice(
        codec=best[0],
        settings=best[1],
        flags=best[2],
        word_nbytes=w,
        expected=least,
        sampled_nbytes=raw.nbytes,
        samples=samples,
    )


def _count(w: int, cut: int) -> int:
    """Give the number of runs into which words of w bytes are cut."""
    if cut & _WIDE:
        return w // 2
    return w + 1 if cut & _SPARSE else w


def _pays(cut: int) -> float:
    """Give the fraction to which a cut has to bring what simpler ones leave."""
    return (_ROTATION_PAYS if cut & _ROTATED else 1) * (_SPARSE_PAYS if cut & _SPARSE else 1)


class _Part(NamedTuple):
    """A run of a sample, its length as a fraction of the words, and what was tried on it."""

    data: _Bytes
    length: float
    found: dict[int, float]

    @property
    def remains(self) -> dict[int, float]:
        return {RAW: self.length, **{n: self.length * x for n, x in self.found.items()}}


def _look(raw: _Bytes, dtype: str, zstd: Compressors) -> Sample:
    w = dtypes.word_nbytes(dtype)
    sample = _sample(raw, max(1, dtypes.itemsize(dtype)))
    parts = _cut(sample, dtype) if w else {}
    for part in parts.values():
        _try(part.data, zstd, _FAST_OF_PLANES, part.found)
    remains = _remains(parts, w)
    if w <= 1:
        whole = _try(sample, zstd, _OF_BYTES)
        _try_slow(parts, remains, zstd)
    else:
        whole = {_LEVEL_1: len(zstd[_LEVEL_1].compress(sample.data)) / len(sample)}
        if whole[_LEVEL_1] > min(remains.values()) * _FAR:  # else they do not help planes
            _try_slow(parts, remains, zstd)
        least = min(_remains(parts, w).values())
        # What is not made smaller by finding words again is better as planes.
        if whole[_LEVEL_1] <= max(least * _HOPELESS, _REPEATS):
            whole = {**_try(sample, zstd, (_ENTROPY,)), **whole}  # from fast to slow
            _try(sample, zstd, (LEVEL_3,), whole)
    return {**{run: part.remains for run, part in parts.items()}, _WHOLE: whole}


def _cut(sample: _Bytes, dtype: str) -> dict[_Run, _Part]:
    """Cut words into planes in all ways that may pay."""
    w = dtypes.word_nbytes(dtype)
    words = sample.view(planes.WORDS[w])
    is_there = words != 0
    found = {_PLAIN: sample} if w > 1 else {}
    bits = None
    if 0 < np.count_nonzero(is_there) <= (1 - _LEAST_ZEROS) * len(words):
        found[_SPARSE] = words.take(np.flatnonzero(is_there)).view(np.uint8)
        bits = np.packbits(is_there, bitorder="little")
    parts = {}
    for how, left in found.items():
        for rotated in (0,) if w == 1 or dtypes.is_integer(dtype) else (0, _ROTATED):
            cut = list(np.empty((w, len(left) // w), np.uint8))
            planes.split(left, cut, rotated=bool(rotated))
            if how == _SPARSE and bits is not None:
                cut.append(bits)
            for plane, data in enumerate(cut):
                parts[how | rotated, plane] = _Part(data, len(data) / len(words), {})
    if w >= 4 and dtypes.is_integer(dtype):  # what finds words again finds more in pairs of bytes
        cut = list(np.empty((w // 2, 2 * len(words)), np.uint8))
        planes.split_wide(sample, cut)
        for plane, data in enumerate(cut):
            parts[_WIDE, plane] = _Part(data, 2.0, {})
    return parts


def _remains(parts: Mapping[_Run, _Part], w: int) -> dict[int, float]:
    """Give what remains of all planes at best, by how they are cut."""
    remains = dict.fromkeys((cut for cut, _ in parts), 0.0)
    for (cut, _), part in parts.items():
        remains[cut] += min(part.remains.values()) / w
    return remains


def _try_slow(parts: Mapping[_Run, _Part], remains: Mapping[int, float], zstd: Compressors) -> None:
    """Try slower settings on the cut that is best so far: they help all of them in the same way."""
    best = min(remains, key=lambda cut: remains[cut] / _pays(cut), default=None)
    for (cut, _), part in parts.items():
        if cut == best:
            _try(part.data, zstd, _SLOW_OF_PLANES, part.found)


def _try(
    run: _Bytes,
    zstd: Compressors,
    settings: Sequence[int],
    found: dict[int, float] | None = None,
) -> dict[int, float]:
    """Find the fractions that remain, of settings that are worth trying after those `found`."""
    found = {} if found is None else found
    for setting in settings:
        if _is_hopeless(found):
            break
        if setting == _ENTROPY_8K and found[_ENTROPY] > _NOISE:
            continue
        found[setting] = len(zstd[setting].compress(run.data)) / len(run)
    return found


def _is_hopeless(found: Mapping[int, float]) -> bool:
    """Say whether the highest level so far finds nothing, so that those above it will not."""
    levels = [fraction for setting, fraction in found.items() if setting >= _LEVEL_1]
    return bool(levels) and levels[-1] > min(_NOISE, min(found.values()) * _HOPELESS)


def _mean(samples: Sequence[Sample]) -> Sample:
    """Give the mean of samples of one series, for the settings that all of them have."""
    return {
        run: {
            setting: sum(sample[run][setting] for sample in samples) / len(samples)
            for setting in tried
            if all(setting in sample[run] for sample in samples)
        }
        for run, tried in samples[0].items()
    }


def _choose_one(fractions: Mapping[int, float]) -> tuple[int, float]:
    """Choose how to store a run of bytes; give the fraction of it that remains."""
    best, remains = RAW, fractions.get(RAW, 1.0)
    for setting, fraction in fractions.items():
        if fraction < remains * (1 - _PAYS[setting]):
            best, remains = setting, fraction
    return best, remains


def _sample(raw: _Bytes, size: int) -> _Bytes:
    """Take whole elements from a few places of a chunk."""
    if len(raw) <= _STRETCHES * _STRETCH_NBYTES:
        return raw
    count, stretch = len(raw) // size, _STRETCH_NBYTES // size
    starts = [(count - stretch) * i // (_STRETCHES - 1) for i in range(_STRETCHES)]
    return np.concatenate([raw[s * size : (s + stretch) * size] for s in starts])

"""What a writer may be told, and the defaults: one place for each."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout

__all__ = ["ChunkShape", "StatsChoice", "WriterOptions", "check_options"]

ChunkShape = Sequence[int | None]
StatsChoice = bool | Literal["only"]

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterOptions:
    """The options of `create_run`, checked and with defaults filled in."""

    flush_interval_s: float
    flush_bytes: int
    queue_bytes: int
    when_full: Literal["block", "drop"]
    compression: Literal["auto", "none", "zstd"]
    chunks: Mapping[str, tuple[int, ...]]
    stats: Mapping[str, StatsChoice]
    on_error: Literal["warn", "raise"]
    encoders: int = 2
    grace_s: float = 10.0
    retry_s: tuple[float, ...] = (0.1, 0.4, 1.6)
    sleep: Callable[[float], None] = field(repr=False)
    clock_us: Callable[[], int] = field(repr=False)
    new_id: Callable[[], int] = field(repr=False)

    def stats_for(self, name: str) -> StatsChoice:
        """Give what to do about the statistics of a name: the first pattern that fits counts."""
        for pattern, choice in self.stats.items():
            if fnmatch.fnmatchcase(name, pattern):
                return choice
        return True

    def chunk_shape_for(self, name: str, rank: int) -> tuple[int, ...] | None:
        """Give the chunk lengths the user wants for a name; None: choose."""
        for pattern, shape in self.chunks.items():
            if fnmatch.fnmatchcase(name, pattern):
                if len(shape) != rank:
                    raise ArgumentError(
                        f"chunks[{pattern!r}] has {len(shape)} lengths, but {name!r} has {rank} "
                        "axes; give one length per axis (None for the whole axis)",
                        name=name,
                        pattern=pattern,
                    )
                return shape
        return None


def check_options(
    *,
    is_local: bool,
    flush_interval_s: float | None,
    flush_bytes: int,
    queue_bytes: int,
    when_full: Literal["block", "drop"],
    compression: Literal["auto", "none", "zstd"],
    chunks: Mapping[str, ChunkShape] | None,
    stats: StatsChoice | Mapping[str, StatsChoice],
    on_error: Literal["warn", "raise"],
    sleep: Callable[[float], None],
    clock_us: Callable[[], int],
    new_id: Callable[[], int],
) -> WriterOptions:
    """Check options as a user gave them.

    Raises
    ------
    ArgumentError
        Naming the option and what it may be.
    """
    if flush_interval_s is None:
        flush_interval_s = 1.0 if is_local else 30.0
    _check_number("flush_interval_s", flush_interval_s, least=0.001)
    _check_number("flush_bytes", flush_bytes, least=1)
    _check_number("queue_bytes", queue_bytes, least=1)
    _check_choice("when_full", when_full, ("block", "drop"))
    _check_choice("compression", compression, ("auto", "none", "zstd"))
    _check_choice("on_error", on_error, ("warn", "raise"))
    if not isinstance(stats, Mapping):
        stats = {"*": stats}
    for pattern, choice in stats.items():
        if choice not in (True, False, "only"):
            raise ArgumentError(f"stats[{pattern!r}] is {choice!r}; it is True, False or 'only'")
    return WriterOptions(
        flush_interval_s=float(flush_interval_s),
        flush_bytes=min(int(flush_bytes), max(1, int(queue_bytes) // 2)),
        queue_bytes=int(queue_bytes),
        when_full=when_full,
        compression=compression,
        chunks={p: _check_chunk_shape(p, s) for p, s in (chunks or {}).items()},
        stats=dict(stats),
        on_error=on_error,
        sleep=sleep,
        clock_us=clock_us,
        new_id=new_id,
    )


def _check_number(name: str, value: object, *, least: float) -> None:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or value < least
    ):
        raise ArgumentError(f"{name} is {value!r}; it is a number, at least {least}", option=name)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(
            f"{name} is {value!r}; it is one of {', '.join(map(repr, choices))}", option=name
        )


def _check_chunk_shape(pattern: object, shape: object) -> tuple[int, ...]:
    if not isinstance(pattern, str):
        raise ArgumentError(f"chunks: the pattern {pattern!r} is not a string", option="chunks")
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise ArgumentError(
            f"chunks[{pattern!r}] is {shape!r}; it is one length per axis, None for the whole axis",
            option="chunks",
        )
    lengths = []
    for length in shape:
        is_int = hasattr(length, "__index__") and not isinstance(length, bool)
        if length is not None and not (is_int and 0 <= length <= layout.MAX_AXIS):
            raise ArgumentError(
                f"chunks[{pattern!r}] has the length {length!r}; lengths are integers above 0, or "
                "None for the whole axis",
                option="chunks",
            )
        lengths.append(0 if length is None else int(length))
    return tuple(lengths)

"""Figures as frames of one GIF."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tensorstore_fmt.demo.attention.style import DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_animation"]

_FRAME_MS = 700
_LAST_MS = 2500
_COLOURS = 256


def save_animation(figures: Iterable[Figure], path: Path) -> int:
    """Write one frame for each figure, all of one size; give how many there are."""
    from PIL import Image  # late: the package of an extra

    frames = []
    for figure in figures:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=DPI, format="png")
        # The palette is each frame's own; dithering would flicker.
        frames.append(
            Image.open(drawn)
            .convert("RGB")
            .quantize(_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        )
    first, *others = frames
    first.save(
        path,
        save_all=True,
        append_images=others,
        duration=[*[_FRAME_MS] * len(others), _LAST_MS],
        loop=0,
    )
    return len(frames)

"""The attention-head view: two columns of tokens, and lines as wide as the scores between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorstore_fmt.demo.attention.slices import HeadSlices, PairSlices
from tensorstore_fmt.demo.attention.style import (
    FAINT,
    FIRST,
    GREY,
    INK,
    SECOND,
    SPECIAL,
    figure_of,
    heading,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_heads"]

_WIDEST = 7.0  # points, of a score of 1
_FAINTEST = 0.015  # a score below is not drawn: many would only be a haze
_BEST = 0.30  # a score at which a line is as dark as it gets
_LEFT, _RIGHT = 0.0, 1.0
_LETTER = 0.038
_FEWEST_LETTERS = 9
_INCHES = 2.85  # from one column of tokens to the other: the unit of what is across
_SHARE = 0.4  # width of the bar of a token that all look at


def draw_heads(slices: HeadSlices, position: int) -> Figure:
    """Draw the scores of one saved step.

    Parameters
    ----------
    position
        Which of the saved steps.
    """
    count = len(slices.pair.tokens)
    room = _LETTER * max(_FEWEST_LETTERS, *map(len, slices.pair.tokens))
    figure = figure_of(_INCHES * (1.75 + 2 * room), 1.55 + 0.27 * count)
    axes = figure.subplots()
    axes.set(xlim=(-room - 0.05, 1.7 + room), ylim=(count - 0.4, -1.6))
    axes.axis("off")
    _lines(axes, slices, position)
    _tokens(axes, slices, position, 1.12 + room)
    heading(figure, slices.pair, position, "Where each token looks: attention scores")
    return figure


def colour_of(pair: PairSlices, token: int) -> str:
    """Give the colour of a token: that of its sentence."""
    if pair.is_special(token):
        return SPECIAL
    return FIRST if token < pair.second else SECOND


def _lines(axes: Axes, slices: HeadSlices, position: int) -> None:
    scores = slices.scores[position]
    for looks in range(len(slices.pair.tokens)):
        for seen in range(len(slices.pair.tokens)):
            score = float(scores[looks, seen])
            if score < _FAINTEST:
                continue
            is_idle = slices.pair.is_special(looks) or slices.pair.is_special(seen)
            axes.plot(
                (_LEFT, _RIGHT),
                (looks, seen),
                color=FAINT if is_idle else colour_of(slices.pair, looks),
                linewidth=max(0.4, _WIDEST * score),
                alpha=min(1.0, 0.12 + 0.88 * score / _BEST),
                solid_capstyle="round",
                zorder=score if is_idle else 1 + score,
            )


def _tokens(axes: Axes, slices: HeadSlices, position: int, bars: float) -> None:
    received = slices.scores[position].mean(axis=0)
    axes.text(_LEFT - 0.04, -1.0, "looks", ha="right", va="center", color=GREY, fontsize=9)
    axes.text(_RIGHT + 0.04, -1.0, "is looked at", ha="left", va="center", color=GREY, fontsize=9)
    axes.text(bars, -1.0, "by all (mean)", ha="left", va="center", color=GREY, fontsize=9)
    for token, text in enumerate(slices.pair.tokens):
        colour = colour_of(slices.pair, token)
        axes.text(
            _LEFT - 0.04, token, text, ha="right", va="center", color=colour, fontsize=11,
            fontweight="bold",
        )  # fmt: skip
        axes.text(
            _RIGHT + 0.04, token, text, ha="left", va="center", color=colour, fontsize=11,
            fontweight="bold",
        )  # fmt: skip
        axes.barh(
            token, float(received[token]) * _SHARE, left=bars, height=0.55, color=colour, alpha=0.75
        )
        axes.text(
            bars + 0.02 + float(received[token]) * _SHARE, token, f"{100 * received[token]:.0f} %",
            ha="left", va="center", fontsize=8, color=INK,
        )  # fmt: skip

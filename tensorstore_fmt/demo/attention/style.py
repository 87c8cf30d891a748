"""What all pictures of this demo share: colours, a figure, the heading.

Matplotlib is imported when the first picture is drawn. Figures are made without pyplot, so no
backend is chosen and no display is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tensorstore_fmt.demo.attention.slices import PairSlices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "FAINT", "FIRST", "GREY", "INK", "SECOND", "SPECIAL", "figure_of", "heading"]

DPI: Final = 130
INK: Final = "#222222"
GREY: Final = "#666666"
FIRST: Final = "#2f6690"
SECOND: Final = "#d95f0e"
SPECIAL: Final = "#8a8a8a"
FAINT: Final = "#cfcfcf"
"""Colours of the first sentence, of the second, of tokens that are no text, and their lines."""


def figure_of(width: float, height: float) -> Figure:
    """Make a figure of so many inches."""
    from matplotlib.figure import Figure  # late: see the module's docstring

    return Figure(figsize=(width, height), facecolor="white")


def heading(figure: Figure, pair: PairSlices, position: int, title: str) -> None:
    """Write what is shown over a figure: layer, head, step, and what the model says."""
    choice, height = pair.choice, float(figure.get_figheight())
    step = f"step {pair.steps[position]} of {pair.steps[-1]}"
    said = 100 * float(pair.probability[position])
    truth = "does follow" if pair.follows else "does not follow"
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.22 / height, top=1 - 0.82 / height)
    figure.text(
        0.03, 1 - 0.12 / height, title, fontsize=13, fontweight="bold", color=INK, va="top"
    )  # fmt: skip
    figure.text(
        0.03,
        1 - 0.42 / height,
        f"layer {choice.layer} · head {choice.head} · pair {choice.pair} · {step}",
        fontsize=11,
        color=INK,
        va="top",
    )
    figure.text(
        0.03,
        1 - 0.64 / height,
        f"the second sentence {truth}; the model is {said:.0f} % sure that it does "
        f"(loss of all pairs {pair.loss[position]:.3f})",
        fontsize=9,
        color=GREY,
        va="top",
    )

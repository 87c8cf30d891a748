"""The neuron view: how the query of one token and the keys of all make its scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tensorstore_fmt.demo.attention.heads import colour_of
from tensorstore_fmt.demo.attention.slices import NeuronSlices, PairSlices
from tensorstore_fmt.demo.attention.style import GREY, INK, figure_of, heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Products", "draw_neuron"]

_COLOURS = "PuOr_r"
_EDGE = 98.0  # percentile of magnitudes that gets the strongest colour


class Products:
    """What is worked out of query and keys at one step.

    Attributes
    ----------
    products
        Query times key, element by element; shape (tokens, width of a head).
    dots
        Their sums over the elements, divided by the root of the width.
    scores
        Softmax of `dots`: what the model stored.
    """

    def __init__(self, slices: NeuronSlices, position: int) -> None:
        query = slices.query[position].astype(np.float64)
        self.products: npt.NDArray[np.float64] = slices.key[position] * query
        self.dots: npt.NDArray[np.float64] = self.products.sum(axis=1) / np.sqrt(len(query))
        powers = np.exp(self.dots - self.dots.max())
        self.scores: npt.NDArray[np.float64] = powers / powers.sum()


def draw_neuron(slices: NeuronSlices, position: int) -> Figure:
    """Draw query, keys, products, dots and scores of one saved step."""
    pair, token = slices.pair, slices.pair.choice.token
    assert token is not None  # `read_neuron` chose one
    every = [Products(slices, each) for each in range(len(pair.steps))]
    worked, count = every[position], len(pair.tokens)
    figure = figure_of(12.0, 2.3 + 0.27 * count)
    name = pair.tokens[token]
    heading(figure, pair, position, f"Why “{name}” looks where it looks: its query, times all keys")
    height = float(figure.get_figheight())
    letters = max(11, *map(len, pair.tokens))
    figure.subplots_adjust(
        left=0.03 + 0.0065 * letters, right=0.94, top=1 - 1.3 / height, bottom=0.25 / height
    )
    grid = figure.add_gridspec(
        2,
        4,
        width_ratios=(1, 1, 0.42, 0.36),
        height_ratios=(1, count),
        wspace=0.07,
        hspace=2.5 / (count + 1),
    )
    query, note = (figure.add_subplot(grid[0, column]) for column in range(2))
    _cells(query, slices.query[position][None], _edge(slices.query))
    query.set_yticks([0], ["query"], color=colour_of(pair, token), fontweight="bold")
    note.axis("off")
    words = "orange: above zero, violet: below; one scale for all steps"
    note.text(0, 0.5, words, fontsize=9, color=GREY, va="center")

    key, product, dots, scores = (figure.add_subplot(grid[1, column]) for column in range(4))
    _cells(key, slices.key[position], _edge(slices.key))
    key.set_yticks(range(count), pair.tokens, fontweight="bold")
    for number, label in enumerate(key.get_yticklabels()):
        label.set_color(colour_of(pair, number))
    _cells(product, worked.products, _edge(np.stack([each.products for each in every])))
    product.set_yticks([])
    _bars(dots, pair, worked.dots, _limits(np.stack([each.dots for each in every])), "{:.1f}")
    _bars(scores, pair, worked.scores, (0.0, 1.25), "{:.2f}")
    _title(key, "key of each token")
    _title(product, "query \N{MULTIPLICATION SIGN} key, element by element")
    _title(dots, "sum / √width")
    _title(scores, "softmax: score")
    return figure


def _cells(axes: Axes, values: npt.NDArray[np.floating], edge: float) -> None:
    axes.imshow(values, cmap=_COLOURS, vmin=-edge, vmax=edge, aspect="auto")
    axes.set_xticks([])
    axes.tick_params(length=0)
    for border in range(1, len(values)):
        axes.axhline(border - 0.5, color="white", linewidth=1.5)
    axes.spines[:].set_visible(False)


def _bars(
    axes: Axes,
    pair: PairSlices,
    values: npt.NDArray[np.float64],
    limits: tuple[float, float],
    form: str,
) -> None:
    count = len(values)
    colours = [colour_of(pair, number) for number in range(count)]
    axes.barh(range(count), values, height=0.6, color=colours, alpha=0.85)
    reach = limits[1] - limits[0]
    for number, value in enumerate(values):
        axes.text(
            value + (0.03 if value >= 0 else -0.03) * reach,
            number,
            form.format(value),
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set(xlim=limits, ylim=(count - 0.5, -0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _limits(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Give ends of an axis at which all bars begin at zero, with room for their numbers."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    room = 0.3 * (high - low)
    return low - room * (low < 0), high + room


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=10, color=GREY, loc="left", pad=4)


def _edge(values: npt.NDArray[np.floating]) -> float:
    """Give the magnitude of the strongest colour: the same at all steps, blind to rare peaks."""
    return float(np.percentile(np.abs(values), _EDGE))

"""What fine-tuning changed: where one token looks at each saved step, and the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tensorstore_fmt.demo.attention.heads import colour_of
from tensorstore_fmt.demo.attention.neuron import Products
from tensorstore_fmt.demo.attention.slices import NeuronSlices
from tensorstore_fmt.demo.attention.style import FIRST, GREY, INK, SECOND, figure_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_change"]


def draw_change(slices: NeuronSlices, batch_loss: npt.NDArray[np.float64]) -> Figure:
    """Draw the scores of the chosen token over the steps, below the losses.

    Parameters
    ----------
    batch_loss
        Of each step's batch.
    """
    pair, token = slices.pair, slices.pair.choice.token
    assert token is not None  # `read_neuron` chose one
    count = len(pair.tokens)
    figure = figure_of(9.0, 3.6 + 0.27 * count)
    height = float(figure.get_figheight())
    figure.subplots_adjust(
        left=0.02 + 0.0098 * max(11, *map(len, pair.tokens)),
        right=0.95,
        top=1 - 0.9 / height,
        hspace=0.16,
        bottom=0.55 / height,
    )
    figure.text(
        0.03, 1 - 0.12 / height, f"Where “{pair.tokens[token]}” looks while the model learns",
        fontsize=13, fontweight="bold", color=INK, va="top",
    )  # fmt: skip
    choice = pair.choice
    place = f"layer {choice.layer} · head {choice.head} · pair {choice.pair}"
    figure.text(
        0.03, 1 - 0.42 / height, f"{place} · all saved steps",
        fontsize=11, color=INK, va="top",
    )  # fmt: skip
    loss, scores = figure.subplots(2, 1, height_ratios=(1.9, 0.27 * count), sharex=True)
    loss.plot(range(len(batch_loss)), batch_loss, color=FIRST, linewidth=1.2, label="batches")
    loss.plot(
        pair.steps, pair.loss, "o-", color=SECOND, markersize=4, label="probes, never trained on"
    )
    loss.set_ylabel("loss", color=INK)
    loss.tick_params(colors=GREY)
    loss.legend(frameon=False, fontsize=9)
    loss.spines[["top", "right"]].set_visible(False)
    loss.grid(axis="y", color="#e4e4e4")

    steps = pair.steps.astype(np.float64)
    middles = (steps[1:] + steps[:-1]) / 2
    borders = np.concatenate((steps[:1] - 0.5, middles, steps[-1:] + 0.5))
    rows = np.stack([Products(slices, each).scores for each in range(len(pair.steps))], axis=1)
    drawn = scores.pcolormesh(
        borders, np.arange(count + 1) - 0.5, rows, cmap="Purples", vmin=0.0,
        vmax=max(0.2, float(rows.max())), edgecolors="white", linewidth=0.6,
    )  # fmt: skip
    scores.invert_yaxis()
    scores.set_yticks(range(count), pair.tokens, fontweight="bold")
    for number, label in enumerate(scores.get_yticklabels()):
        label.set_color(colour_of(pair, number))
    scores.tick_params(axis="y", length=0)
    scores.tick_params(axis="x", colors=GREY)
    scores.set_xticks(steps, [str(step) for step in pair.steps])
    scores.set_xlabel("step", color=INK)
    scores.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=[loss, scores], fraction=0.03, pad=0.02)
    bar.ax.set_title("score", fontsize=9, color=GREY, loc="left")
    bar.ax.tick_params(colors=GREY, labelsize=8)
    bar.outline.set_visible(False)
    return figure

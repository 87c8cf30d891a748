"""The pictures of the demo, drawn from slices and statistics read back from the run.

Matplotlib is imported when the first picture is drawn: nothing else here needs it. Figures are
made without pyplot, so no backend is chosen and no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import tensorstore_fmt as tsf
from tensorstore_fmt.demo.digits.comparison import strongest_units
from tensorstore_fmt.demo.digits.dataset import IMAGE_SHAPE
from tensorstore_fmt.demo.digits.training import COPIED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

__all__ = ["draw"]

_DPI = 130
_TRAIN, _TEST = "#2f6690", "#e36414"
_LAYERS = ("#1b4965", "#2a9d8f", "#e36414")
_INK, _GREY = "#222222", "#666666"

_STYLE: dict[RcKeyType, object] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "text.color": _INK,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}

_HISTOGRAM_NAME = "fc2.weight"
_MOST_COLUMNS = 120  # of the heat map: each is one tensor read whole
_MOST_RIDGES = 16
_RIDGE_HEIGHT = 2.2  # in distances between two ridges
_BINS = 90
_UNITS = 4
_MOMENTS = 7


def draw(run: tsf.Run, folder: Path) -> list[Path]:
    """Draw all pictures of `run` as PNG files in `folder`, which is created.

    Returns
    -------
    list of Path
        The files, in the order a person would look at them.
    """
    import matplotlib as mpl  # late: see the module's docstring

    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "curves.png": _curves,
        "gradients.png": _gradients,
        "histogram.png": _histogram,
        "units.png": _units,
    }
    paths = []
    for file, picture in pictures.items():
        with mpl.rc_context(_STYLE):
            figure = picture(run)
            figure.savefig(folder / file, dpi=_DPI, facecolor="white")
        paths.append(folder / file)
    return paths


def _figure(width: float, height: float, *, wspace: float = 0.04) -> Figure:
    # Late: see the module's docstring.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=wspace)
    return Figure(figsize=(width, height), layout=layout)


def _curves(run: tsf.Run) -> Figure:
    """Loss and accuracy, of the training batches and of the test digits."""
    figure = _figure(9.5, 4.2)
    left, right = figure.subplots(1, 2)
    steps, test_steps = run.steps(mode="TRAIN"), run.steps(mode="EVAL")

    loss = run["loss"].read(mode="TRAIN")
    test_loss = run["loss"].read(mode="EVAL")
    left.plot(steps, loss, color=_TRAIN, linewidth=1.3, label="training batches")
    left.plot(test_steps, test_loss, "o-", color=_TEST, markersize=3.5, label="test digits")
    _scale_by_powers(left)
    left.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats, log scale)")
    _note_last(left, test_steps, test_loss, f"{test_loss[-1]:.3f}", offset=8)

    accuracy = 100 * run["accuracy"].read(mode="TRAIN")
    test_accuracy = 100 * run["accuracy"].read(mode="EVAL")
    right.plot(steps, accuracy, color=_TRAIN, linewidth=1.3, label="training batches")
    right.plot(test_steps, test_accuracy, "o-", color=_TEST, markersize=3.5, label="test digits")
    right.set(title="Accuracy", xlabel="step", ylabel="digits recognised (%)", ylim=(0, 103))
    _note_last(right, test_steps, test_accuracy, f"{test_accuracy[-1]:.1f} %", offset=-16)
    for axes in (left, right):
        axes.set_xlim(0, max(int(steps[-1]), 1))
    right.legend(loc="lower right")
    left.legend(loc="upper right")
    return figure


def _note_last(
    axes: Axes,
    steps: npt.NDArray[np.generic],
    values: npt.NDArray[np.generic],
    text: str,
    *,
    offset: int,
) -> None:
    axes.annotate(
        text,
        (float(steps[-1]), float(values[-1])),
        xytext=(-4, offset),
        textcoords="offset points",
        ha="right",
        color=_TEST,
        fontweight="bold",
    )


def _scale_by_powers(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator  # late: see the module's docstring

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")


def _gradients(run: tsf.Run) -> Figure:
    """Norms of the gradients, from statistics only."""
    figure = _figure(9.5, 4.2)
    axes = figure.subplots()
    for name, colour in zip(run.names("gradient/*.weight"), _LAYERS, strict=False):
        columns = run[name].stats()
        label = name.removeprefix("gradient/")
        axes.plot(columns["step"], columns["l2"], "o-", color=colour, markersize=3.5, label=label)
    _scale_by_powers(axes)
    axes.set(
        title="Gradients, from their stored statistics: no tensor was read",
        xlabel="step",
        ylabel="L2 norm of the gradient (log scale)",
    )
    axes.legend()
    return figure


def _histogram(run: tsf.Run) -> Figure:
    """How the weights of one layer spread while training: over all steps, and step by step."""
    series = run[_HISTOGRAM_NAME]
    saved = _spread(series.steps, _MOST_COLUMNS)
    values = {step: series.read(step=step).ravel().astype(np.float64) for step in saved}
    # Nearly all weights, the same distance to both sides; a few far ones would flatten the rest.
    edge = 1.2 * max(float(np.quantile(np.abs(value), 0.999)) for value in values.values())
    bins = np.linspace(-edge, edge, _BINS + 1)
    densities = {step: np.histogram(values[step], bins, density=True)[0] for step in saved}

    figure = _figure(11.0, 5.2)
    left, right = figure.subplots(1, 2, sharey=False, width_ratios=(1.25, 1))
    _heatmap(figure, left, values, densities, bins)
    _ridges(right, {step: densities[step] for step in _spread(saved, _MOST_RIDGES)}, bins)
    shape = " x ".join(map(str, series.shape))
    figure.suptitle(
        f"How the weights of {_HISTOGRAM_NAME} ({shape}) spread while training", x=0.01, ha="left"
    )
    return figure


def _heatmap(
    figure: Figure,
    axes: Axes,
    values: Mapping[int, npt.NDArray[np.float64]],
    densities: Mapping[int, npt.NDArray[np.float64]],
    bins: npt.NDArray[np.float64],
) -> None:
    from matplotlib.colors import LogNorm  # late: see the module's docstring

    steps = np.array(list(values), dtype=np.float64)
    middles = (steps[:-1] + steps[1:]) / 2
    borders = np.concatenate((steps[:1], middles, steps[-1:])) if len(steps) > 1 else [-0.5, 0.5]
    density = np.stack(list(densities.values()), axis=1)
    drawn = axes.pcolormesh(
        borders,
        bins,
        np.ma.masked_equal(density, 0),
        norm=LogNorm(vmin=density[density > 0].min(), vmax=density.max()),
        cmap="viridis",
        rasterized=True,
    )
    shares = (1, 10, 50, 90, 99)
    lines = np.array([np.percentile(value, shares) for value in values.values()]).T
    for share, line in zip(shares, lines, strict=True):
        axes.plot(steps, line, color="white", linewidth=1.1)
        axes.annotate(
            f"{share} %",
            (steps[-1], line[-1]),
            xytext=(-5, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color="white",
            fontsize=8,
        )
    axes.grid(visible=False)
    axes.set(xlabel="step", ylabel="value of a weight", ylim=(bins[0], bins[-1]))
    axes.set_title("Density, and percentiles as lines", fontsize=10, fontweight="normal")
    figure.colorbar(drawn, ax=axes, label="density (log scale)", pad=0.02)


def _ridges(
    axes: Axes, densities: Mapping[int, npt.NDArray[np.float64]], bins: npt.NDArray[np.float64]
) -> None:
    from matplotlib import colormaps  # late: see the module's docstring

    centres = (bins[:-1] + bins[1:]) / 2
    top = len(densities) - 1
    for row, density in enumerate(densities.values()):
        colour = colormaps["viridis"](0.05 + 0.8 * row / max(top, 1))
        base = float(top - row)
        ridge = base + _RIDGE_HEIGHT * density / density.max()
        # Later steps lie in front, so that the eye goes from the back to the front.
        axes.fill_between(centres, base, ridge, color=colour, alpha=0.9, zorder=row + 2, lw=0)
        axes.plot(centres, ridge, color="white", linewidth=1.0, zorder=row + 2)
    axes.set_yticks([top - row for row in range(top + 1)], [str(step) for step in densities])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(xlabel="value of a weight", ylabel="step", xlim=(bins[0], bins[-1]))
    axes.set_title("Each step scaled to its own peak", fontsize=10, fontweight="normal")


def _units(run: tsf.Run) -> Figure:
    """Incoming weights of the strongest hidden units, as images, at several steps."""
    series = run[COPIED]
    moments = _spread(series.steps, _MOMENTS)
    units = strongest_units(series.read(step=moments[-1]), count=_UNITS)
    images = {
        (unit, step): series.read(step=step, index=np.s_[:, unit]).reshape(IMAGE_SHAPE)
        for unit in units
        for step in moments
    }
    edge = max(float(np.abs(image).max()) for image in images.values())

    figure = _figure(9.5, 1.22 * len(units) + 0.7, wspace=0.0)
    grid = figure.subplots(len(units), len(moments), squeeze=False)
    for row, unit in enumerate(units):
        for column, step in enumerate(moments):
            axes = grid[row, column]
            drawn = axes.imshow(images[unit, step], cmap="RdBu_r", vmin=-edge, vmax=edge)
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(True)
            if row == 0:
                axes.set_title(f"step {step}", fontsize=10, fontweight="normal", loc="center")
            if column == 0:
                axes.set_ylabel(f"unit {unit}")
    figure.colorbar(
        drawn, ax=grid, label="weight (red: ink here excites the unit)", fraction=0.03, pad=0.02
    )
    figure.suptitle(
        f"What the {len(units)} strongest hidden units look for: {COPIED}[:, unit] as 8x8 pixels",
        x=0.01,
        ha="left",
    )
    return figure


def _spread(steps: npt.ArrayLike, count: int) -> list[int]:
    """Choose up to `count` of `steps`, the first and the last among them, evenly spread."""
    steps = np.asarray(steps, dtype=np.int64)
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int))
    return [int(step) for step in steps[chosen]]

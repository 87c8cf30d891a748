"""The pictures of trainings side by side: curves, and statistics of gradients and weights.

Matplotlib is imported when the first picture is drawn: nothing else here needs it. Figures are
made without pyplot, so no backend is chosen and no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

import tensorstore_fmt as tsf
from tensorstore_fmt.demo.curves.observed import Curve, Observed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

__all__ = ["COLOURS", "draw_curves", "draw_statistics", "figure_bytes"]

COLOURS = ("#2f6690", "#2a9d8f", "#e36414", "#7b4b94", "#a07d00", "#8d3b47", "#5c6770", "#3a7d2c")
"""Of the trainings, in their order."""

_DPI = 130
_INK, _GREY, _ALERT = "#222222", "#666666", "#c1121f"
_STYLE: dict[RcKeyType, object] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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
    "svg.hashsalt": "tensorstore-fmt",  # the same picture gives the same bytes
}

_EMPTY = (0.001, 10.0)  # losses that are expected, while there are none

_HIGHEST = 30.0
"""A loss is shown up to so many times what it was at first; beyond, it leaves the picture."""


def figure_bytes(draw: Callable[[], Figure], *formats: Literal["png", "svg"]) -> list[bytes]:
    """Draw a figure in our style, and give it in each format."""
    import matplotlib as mpl  # late: see the module's docstring

    files = []
    with mpl.rc_context(_STYLE):
        figure = draw()
        for each in formats:
            file = io.BytesIO()
            metadata = {"Date": None} if each == "svg" else None
            figure.savefig(file, format=each, dpi=_DPI, facecolor="white", metadata=metadata)
            files.append(file.getvalue())
    return files


def _figure(width: float, height: float) -> Figure:
    # Late: see the module's docstring.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.04)
    return Figure(figsize=(width, height), layout=layout)


# --- curves -------------------------------------------------------------------------------


def draw_curves(observed: Sequence[Observed]) -> Figure:
    """Draw losses and accuracies, with where rules fired and where a training was stopped."""
    figure = _figure(11.0, 4.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    top = _top(observed)
    for each, colour in zip(observed, _colours(observed), strict=True):
        left.plot(*_shown(each.loss), color=colour, linewidth=1.3, label=each.label)
        left.plot(*_shown(each.test_loss), ".", color=colour, markersize=4.5)
        accuracy = 100 * each.test_accuracy.values
        right.plot(each.test_accuracy.steps, accuracy, ".-", color=colour, linewidth=1.3)
        if len(each.loss):
            _mark(left, each, colour, each.loss, top=top)
            _mark(right, each, colour, Curve(each.test_accuracy.steps, accuracy), top=None)
    left.set_ylim(*(_EMPTY if top is None else (_bottom(observed), top)))
    _scale_by_powers(left)
    right.set_ylim(0, 103)
    last = max((each.planned or each.steps for each in observed), default=1)
    for axes in (left, right):
        axes.set_xlim(0, max(last, 1))
        axes.set_xlabel("step")
    left.set(title="Loss", ylabel="cross-entropy (nats, log scale)")
    right.set(title="Accuracy", ylabel="test digits recognised (%)")
    _legend(figure, left)
    return figure


def _colours(observed: Sequence[Observed]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(observed))]


def _shown(curve: Curve) -> tuple[object, object]:
    return curve.steps, curve.values


def _finite(observed: Sequence[Observed]) -> npt.NDArray[np.float64]:
    parts = [c.values for each in observed for c in (each.loss, each.test_loss)]
    values: npt.NDArray[np.float64] = np.concatenate([np.empty(0), *parts])
    return values[np.isfinite(values) & (values > 0)]


def _top(observed: Sequence[Observed]) -> float | None:
    values = _finite(observed)
    if not len(values):
        return None
    first = [each.loss.values[0] for each in observed if len(each.loss)]
    return float(min(1.4 * values.max(), _HIGHEST * np.nanmax([*first, values.min()])))


def _bottom(observed: Sequence[Observed]) -> float:
    return float(0.7 * _finite(observed).min())


def _mark(axes: Axes, each: Observed, colour: str, curve: Curve, *, top: float | None) -> None:
    """Mark what happened: the peak beyond the picture, alerts, the stop."""
    if each.alerts:
        fired = each.cause or each.alerts[0]
        axes.axvline(fired.step, color=_ALERT, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    if each.state == "stopped":
        axes.axvline(each.steps - 1, color=colour, linewidth=1.0, linestyle=":", zorder=1)
    if each.state == "stopped" and len(curve):
        y = curve.values[-1]
        y = y if np.isfinite(y) and (top is None or y < top) else (top or 0)
        axes.plot(
            each.steps - 1, y, "s", color=colour, markersize=7, mec="white", zorder=4, clip_on=False
        )
    if top is None:
        return
    best = curve.best(least=False)
    if best is not None and best[1] > top:
        size = f"{best[1]:,.0f}" if best[1] < 1e6 else f"{best[1]:.1e}"
        axes.annotate(
            f"up to {size} at step {best[0]}",
            (max(best[0], each.steps - 1 if each.state == "stopped" else 0), top),
            xytext=(8, -4),
            textcoords="offset points",
            ha="left",
            va="top",
            color=colour,
            fontsize=9,
        )


def _legend(figure: Figure, axes: Axes) -> None:
    from matplotlib.lines import Line2D  # late: see the module's docstring

    handles, names = axes.get_legend_handles_labels()
    signs = [
        (Line2D([], [], color=_GREY, linewidth=1.3), "training batches"),
        (Line2D([], [], color=_GREY, marker=".", linestyle="none"), "test digits"),
        (Line2D([], [], color=_ALERT, linestyle=(0, (4, 3)), linewidth=1.0), "a rule fired"),
        (Line2D([], [], color=_GREY, marker="s", linestyle=":", linewidth=1.0), "stopped"),
    ]
    figure.legend(
        [*handles, *(sign for sign, _ in signs)],
        [*names, *(text for _, text in signs)],
        loc="outside lower center",
        ncols=min(len(handles) + len(signs), 7),
        columnspacing=1.4,
        handlelength=1.8,
    )


def _scale_by_powers(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter  # late: see the module's docstring

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


# --- statistics ---------------------------------------------------------------------------


def draw_statistics(runs: Mapping[str, tsf.Run], observed: Sequence[Observed]) -> Figure:
    """Draw norms of gradients and weights, layer by layer, from their statistics alone.

    Parameters
    ----------
    runs
        Those that are there, by name.
    """
    layers = sorted({name for run in runs.values() for name in run.names("gradient/*.weight")})
    layers = layers or ["gradient/(none yet)"]
    figure = _figure(3.7 * len(layers), 5.8)
    grid = figure.subplots(2, len(layers), squeeze=False, sharex=True, sharey="row")
    last = max((each.planned or each.steps for each in observed), default=1)
    for column, gradient in enumerate(layers):
        weight = gradient.removeprefix("gradient/")
        for row, name in enumerate((gradient, weight)):
            axes = grid[row, column]
            for each, colour in zip(observed, _colours(observed), strict=True):
                if each.name in runs and name in runs[each.name]:
                    _norms(axes, runs[each.name], name, colour, each)
            axes.set_yscale("log")
            axes.set_xlim(0, max(last, 1))
            axes.set_title(name, fontsize=10)
        grid[1, column].set_xlabel("step")
    grid[0, 0].set_ylabel("L2 norm of the gradient")
    grid[1, 0].set_ylabel("L2 norm of the weights")
    _legend_of_statistics(figure, observed)
    return figure


def _norms(axes: Axes, run: tsf.Run, name: str, colour: str, each: Observed) -> None:
    stats = run[name].stats()
    bad = (stats["nan"] + stats["posinf"] + stats["neginf"]) > 0
    l2 = np.where(bad | (stats["l2"] == 0), np.nan, stats["l2"])
    axes.plot(stats["step"], l2, ".-", color=colour, linewidth=1.3, label=each.label)
    # At the lower edge, as neither has a place on a log scale.
    for is_so, sign in ((stats["l2"] == 0, "v"), (bad, "x")):
        steps = stats["step"][is_so]
        lowest = np.full(len(steps), 0.03)
        edge = axes.get_xaxis_transform()
        if len(steps):
            axes.plot(steps, lowest, sign, color=colour, markersize=6, transform=edge)
    if each.state == "stopped":
        axes.axvline(each.steps - 1, color=colour, linewidth=1.0, linestyle=":", zorder=1)


def _legend_of_statistics(figure: Figure, observed: Sequence[Observed]) -> None:
    from matplotlib.lines import Line2D  # late: see the module's docstring

    handles = [
        Line2D([], [], color=colour, marker=".", linewidth=1.3) for colour in _colours(observed)
    ]
    signs = [
        (Line2D([], [], color=_GREY, marker="v", linestyle="none"), "all zero"),
        (Line2D([], [], color=_GREY, marker="x", linestyle="none"), "NaN or infinite elements"),
        (Line2D([], [], color=_GREY, linestyle=":", linewidth=1.0), "stopped"),
    ]
    figure.legend(
        [*handles, *(sign for sign, _ in signs)],
        [*(each.label for each in observed), *(text for _, text in signs)],
        loc="outside lower center",
        ncols=min(len(handles) + len(signs), 7),
        columnspacing=1.4,
        handlelength=1.8,
    )

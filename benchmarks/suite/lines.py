"""Pictures of lines, where a case measures over something: entries, latency, time."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.plots import INK, OURS

# Told apart also by those who see few colours; ours has its own.
_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7f3c8d", "#555b66", "#a5aa99")
_OURS = (OURS, "#7aa6e0", "#0b2f66")
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Line:
    """What one contestant needed, by x; its lines share a colour."""

    contestant: str
    label: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes with lines; ``log`` names the axes that are logarithmic: none, x, y, or xy."""

    title: str
    lines: Sequence[Line]
    x: str
    y: str
    log: str = ""


def draw_panels(path: Path, title: str, panels: Sequence[Panel], *, across: int = 2) -> None:
    """Draw panels side by side, with one legend for all of them."""
    from matplotlib import pyplot as plt

    panels = [panel for panel in panels if any(line.points for line in panel.lines)]
    if not panels:
        return
    columns = min(across, len(panels))
    rows = -(-len(panels) // columns)
    size = (max(8.0, 4.6 * columns), 3.3 * rows + 0.9)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    looks = _looks([line.contestant for panel in panels for line in panel.lines])
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, looks)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    width = round(size[0] * 12)
    figure.suptitle(textwrap.fill(title, width), x=0.01, ha="left", fontsize=11, color=INK)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    if len(handles) > 1:
        is_one = len(panels) == 1
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside right upper" if is_one else "outside lower center",
            ncols=1 if is_one else 4,
            frameon=False,
            fontsize=8,
        )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _looks(contestants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give each contestant its colour and marker; ours is bold."""
    looks: dict[str, dict[str, Any]] = {}
    counts = {True: 0, False: 0}
    for contestant in dict.fromkeys(contestants):
        is_ours = contestant.startswith("ours")
        palette, number = _OURS if is_ours else _COLOURS, counts[is_ours]
        cycle = number // len(palette)  # more contestants than colours: other lines and markers
        counts[is_ours] += 1
        looks[contestant] = {
            "color": palette[number % len(palette)],
            "marker": _MARKERS[(number + cycle) % len(_MARKERS)],
            "linestyle": (":", "-")[cycle == 0],
            "linewidth": 2.2 if is_ours else 1.3,
            "markersize": 5 if is_ours else 4,
            "zorder": 3 if is_ours else 2,
        }
    return looks


def _draw(axes: Any, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    for line in panel.lines:
        look = looks[line.contestant]
        axes.plot(
            [x for x, _ in line.points],
            [y for _, y in line.points],
            label=line.label,
            **{**look, **({"linestyle": "--"} if line.is_dashed else {})},
        )
    if "x" in panel.log:
        axes.set_xscale("log")
    if "y" in panel.log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(y for line in panel.lines for _, y in line.points))
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(visible=True, axis="y", color="#e4e7ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

"""A picture of many rows and several figures: a dot for each contestant, ours filled and large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from suite.case import Table
from suite.plots import INK, OURS

PALETTE = ("#8a93a3", "#4a4f59", "#d98c3f", "#b4442f", "#e6c04f", "#5d9c59", "#93c48f", "#8d5fa8")


def draw(
    table: Table,
    path: Path,
    rows: Sequence[str],
    contestants: Sequence[str],
    figures: Mapping[str, str],
    *,
    title: str,
) -> None:
    """Draw a column for each figure; a figure of a row is named ``<figure> <row>``."""
    from matplotlib import pyplot as plt

    names = [name for name in contestants if name in table.trials]
    size = (4.2 * len(figures) + 1.8, 0.3 * len(rows) + 1.6)
    figure, columns = plt.subplots(1, len(figures), figsize=size, sharey=True, layout="constrained")
    colours = iter(PALETTE * 3)
    styles = {name: _style(name, colours) for name in names}
    for axes, (key, heading) in zip(columns, figures.items(), strict=True):
        for name in names:
            values = [table.median(name, f"{key} {row}") for row in rows]
            known = [(value, at) for at, value in enumerate(values) if value is not None]
            if known:
                x, y = zip(*known, strict=True)
                axes.scatter(x, y, label=name.replace("-codec", ""), **styles[name])
        axes.set_title(heading, loc="left", fontsize=10, color=INK)
        axes.set_xscale("log")
        axes.grid(axis="both", color="#e4e7ec", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _plain_ticks(axes)
    columns[0].set_yticks(range(len(rows)), [row.replace("_", " ") for row in rows])
    columns[0].invert_yaxis()
    handles, labels = columns[0].get_legend_handles_labels()
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _style(name: str, colours: Iterator[str]) -> dict[str, Any]:
    if name.startswith("ours"):
        is_main = "numpy" not in name
        face = OURS if is_main else "white"
        return {"c": face, "edgecolors": OURS, "s": 64 if is_main else 46, "zorder": 4 + is_main}
    return {"c": next(colours), "s": 26, "zorder": 3, "linewidths": 0}


def _plain_ticks(axes: Any) -> None:
    from matplotlib import ticker

    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())

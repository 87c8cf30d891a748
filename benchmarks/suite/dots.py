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
    relative: str = "",
) -> None:
    """Draw a column for each figure; a figure of a row is named ``<figure> <row>``.

    The figure `relative` is shown as a multiple of the first contestant's.
    """
    from matplotlib import pyplot as plt

    names = [name for name in contestants if name in table.trials]
    size = (4.2 * len(figures) + 1.8, 0.3 * len(rows) + 1.6)
    figure, columns = plt.subplots(1, len(figures), figsize=size, sharey=True, layout="constrained")
    colours = iter(PALETTE * 3)
    styles = {name: _style(name, colours) for name in names}
    for axes, (key, heading) in zip(columns, figures.items(), strict=True):
        for name in names:
            values = [table.median(name, f"{key} {row}") for row in rows]
            if key == relative:
                own = [table.median(contestants[0], f"{key} {row}") for row in rows]
                values = [v and o and v / o for v, o in zip(values, own, strict=True)]
            known = [(value, at) for at, value in enumerate(values) if value is not None]
            if known:
                x, y = zip(*known, strict=True)
                axes.scatter(x, y, label=name.replace("-codec", ""), **styles[name])
        more = f", times that of {contestants[0]}" if key == relative else ""
        heading = heading + more.replace("-codec", "")  # noqa: PLW2901 (one more word)
        axes.set_title(heading, loc="left", fontsize=10, color=INK)
        axes.set_xscale("log")
        if key == relative:
            axes.set_xlim(max(0.5, axes.get_xlim()[0]), min(2.0, axes.get_xlim()[1]))
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

    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low > 10 else (1, 1.2, 1.5, 2, 3, 5, 7, 8, 9)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=steps))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))

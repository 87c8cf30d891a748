"""A picture of each case: medians as bars with the range of the trials, ours in another colour."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from statistics import median

from suite.case import Case, Table
from suite.results import Results

OURS = "#1f5fbf"
OTHERS = "#b0b7c3"
INK = "#22262e"


def draw(cases: list[Case], results: Results) -> list[Path]:
    """Draw what was measured; give the files. Nothing where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    folder = results.folder / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    for case in cases:
        table = results.tables.get(case.name)
        if table is None or len(table.trials) == 0:
            continue
        path = folder / f"{case.name}.png"
        own = getattr(case, "draw", None)  # a case may have a picture of its own
        (own or _bars)(*([table, path] if own else [case, table, path]))
        drawn.append(path)
    return drawn


def _bars(case: Case, table: Table, path: Path) -> None:
    from matplotlib import pyplot as plt

    values = {
        name: [t[case.unit] for t in trials if case.unit in t]
        for name, trials in table.trials.items()
    }
    values = {name: v for name, v in values.items() if v}
    order = sorted(values, key=lambda n: median(values[n]), reverse=case.least_is_best)
    middles = [median(values[n]) for n in order]
    below = [m - min(values[n]) for n, m in zip(order, middles, strict=True)]
    above = [max(values[n]) - m for n, m in zip(order, middles, strict=True)]
    colours = [OURS if n.startswith("ours") else OTHERS for n in order]
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.32 * len(order)), layout="constrained")
    axes.barh(order, middles, xerr=[below, above], color=colours, ecolor=INK, height=0.7)
    axes.set_title(case.question, loc="left", fontsize=10, color=INK, wrap=True)
    axes.set_xlabel(case.unit.replace("_", " "))
    if middles and max(middles) > 30 * max(min(middles), 1e-12) > 0:
        axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=130)
    plt.close(figure)

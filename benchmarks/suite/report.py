"""The report: for each case a table of medians, what must hold, and how everybody was set up."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from suite.case import Case, Table
from suite.results import Results, machine

MARKS = {True: "met", False: "**missed**", None: "not judged"}


def _amount(figure: str, value: float) -> str:
    """Write a figure with the unit that its name ends in."""
    if figure.endswith("bytes"):
        for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.3g} {unit}"
        return f"{value:.0f} B"
    if figure.endswith("seconds"):
        for unit, size in (("s", 1.0), ("ms", 1e-3)):
            if abs(value) >= size:
                return f"{value / size:.3g} {unit}"
        return f"{value * 1e6:.3g} µs"
    return f"{value:,.4g}"


def _title(figure: str) -> str:
    for ending in ("_seconds", "_bytes"):
        figure = figure.removesuffix(ending)
    return figure.replace("_", " ")


def rows(case: Case, table: Table | None) -> list[str]:
    """Give the lines of a case's table: best first."""
    if table is None:
        return []
    own = getattr(case, "rows", None)  # a case may have tables of its own
    if own is not None:
        return list(own(table))
    figures = list(dict.fromkeys(f for ts in table.trials.values() for t in ts for f in t))
    figures = [f for f in figures if not case.shown or f in (case.unit, *case.shown)]
    shown = [case.unit] * (case.unit in figures) + [f for f in figures if f != case.unit]
    known = [c for c in table.trials if table.median(c, case.unit) is not None]
    known.sort(key=lambda c: table.median(c, case.unit) or 0.0, reverse=not case.least_is_best)
    if not known:
        return []
    ours = next((c.name for c in case.contestants() if c.name in table.trials), known[0])
    head = ["contestant", *map(_title, shown), f"× {ours}", "spread", "trials"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in known:
        cells = [name]
        for figure in shown:
            value = table.median(name, figure)
            cells.append("–" if value is None else _amount(figure, value))
        ratio = table.ratio(name, ours, case.unit)
        values = [t[case.unit] for t in table.trials[name] if case.unit in t]
        middle = median(values)
        spread = f"{(max(values) - min(values)) / middle:.0%}" if middle else "–"
        cells += ["–" if ratio is None else f"{ratio:.2f}", spread, str(len(values))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _case(case: Case, results: Results) -> list[str]:
    table = results.tables[case.name]
    lines = [f"### {case.number}. {case.name}", "", case.question, ""]
    caches = {"warm": "page cache warm", "cold": "cold", "none": "nothing is read"}
    lines += [f"Data: {case.data}. Cache: {caches[case.cache]}.", "", *rows(case, table), ""]
    for verdict in case.judge(table):
        lines.append(f"- {verdict.must}: {verdict.measured} — {MARKS[verdict.is_met]}")
    plot = results.folder / "plots" / f"{case.name}.png"
    if plot.exists():
        lines += ["", f"![{case.name}](plots/{plot.name})"]
    return [*lines, ""]


def _summary(cases: list[Case], results: Results) -> list[str]:
    lines = ["| case | must | measured | |", "|---|---|---|---|"]
    for case in cases:
        for verdict in case.judge(results.tables[case.name]):
            cells = [f"{case.number}. {case.name}", verdict.must, verdict.measured]
            lines.append(f"| {' | '.join(cells)} | {MARKS[verdict.is_met]} |")
    return lines


def write(cases: list[Case], results: Results) -> Path:
    """Write ``report.md`` beside the trials; give its path."""
    shown = [case for case in cases if case.name in results.tables]
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine().items())
    lines = ["# Benchmark report", "", f"Machine: {facts}.", ""]
    if results.quick:
        lines += ["**Quick run: tiny data, one round. Its ratios say nothing.**", ""]
    lines += [
        "Each figure is the median over trials. Each trial is a process of its own; a round runs",
        "every contestant once, so that what disturbs one disturbs all. `× …` is the median over",
        "the rounds of the ratio within a round. The spread is (largest - least) / median.",
        "",
        "## What must hold",
        "",
        *_summary(shown, results),
        "",
        "## Cases",
        "",
    ]
    for case in shown:
        lines += _case(case, results)
    lines += [
        "## How everybody was set up",
        "",
        "| contestant | settings | versions |",
        "|---|---|---|",
    ]
    for name, facts_of in sorted(results.versions.items()):
        versions = ", ".join(f"{k} {v}" for k, v in facts_of.items() if k != "settings" and v)
        lines.append(f"| {name} | {facts_of['settings']} | {versions} |")
    if results.absent:
        lines += ["", "Not taking part:", ""]
        lines += [f"- {name}: {why}" for name, why in sorted(results.absent.items())]
    if results.failed:
        lines += ["", "Failed:", ""]
        for name, why in sorted(results.failed.items()):
            lines += [f"- {name}", "", *(f"      {line}" for line in why.splitlines()), ""]
    path = results.folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path

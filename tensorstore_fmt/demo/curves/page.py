"""The page: all that was seen, as one HTML file that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tensorstore_fmt.demo.curves.comparison import (
    COLUMNS,
    EVALUATION_COLUMNS,
    RULE_COLUMNS,
    comparison,
    rules_log,
)
from tensorstore_fmt.demo.curves.observed import Observed
from tensorstore_fmt.demo.curves.pictures import COLOURS
from tensorstore_fmt.demo.report import bytes_text

__all__ = ["Traffic", "page"]

_REFRESH_S = 1
_ALONE = (
    "Everything here was read from the runs, by a process that knows where they lie and nothing "
    "else."
)

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #222;
  background: #f4f5f7; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 0 0 10px; }
p { margin: 6px 0 0; color: #444; }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 18px 20px;
  margin-top: 18px; overflow-x: auto; }
section svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: #666; font-weight: 600; border-bottom: 2px solid #e1e4e8; }
th, td { padding: 6px 14px 6px 0; vertical-align: top; }
td { border-bottom: 1px solid #eef0f2; font-variant-numeric: tabular-nums; }
th, td:not(:last-child) { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 8px; }
.badge { display: inline-block; font-size: 13px; font-weight: 600; border-radius: 12px;
  padding: 2px 12px; margin-left: 10px; vertical-align: 4px; }
.live { background: #e6f4ea; color: #137333; }
.done { background: #e8eaed; color: #3c4043; }
.alert td:nth-child(n+2) { color: #9b1c1c; }
pre { background: #f4f5f7; border-radius: 4px; padding: 10px 14px; font-size: 13px; margin: 0; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What was read of a run, against what it holds.

    Attributes
    ----------
    tensors_nbytes, stored_nbytes
        Of all that it holds, before and after encoding.
    fetched_nbytes, requests, chunk_nbytes
        What was fetched since the beginning, all looks together; chunks of tensors are part.
    """

    name: str
    tensors_nbytes: int
    stored_nbytes: int
    fetched_nbytes: int
    requests: int
    chunk_nbytes: int

    def row(self) -> tuple[str, ...]:
        """Give it as text, for the columns of the page."""
        return (
            self.name,
            bytes_text(self.tensors_nbytes),
            bytes_text(self.stored_nbytes),
            bytes_text(self.fetched_nbytes),
            f"{self.requests:,}",
            bytes_text(self.chunk_nbytes),
        )


TRAFFIC_COLUMNS = ("run", "holds", "stored as", "read in all", "requests", "read of tensors")
"""Of `Traffic.row`."""


def page(
    observed: Sequence[Observed],
    *,
    curves: str,
    statistics: str | None = None,
    traffic: Sequence[Traffic] = (),
    is_live: bool,
    looks: int,
    evaluated: Sequence[Sequence[str]] = (),
) -> str:
    """Write the page.

    Parameters
    ----------
    curves, statistics
        SVG files, as text.
    is_live
        Whether it is to load itself again and again.
    looks
        How often the runs were looked at.
    evaluated
        Rows of `evaluations_log`.
    """
    refresh = f'<meta http-equiv="refresh" content="{_REFRESH_S}">' if is_live else ""
    badge = '<span class="badge live">training goes on</span>'
    if not is_live:
        is_over = all(each.state in ("finished", "stopped") for each in observed)
        badge = f'<span class="badge done">{"finished" if is_over else "broken off"}</span>'
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}',
        f"<title>Loss curves</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{len(observed)} trainings, side by side{badge}</h1>",
        f"<p>{_ALONE}</p>",
        f"<section>{_inline(curves)}</section>",
        _section("Comparison", COLUMNS, comparison(observed), observed),
        _rules(observed, evaluated),
    ]
    if statistics is not None:
        note = (
            "<p>Drawn from the statistics that are stored beside the tensors. No tensor was read."
            "</p>"
        )
        parts.append(
            f"<section><h2>Gradients and weights</h2>{_inline(statistics)}{note}</section>"
        )
    if traffic:
        rows = [each.row() for each in traffic]
        section = _section("What was read, of what is stored", TRAFFIC_COLUMNS, rows, observed)
        note = f"<p>In {looks} looks while the trainings went on, and one at the end.</p>"
        parts.append(section.replace("</section>", f"{note}</section>"))
    if not is_live:
        parts.append(_commands(observed))
    return "\n".join([*parts, "</main></body></html>\n"])


def _rules(observed: Sequence[Observed], evaluated: Sequence[Sequence[str]]) -> str:
    rows = rules_log(observed)
    section = "<section><h2>Rules log</h2><p>No rule has fired.</p></section>"
    if rows:
        section = _section("Rules log", RULE_COLUMNS, rows, observed, kind="alert")
    if evaluated:
        section += _section("What rules looked at", EVALUATION_COLUMNS, evaluated, observed)
    return section


def _commands(observed: Sequence[Observed]) -> str:
    """Write what to type to see the same."""
    shown = next((each for each in observed if each.alerts), observed[0])
    names = [each for each in observed if each.state != "waiting"]
    if not names:
        return ""
    words = [
        f"tensorstore-fmt watch {shown.place} --alerts",
        f"tensorstore-fmt stat {shown.place} gradient/fc2.weight",
        f"tensorstore-fmt export {shown.place} loss.csv --names loss",
        f"tensorstore-fmt info {shown.place}",
    ]
    code = "\n".join(escape(word) for word in words)
    return f"<section><h2>See for yourself</h2><pre>{code}</pre></section>"


def _section(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    observed: Sequence[Observed],
    *,
    kind: str = "",
) -> str:
    """Write a table whose first column is the name of a training."""
    colours = {each.name: COLOURS[n % len(COLOURS)] for n, each in enumerate(observed)}
    heading = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for name, *cells in rows:
        dot = f'<span class="dot" style="background:{colours.get(name, "#999")}"></span>'
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f'<tr class="{kind}"><td>{dot}{escape(name)}</td>{rest}</tr>\n'
    return (
        f"<section><h2>{escape(title)}</h2><table><thead><tr>{heading}</tr></thead>"
        f"<tbody>{body}</tbody></table></section>"
    )


def _inline(svg: str) -> str:
    """Take the element out of an SVG file; without width and height it fills its place."""
    element = svg[svg.index("<svg") :]
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", element, count=1)

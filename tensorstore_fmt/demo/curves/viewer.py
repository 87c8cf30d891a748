"""The process that draws: it knows where the runs lie, and nothing else.

Works on its own too, on any runs that log ``loss``:
``python -m tensorstore_fmt.demo.curves.viewer FOLDER URL [URL …]``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from tensorstore_fmt import rules
from tensorstore_fmt.demo.curves.comparison import (
    COLUMNS,
    RULE_COLUMNS,
    comparison,
    ending,
    evaluations_log,
    lines,
    rules_log,
)
from tensorstore_fmt.demo.curves.observed import Curve, Observed, Reader
from tensorstore_fmt.demo.curves.page import TRAFFIC_COLUMNS, Traffic, page
from tensorstore_fmt.demo.curves.pictures import draw_curves, draw_statistics, figure_bytes
from tensorstore_fmt.demo.digits.observation import OPTIONS_VARIABLE
from tensorstore_fmt.errors import TensorStoreError

__all__ = ["Viewer", "main"]

_LOOK_S = 0.2
_DRAW_S = 1.0  # at most so often: a picture costs a good part of a second
_SILENCE_S = 120.0  # then the trainings are taken for dead
_BARS = " ▁▂▃▄▅▆▇█"
_COLUMNS = 76
_SHORT: Callable[[Sequence[str]], tuple[str, ...]] = itemgetter(0, 2, 3, 4, 5, 6)


class Viewer:
    """Looks at runs until they are closed, and keeps pictures and a page of them.

    Parameters
    ----------
    folder
        Gets ``report.html`` and ``curves.svg`` while the trainings go on; at the end also
        ``statistics.svg``, both as PNG, and ``summary.json``.
    """

    def __init__(
        self,
        urls: Sequence[str],
        folder: Path,
        *,
        storage_options: Mapping[str, object] | None = None,
    ) -> None:
        self._readers = [Reader(url, storage_options=storage_options) for url in urls]
        self._folder = folder
        self._looks = 0
        self._lines = 0

    def follow(self, *, is_over: Callable[[], bool] = lambda: False) -> None:
        """Draw whenever something came, until all runs are closed.

        Parameters
        ----------
        is_over
            Asked now and then; ends it, too.

        Raises
        ------
        TimeoutError
            Nothing came for two minutes.
        """
        self._draw_live(self._look())
        print(f"draws {self._folder / 'report.html'}", flush=True)
        drawn_at, news_at, is_new = -math.inf, time.monotonic(), False
        while not is_over() and not all(reader.is_closed for reader in self._readers):
            has_news = any([reader.refresh() for reader in self._readers])  # noqa: C419 - each
            is_new |= has_news
            now = time.monotonic()
            if has_news:
                news_at = now
            elif now - news_at > _SILENCE_S:
                raise TimeoutError(f"nothing came for {_SILENCE_S:g} s from runs that are open")
            if is_new and now - drawn_at >= _DRAW_S:
                is_new = False
                observed = self._look()
                self._say(observed)
                self._draw_live(observed)
                self._looks += 1
                drawn_at = time.monotonic()
            time.sleep(_LOOK_S)

    def finish(self) -> None:
        """Draw all that there is, a last time, and say it."""
        observed = self._look()
        self._draw_all(observed)
        traffic = self._traffic()
        found = rules_log(observed)
        say = partial(print, flush=True)
        say()
        rows = comparison(observed)
        # Without the rate, which is in the name, and the state, which is said at the end.
        for text in lines(_SHORT(COLUMNS), [_SHORT(row) for row in rows]):
            say(text)
        say()
        say("\n".join(lines(RULE_COLUMNS, found)) if found else "No rule has fired.")
        say()
        for text in lines(TRAFFIC_COLUMNS, [each.row() for each in traffic]):
            say(text)
        summary = {
            "runs": [_described(each) for each in observed],
            "traffic": [asdict(each) for each in traffic],
            "looks": self._looks,
        }
        text = json.dumps(summary, indent=2, allow_nan=False)
        _replace(self._folder / "summary.json", text.encode())

    def close(self) -> None:
        """Close the runs."""
        for reader in self._readers:
            reader.close()

    def _look(self) -> list[Observed]:
        return [reader.look() for reader in self._readers]

    def _draw_live(self, observed: Sequence[Observed]) -> None:
        (curves,) = figure_bytes(partial(draw_curves, observed), "svg")
        text = page(observed, curves=curves.decode(), is_live=True, looks=self._looks)
        _replace(self._folder / "curves.svg", curves)
        _replace(self._folder / "report.html", text.encode())

    def _draw_all(self, observed: Sequence[Observed]) -> None:
        runs = {reader.name: reader.run for reader in self._readers if reader.run is not None}
        curves, curves_png = figure_bytes(partial(draw_curves, observed), "svg", "png")
        statistics, statistics_png = figure_bytes(
            partial(draw_statistics, runs, observed), "svg", "png"
        )
        text = page(
            observed,
            curves=curves.decode(),
            statistics=statistics.decode(),
            traffic=self._traffic(),
            is_live=False,
            looks=self._looks,
            evaluated=[
                row
                for name, run in runs.items()
                for row in evaluations_log(name, rules.evaluations(run))
            ],
        )
        for name, data in (
            ("curves.svg", curves),
            ("curves.png", curves_png),
            ("statistics.svg", statistics),
            ("statistics.png", statistics_png),
            ("report.html", text.encode()),
        ):
            _replace(self._folder / name, data)

    def _traffic(self) -> list[Traffic]:
        return [
            Traffic(
                name=reader.name,
                tensors_nbytes=sum(reader.run[name].nbytes for name in reader.run),
                stored_nbytes=sum(reader.run[name].stored_nbytes for name in reader.run),
                fetched_nbytes=reader.meter.fetched_nbytes,
                requests=len(reader.meter.requests),
                chunk_nbytes=reader.meter.chunk_nbytes,
            )
            for reader in self._readers
            if reader.run is not None and reader.meter is not None
        ]

    def _say(self, observed: Sequence[Observed]) -> None:
        """Print one line: each training's last step, its loss, and its curve so far."""
        if not any(len(each.loss) for each in observed):
            return
        width = max((_COLUMNS - 2 * len(observed)) // len(observed), 14)
        if self._lines % 12 == 0:
            names = (f"{each.name}: step, loss" for each in observed)
            print("  ".join(name[:width].ljust(width) for name in names).rstrip(), flush=True)
        self._lines += 1
        print("  ".join(_cell(each, width) for each in observed).rstrip(), flush=True)


def _cell(each: Observed, width: int) -> str:
    if not len(each.loss):
        return "(not there yet)"[:width].ljust(width)
    what = {"stopped": "stopped", "finished": "done"}.get(each.state) or (
        f"{each.loss.values[-1]:.3g}"
    )
    head = f"{each.steps:>4} {what:<8} "
    return (head + _sparkline(each.loss, max(width - len(head), 0))).ljust(width)


def _sparkline(curve: Curve, width: int) -> str:
    """Draw the last of a curve in a line of text, on a log scale."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    if not encoding.startswith("utf") or width < 2:
        return ""
    values = curve.values[np.linspace(0, len(curve) - 1, width).round().astype(int)]
    first = float(curve.values[0])
    with np.errstate(all="ignore"):
        height = 1 + np.log10(values / first) / 2  # one at what it was at first, a decade a half
    height = np.clip(np.nan_to_num(height, nan=1.0, posinf=1.0), 0.05, 1.0)
    return "".join(_BARS[round(each * (len(_BARS) - 1))] for each in height.tolist())


def _described(each: Observed) -> dict[str, Any]:
    """Give what a program would ask of a training, as JSON can say it."""
    cause = each.cause

    def last(curve: Curve) -> float | None:
        value = curve.values[-1] if len(curve) else math.nan
        return float(value) if math.isfinite(value) else None

    return {
        "name": each.name,
        "state": each.state,
        "learning_rate": each.learning_rate,
        "steps": each.steps,
        "planned": each.planned,
        "last_loss": last(each.loss),
        "best_loss": each.loss.best(least=True),
        "last_accuracy": last(each.test_accuracy),
        "best_accuracy": each.test_accuracy.best(least=False),
        "alerts": len(each.alerts),
        "ending": ending(each),
        "stopped_by": None if cause is None else cause.rule,
        "fired_at": None if cause is None else cause.step,
        "reason": each.reason,
    }


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that nobody sees half of it."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(data)
    os.replace(draft, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw until all runs are closed; 1 if they could not be read."""
    parser = argparse.ArgumentParser(
        prog="python -m tensorstore_fmt.demo.curves.viewer",
        description="Draw loss curves of runs while they are written, and a report at the end.",
        epilog=f"Storage options are read as JSON from the environment: {OPTIONS_VARIABLE}.",
    )
    parser.add_argument("folder", help="for pictures and page; local")
    parser.add_argument("urls", metavar="url", nargs="+", help="folders or URLs of the runs")
    options = parser.parse_args(arguments)
    storage_options = json.loads(os.environ.get(OPTIONS_VARIABLE, "null"))
    signals: list[int] = []
    # After Ctrl-C, too, the page is finished: else it would load itself for ever.
    signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    viewer = Viewer(options.urls, Path(options.folder), storage_options=storage_options)
    with contextlib.closing(viewer):
        try:
            try:
                viewer.follow(is_over=lambda: bool(signals))
            finally:
                viewer.finish()
        except (TensorStoreError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

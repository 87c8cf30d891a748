"""Case 3: how long `log` keeps the caller, beside what copying the same bytes takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np

import datasets
from peers.ours import Ours, OursNumPy, OursRaw
from suite.case import Case, Figures, Place, Table, Verdict
from suite.contestant import Contestant
from suite.plots import INK, OTHERS, OURS

NBYTES = 16 << 20
PIECES = 16
ROUNDS = 15
LIMIT = 1.5
BARS = {
    "warm_copy": "np.copyto, into memory in use",
    "log": "log, one tensor of 16 MB",
    "log_pieces": "log, 16 tensors of 1 MB in one call",
    "fresh_copy": "array.copy(), into new memory",
    "busy_copy": "np.copyto, while the writer works",
    "busy_log": "log, while the writer works",
}


class Blocking(Case):
    """Everything is measured in one process, in turns."""

    number: ClassVar[int] = 3
    cache = "none"
    name = "blocking"
    question = "How long does log keep the training's thread, for 16 MB?"
    data = (
        "16 MiB of float32 weights; each round lets the writer finish first, but for what is "
        "called busy: those follow at once on a call of log, while its tensor is encoded"
    )
    unit = "log_seconds"

    def contestants(self) -> Sequence[type[Contestant]]:
        return [Ours, OursNumPy, OursRaw]

    def trial(self, contestant: Contestant, place: Place) -> Figures:
        import tensorstore_fmt as tsf

        assert isinstance(contestant, Ours)
        weights = datasets.load("weights_f32", quick=place.quick).reshape(-1)
        values = np.array(weights[: NBYTES // weights.itemsize])
        pieces = {f"piece{i}": piece for i, piece in enumerate(np.array_split(values, PIECES))}
        times: dict[str, list[float]] = {key: [] for key in BARS}
        warm, kept = values.copy(), []
        with tsf.create_run(place.scratch / "run", **contestant.options) as run:
            for i in range(4 if place.quick else ROUNDS + 2):
                actions: dict[str, Callable[[], Any]] = {
                    "warm_copy": lambda: np.copyto(warm, values),
                    "fresh_copy": lambda: kept.append(values.copy()),
                    "log": lambda i=i: run.log({"whole": values}, step=4 * i),
                    "log_pieces": lambda i=i: run.log(pieces, step=4 * i + 1),
                }
                for key, action in actions.items():
                    _change(values)
                    run.flush()
                    times[key].append(_seconds(action))
                _change(values)
                run.flush()
                run.log({"whole": values}, step=4 * i + 2)
                times["busy_copy"].append(_seconds(actions["warm_copy"]))
                busy = partial(run.log, {"whole": values}, step=4 * i + 3)
                times["busy_log"].append(_seconds(busy))
        _check(place, values, len(kept))
        found = {key: np.array(of[2:]) for key, of in times.items()}  # two rounds to warm up
        figures = {f"{key}_seconds": median(of) for key, of in found.items()}
        for key, beside in (
            ("log", "warm_copy"),
            ("log_pieces", "warm_copy"),
            ("busy_log", "busy_copy"),
        ):
            figures[f"{key}_per_copy"] = float(np.median(found[key] / found[beside]))
        # What a busy machine does to the middle, it does not do to the least.
        figures["least_log_per_copy"] = found["log"].min() / found["warm_copy"].min()
        figures["log_per_fresh_copy"] = float(np.median(found["log"] / found["fresh_copy"]))
        return figures

    def judge(self, table: Table) -> list[Verdict]:
        verdicts = []
        for ours in (Ours, OursRaw):
            must = f"{ours.name}: log ≤ {LIMIT:g} × np.copyto into memory in use"
            found = table.median(ours.name, "log_per_copy")
            if found is None:
                verdicts.append(Verdict(must, "not measured", None))
                continue
            others = {
                "least": table.median(ours.name, "least_log_per_copy"),
                "16 tensors of 1 MB": table.median(ours.name, "log_pieces_per_copy"),
                "beside array.copy()": table.median(ours.name, "log_per_fresh_copy"),
            }
            more = [f"{what} {value:.2f} ×" for what, value in others.items() if value is not None]
            measured = f"{found:.2f} × ({', '.join(more)})"
            verdicts.append(Verdict(must, measured, found <= LIMIT))
        return verdicts

    def draw(self, table: Table, path: Path) -> None:
        """Draw what each way of copying takes, with default settings."""
        from matplotlib import pyplot as plt

        keys = [key for key in BARS if table.median(Ours.name, f"{key}_seconds") is not None]
        values = [1e3 * (table.median(Ours.name, f"{key}_seconds") or 0) for key in keys]
        figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
        colours = [OURS if "log" in key else OTHERS for key in keys]
        bars = axes.barh([BARS[key] for key in keys], values, color=colours, height=0.7)
        axes.bar_label(bars, fmt="%.1f", padding=3, color=INK, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.set_title(self.question, loc="left", fontsize=10, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _change(values: np.ndarray) -> None:
    """Make another tensor of it: what was stored before would not be stored again."""
    np.multiply(values, np.float32(1.0001), out=values)


def _seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _check(place: Place, values: np.ndarray, rounds: int) -> None:
    import tensorstore_fmt as tsf

    with tsf.open_run(place.scratch / "run") as run:
        found = run["whole"].read(step=4 * rounds - 1)
    if found.tobytes() != values.tobytes():
        raise RuntimeError("what was logged last came back otherwise")


CASES: list[Case] = [Blocking()]

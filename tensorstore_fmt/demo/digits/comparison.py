"""Slices of many kinds, read back from the run and compared with what the training remembers."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

import tensorstore_fmt as tsf
from tensorstore_fmt.demo import report
from tensorstore_fmt.demo.digits.training import COPIED, Memory
from tensorstore_fmt.demo.report import Check
from tensorstore_fmt.testing.storage import CountingStorage

__all__ = ["read_back", "strongest_units"]

_LOOKS_ALIKE = 0.5  # cosine of the angle between the incoming weights of two units


def strongest_units(weight: npt.NDArray[np.generic], *, count: int) -> list[int]:
    """Choose up to `count` units, those with the largest incoming weights, strongest first.

    Leaves out units that look like one already chosen: many learn nearly the same.
    """
    columns = weight.astype(np.float64)
    norms = np.linalg.norm(columns, axis=0)
    directions = columns / np.maximum(norms, np.finfo(np.float64).tiny)
    chosen: list[int] = []
    for unit in np.argsort(-norms, kind="stable"):
        if len(chosen) == count:
            break
        if np.all(directions[:, chosen].T @ directions[:, unit] < _LOOKS_ALIKE):
            chosen.append(int(unit))
    return chosen


def read_back(run: tsf.Run, counting: CountingStorage, memory: Memory) -> list[Check]:
    """Read slices of many kinds and compare each with `memory`, bit for bit.

    Statistics are compared to six digits instead: the store adds in float32 at first.
    """
    last = len(memory.loss) - 1
    unit = strongest_units(_array(memory.last[COPIED]), count=1)[0]
    copied = [memory.copies[step] for step in sorted(memory.copies)]
    end = max(memory.copies) + 1
    many = ("fc1.bias", "fc2.bias", "fc3.bias")
    slope = "gradient/fc2.weight"
    compare = partial(report.compare, counting)
    return [
        compare(
            'run["loss"].read(mode="TRAIN")',
            lambda: run["loss"].read(mode="TRAIN"),
            np.array(memory.loss),
        ),
        compare(
            'run["accuracy"].read(mode="EVAL")',
            lambda: run["accuracy"].read(mode="EVAL"),
            np.array(list(memory.test_accuracy.values())),
        ),
        compare(
            f'run["{COPIED}"].read(steps=slice(0, {end}), index=np.s_[:, {unit}])',
            lambda: run[COPIED].read(steps=slice(0, end), index=np.s_[:, unit]),
            np.stack([copy[:, unit] for copy in copied]),
        ),
        compare(
            f'run["{COPIED}"].read(step=0)',
            lambda: run[COPIED].read(step=0),
            memory.copies[0],
        ),
        compare(
            f'run["{slope}"].at({last})[-16:, ::8]',
            lambda: run[slope].at(last)[-16:, ::8],
            _array(memory.last[slope])[-16:, ::8],
        ),
        compare(
            f'run["activation/fc1"].read(step={last}, index=0)',
            lambda: run["activation/fc1"].read(step=last, index=0),
            _array(memory.last["activation/fc1"])[0],
        ),
        compare(
            f'run.read([(f"fc{{i}}.bias", {last}, np.s_[:10]) for i in (1, 2, 3)])',
            lambda: np.stack(run.read([(name, last, np.s_[:10]) for name in many])),
            np.stack([_array(memory.last[name])[:10] for name in many]),
        ),
        compare(
            f'run["{slope}"].stats()["l2"]',
            lambda: run[slope].stats()["l2"],
            np.array(memory.gradient_l2[slope]),
            tolerance=1e-6,
        ),
    ]


def _array(value: object) -> npt.NDArray[np.generic]:
    assert isinstance(value, np.ndarray)  # the training put it there
    return value

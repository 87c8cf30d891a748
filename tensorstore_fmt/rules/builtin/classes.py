"""Rules on labels and predictions of a classification."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.rules.block import Block, Item
from tensorstore_fmt.rules.parameters import parameter
from tensorstore_fmt.rules.rule import Finding, Needs, Rule, Series

__all__ = ["ClassImbalance", "Confusion"]

_MOST_CLASSES = 10_000


class ClassesRule(Rule):
    """Pairs labels with predictions of the same step, and counts them by class.

    Labels are integers, one a sample. Predictions are classes, or scores whose last axis is the
    class (the greatest one counts); the sample is the axis before it.
    """

    labels: str = parameter(r"(^|/)(labels?|targets?)$", is_pattern=True)
    predictions: str = parameter(r"^output$|(^|/)(predictions?|logits)$", is_pattern=True)
    mode: str | None = parameter(None, choices=("TRAIN", "EVAL", "PREDICT", "NONE"))
    samples: int = parameter(500, least=1)

    _matrix: dict[tuple[str, int | None], NDArray[np.int64]]

    def begin(self) -> None:
        """Forget all samples."""
        self._matrix = {}

    def needs(self) -> Sequence[Needs]:
        """Labels and predictions."""
        return [
            Needs(names=self.labels, mode=self.mode, values=True),
            Needs(names=self.predictions, mode=self.mode, values=True),
        ]

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Count the samples of each step, and look at the counts."""
        labels = _by_place(block.saved(self.labels, self.mode))
        for place, (series, steps) in _by_place(block.saved(self.predictions, self.mode)).items():
            if place not in labels:
                continue
            of_labels, label_steps = labels[place]
            both = np.intersect1d(steps, label_steps).tolist()
            items: list[Item] = [(s, step, ()) for step in both for s in (of_labels, series)]
            values = block.read(items)
            for step in both:
                matrix = self._add(place, next(values), next(values))
                if matrix.sum() >= self.samples:
                    yield from self.look_at(series, step, matrix)

    def _add(
        self,
        place: tuple[str, int | None],
        labels: Any,  # noqa: ANN401 - arrays
        predictions: Any,  # noqa: ANN401
    ) -> NDArray[np.int64]:
        """Add samples to the matrix of a place: [label, prediction]."""
        true = np.asarray(labels).reshape(-1).astype(np.int64)
        scores = np.asarray(predictions)
        n = 0
        if scores.size != true.size:
            n = scores.shape[-1] if scores.ndim else 0
            scores = scores.argmax(axis=-1)
        guess = scores.reshape(-1).astype(np.int64)
        if len(true) != len(guess):
            raise ValueError(
                f"{len(true)} labels and {len(guess)} predictions at one step: set labels= and "
                "predictions= to names that belong together"
            )
        n = max(n, int(true.max(initial=-1)) + 1, int(guess.max(initial=-1)) + 1)
        if n > _MOST_CLASSES or min(true.min(initial=0), guess.min(initial=0)) < 0:
            raise ValueError(f"classes are numbers from 0 to {_MOST_CLASSES - 1}; here are others")
        matrix = self._matrix.get(place, np.zeros((0, 0), np.int64))
        if len(matrix) < n:
            matrix = np.pad(matrix, (0, n - len(matrix)))
        np.add.at(matrix, (true, guess), 1)
        self._matrix[place] = matrix
        return matrix

    @abstractmethod
    def look_at(self, series: Series, step: int, matrix: NDArray[np.int64]) -> Iterator[Finding]:
        """Look at the counts, [label, prediction], of at least `samples` samples."""


def _by_place(
    saved: Sequence[tuple[Series, NDArray[np.int64]]],
) -> dict[tuple[str, int | None], tuple[Series, NDArray[np.int64]]]:
    """Give the first series of each mode and worker."""
    found: dict[tuple[str, int | None], tuple[Series, NDArray[np.int64]]] = {}
    for series, steps in saved:
        found.setdefault((series.mode, series.worker), (series, steps))
    return found


class ClassImbalance(ClassesRule):
    """Classes of which there are too few samples, or that are hardly ever right.

    After `samples` labels, and at each step from then on: fires where the largest class has more
    than `ratio` times the samples of the smallest (one that has none counts as having one), and
    where of a class with at least `samples` / (10 × classes) samples more than `misprediction` are
    predicted wrongly. Reads values of labels and predictions.
    """

    ratio: float = parameter(10.0, least=1)
    misprediction: float = parameter(0.7, least=0, most=1)

    def look_at(self, series: Series, step: int, matrix: NDArray[np.int64]) -> Iterator[Finding]:
        """Compare classes."""
        n = matrix.sum(axis=1)
        ratio = n.max() / max(int(n.min()), 1)
        for _ in self.begins((series, "ratio"), np.array([ratio > self.ratio])):
            yield self.found(
                series,
                step,
                f"class {n.argmax()} has {n.max()} samples, class {n.argmin()} has {n.min()}",
                value=ratio,
                threshold=self.ratio,
            )
        with np.errstate(all="ignore"):
            wrong = np.where(
                n * 10 * len(n) >= self.samples, 1 - matrix.diagonal() / np.maximum(n, 1), 0.0
            )
        for i, share in enumerate(wrong.tolist()):
            for _ in self.begins((series, i), np.array([share > self.misprediction])):
                yield self.found(
                    series,
                    step,
                    f"{share:.0%} of the samples of class {i} are predicted wrongly",
                    value=share,
                    threshold=self.misprediction,
                )


class Confusion(ClassesRule):
    """Classes that are taken for others.

    Of every `samples` samples the confusion matrix is made, each row divided by its sum. Fires
    for classes whose cell on the diagonal is below `diagonal`, and for other cells above
    `off_diagonal`. Reads values of labels and predictions.
    """

    diagonal: float = parameter(0.9, least=0, most=1)
    off_diagonal: float = parameter(0.1, least=0, most=1)

    def look_at(self, series: Series, step: int, matrix: NDArray[np.int64]) -> Iterator[Finding]:
        """Look at the matrix, and begin a new one."""
        n = matrix.sum(axis=1)
        share = matrix / np.maximum(n, 1)[:, None]
        self._matrix[series.mode, series.worker] = np.zeros_like(matrix)
        for i in range(len(n)):
            low = n[i] > 0 and share[i, i] < self.diagonal
            for _ in self.begins((series, i), np.array([low])):
                yield self.found(
                    series,
                    step,
                    f"{share[i, i]:.0%} of class {i} are predicted rightly",
                    value=share[i, i],
                    threshold=self.diagonal,
                )
            row = share[i].copy()
            row[i] = 0
            worst = int(row.argmax())
            for _ in self.begins((series, i, "off"), np.array([row[worst] > self.off_diagonal])):
                yield self.found(
                    series,
                    step,
                    f"{row[worst]:.0%} of class {i} are taken for class {worst}",
                    value=row[worst],
                    threshold=self.off_diagonal,
                )

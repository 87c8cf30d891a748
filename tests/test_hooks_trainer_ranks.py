"""Trainings of two ranks with the libraries that people train with: saved, stopped, gone on in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tensorstore_fmt as tsf

pytest.importorskip("torch")

from support import torch_ranks, trainer_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_two_ranks_stop_together_and_go_on(library: str, tmp_path: Path) -> None:
    """Step k is the k-th update with Transformers, the batch k from 0 with Lightning."""
    pytest.importorskip(library)
    train = getattr(trainer_ranks, library)
    for i, goes_on in enumerate((False, True)):
        torch_ranks.run_ranks(train, str(tmp_path / f"store{i}"), str(tmp_path), goes_on)

    def said(name: str) -> int:
        return int((tmp_path / name).read_text("utf-8"))

    stopped, resumed, ended = said("first-0"), said("resumed"), said("again-0")
    assert (said("first-1"), said("again-1")) == (stopped, ended)  # on both after the same step
    assert 3 < stopped < 10_000
    assert ended == resumed + trainer_ranks.MORE
    first = 1 if library == "transformers" else 0
    with tsf.open_run(tmp_path / "run") as run:
        assert run.is_closed
        assert run.attempts == [0, 1]
        assert run.workers == [0, 1]
        assert run["loss"].workers == (0,)
        assert run["loss"].select(attempt=0).steps.tolist() == [*range(first, stopped + first)]
        weight, gradient = run["head.weight"], run["gradient/head.weight"]
        for tensor in (weight, gradient):
            for worker in (0, 1):
                steps = tensor.select(worker=worker).steps.tolist()
                assert steps == [*range(first, ended + first)]
            for step in (first, resumed + first, ended + first - 1):
                of_ranks = [tensor.read(step=step, worker=worker) for worker in (0, 1)]
                np.testing.assert_array_equal(*of_ranks)  # averaged
        outputs = [run["head/output"].read(step=ended + first - 1, worker=w) for w in (0, 1)]
        assert not np.array_equal(*outputs)  # each has batches of its own
        before = (
            weight.read(step=resumed + first, worker=1, attempt=0) if stopped > resumed else None
        )
        if before is not None:  # the same weights begin the step that is done again
            np.testing.assert_array_equal(weight.read(step=resumed + first, worker=1), before)

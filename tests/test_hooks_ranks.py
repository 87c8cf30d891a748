"""The PyTorch hook in trainings of two processes: every rank, one rank, parts of one tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import AmbiguousError

pytest.importorskip("torch")

from support import torch_ranks

pytestmark = pytest.mark.slow


def test_all_ranks(tmp_path: Path) -> None:
    """Each rank saves its own activations; parameters and averaged gradients are the same."""
    url = tmp_path / "run"
    torch_ranks.run_ranks(torch_ranks.ddp, str(tmp_path / "store"), str(url), "all")
    with tsf.open_run(url) as run:
        assert run.is_closed
        assert list(run.workers) == [0, 1]
        with pytest.raises(AmbiguousError):
            run["0/output"].read(step=1)
        outputs = [run["0/output"].read(step=1, worker=worker) for worker in (0, 1)]
        assert not np.array_equal(*outputs)
        for name in ("0.weight", "gradient/0.weight"):
            of_ranks = [run[name].read(step=2, worker=worker) for worker in (0, 1)]
            np.testing.assert_array_equal(*of_ranks)


def test_one_rank(tmp_path: Path) -> None:
    url = tmp_path / "run"
    torch_ranks.run_ranks(torch_ranks.ddp, str(tmp_path / "store"), str(url), "one")
    with tsf.open_run(url) as run:
        assert run.is_closed
        assert list(run.workers) == [0]
        assert run["gradient/2.weight"].steps.tolist() == [0, 1, 2]


def test_sharded_parameters_are_parts_of_one_tensor(tmp_path: Path) -> None:
    """FSDP: each rank saves what it holds, and a reader sees the whole tensor."""
    url = tmp_path / "run"
    torch_ranks.run_ranks(torch_ranks.fsdp, str(tmp_path / "store"), str(url))
    with tsf.open_run(url) as run:
        for step in (0, 1):
            for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
                whole = run[f"check/{name}"].read(step=step)
                np.testing.assert_array_equal(run[name].read(step=step), whole)
                assert run[f"gradient/{name}"].read(step=step).shape == whole.shape
                assert run[f"optimizer/{name}/exp_avg"].read(step=step).shape == whole.shape

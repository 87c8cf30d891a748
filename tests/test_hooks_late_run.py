"""A run that several ranks open, go on in, and are stopped through."""

from __future__ import annotations

from pathlib import Path

import pytest

import tensorstore_fmt as tsf

pytest.importorskip("torch")

from support import late_runs, torch_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("all_write", [True, False])
def test_ranks_go_on_in_one_attempt_and_stop_together(tmp_path: Path, all_write: bool) -> None:
    url = str(tmp_path / "run")
    for first, resume in ((0, False), (2, True)):
        store = str(tmp_path / f"store{first}")
        torch_ranks.run_ranks(late_runs.go_on, store, url, first, resume, all_write)
    torch_ranks.run_ranks(late_runs.refused, str(tmp_path / "store"), url)
    with tsf.open_run(url) as run:
        assert run.is_closed
        assert run.attempts == [0, 1]
        assert run.workers == ([0, 1] if all_write else [0])
        for rank in run.workers:
            value = run["value"].select(worker=rank)
            assert value.read(step=1) == rank
            assert value.read(step=2) == 20 + rank
            assert value.read(step=2, attempt=0) == rank
        assert len({run["value"].select(worker=w).steps[-1] for w in run.workers}) == 1

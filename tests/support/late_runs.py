"""What each rank does with a run that all ranks open; for `torch_ranks.run_ranks`."""

from __future__ import annotations

import time

from torch import distributed

from tensorstore_fmt.hooks.late_run import LateRun, open_on_all_ranks
from tensorstore_fmt.rules import request_stop


def go_on(rank: int, url: str, first: int, resume: bool, all_write: bool) -> None:
    """Log from a step on until somebody asks to stop, which rank 1 does."""
    run = LateRun(url, resume=resume)
    opened = open_on_all_ranks(run, first, all_write=all_write, is_stoppable=True)
    assert opened.watcher is not None
    assert (opened.writer is None) == (rank == 1 and not all_write)
    step = first
    while not opened.watcher.should_stop(step):
        if opened.writer is not None:
            opened.writer.log({"value": float(10 * first + rank)}, step=step)
        if rank == 1 and step == first + 2:
            request_stop(url, "enough")
        time.sleep(0.01)
        distributed.barrier()  # as gradients that are averaged
        step += 1
    opened.watcher.close()
    if opened.writer is not None:
        opened.writer.close()


def refused(rank: int, url: str) -> None:
    """Open a finished run, which all ranks are told."""
    from tensorstore_fmt.errors import RunExistsError

    try:
        open_on_all_ranks(LateRun(url), 0, all_write=True)
    except RunExistsError:
        return
    raise AssertionError(f"rank {rank} was not told")

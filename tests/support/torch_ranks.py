"""What each rank of a small distributed training does: run by `torch.multiprocessing`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tensorstore_fmt.hooks import Collection
from tensorstore_fmt.hooks.torch import attach

RANKS = 2


def run_ranks(function: Callable[..., None], *args: Any) -> None:
    """Run a function on both ranks; raises what one of them raises."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    # A file store would do, but gloo wants an address to listen on anyway.
    context = mp.spawn(_rank, (function, *args), nprocs=RANKS, join=False)
    assert context is not None
    while not context.join(timeout=120):
        pass


def _rank(rank: int, function: Callable[..., None], store: str, *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def _model() -> Any:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))


def _batch(rank: int, step: int) -> Any:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))


def ddp(rank: int, url: str, workers: Any) -> None:
    model = torch.nn.parallel.DistributedDataParallel(_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    collections = ["weights", "gradients", "activations"]
    with attach(
        model, url, optimizer=optimizer, collections=collections, every=1, workers=workers,
        on_error="raise",
    ):  # fmt: skip
        for step in range(3):
            optimizer.zero_grad()
            model(_batch(rank, step)).pow(2).sum().backward()
            optimizer.step()


def fsdp(rank: int, url: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    collections = [
        "weights",
        "biases",
        "gradients",
        "optimizer",
        Collection(name="o", modules=["2"]),
    ]
    with attach(
        model, url, optimizer=optimizer, collections=collections, every=1, on_error="raise"
    ) as hook:
        for step in range(2):
            whole = {n: p.full_tensor().detach().clone() for n, p in model.named_parameters()}
            optimizer.zero_grad()
            model(_batch(rank, step)).pow(2).sum().backward()
            optimizer.step()
            if rank == 0:
                hook.log({f"check/{name}": tensor for name, tensor in whole.items()})


def ddp_until_stopped(rank: int, url: str, workers: Any, out: str) -> None:
    """Train until somebody asks to stop; rank 1 is slower, rank 0 evaluates now and then."""
    from tensorstore_fmt.rules import TrainingStopped, request_stop

    model = torch.nn.parallel.DistributedDataParallel(_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    done = 0
    with attach(
        model, url, optimizer=optimizer, collections=["losses"], every=1, workers=workers,
        stoppable=True, on_error="raise",
    ):  # fmt: skip
        try:
            for step in range(1_000_000):
                if rank == 0 and step % 3 == 2:
                    with torch.no_grad():
                        model.eval()
                        model.module(_batch(rank, step))
                        model.train()
                optimizer.zero_grad()
                model(_batch(rank, step)).pow(2).sum().backward()
                optimizer.step()
                done += 1
                if rank == 1 and step == 5:
                    request_stop(url, "enough")
        except TrainingStopped as stopped:
            Path(f"{out}-{rank}").write_text(f"{done} {stopped.step} {stopped.reason}")

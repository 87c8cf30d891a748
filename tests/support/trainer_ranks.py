"""Real trainings of two ranks with Transformers and Lightning; for `torch_ranks.run_ranks`.

Each trains until rank 1 asks to stop, or goes on from the last checkpoint for a few steps, and
leaves behind at which step it ended.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from tensorstore_fmt.hooks import Collection
from tensorstore_fmt.rules import request_stop

MORE = 4
"""Steps of the second training."""
COLLECTIONS = ["weights", "gradients", Collection(name="outputs", modules=["head"])]


def _environment(rank: int) -> None:
    """Say what `torchrun` says."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="none",
    )  # fmt: skip
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _data() -> list[dict[str, Any]]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": int(row[0] > 0)} for row in x]


def _end(folder: Path, rank: int, kind: str, step: int) -> None:
    (folder / f"{kind}-{rank}").write_text(str(step))


def transformers(rank: int, where: str, goes_on: bool) -> None:
    _environment(rank)
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from tensorstore_fmt.hooks.transformers import RunCallback

    folder = Path(where)

    class Ask(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if rank == 1 and state.global_step == 3 and not goes_on:
                request_stop(folder / "run", "enough")

    class Model(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.head = torch.nn.Linear(4, 2)

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            logits = self.head(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    last = max((int(p.name.split("-")[1]) for p in folder.glob("out/checkpoint-*")), default=0)
    args = TrainingArguments(
        str(folder / "out"), max_steps=last + MORE if goes_on else 10_000, save_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, ddp_backend="gloo", disable_tqdm=True,
        per_device_train_batch_size=2, dataloader_pin_memory=False, save_total_limit=2,
    )  # fmt: skip
    callback = RunCallback(folder / "run", collections=COLLECTIONS, every=1, on_error="raise")
    trainer = Trainer(Model(), args, train_dataset=_data(), callbacks=[callback, Ask()])
    checkpoint = str(folder / "out" / f"checkpoint-{last}") if goes_on else None
    trainer.train(resume_from_checkpoint=checkpoint)
    _end(folder, rank, "again" if goes_on else "first", trainer.state.global_step)
    if rank == 0 and goes_on:
        (folder / "resumed").write_text(str(last))


def lightning(rank: int, where: str, goes_on: bool) -> None:
    _environment(rank)
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy

    from tensorstore_fmt.hooks.lightning import RunCallback, RunLogger

    folder = Path(where)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.head = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any) -> Any:
            if rank == 1 and self.global_step == 3 and not goes_on:
                request_stop(folder / "run", "enough")
            loss = torch.nn.functional.cross_entropy(self.head(batch["x"]), batch["labels"])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    saver = ModelCheckpoint(folder / "out", save_last=True, every_n_train_steps=2, save_top_k=0)
    last = folder / "out" / "last.ckpt"
    done = torch.load(last, weights_only=False)["global_step"] if goes_on else 0
    torch.distributed.barrier()  # before anybody writes another one
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"),
        logger=RunLogger(folder / "run"), log_every_n_steps=1,
        callbacks=[RunCallback(COLLECTIONS, every=1), saver],
        max_steps=done + MORE if goes_on else 10_000, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(_data(), batch_size=2)
    trainer.fit(Module(), loader, ckpt_path=last if goes_on else None)
    _end(folder, rank, "again" if goes_on else "first", trainer.global_step)
    if rank == 0 and goes_on:
        (folder / "resumed").write_text(str(done))

"""What saves weights, gradients and activations of a PyTorch training while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suite.contestant import Contestant


class Saver(Contestant):
    """Attached to a model before it trains; saves every k-th step, counted from 0."""

    needs = ("torch", "mlxtend")
    distributions = ("torch", "numpy")

    def attach(self, model: Any, optimizer: Any, loss: Any, folder: Path, every: int) -> None:
        """Begin: nothing of this is timed."""
        raise NotImplementedError

    def before_forward(self, step: int) -> None:
        """Learn that a step begins."""

    def after_backward(self, step: int) -> None:
        """Learn that gradients are there, before the optimizer's step."""

    def settle(self) -> None:
        """Wait until what was given to the background is stored."""

    def begin(self) -> None:
        """Learn that what went before was to warm up, and is not measured."""

    def close(self) -> dict[str, float]:
        """Store all; give figures of its own."""
        return {}


class OursHook(Saver):
    """The library's hook for PyTorch."""

    name = "ours"
    settings = (
        "hooks.torch.attach(model, run, optimizer=…, every=k, collections=['weights', 'biases', "
        "'gradients', 'activations']), default settings: auto compression, statistics on"
    )
    needs = ("torch", "mlxtend", "tensorstore_fmt")
    distributions = ("tensorstore-fmt", "torch", "numpy")

    def attach(self, model: Any, optimizer: Any, loss: Any, folder: Path, every: int) -> None:
        from tensorstore_fmt.hooks.torch import attach

        self._hook = attach(
            model,
            folder,
            optimizer=optimizer,
            every=every,
            collections=["weights", "biases", "gradients", "activations"],
        )

    def settle(self) -> None:
        self._hook.run.flush()

    def begin(self) -> None:
        # No public name gives it before the run is closed.
        self._before_s = self._hook.run._log_s

    def close(self) -> dict[str, float]:
        run = self._hook.run
        self._hook.remove()
        report = run.close()
        if report.dropped or self._hook.failures:
            raise RuntimeError(f"{report}; {self._hook.failures}")
        return {"log_seconds": report.log_s - self._before_s, "stall_seconds": report.stalled_s}


class _Capture(Saver):
    """Keeps the outputs of leaf modules at steps that are due, as plain forward hooks do."""

    def attach(self, model: Any, optimizer: Any, loss: Any, folder: Path, every: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model, self.folder, self.every = model, folder, every
        self.is_due = False
        self.outputs: dict[str, Any] = {}
        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            if self.is_due:
                self.outputs[name] = output.detach()

        return keep

    def before_forward(self, step: int) -> None:
        self.is_due = step % self.every == 0

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Give all that is to be saved at this step."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()
            yield f"gradient.{name}", parameter.grad
        for name, output in self.outputs.items():
            yield f"{name}.output", output
        self.outputs = {}


class Copies(_Capture):
    """The floor: every tensor is copied once, into memory that is there already."""

    name = "copies"
    settings = "copies each tensor into a buffer that was touched before; stores nothing"

    def attach(self, model: Any, optimizer: Any, loss: Any, folder: Path, every: int) -> None:
        super().attach(model, optimizer, loss, folder, every)
        self.buffers: dict[str, Any] = {}
        self.seconds, self.nbytes, self.saves = 0.0, 0, 0

    def begin(self) -> None:
        self.seconds, self.nbytes, self.saves = 0.0, 0, 0

    def after_backward(self, step: int) -> None:
        if not self.is_due:
            return
        found = list(self.tensors())
        if not self.buffers:
            self.buffers = {name: tensor.clone() for name, tensor in found}
        begin = time.perf_counter()
        for name, tensor in found:
            self.buffers[name].copy_(tensor)
        self.seconds += time.perf_counter() - begin
        self.saves += 1
        self.nbytes += sum(tensor.nbytes for _, tensor in found)

    def close(self) -> dict[str, float]:
        return {"log_seconds": self.seconds, "save_bytes": self.nbytes / self.saves}


class TorchSave(_Capture):
    """A file a tensor."""

    name = "torch-save"
    settings = "torch.save, a file a tensor, in the training thread"

    def after_backward(self, step: int) -> None:
        import torch

        if self.is_due:
            for name, tensor in self.tensors():
                torch.save(tensor.clone(), self.folder / f"{step}-{name}.pt")


class SmDebug(Saver):
    """SageMaker Debugger's hook."""

    name = "smdebug"
    settings = (
        "smdebug.pytorch.Hook(save_config=SaveConfig(save_interval=k), include_collections="
        "['weights', 'biases', 'gradients'], include_regex of the outputs of all modules)"
    )
    needs = ("smdebug", "torch", "mlxtend")
    distributions = ("smdebug", "protobuf", "torch", "numpy")
    environment = "smdebug-torch"

    def attach(self, model: Any, optimizer: Any, loss: Any, folder: Path, every: int) -> None:
        import smdebug.pytorch as smd

        self._hook = smd.Hook(
            out_dir=str(folder),
            save_config=smd.SaveConfig(save_interval=every),
            include_collections=["weights", "biases", "gradients"],
            include_regex=[".*_output_"],
        )
        self._hook.register_module(model)

    def close(self) -> dict[str, float]:
        self._hook.close()
        return {}

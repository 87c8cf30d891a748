"""Tensors on an accelerator: copied to pinned memory on a stream of their own, logged by a thread.

The training thread only enqueues: it clones the tensor on the device (what comes next may change
it in place), lets a side stream copy the clone to pinned memory, and goes on. A thread waits for
each copy and logs it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.writing.staging import Part

__all__ = ["Staging"]

MIB: Final = 1 << 20


@dataclass(slots=True)
class _Job:
    values: dict[str, object]
    step: int
    mode: str | None
    nbytes: int
    copied: Any  # an event of the side stream; None for copies that are done


class Staging:
    """A queue of copies from devices to a run.

    Parameters
    ----------
    log
        Called in the thread: (values, step, mode).
    devices
        Types of devices whose tensors take this way.
    most_bytes
        Bytes on their way; beyond them the training thread waits.
    """

    def __init__(
        self,
        log: Callable[[dict[str, object], int, str | None], None],
        guard: Guard,
        *,
        devices: frozenset[str] = frozenset({"cuda", "xpu"}),
        most_bytes: int = 256 * MIB,
    ) -> None:
        self._log = log
        self._guard = guard
        self._devices = devices
        self._most_bytes = most_bytes
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._under_way = 0
        self._streams: dict[torch.device, Any] = {}
        self._thread: threading.Thread | None = None
        self.stalls = 0
        """How often the training thread had to wait for room."""

    def takes(self, values: dict[str, object]) -> bool:
        """Say whether any of the values lies on a device that is copied from here."""
        return any(
            tensor is not None and tensor.device.type in self._devices
            for tensor in map(_tensor, values.values())
        )

    def put(self, values: dict[str, object], step: int, mode: str | None) -> None:
        """Begin to copy; the caller may change the tensors as soon as this returns."""
        nbytes = sum(
            tensor.nbytes for tensor in map(_tensor, values.values()) if tensor is not None
        )
        self._wait_for_room(nbytes)
        copies, copied = self._begin_copies(values)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tsf-hook", daemon=True)
            self._thread.start()
        self._jobs.put(_Job(copies, step, mode, nbytes, copied))

    def close(self) -> None:
        """Log what is left and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    def _wait_for_room(self, nbytes: int) -> None:
        with self._room:
            if self._under_way and self._under_way + nbytes > self._most_bytes:
                self.stalls += 1
                self._room.wait_for(
                    lambda: not self._under_way or self._under_way + nbytes <= self._most_bytes
                )
            self._under_way += nbytes

    def _begin_copies(self, values: dict[str, object]) -> tuple[dict[str, object], Any]:
        copies: dict[str, object] = {}
        copied = None
        for name, value in values.items():
            tensor = _tensor(value)
            if tensor is None:
                copies[name] = value
                continue
            host, event = self._copy(tensor)
            copied = event or copied
            copies[name] = replace(value, value=host) if isinstance(value, Part) else host
        return copies, copied

    def _copy(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Copy one tensor; events of one stream come in order, so the last stands for all."""
        if tensor.device.type == "cpu":
            return tensor.clone(memory_format=torch.contiguous_format), None
        device = tensor.device
        with torch.no_grad():
            clone = tensor.clone(memory_format=torch.contiguous_format)
        host = torch.empty(clone.shape, dtype=clone.dtype, pin_memory=True)
        side = self._streams.get(device)
        if side is None:
            side = self._streams[device] = torch.Stream(device=device)
        side.wait_stream(torch.accelerator.current_stream(device))
        with side:
            host.copy_(clone, non_blocking=True)
            event = side.record_event()
        clone.record_stream(side)  # its memory is not given away before the copy is done
        return host, event

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._guard.call("what was copied from the device", self._finish, job)
            with self._room:
                self._under_way -= job.nbytes
                self._room.notify_all()

    def _finish(self, job: _Job) -> None:
        if job.copied is not None:
            job.copied.synchronize()
        self._log(job.values, job.step, job.mode)


def _tensor(value: object) -> torch.Tensor | None:
    inside = value.value if isinstance(value, Part) else value
    return inside if isinstance(inside, torch.Tensor) else None

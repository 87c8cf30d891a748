"""Saves a tensor in the wanted forms: whole, reduced, with a second one; knows step and mode."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal

import torch

from tensorstore_fmt.hooks.collections import Chooser, Kind, Wanted
from tensorstore_fmt.hooks.guard import Guard
from tensorstore_fmt.hooks.reductions import Reduction
from tensorstore_fmt.hooks.torch_staging import Staging
from tensorstore_fmt.hooks.torch_values import as_value, quantiles, reduce

if TYPE_CHECKING:
    from tensorstore_fmt.writing.run import RunWriter

__all__ = ["Recorder"]

_SMALL_NBYTES: Final = 256 * 1024
_TOGETHER_NBYTES: Final = 1024 * 1024  # a call of `log` takes all or nothing: it must not be large

_Gathered = list[tuple[str, dict[str, object]]]


class _Thread(threading.local):
    """What one thread gathers, to log it in one call."""

    gathered: _Gathered | None = None
    nbytes = 0


class Recorder:
    """Takes tensors of the present step from hooks of any thread.

    Backward runs in threads of its own, so that gradients come from there.
    """

    def __init__(self, run: RunWriter, chooser: Chooser, guard: Guard, prefix: str) -> None:
        self._run = run
        self._chooser = chooser
        self._guard = guard
        self._prefix = prefix
        self._staging = Staging(self._log_staged, guard)
        self._lock = threading.Lock()
        self._own = _Thread()
        self._known: set[str] = set()
        self._waiting: dict[str, list[tuple[str, torch.Tensor, Reduction]]] = {}
        self.step = 0
        self.mode: str | None = "TRAIN"
        self.is_due = False
        """Whether anything is saved at the present step: hooks ask this first."""

    def begin(self, step: int, mode_step: int, mode: str | None) -> None:
        """Go to a step. `mode_step` is its number among those of its mode."""
        self.step, self.mode = step, mode
        self.is_due = self._chooser.begin(mode_step, mode)
        with self._lock:
            self._waiting.clear()

    def hold(self) -> None:
        """Let encoders wait until the step's end, which has to be told."""
        if self.is_due:
            self._run.hold_encoding()

    def end(self) -> None:
        """Let encoders work: the step has ended."""
        self._run.release_encoding()

    def is_awaited(self, name: str) -> bool:
        """Say whether another tensor of this step waits for this one."""
        return name in self._waiting

    def take(
        self, kind: Kind, name: str, tensor: torch.Tensor, path: str = "", *, is_leaf: bool = False
    ) -> None:
        """Save a tensor, if it is wanted at the present step. Copies what it needs at once.

        A tensor that fails is the guard's: those that the same hook takes after it are saved.
        """
        wanted = self._chooser.wanted(kind, name, path, is_leaf=is_leaf)
        if wanted is not None or self.is_awaited(name):
            self._guard.call(name, self._save, name, tensor, wanted)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _save(self, name: str, tensor: torch.Tensor, wanted: Wanted | None) -> None:
        tensor = tensor.detach()
        values: dict[str, object] = {}
        if wanted is not None:
            self._add(values, name, tensor, wanted)
        self._combine(values, name, tensor)
        if not values:
            return
        gathered = self._own.gathered
        if gathered is None or tensor.nbytes >= _SMALL_NBYTES:
            self.log(values)
            return
        gathered.append((name, values))
        self._own.nbytes += tensor.nbytes
        if self._own.nbytes >= _TOGETHER_NBYTES:
            self._log_gathered(gathered)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Log small tensors that this thread takes inside in few calls, the last at the end.

        Nobody may change them before.
        """
        own = self._own
        gathered: _Gathered = []
        own.gathered = gathered
        try:
            yield
        finally:
            own.gathered = None
            if gathered:
                self._log_gathered(gathered)

    def _log_gathered(self, gathered: _Gathered) -> None:
        every, gathered[:] = gathered[:], []
        self._own.nbytes = 0
        try:
            self.log({name: value for _, values in every for name, value in values.items()})
        except Exception:  # noqa: BLE001 - whichever it was is found out, and named, below
            for name, values in every:
                self._guard.call(name, self.log, values)

    def log(self, values: dict[str, object]) -> None:
        """Log values at the present step, under this hook's prefix."""
        if self._prefix:
            values = {self._prefix + name: value for name, value in values.items()}
        if self._staging.takes(values):
            self._staging.put(values, self.step, self.mode)
        else:
            self._run.log(values, step=self.step, mode=self.mode)

    def close(self) -> None:
        """Wait until what lies on its way from a device is logged."""
        self._staging.close()

    def _log_staged(self, values: dict[str, object], step: int, mode: str | None) -> None:
        self._run.log(values, step=step, mode=mode)

    def _add(
        self, values: dict[str, object], name: str, tensor: torch.Tensor, wanted: Wanted
    ) -> None:
        if wanted.raw or wanted.stats_only:
            self._set_stats(name, "only" if wanted.stats_only else True)
            value = as_value(tensor)
            if value is not None:
                values[name] = value
        for reduction in wanted.reductions:
            if reduction.other is not None:
                self._wait(name, tensor, reduction)
                continue
            try:
                values[f"{name}/{reduction.name}"] = (
                    reduce(tensor, reduction)
                    if reduction.function is None
                    else reduction.function(tensor)
                )
            except Exception as error:  # noqa: BLE001 - a user's function; the rest is saved
                self._guard.failed(f"{name}/{reduction.name}", error)
        if wanted.quantiles:
            try:
                values[f"{name}/quantiles"] = quantiles(tensor, wanted.quantiles)
            except Exception as error:  # noqa: BLE001 - the same
                self._guard.failed(f"{name}/quantiles", error)

    def _set_stats(self, name: str, choice: Literal[True, "only"]) -> None:
        """Tell the writer the first time; a name keeps what it began with."""
        if name not in self._known:
            self._known.add(name)
            if choice == "only":
                self._run.set_stats(self._prefix + name, choice)

    # --- functions of two tensors ------------------------------------------------

    def _wait(self, name: str, tensor: torch.Tensor, reduction: Reduction) -> None:
        """Keep a tensor until the other one comes; a copy, for it may be changed in place."""
        other = reduction.other_of(name)
        assert other is not None
        with self._lock:
            self._waiting.setdefault(other, []).append((name, tensor.clone(), reduction))

    def _combine(self, values: dict[str, object], name: str, tensor: torch.Tensor) -> None:
        with self._lock:
            waiting = self._waiting.pop(name, [])
        for first, kept, reduction in waiting:
            self._apply(values, first, reduction, kept, tensor)

    def _apply(
        self,
        values: dict[str, object],
        name: str,
        reduction: Reduction,
        tensor: torch.Tensor,
        other: torch.Tensor,
    ) -> None:
        assert reduction.function is not None
        try:
            values[f"{name}/{reduction.name}"] = reduction.function(tensor, other)
        except Exception as error:  # noqa: BLE001 - a user's function; the rest is saved
            self._guard.failed(f"{name}/{reduction.name}", error)

"""Trial: a run as smdebug's scripts see it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError, NotARunError
from tensorstore_fmt.interop.importing.smdebug_names import (
    COLLECTIONS_NAME,
    reduction_of,
    shaped,
)
from tensorstore_fmt.interop.importing.target import REPORT_NAME
from tensorstore_fmt.interop.smdebug.ahead import ReadAhead, has_step
from tensorstore_fmt.interop.smdebug.collections import Collection, built_in
from tensorstore_fmt.interop.smdebug.exceptions import (
    InvalidWorker,
    MissingCollectionFiles,
    NoMoreData,
    SMDebugError,
    SMDebugValueError,
    StepNotYetAvailable,
    StepUnavailable,
    TensorUnavailable,
)
from tensorstore_fmt.interop.smdebug.ledger import Ledger
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys, StepState
from tensorstore_fmt.interop.smdebug.tensor import Tensor
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.steptable import step_rows
from tensorstore_fmt.reading.tensor import Tensor as RunTensor
from tensorstore_fmt.storage.base import without_credentials
from tensorstore_fmt.storage.foreign import open_folder

__all__ = ["Trial"]

_WINDOW_VARIABLE: Final = "SMDEBUG_INCOMPLETE_STEP_WAIT_WINDOW"
_WINDOW: Final = 1000
_POLL_S: Final = (0.02, 0.5)
_REMOTE_POLL_S: Final = (0.5, 5.0)
_HIDDEN: Final = (COLLECTIONS_NAME, REPORT_NAME)


class Trial:
    """A run, live or finished, of this library or imported. Made by `create_trial`.

    It looks for news whenever it is asked something that may have changed, until the run has
    ended; one LIST if there is nothing new. Steps are global steps, or those of a mode if one is
    given.

    A step counts as written by a worker from its first `log` on: a worker that logs several times
    in a step should do so in one call, or flush behind it.
    """

    def __init__(
        self,
        name: str,
        path: str,
        *,
        range_steps: tuple[int | None, int | None] | None = None,
        storage_options: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.name = name
        self.path = without_credentials(path)
        self.range_steps = _checked_range(range_steps)
        self._window = int(os.environ.get(_WINDOW_VARIABLE) or _WINDOW)
        self._frozen = 0
        self._ledger: Ledger | None = None
        self._parts: dict[str, list[str]] | None = None
        self._steps: dict[str, NDArray[np.int64]] = {}  # by name, of anything; of values
        self._values: dict[str, NDArray[np.int64]] = {}
        self._session, self.run = _open(path, storage_options, timeout_s)
        self._ahead = ReadAhead(self._session, self.run)
        self._poll_s = _POLL_S if self._session.storage.is_local else _REMOTE_POLL_S
        self._imported: Mapping[str, Any] = _mapping(self.run.attrs.get("smdebug"))
        self._wait_for_workers(timeout_s)

    def _wait_for_workers(self, timeout_s: float | None) -> None:
        missing = self._imported.get("missing_workers", 0)
        if missing:
            raise MissingCollectionFiles(
                f"{self.path}: {missing} of {self.num_workers} workers have left nothing in the "
                "run that was imported; read it with tensorstore_fmt.open_run"
            )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pauses = _pauses(self._poll_s)
        while not self.run.is_closed and len(self.run.workers) < self.run.num_workers:
            if deadline is not None and time.monotonic() > deadline:
                raise MissingCollectionFiles(
                    f"{self.path}: {len(self.run.workers)} of {self.run.num_workers} workers have "
                    f"joined the run within {timeout_s:g} s"
                )
            time.sleep(next(pauses))
            self.run.refresh()

    # --- what is known ------------------------------------------------------------
    @property
    def ledger(self) -> Ledger:
        """Which steps there are, as of the last look."""
        if self._ledger is None:
            first, stop = self.range_steps
            self._ledger = Ledger(
                step_rows(self._session, None),
                num_workers=max(self.run.num_workers, 1),
                has_ended=self.run.is_closed,
                window=self._window,
                first=first,
                stop=stop,
            )
        return self._ledger

    @property
    def num_workers(self) -> int:
        """How many workers write."""
        number = self._imported.get("num_workers")
        return number if isinstance(number, int) and number else max(self.run.num_workers, 1)

    @property
    def loaded_all_steps(self) -> bool:
        """Whether the run has ended, and all of it is known."""
        self.maybe_refresh()
        return self.ledger.has_ended

    @property
    def last_complete_step(self) -> int:
        """Give the last step that is complete; −1 if none is."""
        return self.ledger.last_complete

    def training_ended(self) -> bool:
        """Say whether the run has ended."""
        return self.loaded_all_steps

    # --- refreshing -----------------------------------------------------------------
    def refresh_data(self) -> None:
        """Look for news, also within `no_refresh`."""
        if self.run.refresh() or (self._ledger is not None and self._is_news()):
            self._ledger = None
            self._parts = None
            self._steps = {}
            self._values = {}
            self._ahead.drop()

    def _is_news(self) -> bool:
        return self._ledger is not None and self._ledger.has_ended != self.run.is_closed

    def maybe_refresh(self, name: str | None = None) -> None:  # noqa: ARG002 - smdebug's signature
        """Look for news, unless this is within `no_refresh` or the run has ended."""
        if not self._frozen and not (self._ledger is not None and self._ledger.has_ended):
            self.refresh_data()

    def freeze(self, by: int) -> None:
        """Begin (1) or end (−1) to show the same; for `no_refresh`."""
        self._frozen += by

    @property
    def freeze_depth(self) -> int:
        """How many `no_refresh` this is within."""
        return self._frozen

    # --- names ----------------------------------------------------------------------
    @property
    def _names(self) -> dict[str, list[str]]:
        """Names of tensors; for each the names in the run that hold something of it."""
        if self._parts is None:
            found: dict[str, list[str]] = {}
            for name in self.run.names():
                if name in _HIDDEN:
                    continue
                reduction = reduction_of(name)
                tensor = reduction[2] if reduction else shaped(name) or name
                found.setdefault(tensor, []).append(name)
            self._parts = found
        return self._parts

    def parts_of(self, name: str) -> list[RunTensor]:
        """Give what the run holds of a tensor: values, reductions, shapes."""
        return [self.run[part] for part in self._names.get(name, ())]

    def steps_of(self, name: str) -> NDArray[np.int64]:
        """Give the global steps at which anything of a tensor was saved."""
        found = self._steps.get(name)
        if found is None:
            parts = [self._saved(part) for part in self.parts_of(name)]
            found = parts[0] if len(parts) == 1 else np.empty(0, np.int64)
            if len(parts) > 1:
                found = np.unique(np.concatenate(parts))
            self._steps[name] = found
        return found

    def _raw_steps(self, name: str) -> NDArray[np.int64]:
        """Give the global steps at which values of a tensor were saved."""
        found = self._values.get(name)
        if found is None:
            is_there = name in self.run and self.run[name].has_data
            found = self.run[name].steps if is_there else np.empty(0, np.int64)
            self._values[name] = found
        return found

    def was_saved(self, name: str, step: int) -> bool:
        """Say whether anything of a tensor was saved at a global step."""
        return has_step(self.steps_of(name), step)

    @staticmethod
    def _saved(tensor: RunTensor) -> NDArray[np.int64]:
        if tensor.has_data:
            return tensor.steps
        found = [
            tensor.stats(mode=mode, worker=worker).step
            for mode in tensor.modes
            for worker in tensor.select(mode=mode).workers
        ]
        return np.unique(np.concatenate(found))

    def has_reductions(self, name: str, step: int) -> bool:
        """Say whether reductions of a tensor were saved at a step."""
        return any(
            reduction_of(part.name) is not None and step in part.steps
            for part in self.parts_of(name)
        )

    def tensor_names(
        self,
        *,
        step: int | None = None,
        mode: ModeKeys = ModeKeys.GLOBAL,
        regex: str | Sequence[str] | None = None,
        collection: str | Collection | None = None,
    ) -> list[str]:
        """Give the names of tensors, sorted.

        Parameters
        ----------
        step, mode
            Only those of which anything was saved at this step; or, with a mode alone, at any
            step of it.
        regex
            Only those that a pattern (or one of several) fits, as `re.search` does.
        collection
            Only those of a collection, or of the collection of this name.

        Raises
        ------
        ValueError
            Both a regex and a collection.
        """
        if regex is not None and collection is not None:
            raise SMDebugValueError("give a regex or a collection, not both")
        self.maybe_refresh()
        names: Iterable[str] = self._names
        if regex is not None:
            patterns = [regex] if isinstance(regex, str) else list(regex)
            names = [name for name in names if any(re.search(p, name) for p in patterns)]
        if collection is not None:
            chosen = self._chosen(collection)
            names = [name for name in names if chosen is not None and chosen.has_tensor(name)]
        if step is not None or mode is not ModeKeys.GLOBAL or self.range_steps != (None, None):
            wanted = self._wanted_steps(step, mode)
            names = [n for n in names if np.isin(self.steps_of(n), wanted).any()]
        return sorted(names)

    def _chosen(self, collection: str | Collection) -> Collection | None:
        if isinstance(collection, Collection):
            return collection
        return self.collections().get(collection)

    def _wanted_steps(self, step: int | None, mode: ModeKeys) -> NDArray[np.int64]:
        if step is None:
            return self.ledger.of_mode(mode)[1]
        found = self.ledger.global_step(step, mode)
        return np.array([] if found is None else [found], np.int64)

    def has_tensor(self, name: str) -> bool:
        """Say whether anything of a tensor was saved."""
        if name not in self._names:
            self.maybe_refresh()
        return name in self._names

    def tensor(self, name: str) -> Tensor:
        """Give a tensor.

        Raises
        ------
        TensorUnavailable
            No tensor has this name.
        """
        if not self.has_tensor(name):
            near = get_close_matches(name, self._names, n=3)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise TensorUnavailable(name, hint)
        return Tensor(name, self)

    def collections(self) -> dict[str, Collection]:
        """Give the collections, by name: those the run was written with, else the built-in."""
        self.maybe_refresh()
        if COLLECTIONS_NAME not in self.run:
            return built_in()
        found: dict[str, Collection] = {}
        tensor = self.run[COLLECTIONS_NAME]
        for worker in tensor.workers:
            one = tensor.select(worker=worker)
            last = int(one.steps[-1])
            text = one.read(step=last, mode=one.modes[-1] if len(one.modes) > 1 else None)
            for name, params in _mapping(json.loads(text)).items():
                collection = _collection(name, _mapping(params))
                if name in found:
                    found[name].tensor_names |= collection.tensor_names
                else:
                    found[name] = collection
        return found

    def collection(self, coll_name: str) -> Collection | None:
        """Give one collection; None if there is none of this name."""
        return self.collections().get(coll_name)

    def inputs(self, step: int | None = None, mode: ModeKeys = ModeKeys.GLOBAL) -> list[str]:
        """Give the names in the collection ``inputs``."""
        return self.tensor_names(step=step, mode=mode, collection="inputs")

    def labels(self, step: int | None = None, mode: ModeKeys = ModeKeys.GLOBAL) -> list[str]:
        """Give the names in the collection ``labels``."""
        return self.tensor_names(step=step, mode=mode, collection="labels")

    def predictions(self, step: int | None = None, mode: ModeKeys = ModeKeys.GLOBAL) -> list[str]:
        """Give the names in the collection ``predictions``."""
        return self.tensor_names(step=step, mode=mode, collection="predictions")

    # --- workers --------------------------------------------------------------------
    def workers(self) -> list[str]:
        """Give the names of the workers that have written."""
        self.maybe_refresh()
        return [self.worker_name(worker) for worker in self.run.workers]

    def worker_name(self, worker: int) -> str:
        """Give the name of a worker by its number."""
        names = self._imported.get("workers")
        if isinstance(names, Sequence) and worker < len(names):
            return str(names[worker])
        return f"worker_{worker}"

    def worker_number(self, worker: str) -> int:
        """Give the number of a worker by its name.

        Raises
        ------
        InvalidWorker
            There is none.
        """
        for number in self.run.workers:
            if self.worker_name(number) == worker:
                return number
        raise InvalidWorker(worker, tuple(self.worker_name(w) for w in self.run.workers[:6]))

    # --- steps ----------------------------------------------------------------------
    def steps(
        self,
        mode: ModeKeys = ModeKeys.GLOBAL,
        show_incomplete_steps: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
    ) -> list[int]:
        """Give the complete steps, ascending; with incomplete ones, if asked for."""
        self.maybe_refresh()
        known = self.ledger.steps if show_incomplete_steps else self.ledger.complete
        return self.ledger.in_mode(known, mode)

    def modes(self) -> list[ModeKeys]:
        """Give the modes in which anything was saved."""
        self.maybe_refresh()
        return self.ledger.modes

    def mode(self, global_step: int) -> ModeKeys | None:
        """Give the mode of a global step; None if there is no such step."""
        self.maybe_refresh()
        return self.ledger.mode_of(global_step)

    def mode_step(self, global_step: int) -> int | None:
        """Give a global step's number within its mode; None if there is no such step."""
        self.maybe_refresh()
        return self.ledger.mode_step_of(global_step)

    def mode_modestep(self, global_step: int) -> tuple[ModeKeys | None, int | None]:
        """Give the mode of a global step, and its number there."""
        return self.mode(global_step), self.ledger.mode_step_of(global_step)

    def global_step(self, mode: ModeKeys, mode_step: int) -> int | None:
        """Give the global step of a step of a mode; None if there is no such step.

        Of `modes.GLOBAL` it is the step itself.
        """
        if mode is ModeKeys.GLOBAL:
            return mode_step
        self.maybe_refresh()
        return self.ledger.global_step(mode_step, mode)

    def has_passed_step(self, step: int, mode: ModeKeys = ModeKeys.GLOBAL) -> StepState:
        """Say whether a step can be read, may come, or will never come.

        Looks for news only if what is known does not settle it.
        """
        state = self.ledger.state(step, mode)
        if state is StepState.NOT_YET_AVAILABLE:
            self.maybe_refresh()
            state = self.ledger.state(step, mode)
        return state

    def wait_for_steps(
        self, required_steps: Iterable[int], mode: ModeKeys = ModeKeys.GLOBAL
    ) -> None:
        """Wait until steps can be read.

        Raises
        ------
        StepUnavailable
            One of them was not saved, and later ones were.
        NoMoreData
            The run has ended before one of them.
        StepNotYetAvailable
            One of them is not there, and this is within `no_refresh`.
        """
        for step in required_steps:
            pauses = _pauses(self._poll_s)
            while True:
                state = self.has_passed_step(step, mode)
                if state is StepState.AVAILABLE:
                    break
                if state is StepState.UNAVAILABLE:
                    raise self._gone(step, mode)
                if self._frozen:
                    raise StepNotYetAvailable(step, mode)
                time.sleep(next(pauses))

    def _gone(self, step: int, mode: ModeKeys) -> StepUnavailable | NoMoreData:
        numbers, _ = self.ledger.of_mode(mode)
        last = int(numbers[-1]) if len(numbers) else -1
        if self.ledger.has_ended and (step > last or not len(numbers)):
            return NoMoreData(step, mode, last)
        return StepUnavailable(step, mode)

    def next_step(self, step: int) -> int:
        """Wait for the first complete global step that is not before this one, and give it.

        Raises
        ------
        NoMoreData
            The run has ended, and there is none.
        """
        pauses = _pauses(self._poll_s)
        while True:
            complete = self.ledger.complete
            at = int(complete.searchsorted(step))
            if at < len(complete):
                return int(complete[at])
            if self.ledger.has_ended:
                raise NoMoreData(step, ModeKeys.GLOBAL, self.ledger.last_complete)
            before = self._ledger
            self.maybe_refresh()
            if self._ledger is before:
                time.sleep(next(pauses))

    # --- values that were read ahead -----------------------------------------------
    def keep(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Read values by name and global steps in one round; `Tensor.value` finds them."""
        self._ahead.fetch(wanted, saved=self._raw_steps, last=self.ledger.last_complete)

    def kept(self, name: str, step: int, mode: ModeKeys) -> Any:  # noqa: ANN401 - an array or a str
        """Give a value that was read ahead; None if it was not."""
        if mode is not ModeKeys.GLOBAL and self.ledger.mode_of(step) is not mode:
            return None
        found = self._ahead.get(name, step)
        if found is None:
            last = self.ledger.last_complete
            found = self._ahead.around(name, step, saved=self._raw_steps(name), last=last)
        return found

    def close(self) -> None:
        """Give back connections and memory."""
        self.run.close()

    def __repr__(self) -> str:
        return f"<Trial {self.name!r} {self.path}>"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _collection(name: str, params: Mapping[str, Any]) -> Collection:
    """Make a collection; without its settings, if these are of a version that had others."""
    named = {**params, "name": name}
    try:
        return Collection.from_dict(named)
    except (SMDebugError, TypeError, AttributeError):
        return Collection.from_dict({**named, "reduction_config": None, "save_config": None})


def _checked_range(
    given: tuple[int | None, int | None] | None,
) -> tuple[int | None, int | None]:
    first, stop = given or (None, None)
    if first is not None and stop is not None and first > stop:
        raise SMDebugValueError(f"range_steps is {given}; the first one is not above the second")
    return first, stop


def _pauses(bounds: tuple[float, float]) -> Iterator[float]:
    pause, most = bounds
    while True:
        yield pause
        pause = min(2 * pause, most)


def _open(
    path: str, storage_options: Mapping[str, object] | None, timeout_s: float | None
) -> tuple[Session, Run]:
    """Open a run; wait for one to appear."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pauses = _pauses(_POLL_S)
    while True:
        session = Session(path, storage_options)
        try:
            session.view  # noqa: B018 - looks at the run
        except NotARunError as error:
            session.close()
            if error.code != NotARunError.default_code:
                raise
            _refuse_foreign(path, storage_options)
            if deadline is not None and time.monotonic() > deadline:
                raise MissingCollectionFiles(
                    f"{without_credentials(path)}: no run has appeared within {timeout_s:g} s"
                ) from error
        else:
            return session, Run(session)
        time.sleep(next(pauses))


def _refuse_foreign(path: str, storage_options: Mapping[str, object] | None) -> None:
    """Say what to do with a folder that smdebug itself wrote."""
    try:
        folders = set(open_folder(path, storage_options=storage_options).folders())
    except ArgumentError:
        return
    if {"collections", "events"} <= folders or {"collections", "index"} <= folders:
        raise NotARunError(
            f"{without_credentials(path)} was written by smdebug; make a run of it first: "
            "tensorstore-fmt import smdebug SRC RUN",
            code="unknown_format",
        )

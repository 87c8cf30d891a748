"""What a run must show: kept beside it while it is written, compared with it afterwards.

The *prefix rule*: what is visible is what the first p calls of `log` saved, for some p that
includes all that was acknowledged; apart from drops, which are recorded as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from tensorstore_fmt.errors import ArgumentError, FormatError, NotThereError, StepDroppedError
from tensorstore_fmt.format import statistics
from tensorstore_fmt.reading.run import Run

__all__ = ["Event", "Key", "Oracle", "Seen", "WrongDataError", "bits", "check_durable", "check_run"]

Key: TypeAlias = tuple[str, str, int]
"""Name, mode (``NONE`` where there was none) and step."""


class WrongDataError(AssertionError):
    """A run shows something that was not logged, or lacks something that was acknowledged."""


@dataclass(frozen=True, slots=True)
class Event:
    """One call of `log`."""

    step: int
    values: Mapping[str, Any]
    mode: str | None = None

    @property
    def keys(self) -> list[Key]:
        """What it saved."""
        return [(name, self.mode or "NONE", self.step) for name in self.values]


@dataclass(slots=True)
class Oracle:
    """All calls of `log` in their order; of attempts before the last, what these left visible.

    Attributes
    ----------
    acknowledged
        So many of the events are safe: a flush said so after them.
    """

    events: list[Event] = field(default_factory=list)
    acknowledged: int = 0

    def state(self, prefix: int) -> dict[Key, int]:
        """Give, for each key, which of the first events saved it last."""
        return {key: i for i, event in enumerate(self.events[:prefix]) for key in event.keys}

    def versions(self) -> dict[Key, list[int]]:
        """Give, for each key, all events that saved it."""
        found: dict[Key, list[int]] = {}
        for i, event in enumerate(self.events):
            for key in event.keys:
                found.setdefault(key, []).append(i)
        return found

    def value(self, key: Key, event: int) -> Any:  # noqa: ANN401 - what was logged
        """Give what an event saved."""
        return self.events[event].values[key[0]]

    def resumed(self, prefix: int, step: int) -> Oracle:
        """Give what the next attempt begins with, which hides this step and later ones."""
        kept = [event for event in self.events[:prefix] if event.step < step]
        return Oracle(kept, len(kept))


@dataclass(frozen=True, slots=True)
class Seen:
    """What a check found: the prefix that is visible, and how many of its values were dropped."""

    prefix: int
    dropped: int
    values: int


def bits(value: object) -> tuple[object, ...]:
    """Give a value in a form in which equal means the same bits, dtype and shape."""
    if isinstance(value, str):
        return ("str", value)
    found = np.asarray(value)
    if found.dtype == object:
        return ("str", found.shape, *found.reshape(-1).tolist())
    return (str(found.dtype), found.shape, found.tobytes())


def check_run(
    run: Run, oracle: Oracle, *, may_drop: bool = False, worker: int | None = None
) -> Seen:
    """Check the prefix rule, bit for bit.

    Parameters
    ----------
    may_drop
        Whether drops are possible here: after failures, never after a mere crash.
    worker
        Look at what this worker saved alone.

    Raises
    ------
    WrongDataError
        Saying what is wrong with which key.
    """
    versions = oracle.versions()
    visible = _visible(run, worker)
    prefix = oracle.acknowledged
    for key, found in visible.items():
        same = [i for i in versions.get(key, ()) if bits(oracle.value(key, i)) == found]
        if not same:
            raise WrongDataError(f"{key} shows what was never logged: {found!r:.300}")
        prefix = max(prefix, same[0] + 1)
    while may_drop and _is_dropped_whole(run, oracle.events[prefix : prefix + 1], worker):
        prefix += 1
    wanted = oracle.state(prefix)
    dropped = 0
    for key, event in wanted.items():
        shown = visible.pop(key, None)
        if shown is None:
            state = _state(run, key, worker)
            if state != "dropped" or not may_drop:
                raise WrongDataError(f"{key} of event {event} of {prefix} is {state}")
            dropped += 1
        elif shown != bits(oracle.value(key, event)):
            raise WrongDataError(f"{key} does not show what event {event} of {prefix} saved")
    if visible:
        raise WrongDataError(f"{next(iter(visible))} is visible, but not of the first {prefix}")
    if worker is None:
        _check_steps(run, oracle, prefix)
    _check_unseen(run, oracle, prefix, worker)
    _check_statistics(run, oracle, wanted, worker)
    return Seen(prefix, dropped, len(wanted))


def _is_dropped_whole(run: Run, events: Sequence[Event], worker: int | None) -> bool:
    """Say whether nothing of the next event is visible, but all of it recorded as dropped."""
    keys = [key for event in events for key in event.keys]
    return bool(keys) and all(_state(run, key, worker) == "dropped" for key in keys)


def _visible(run: Run, worker: int | None) -> dict[Key, tuple[object, ...]]:
    found: dict[Key, tuple[object, ...]] = {}
    for name in run.names():  # also those of which later attempts hide everything
        tensor = run[name]
        if worker is not None and worker not in tensor.workers:
            continue
        for mode in tensor.modes:
            chosen = tensor.select(mode=mode, worker=worker)
            steps = chosen.steps.tolist()
            for step, value in zip(steps, _values(chosen, steps), strict=True):
                found[name, mode, step] = bits(value)
    return found


def _values(tensor: Any, steps: Sequence[int]) -> Iterable[Any]:  # noqa: ANN401 - a reader's Tensor
    if not steps:
        return []
    try:
        stacked = tensor.read()
    except ArgumentError:  # shapes vary
        return [tensor.read(step=step) for step in steps]
    last = tensor.read(step=steps[-1])
    if isinstance(last, str):
        return list(stacked)
    if bits(stacked[-1]) != bits(last):
        raise WrongDataError(f"{tensor.name}: stacked and single reads of {steps[-1]} differ")
    return list(stacked)


def _state(run: Run, key: Key, worker: int | None) -> str:
    name, mode, step = key
    if name not in run:
        return "no such name"
    return run.state(name, step, mode=mode, worker=worker)


def _check_steps(run: Run, oracle: Oracle, prefix: int) -> None:
    wanted = {event.step for event in oracle.events[:prefix]}
    found = set(run.steps().tolist())
    if found != wanted:
        raise WrongDataError(f"steps {sorted(found ^ wanted)[:20]} are logged or visible, not both")


def _check_unseen(run: Run, oracle: Oracle, prefix: int, worker: int | None) -> None:
    """What was logged, but not committed, may never be called "never saved" while it is open."""
    seen = oracle.state(prefix)
    unseen = [key for event in oracle.events[prefix:] for key in event.keys if key not in seen]
    if run.is_closed:
        return
    for key in [*unseen[:4], *unseen[-2:]]:
        state = _state(run, key, worker)
        if state not in ("not_yet", "no such name"):
            raise WrongDataError(f"{key} was not committed and is called {state}")


def _check_statistics(
    run: Run, oracle: Oracle, wanted: Mapping[Key, int], worker: int | None
) -> None:
    for name in {name for name, _, _ in wanted} & set(run.names()):
        tensor = run[name]
        if worker is not None and worker not in tensor.workers:
            continue
        for mode in tensor.modes:
            stats = tensor.stats(mode=mode, worker=worker)
            columns = [stats[field].tolist() for field in ("step", "count", "nan", "zero")]
            for step, *found in zip(*columns, strict=True):
                event = wanted.get((name, mode, int(step)))
                if event is None:
                    raise WrongDataError(f"statistics of {name} at {step}, which is not there")
                _compare(name, int(step), oracle.value((name, mode, int(step)), event), found)


def _compare(name: str, step: int, value: Any, found: Sequence[float]) -> None:  # noqa: ANN401 - what was logged
    data = np.asarray(value)
    right = statistics.compute(data, dtype=str(data.dtype))
    wanted = [right[0], right[1], right[4]]
    if wanted != found:
        raise WrongDataError(f"statistics of {name} at {step}: {found}, not {wanted}")


# --- after a power cut -----------------------------------------------------------------


def check_durable(run: Run, oracle: Oracle, logged: int, *, undropped: int | None = None) -> int:
    """Check what is left after a power cut: all that was acknowledged, and nothing wrong.

    Of the first `logged` events those that were not acknowledged may be there, or not, or fail
    with an error of the format; a value is right or is not given.

    Parameters
    ----------
    undropped
        After a failed sync: of the acknowledged events only the first so many may not be recorded
        as dropped. None: none may.

    Returns
    -------
    int
        Number of values that were read.
    """
    durable = oracle.state(oracle.acknowledged)
    versions = oracle.versions()
    for name in run.names():
        if name not in {key[0] for key in versions}:
            raise WrongDataError(f"{name!r} was never logged")
    later = oracle.events[oracle.acknowledged : logged]
    touched = _touched(later)
    read = 0
    others = {key for event in later for key in event.keys} - durable.keys()
    for key, found in [*_read_all(run, sorted(durable)), *_read_all(run, sorted(others))]:
        least = durable.get(key, -1)
        if isinstance(found, Exception):
            low, high = touched.get(key[:2], (1, 0))
            may_fail = low <= key[2] <= high
            may_drop = undropped is not None and least >= undropped
            if not may_fail and not (may_drop and isinstance(found, StepDroppedError)):
                raise WrongDataError(f"{key} was acknowledged: {found!r:.200}") from found
            continue
        read += 1
        allowed = [i for i in versions[key] if least <= i < logged]
        if bits(found) not in [bits(oracle.value(key, i)) for i in allowed]:
            raise WrongDataError(f"{key} shows what was not logged, or less than acknowledged")
    _check_durable_steps(run, oracle, logged)
    return read


def _touched(later: Iterable[Event]) -> dict[tuple[str, str], tuple[int, int]]:
    """Give the first and the last step of what was not acknowledged, by name and mode.

    Where a page of it is torn, whatever lies between may have been saved again in it: that a
    reader refuses to say is right.
    """
    touched: dict[tuple[str, str], tuple[int, int]] = {}
    for event in later:
        for name, mode, step in event.keys:
            low, high = touched.get((name, mode), (step, step))
            touched[name, mode] = (min(low, step), max(high, step))
    return touched


def _read_all(run: Run, keys: Sequence[Key]) -> Iterator[tuple[Key, Any]]:
    """Give the value or the error of each key; many at once where none fails."""
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in keys:
        groups.setdefault(key[:2], []).append(key)
    for (name, mode), group in groups.items():
        try:
            stacked = run[name].read(steps=[key[2] for key in group], mode=mode)
            yield from zip(group, stacked, strict=True)
        except (ArgumentError, FormatError, NotThereError):
            for key in group:
                yield key, _read_one(run, key)


def _read_one(run: Run, key: Key) -> Any:  # noqa: ANN401 - a value or an error
    try:
        return run[key[0]].read(step=key[2], mode=key[1])
    except (FormatError, NotThereError) as error:
        return error


def _check_durable_steps(run: Run, oracle: Oracle, logged: int) -> None:
    try:
        found = set(run.steps().tolist())
    except FormatError:
        return  # flushes are missing, and it says so
    least = {event.step for event in oracle.events[: oracle.acknowledged]}
    most = {event.step for event in oracle.events[:logged]}
    if not least <= found <= most:
        raise WrongDataError(f"steps: {sorted(least - found)} lack, {sorted(found - most)} are new")

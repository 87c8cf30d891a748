"""Reading ahead: what a rule needs at a step, with the same tensors at the steps behind it.

A chunk of a small tensor holds many steps. Read step by step it would be decoded as often. So
who asks for a second step of a tensor gets those around it along.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import AmbiguousError, ArgumentError, FormatError, NotThereError
from tensorstore_fmt.reading.reader import Ask, read
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["ReadAhead", "has_step"]

_MOST_STEPS: Final = 64
_MOST_NBYTES: Final = 32 * 1024 * 1024
_WINDOW_NBYTES: Final = 256 * 1024  # about a chunk
_MOST_WINDOWS: Final = _MOST_NBYTES // _WINDOW_NBYTES

_I64 = NDArray[np.int64]

# Then the value is read when it is asked for, which says what is wrong.
_PROBLEMS: Final = (AmbiguousError, ArgumentError, NotThereError, FormatError)


def has_step(steps: _I64, step: int) -> bool:
    """Say whether a step is among some that ascend."""
    at = int(steps.searchsorted(step))
    return at < len(steps) and int(steps[at]) == step


class ReadAhead:
    """Values of a run that were read already.

    Those that rules needed last, and 32 MiB behind them; and 32 MiB around those that were asked
    for last.
    """

    def __init__(self, session: Session, run: Run) -> None:
        self._session = session
        self._run = run
        self._held: dict[str, dict[int, Any]] = {}
        self._windows: OrderedDict[tuple[str, int], dict[int, Any]] = OrderedDict()
        self._width: dict[str, int] = {}  # steps in a window, of names that were asked for

    def get(self, name: str, step: int) -> Any:  # noqa: ANN401 - an array or a str
        """Give a value; None if it is not here."""
        return self._held.get(name, {}).get(step)

    def drop(self) -> None:
        """Forget everything."""
        self._held = {}
        self._windows.clear()
        self._width.clear()

    def around(self, name: str, step: int, *, saved: _I64, last: int) -> Any:  # noqa: ANN401 - the same
        """Give a value that somebody asks for, and read its neighbours; None: read it otherwise.

        Parameters
        ----------
        saved
            The steps at which values of the tensor were saved; the same until `drop`.
        last
            Read nothing behind this step.
        """
        width = self._width.get(name)
        if width is None:  # maybe nobody asks for another step
            self._width[name] = self._steps_of_window(name)
            return None
        if width == 1:
            return None
        number = int(saved.searchsorted(step)) // width
        window = self._windows.get((name, number))
        if window is None:
            steps = saved[number * width : (number + 1) * width]
            steps = steps[steps <= last].tolist()
            window = self._read({name: steps})[name] if steps else {}
            self._windows[name, number] = window
            if len(self._windows) > _MOST_WINDOWS:
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end((name, number))
        return window.get(step)

    def _steps_of_window(self, name: str) -> int:
        if name not in self._run:
            return 1
        tensor = self._run[name]
        each = tensor.nbytes // max(tensor.step_summary[0], 1) + 1
        return max(1, min(_MOST_STEPS, _WINDOW_NBYTES // each))

    def fetch(
        self,
        wanted: Mapping[str, Sequence[int]],
        *,
        saved: Callable[[str], _I64],
        last: int,
    ) -> None:
        """Read values by name and step, in one round of requests; drop what lies before them.

        Parameters
        ----------
        saved
            Gives the steps at which values of a name were saved.
        last
            Read nothing ahead behind this step.
        """
        low = min((step for steps in wanted.values() for step in steps), default=0)
        self._held = {
            name: {step: value for step, value in held.items() if step >= low}
            for name, held in self._held.items()
            if name in wanted
        }
        missing: dict[str, list[int]] = {}
        for name, steps in wanted.items():
            lacking = [s for s in steps if self.get(name, s) is None and has_step(saved(name), s)]
            if lacking:
                missing[name] = lacking
        if not missing:
            return
        budget = _MOST_NBYTES // len(missing)
        more = {
            name: _with_following(self._run[name], steps, saved(name), last, budget)
            for name, steps in missing.items()
        }
        for name, values in self._read(more).items():
            self._held.setdefault(name, {}).update(values)

    def _read(self, wanted: Mapping[str, list[int]]) -> dict[str, dict[int, Any]]:
        """Give values by name and step; what cannot be read is left out."""
        try:
            asks = [self._run[name].ask(steps=steps) for name, steps in wanted.items()]
            found = read(self._session, asks)
        except _PROBLEMS:  # one by one, to have what can be had
            return {name: self._read_one(name, steps) for name, steps in wanted.items()}
        return {
            name: dict(zip(steps, values, strict=True))
            for (name, steps), values in zip(wanted.items(), found, strict=True)
        }

    def _read_one(self, name: str, steps: list[int]) -> dict[int, Any]:
        tensor = self._run[name]
        asks: list[Callable[[], Ask]] = [lambda: tensor.ask(steps=steps)]
        if len(tensor.workers) > 1:  # the first one counts, where it saved all of them
            asks.append(lambda: tensor.select(worker=tensor.workers[0]).ask(steps=steps))
        for ask in asks:
            try:
                (values,) = read(self._session, [ask()])
            except _PROBLEMS:
                continue
            return dict(zip(steps, values, strict=True))
        return {}


def _with_following(
    tensor: Tensor, steps: Sequence[int], saved: _I64, last: int, budget: int
) -> list[int]:
    """Add steps behind those that are needed, as many as fit a budget of bytes."""
    each = tensor.nbytes // max(tensor.step_summary[0], 1) + 1
    most = min(_MOST_STEPS, budget // each)
    begin = int(saved.searchsorted(max(steps), side="right"))
    ahead = saved[begin : begin + most]
    return sorted({*steps, *ahead[ahead <= last].tolist()})

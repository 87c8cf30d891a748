"""What is seen of a training: read from its run alone, while it is written or afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.demo.curves.training import STOPPED
from tensorstore_fmt.demo.places import run_name
from tensorstore_fmt.errors import NotARunError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import Request, open_storage
from tensorstore_fmt.testing.storage import CountingStorage

__all__ = ["Curve", "Meter", "Observed", "Reader", "State"]

T = TypeVar("T")

State: TypeAlias = Literal["waiting", "training", "finished", "stopped"]

_SCALARS = ("loss", "accuracy", STOPPED)


class Meter(CountingStorage):
    """Counts the bytes that came, and how many of them were chunks of tensors.

    Attributes
    ----------
    fetched_nbytes, chunk_nbytes
        From all files; from files of chunks alone.
    """

    def reset(self) -> None:
        """Begin to count anew."""
        super().reset()
        self.fetched_nbytes = 0
        self.chunk_nbytes = 0

    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Fetch, and count what came."""
        results = super().fetch_settled(requests)
        for request, result in zip(requests, results, strict=True):
            nbytes = _nbytes(result)
            self.fetched_nbytes += nbytes
            if getattr(request, "path", "").startswith(f"{layout.SHARDS_DIR}/"):
                self.chunk_nbytes += nbytes
        return results


def _nbytes(result: object) -> int:
    data = result[0] if isinstance(result, tuple) else result
    return memoryview(data).nbytes if isinstance(data, bytes | bytearray | memoryview) else 0


@dataclass(frozen=True, slots=True)
class Curve:
    """Values of a scalar, by step; both one-dimensional, ascending by step."""

    steps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def best(self, *, least: bool) -> tuple[int, float] | None:
        """Give step and value where it is least or greatest, of what is no NaN."""
        if np.isnan(self.values).all():
            return None
        at = int(np.nanargmin(self.values) if least else np.nanargmax(self.values))
        return int(self.steps[at]), float(self.values[at])


_NOTHING = Curve(np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A training as its run shows it at one moment.

    Attributes
    ----------
    name, place
        Of the run; the place without credentials.
    learning_rate, planned
        From the run's attributes: the rate, and how many steps were to be done.
    loss, test_loss, test_accuracy
        Of each step's batch; of the test digits.
    alerts
        What rules found, ascending by step.
    reason
        Why it ended early, in its own words.
    """

    name: str
    place: str
    state: State = "waiting"
    learning_rate: float | None = None
    planned: int | None = None
    loss: Curve = _NOTHING
    test_loss: Curve = _NOTHING
    test_accuracy: Curve = _NOTHING
    alerts: Sequence[rules.Finding] = ()
    reason: str | None = None

    @property
    def label(self) -> str:
        """Name it for a legend."""
        return self.name if self.learning_rate is None else f"learning rate {self.learning_rate:g}"

    @property
    def steps(self) -> int:
        """How many steps were done."""
        return int(self.loss.steps[-1]) + 1 if len(self.loss) else 0

    @property
    def cause(self) -> rules.Finding | None:
        """The finding for which it was stopped, if that is known."""
        return next((each for each in self.alerts if str(each) == self.reason), None)


class Reader:
    """One run that is looked at again and again; it may not be there yet.

    Attributes
    ----------
    name
        Last part of the URL.
    run, meter
        None until the run is there.
    """

    def __init__(self, url: str, *, storage_options: Mapping[str, object] | None = None) -> None:
        self._url = url
        self.name = run_name(url)
        self._storage_options = storage_options
        self.run: tsf.Run | None = None
        self.meter: Meter | None = None

    def refresh(self) -> bool:
        """Look for what was committed since; True if there is something new.

        Raises
        ------
        TensorStoreError, OSError
            The run is damaged, or the storage failed.
        """
        if self.run is not None:
            return self.run.refresh()
        storage = open_storage(self._url, storage_options=self._storage_options, writable=False)
        meter = Meter(storage)
        session = Session(self._url, self._storage_options, storage=meter)
        try:
            session.view  # noqa: B018 - looks at the run
        except NotARunError:
            session.close()
            return False
        self.run, self.meter = tsf.Run(session), meter
        return True

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will come."""
        return self.run is not None and self.run.is_closed

    def look(self) -> Observed:
        """Read the curves and what rules found; no chunk of a tensor is fetched."""
        run = self.run
        if run is None:
            return Observed(name=self.name, place=self.name)
        table = run.scalars([each for each in _SCALARS if each in run])
        reason = _last_text(table)
        state: State = "training"
        if run.is_closed:
            state = "finished" if reason is None else "stopped"
        return Observed(
            name=self.name,
            place=run.describe(),
            state=state,
            learning_rate=_number(run.attrs.get("learning_rate")),
            planned=_integer(run.attrs.get("steps")),
            loss=_curve(table, "loss", "TRAIN"),
            test_loss=_curve(table, "loss", "EVAL"),
            test_accuracy=_curve(table, "accuracy", "EVAL"),
            alerts=rules.alerts(run),
            reason=reason,
        )

    def close(self) -> None:
        """Give everything back."""
        if self.run is not None:
            self.run.close()


def _curve(table: Any, name: str, mode: str) -> Curve:  # noqa: ANN401 - Arrow has no types
    rows = table.filter(pc.and_(pc.equal(table["name"], name), pc.equal(table["mode"], mode)))
    return Curve(rows["step"].to_numpy(), rows["value"].to_numpy())


def _last_text(table: Any) -> str | None:  # noqa: ANN401 - Arrow has no types
    texts = table.filter(pc.equal(table["name"], STOPPED))["text"].to_pylist()
    return texts[-1] if texts else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None

"""Runs: opening one, and what it holds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import translate
from typing import Any, Literal, SupportsIndex

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.errors import (
    AmbiguousError,
    ArgumentError,
    FormatError,
    StepDroppedError,
    StepNotFoundError,
    StepNotYetWrittenError,
)
from tensorstore_fmt.reading import display, follow, steptable, tables
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.modes import MODE_NAMES, mode_number
from tensorstore_fmt.reading.reader import Ask, check_name, read
from tensorstore_fmt.reading.selection import Index
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.steps import step_number
from tensorstore_fmt.reading.tensor import Tensor

__all__ = ["Run", "State", "open_run"]

State = Literal["here", "not_yet", "never", "dropped", "unreadable"]


def open_run(
    url: str | os.PathLike[str], *, storage_options: Mapping[str, object] | None = None
) -> Run:
    """Open a run to read it; no tensor data is read.

    One round of requests if all of the index that this needs is in the bundle, two if it fits
    the first 512 KiB of each segment, else three.

    Parameters
    ----------
    url
        A local path or any fsspec URL.
    storage_options
        For the filesystem.

    Raises
    ------
    NotARunError
        There is no run.
    UnsupportedError
        A newer version wrote it.
    OSError
        The storage failed.

    Warns
    -----
    RuntimeWarning
        The index is damaged; see `Run.damage`.
    """
    session = Session(os.fspath(url), storage_options)
    session.view  # noqa: B018 - looks at the run
    return Run(session)


class Run(Closeable):
    """A run as it was when it was opened or last refreshed: a mapping from names to `Tensor`.

    Threads and forked processes may share it. It pickles as its URL and what it shows, and shows
    the same steps where it is unpickled. Made by `open_run`.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    # --- what it is -----------------------------------------------------------
    @property
    def url(self) -> str:
        """As it was given; it may hold credentials."""
        return self._session.url

    def describe(self) -> str:
        """Name the run's place without credentials."""
        return self._session.storage.describe()

    @property
    def attrs(self) -> Mapping[str, object]:
        """The user's attributes."""
        return self._session.view.info.attrs

    @property
    def run_id(self) -> str:
        """32 hexadecimal digits."""
        return self._session.view.info.run_id.hex()

    @property
    def format_version(self) -> tuple[int, int]:
        """Major and minor version of the format it was created with."""
        return self._session.view.info.version

    @property
    def created_us(self) -> int:
        """When it was created: microseconds since 1970 UTC."""
        return self._session.view.info.created_us

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers that have written something, ascending."""
        return list(self._session.view.workers)

    @property
    def attempts(self) -> list[int]:
        """Numbers of the attempts, ascending."""
        return list(self._session.view.attempts)

    @property
    def num_workers(self) -> int:
        """How many workers the newest attempt has."""
        return self._session.view.num_workers

    @property
    def is_closed(self) -> bool:
        """Whether all workers of the newest attempt have closed it: nothing more will come."""
        return self._session.view.is_closed

    @property
    def damage(self) -> list[FormatError]:
        """What is wrong with the index, as errors with ``code`` and ``facts``.

        Opening warns of it. While flushes are missing (``missing_segment``), a step that was saved
        twice may show what was saved first: the flush that saved it again may be a missing one.
        """
        return list(self._session.view.damage)

    # --- names ------------------------------------------------------------------
    def names(self, pattern: str | None = None) -> list[str]:
        """Give the names, ascending.

        Parameters
        ----------
        pattern
            Only names that match, as in `fnmatch.fnmatchcase`: ``*`` also matches ``/``.
        """
        names = self._session.view.names
        if pattern is None:
            return list(names)
        match = re.compile(translate(pattern)).match
        return [name for name in names if match(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._session.view.has(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._session.view.names)

    def __len__(self) -> int:
        return len(self._session.view.names)

    def __getitem__(self, name: str) -> Tensor:
        """Give the handle of a tensor.

        Raises
        ------
        NameNotFoundError
            No tensor has this name; the message has those that look alike.
        """
        check_name(self._session.view, name)
        return Tensor(self._session, Query(name=name))

    # --- steps ------------------------------------------------------------------
    def steps(self, mode: str | None = None) -> NDArray[np.int64]:
        """Give all logged steps, of one mode or of all.

        Returns
        -------
        ndarray
            Shape (n,), int64, ascending, without repetition.
        """
        return steptable.logged_steps(self._session, mode_number(mode))

    def complete_steps(self, mode: str | None = None) -> NDArray[np.int64]:
        """Give the logged steps to which no worker will add anything; as `steps`."""
        return steptable.complete_steps(self._session, mode_number(mode))

    def is_complete(self, step: SupportsIndex, mode: str | None = None) -> bool:
        """Say whether no worker will add anything to a step (whether it was logged or not).

        Without a mode: in all modes in which it was logged.
        """
        return steptable.is_complete(self._session, step_number(step), mode_number(mode))

    def mode_step(self, step: SupportsIndex, mode: str | None = None) -> int:
        """Give a step's number within its mode.

        Raises
        ------
        NotThereError
            The step was not logged.
        AmbiguousError
            It was logged in several modes.
        """
        return self._step_row(step, mode)[0]

    def wall_time(self, step: SupportsIndex, mode: str | None = None) -> float:
        """Give when a step was logged, by the first worker that did, in seconds since 1970 UTC.

        Raises
        ------
        NotThereError
            The step was not logged.
        AmbiguousError
            It was logged in several modes.
        """
        return self._step_row(step, mode)[1] / 1e6

    def _step_row(self, step: SupportsIndex, mode: str | None) -> tuple[int, int]:
        number, which = step_number(step), mode_number(mode)
        rows = steptable.step_rows(self._session, which, number, number)
        modes = sorted(set(rows.mode.tolist()))
        if not modes:
            view = self._session.view
            wanted = view.used_modes if which is None else (which,)
            problem = view.missing(step=number)
            if problem is not None:
                raise problem
            if all(view.complete_through(m) >= number for m in wanted or (0,)):
                raise StepNotFoundError(f"step {number} was not logged", step=number)
            raise StepNotYetWrittenError(f"step {number} is not logged yet", step=number)
        if len(modes) > 1:
            names = [MODE_NAMES[m] for m in modes]
            raise AmbiguousError(
                f"step {number} was logged in the modes {', '.join(names)}; say which, e.g. "
                f"mode={names[0]!r}",
                step=number,
                modes=names,
            )
        first = int(rows.wall_time_us.argmin())
        return int(rows.mode_step[first]), int(rows.wall_time_us[first])

    # --- while it is being written --------------------------------------------------
    def refresh(self) -> bool:
        """See what was committed since; one LIST if nothing was.

        Returns
        -------
        bool
            Whether there is something new.
        """
        return self._session.refresh()

    def wait_for_step(
        self, step: SupportsIndex, mode: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Refresh until a step was logged and is complete.

        Raises
        ------
        StepNotFoundError
            It was not logged and never will be.
        TimeoutError
            `timeout_s` has passed.
        """
        follow.wait_for_step(
            self._session, step_number(step), mode_number(mode), timeout_s=timeout_s
        )

    def follow(
        self,
        mode: str | None = None,
        poll_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[int]:
        """Iterate over steps as they become visible and complete, until the run is closed.

        Begins with those that are complete already. Refreshes this run. A step logged in several
        modes comes once. If a later attempt resumes before steps that came, they come again.

        Parameters
        ----------
        mode
            Only this one's steps.
        poll_s
            Seconds from one look to the next; None: 0.01 to 0.5 on a disk, 0.5 to 5 elsewhere,
            the longer the longer nothing came.
        timeout_s
            Raise `TimeoutError` if nothing came for so long.
        """
        return follow.follow(self._session, mode_number(mode), poll_s=poll_s, timeout_s=timeout_s)

    def state(
        self,
        name: str,
        step: SupportsIndex,
        *,
        mode: str | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> State:
        """Say what there is of a tensor at a step.

        ``"unreadable"`` is found out by reading all of its chunks. A failure of the storage
        itself is raised.

        Raises
        ------
        NameNotFoundError
            No tensor has this name.
        AmbiguousError
            Several workers or modes saved it: say which.
        """
        tensor = self[name].select(mode=mode, worker=worker, attempt=attempt)
        try:
            tensor.read(step=step)
        except StepDroppedError:
            return "dropped"
        except StepNotFoundError:
            return "never"
        except StepNotYetWrittenError:
            return "not_yet"
        except FormatError:
            return "unreadable"
        return "here"

    # --- values ---------------------------------------------------------------------
    def read(self, items: Sequence[tuple[str, SupportsIndex, Index]]) -> list[Any]:
        """Read many slices with one round of requests.

        Parameters
        ----------
        items
            (name, step, index) each; as `Tensor.read`.

        Returns
        -------
        list
            One array, or `str`, for each.

        Raises
        ------
        ArgumentError
            An item is something else.
        """
        for item in items:
            if not isinstance(item, tuple | list) or len(item) != 3:  # type: ignore[redundant-expr]
                raise ArgumentError(f"an item is (name, step, index), not {item!r:.100}")
        return read(self._session, [Ask.at(name, step, index) for name, step, index in items])

    def table(self) -> pa.Table:
        """Give the index as an Arrow table.

        One row per (name, kind, mode, worker, attempt, dtype, shape), with first_step, last_step,
        steps, raw_nbytes and stored_nbytes.
        """
        return tables.index_table(self._session.view)

    def scalars(self, names: Sequence[str] | None = None) -> pa.Table:
        """Give all values with one element a step as an Arrow table.

        Columns step, mode, worker, wall_time_us, name, value (float64) and text (strings).

        Raises
        ------
        NameNotFoundError
            One of `names` is not there.
        """
        return tables.scalars_table(self._session, names)

    def statistics(self, names: Sequence[str] | None = None) -> pa.Table:
        """Give all saved statistics as an Arrow table, one row per name, step, mode and worker.

        Raises
        ------
        NameNotFoundError
            One of `names` is not there.
        """
        return tables.statistics_table(self._session, names)

    # --- the rest -------------------------------------------------------------------
    def close(self) -> None:
        """Give back connections and memory; reading raises `ClosedError` afterwards."""
        self._session.close()

    def __reduce__(self) -> tuple[object, ...]:
        return Run, (self._session,)

    def __repr__(self) -> str:
        return display.run_text(self)

    def _repr_html_(self) -> str:
        return display.run_html(self)

"""Tensors: handles on everything that a run holds under one name."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading import display
from tensorstore_fmt.reading.assembly import choose, full_shape
from tensorstore_fmt.reading.entries import Query
from tensorstore_fmt.reading.mapping import map_view
from tensorstore_fmt.reading.modes import MODE_NAMES, mode_number
from tensorstore_fmt.reading.reader import Ask, check_name, read, visible
from tensorstore_fmt.reading.selection import Index
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.stats import Stats, read_stats
from tensorstore_fmt.reading.steps import Steps, StepSet, step_number, step_set
from tensorstore_fmt.reading.timeline import timelines
from tensorstore_fmt.reading.view import Source, View

__all__ = ["Tensor", "TensorAt"]


class Tensor:
    """All that a run holds under one name: no data until it is asked for.

    Made by ``run[name]``. It shows what its run shows, also after ``run.refresh()``. Threads
    may share it; it pickles, and then shows the same steps elsewhere.

    Parameters
    ----------
    session
        Of the run.
    query
        Name, and what is selected of it.
    """

    __slots__ = ("_query", "_session")

    def __init__(self, session: Session, query: Query) -> None:
        self._session = session
        self._query = query

    # --- what it is -------------------------------------------------------------
    @property
    def name(self) -> str:
        """Its name."""
        return self._query.name

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of what was saved last; `object` for strings.

        Of the statistics (float64), if only those were saved.
        """
        return dtypes.numpy_dtype(self.dtype_name).newbyteorder("=")

    @property
    def dtype_name(self) -> str:
        """Name of the dtype as in the spec, e.g. ``"bfloat16"`` or ``"string"``."""
        return self._newest.series.dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Shape at every step; None for an axis whose length varies.

        Of the global tensor, if parts of it were saved and no worker is selected.
        """
        shapes = {self._shape_of(source) for source in self._sources}
        newest = self._shape_of(self._newest)
        alike = [shape for shape in shapes if len(shape) == len(newest)]
        return tuple(
            lengths[0] if len(set(lengths)) == 1 and lengths[0] >= 0 else None
            for lengths in zip(*alike, strict=True)
        )

    @property
    def ndim(self) -> int:
        """Number of axes of what was saved last."""
        return len(self._newest.series.global_shape or self._newest.series.shape)

    def _shape_of(self, source: Source) -> tuple[int, ...]:
        series = source.series
        return (self._query.worker is None and series.global_shape) or series.shape

    @property
    def has_data(self) -> bool:
        """Whether values were saved, not only statistics."""
        return bool(self._sources_of(layout.KIND_DATA))

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes in which it was saved; ``"NONE"`` is without one."""
        return tuple(MODE_NAMES[m] for m in sorted({s.series.mode for s in self._sources}))

    @property
    def workers(self) -> tuple[int, ...]:
        """Workers that saved it."""
        return tuple(sorted({s.worker for s in self._sources}))

    @property
    def attempts(self) -> tuple[int, ...]:
        """Attempts in which it was saved, hidden ones included."""
        return tuple(sorted({s.attempt for s in self._sources}))

    @property
    def nbytes(self) -> int:
        """Bytes of all saved steps, decoded; informative (hidden steps count too)."""
        return sum(s.series.raw_nbytes for s in self._sources)

    @property
    def stored_nbytes(self) -> int:
        """Bytes its steps take in files; informative."""
        return sum(s.series.stored_nbytes for s in self._sources)

    @property
    def step_summary(self) -> tuple[int, int, int]:
        """How many steps were saved (informative), the first and the last; from the catalogs."""
        series = [s.series for s in self._sources]
        if len(series) == 1:
            return series[0].steps, series[0].first_step, series[0].last_step
        return (
            sum(s.steps for s in series),
            min(s.first_step for s in series),
            max(s.last_step for s in series),
        )

    @property
    def steps(self) -> NDArray[np.int64]:
        """Steps at which values were saved, in all selected modes and workers.

        Shape (n,), int64, ascending, without repetition.
        """
        return visible(self._session, self._query).saved().steps

    def shape_at(self, step: SupportsIndex) -> tuple[int, ...]:
        """Give the shape at one step.

        Raises
        ------
        NotThereError
            The step is not there; see `read`.
        AmbiguousError
            Several workers or modes saved it.
        """
        number = step_number(step)
        wanted = StepSet.one(number)

        def work(view: View) -> tuple[int, ...]:
            check_name(view, self.name)
            (line,) = timelines(view, self._session.pages, [self._narrow(number, number)])
            chosen = choose(view, line, wanted)
            found = line.found
            row = int(chosen.rows[0])
            source = found.sources[int(chosen.line.source[row])]
            if chosen.is_parts:
                return source.series.global_shape
            return full_shape(found, source, int(chosen.line.row[row]))

        return self._session.do(work)

    # --- narrowing --------------------------------------------------------------
    def select(
        self, *, mode: str | None = None, worker: int | None = None, attempt: int | None = None
    ) -> Tensor:
        """Give the same name, narrowed to a mode, a worker or an attempt.

        Parameters
        ----------
        mode
            ``"TRAIN"``, ``"EVAL"``, ``"PREDICT"``, or ``"NONE"`` for what was logged without a
            mode. None keeps what is selected.
        worker
            Its values alone. Of a tensor saved in parts, this worker's part alone.
        attempt
            Its values alone, also the steps that later attempts hide.
        """
        old = self._query
        number = mode_number(mode)
        return Tensor(
            self._session,
            Query(
                name=old.name,
                mode=old.mode if number is None else number,
                worker=old.worker if worker is None else int(worker),
                attempt=old.attempt if attempt is None else int(attempt),
            ),
        )

    def _narrow(self, low: int, high: int) -> Query:
        old = self._query
        return Query(
            name=old.name, low=low, high=high,
            mode=old.mode, worker=old.worker, attempt=old.attempt,
        )  # fmt: skip

    # --- values -------------------------------------------------------------------
    def read(
        self,
        *,
        step: SupportsIndex | None = None,
        steps: Steps = None,
        index: Index = (),
        mode: str | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> Any:  # noqa: ANN401 - an array or, of one string, a str
        """Read a slice at one step, or stacked over several.

        Fetches only the chunks that `index` touches (spec, "Reading a slice"): at most one round
        of requests for the index and one for the data (more only beyond 64 MiB).

        Parameters
        ----------
        step
            One step. Negative numbers do not count from the end: use ``.steps[-1]``.
        steps
            A half-open slice of step numbers, of which the saved ones are taken (with a stride:
            every stride-th number from its start on); exactly the steps of a sequence; or None
            for all that were saved.
        index
            What to take of the tensor, as NumPy's basic indexing (`numpy.s_` helps).
        mode, worker, attempt
            As in `select`.

        Returns
        -------
        ndarray or str
            With `step` the selection's shape, else (number of steps, *selection). Stored dtype,
            native byte order; the caller owns it. Strings: `str` for one of rank 0, else
            arrays of `object`.

        Raises
        ------
        StepNotFoundError, StepNotYetWrittenError, StepDroppedError
            The step was never saved, is not there yet, or was given up by its writer.
        FormatError
            It was saved but cannot be read: `ChecksumError`, `TruncatedError`,
            `MissingFileError` ….
        AmbiguousError
            Several workers or modes saved a step: say which.
        SelectionError
            The tensor does not have what `index` asks for.
        ArgumentError
            Code ``shape_varies``: the steps differ in shape or dtype and cannot be stacked.
        """
        tensor = self
        if mode is not None or worker is not None or attempt is not None:
            tensor = self.select(mode=mode, worker=worker, attempt=attempt)
        (result,) = read(self._session, [tensor.ask(step=step, steps=steps, index=index)])
        return result

    def ask(
        self, *, step: SupportsIndex | None = None, steps: Steps = None, index: Index = ()
    ) -> Ask:
        """Put a `read` in a form that `reader.read` takes many of."""
        if step is None:
            wanted = step_set(steps)
            return Ask(query=self._narrow(wanted.low, wanted.high), wanted=wanted, index=index)
        if steps is not None:
            raise ArgumentError("give step= or steps=, not both")
        number = step_number(step)
        wanted = StepSet.one(number)
        return Ask(query=self._narrow(number, number), wanted=wanted, index=index, is_single=True)

    def at(
        self,
        step: SupportsIndex,
        *,
        mode: str | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> TensorAt:
        """Give the tensor at one step, to be indexed: ``t.at(500)[0, 3, :20]``."""
        return TensorAt(self.select(mode=mode, worker=worker, attempt=attempt), step_number(step))

    def view(
        self,
        *,
        step: SupportsIndex,
        mode: str | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> NDArray[Any]:
        """Map a step of a local run without copying it.

        Returns
        -------
        ndarray
            Read-only; its memory is the shard itself. Its checksum is checked at the first call
            for this payload. If somebody cuts the file short later, access kills the process.

        Raises
        ------
        ArgumentError
            It is not local, not raw, not one chunk, or lies in the index (code ``no_view``).
        NotThereError, FormatError, AmbiguousError
            As `read`.
        """
        tensor = self.select(mode=mode, worker=worker, attempt=attempt)
        return map_view(self._session, tensor.ask(step=step))

    def stats(
        self,
        steps: Steps = None,
        *,
        mode: str | None = None,
        worker: int | None = None,
        attempt: int | None = None,
    ) -> Stats:
        """Read the statistics of steps from the index alone; no chunk is fetched.

        They are those the writer saved, or are computed from values that lie in the index.
        Steps that have neither are left out; if asked for exactly they raise.

        Parameters
        ----------
        steps
            As in `read`.

        Raises
        ------
        NotThereError
            A step asked for exactly has no statistics.
        AmbiguousError
            Several workers or modes saved a step: say which.
        """
        tensor = self.select(mode=mode, worker=worker, attempt=attempt)
        return read_stats(self._session, tensor._query, step_set(steps))

    # --- others -------------------------------------------------------------------
    def table(self) -> pa.Table:
        """Give a series of scalars as an Arrow table with the columns step and value.

        Raises
        ------
        ArgumentError
            It has more than one element a step.
        """
        steps = self.steps
        values = np.asarray(self.read())
        if values.size != len(steps):
            raise ArgumentError(
                f"{self.name!r} has {values.size // max(len(steps), 1)} elements a step; only "
                "scalars make a table"
            )
        values = values.reshape(-1)
        if self.dtype_name == dtypes.STRING:
            return pa.table({"step": steps, "value": pa.array(values, pa.utf8())})
        if values.dtype.kind == "c":
            raise ArgumentError(f"{self.name!r} is complex, which Arrow does not have; use read()")
        if values.dtype.kind == "V":  # of ml_dtypes: Arrow does not have them
            values = values.astype(np.float64)
        return pa.table({"step": steps, "value": values})

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.table().__arrow_c_stream__(requested_schema)

    def __reduce__(self) -> tuple[object, ...]:
        return Tensor, (self._session, self._query)

    def __repr__(self) -> str:
        return display.tensor_text(self)

    def _repr_html_(self) -> str:
        return display.tensor_html(self)

    # --- sources ------------------------------------------------------------------
    def _sources_of(self, kind: int) -> list[Source]:
        view = self._session.view
        query = self._query
        sources = view.sources(self.name, kind)
        if not sources:
            check_name(view, self.name)
        if query.mode is query.worker is query.attempt is None:
            return list(sources)
        return [
            s
            for s in sources
            if query.mode in (None, s.series.mode)
            and query.worker in (None, s.worker)
            and query.attempt in (None, s.attempt)
        ]

    @property
    def _sources(self) -> list[Source]:
        """Series of the values, else those of the statistics."""
        found = self._sources_of(layout.KIND_DATA) or self._sources_of(layout.KIND_STATS)
        if not found:
            raise ArgumentError(
                f"{self.name!r} was saved, but not in this mode, by this worker or in this attempt",
                code="empty_selection",
                name=self.name,
            )
        return found

    @property
    def _newest(self) -> Source:
        return max(self._sources, key=lambda s: (s.series.last_step, s.writer.rank))


class TensorAt:
    """One tensor at one step; indexing reads it."""

    __slots__ = ("_step", "_tensor")

    def __init__(self, tensor: Tensor, step: int) -> None:
        self._tensor = tensor
        self._step = step

    def __getitem__(self, index: Index) -> Any:  # noqa: ANN401 - as `read`
        return self._tensor.read(step=self._step, index=index)

    def __array__(
        self,
        dtype: np.dtype[Any] | None = None,
        copy: bool | None = None,  # noqa: FBT001 - NumPy's protocol
    ) -> NDArray[Any]:
        if copy is False:
            raise ValueError("reading makes a copy; use .view(step=...) for a view")
        array = np.asarray(self._tensor.read(step=self._step))
        return array if dtype is None else array.astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape at this step."""
        return self._tensor.shape_at(self._step)

    def __repr__(self) -> str:
        return f"<{display.quoted(self._tensor.name)} at step {self._step}>"

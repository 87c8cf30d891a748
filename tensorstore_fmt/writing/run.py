"""A run that is being written: `create_run`, `RunWriter.log`, flushing, closing."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - its end of all pools is registered before ours
import os
import secrets
import threading
import time
import warnings
import weakref
from collections.abc import Mapping
from typing import Literal

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.errors import ArgumentError, ClosedError, TensorStoreError
from tensorstore_fmt.format import layout, segment
from tensorstore_fmt.storage import Storage, open_storage
from tensorstore_fmt.writing import closing
from tensorstore_fmt.writing.commit import tables
from tensorstore_fmt.writing.committer import Committer
from tensorstore_fmt.writing.convert import check_mode, check_step
from tensorstore_fmt.writing.encoders import EncoderPool
from tensorstore_fmt.writing.failures import Failures
from tensorstore_fmt.writing.intake import Intake
from tensorstore_fmt.writing.joining import Joined, join_run
from tensorstore_fmt.writing.options import (
    MIB,
    ChunkShape,
    StatsChoice,
    WriterOptions,
    check_options,
)
from tensorstore_fmt.writing.quota import Quota
from tensorstore_fmt.writing.report import CloseReport
from tensorstore_fmt.writing.segments import SegmentLog
from tensorstore_fmt.writing.shards import ShardSink

__all__ = ["RunWriter", "create_run", "open_writer"]


def create_run(
    url: str | os.PathLike[str],
    *,
    attrs: Mapping[str, object] | None = None,
    worker: int = 0,
    num_workers: int = 1,
    resume_from: int | None = None,
    attempt: int | None = None,
    storage_options: Mapping[str, object] | None = None,
    flush_interval_s: float | None = None,
    flush_bytes: int = 64 * MIB,
    queue_bytes: int = 256 * MIB,
    when_full: Literal["block", "drop"] = "block",
    compression: Literal["auto", "none", "zstd"] = "auto",
    chunks: Mapping[str, ChunkShape] | None = None,
    stats: StatsChoice | Mapping[str, StatsChoice] = True,
    on_error: Literal["warn", "raise"] = "warn",
    join_timeout_s: float = 60.0,
) -> RunWriter:
    """Create a run, or join one as a further writer, and begin to write.

    Parameters
    ----------
    url
        A folder, or any URL that fsspec can write (``s3://bucket/run``, ``memory://run``).
    attrs
        Anything JSON can say about the run; kept by the writer that creates it.
    worker, num_workers
        Rank of this process and number of ranks. Worker 0 creates the run, the others wait
        for it up to `join_timeout_s` seconds.
    resume_from
        Go on in an existing run: a new attempt that hides what earlier attempts wrote at this
        step and later (it stays readable with ``attempt=``). All workers give the same number.
    attempt
        Number of the attempt, if the launcher knows it; else it is found out from the run.
    storage_options
        For the fsspec file system: ``key``, ``secret``, ``endpoint_url`` …
    flush_interval_s
        Logged data is visible to readers after at most this time; 1 s on a disk, 30 s elsewhere.
    flush_bytes
        Flush also when so many raw bytes have been logged since the last time.
    queue_bytes
        Most raw bytes that wait in memory. When they are reached, `log` waits
        (``when_full="block"``), or drops tensors and counts them (``"drop"``).
    compression
        ``auto`` samples what pays; ``zstd``; ``none`` stores raw, without digests.
    chunks
        Chunk lengths per name pattern, one per axis; None for the whole axis:
        ``{"attention/*": (1, 1, None, None)}``.
    stats
        Whether statistics are stored beside tensors: True, False, ``"only"`` (no data), or one
        of these per name pattern.
    on_error
        ``warn``: storage faults never stop training; what cannot be stored is retried, then
        dropped, counted and recorded. ``raise``: `log`, `flush` and `close` raise it.

    Raises
    ------
    ArgumentError
        An option that cannot be used.
    NotARunError
        The folder holds something else.
    RunExistsError
        A finished run is there, and `resume_from` was not given.
    OSError
        The storage cannot be used: no permission, no such bucket, wrong credentials.
    """
    _check_workers(worker, num_workers, attempt)
    storage = open_storage(url, storage_options=storage_options, writable=True)
    options = check_options(
        is_local=storage.is_local,
        flush_interval_s=flush_interval_s,
        flush_bytes=flush_bytes,
        queue_bytes=queue_bytes,
        when_full=when_full,
        compression=compression,
        chunks=chunks,
        stats=stats,
        on_error=on_error,
        sleep=time.sleep,
        clock_us=_now_us,
        new_id=_new_id,
    )
    return open_writer(
        storage,
        options,
        attrs=attrs or {},
        worker=worker,
        num_workers=num_workers,
        resume_from=None if resume_from is None else check_step(resume_from),
        attempt=attempt,
        join_timeout_s=join_timeout_s,
    )


def open_writer(
    storage: Storage,
    options: WriterOptions,
    *,
    attrs: Mapping[str, object],
    worker: int = 0,
    num_workers: int = 1,
    resume_from: int | None = None,
    attempt: int | None = None,
    join_timeout_s: float = 60.0,
) -> RunWriter:
    """Begin to write to a storage that is open; `create_run` for those who bring their own."""
    now = options.clock_us()
    joined = join_run(
        storage,
        attrs=attrs,
        worker=worker,
        num_workers=num_workers,
        resume_from=resume_from,
        attempt=attempt,
        join_timeout_s=join_timeout_s,
        now_us=now,
        new_run_id=lambda: b"".join(options.new_id().to_bytes(8, "big") for _ in range(2)),
    )
    if joined.also_here:
        warnings.warn(
            f"{storage.describe()}: worker {worker} already has a writer in attempt "
            f"{joined.attempt}; if it is dead, continue with resume_from=STEP; if it lives, both "
            "are kept and the one opened last is shown where they saved the same",
            stacklevel=3,
        )
    key = layout.WriterKey(worker=worker, attempt=joined.attempt, writer=options.new_id())
    return RunWriter(
        storage, options, joined=joined, key=key, num_workers=num_workers, opened_us=now
    )


def _check_workers(worker: int, num_workers: int, attempt: int | None) -> None:
    for name, value, least in (
        ("num_workers", num_workers, 1),
        ("worker", worker, 0),
        ("attempt", attempt, 0),
    ):
        if name == "attempt" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"{name} is {value!r}; it is an integer, at least {least}")
        if value > layout.MAX_WORKER:
            raise ArgumentError(f"{name} is {value}; at most {layout.MAX_WORKER} is possible")
    if worker >= num_workers:
        raise ArgumentError(
            f"worker is {worker}, but num_workers is {num_workers}; workers are counted from 0"
        )


def _now_us() -> int:
    return time.time_ns() // 1000


def _new_id() -> int:
    return secrets.randbits(64) or 1


class RunWriter(Closeable):
    """One writer of a run. Made by `create_run`; close it, or use it in a ``with`` statement.

    All methods may be called from several threads. In a process forked from this one it
    cannot be used; that process opens its own.
    """

    def __init__(
        self,
        storage: Storage,
        options: WriterOptions,
        *,
        joined: Joined,
        key: layout.WriterKey,
        num_workers: int,
        opened_us: int,
    ) -> None:
        self._storage = storage
        self._options = options
        self._joined = joined
        self._key = key
        self._num_workers = num_workers
        self._pid = os.getpid()
        self._is_closed = False
        self._report: CloseReport | None = None
        self._log_s = 0.0
        if joined.attempt > 0:
            storage.delete([layout.BUNDLE])
        self._os_lock = storage.lock(layout.lock_path(key))
        header = segment.Header(
            run_id=joined.info.run_id,
            key=key,
            num_workers=num_workers,
            resume_step=joined.resume_step,
            first_flush=0,
            last_flush=0,
            opened_us=opened_us,
            published_us=opened_us,
            complete_through=(joined.resume_step - 1,) * 4,
        )
        self._failures = Failures(options, storage.describe())
        self._segments = SegmentLog(storage, options, self._failures)
        # Flush 0 says that this writer exists; if it fails, the caller is told at once.
        self._segments.publish(header, tables([]))
        self._quota = Quota(options.queue_bytes, options.when_full)
        self._sink = ShardSink(
            storage, options, run_id=joined.info.run_id, key=key, failures=self._failures
        )
        self._pool = EncoderPool(self._sink, options, quota=self._quota, failures=self._failures)
        self._intake = Intake(
            options,
            joined,
            pool=self._pool,
            quota=self._quota,
            failures=self._failures,
            check_usable=self._check_usable,
            request=self._request,
        )
        self._committer = Committer(
            storage,
            options,
            header,
            sink=self._sink,
            segments=self._segments,
            pool=self._pool,
            failures=self._failures,
            take=self._intake.end,
            has_news=lambda: self._intake.has_news,
        )
        _open_writers.add(self)

    # --- what users read ------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the run lies, without credentials."""
        return self._storage.describe()

    @property
    def run_id(self) -> str:
        """32 hexadecimal digits."""
        return self._joined.info.run_id.hex()

    @property
    def worker(self) -> int:
        """Rank of this writer."""
        return self._key.worker

    @property
    def num_workers(self) -> int:
        """Number of ranks, as the writer was told."""
        return self._num_workers

    @property
    def attempt(self) -> int:
        """Number of the attempt this writer belongs to."""
        return self._key.attempt

    @property
    def attrs(self) -> Mapping[str, object]:
        """The attributes of the run, as its creator gave them."""
        return self._joined.info.attrs

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<RunWriter {self.url} worker={self.worker} attempt={self.attempt} {state}>"

    # --- logging ----------------------------------------------------------------------

    def log(
        self,
        data: Mapping[str, object],
        *,
        step: int,
        mode: str | None = None,
    ) -> None:
        """Log named values at a step; copies them and returns.

        Parameters
        ----------
        data
            Numbers, strings, NumPy arrays, torch or JAX tensors, anything with DLPack or
            ``__array__``, `Part`; by name. Nested dicts give names joined by ``/``. Logging a
            (name, mode, step) again replaces it.
        step
            The run's counter, 0 or greater; steps may have gaps and may go back.
        mode
            ``"TRAIN"``, ``"EVAL"``, ``"PREDICT"`` or None; part of the key.

        Raises
        ------
        ArgumentError
            A name, step, mode or value that cannot be stored; then nothing of this call is.
        ClosedError
            The run is closed, or this process was forked from the one that opened it.
        StorageFailedError
            With ``on_error="raise"``, after the storage failed.
        """
        begin = time.perf_counter()
        self._check_usable()
        number = check_mode(mode)
        self._intake.take(data, check_step(step), number)
        self._log_s += time.perf_counter() - begin

    def set_stats(self, name: str, choice: StatsChoice) -> None:
        """Say for one name what ``stats=`` of `create_run` says for patterns of names.

        Parameters
        ----------
        name
            Of a tensor that was not logged yet.
        choice
            True, False, or ``"only"``: statistics without the data.

        Raises
        ------
        ArgumentError
            No such choice.
        StateError
            Code ``logged``: too late.
        """
        self._check_usable()
        if choice not in (True, False, "only"):
            raise ArgumentError(f"stats of {name!r} is {choice!r}; it is True, False or 'only'")
        self._intake.set_stats(name, choice)

    def stamp(self, step: int, mode: str | None, *, mode_step: int, wall_time_us: int) -> None:
        """Say when a step was made, and its number in its mode, before it is logged.

        For importers, which copy what happened elsewhere; otherwise `log` finds out itself.
        """
        self._check_usable()
        number = check_mode(mode)
        self._intake.stamp(
            check_step(step), number, mode_step=check_step(mode_step), time_us=wall_time_us
        )

    def hold_encoding(self) -> None:
        """Let what is logged from here on wait until `release_encoding`: a step is being logged.

        Copying is faster while no encoder uses the same memory and cores. What was logged before
        is encoded; and so is all else when half of ``queue_bytes`` waits, or somebody waits for it.
        """
        self._pool.hold()

    def release_encoding(self) -> None:
        """End what `hold_encoding` began, if it did."""
        self._pool.release()

    def _request(self, number: int) -> None:
        self._committer.request(number)

    # --- flushing -----------------------------------------------------------------------

    def flush(self, *, durable: bool = False) -> bool:
        """Make all that was logged so far visible to readers.

        It then survives the death of this process; with `durable`, also power loss, on a file
        system that honours fsync.

        Returns
        -------
        bool
            False if the storage failed (with ``on_error="warn"``). What could not be published
            is tried again with the next flush; what could not be stored is recorded as dropped.
            After a failed sync, `durable` flushes stay False if something visible may be lost
            at a power cut.

        Raises
        ------
        StorageFailedError
            With ``on_error="raise"``, if the storage failed.
        ClosedError
            The run is closed.
        """
        self._check_usable()
        number = self._intake.number
        self._committer.request(number, durable=durable)
        with self._pool.hurry():
            is_safe = self._committer.wait(number, durable=durable)
        self._failures.check()
        return is_safe

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(
                f"{self.url} was opened in process {self._pid}, this is {os.getpid()}: a forked "
                "process opens its own with create_run(...)",
                url=self.url,
            )
        if self._is_closed:
            raise ClosedError(f"{self.url} is closed", url=self.url)
        self._failures.check()

    # --- closing --------------------------------------------------------------------------

    def close(self) -> CloseReport:
        """Flush durably, seal the shard, and mark this writer as finished.

        Called at the end of the ``with`` statement, and at the exit of the interpreter if
        nobody did. Calling it again gives the same report.

        Raises
        ------
        StorageFailedError
            With ``on_error="raise"``, if the storage failed.
        """
        if os.getpid() != self._pid:  # a thread that is not in this process may hold the locks
            return self._report or self._make_report(0)
        with self._intake.lock:
            if self._is_closed:
                return self._report or self._make_report(self._segments_nbytes())
            self._is_closed = True
        with self._pool.hurry():
            self._committer.close()
        self._pool.stop()
        self._sink.close()
        self._segments.stop()
        try:
            closing.finish(self._storage, self._joined.info.run_id, self._segments)
        except (
            OSError,
            MemoryError,
        ) as error:  # all data is published; what failed only speeds up reading
            self._failures.note(error)
        try:
            self._os_lock.release()
            self._storage.delete([layout.lock_path(self._key)])
        except OSError as error:  # the lock went with the process's last hold on it
            self._failures.note(error)
        self._report = self._make_report(self._segments_nbytes())
        self._storage.close()
        self._intake.clear()
        _open_writers.discard(self)
        self._failures.check()
        if self._report.dropped:
            warnings.warn(f"{self.url}: {self._report}", RuntimeWarning, stacklevel=2)
        return self._report

    def _segments_nbytes(self) -> int:
        return sum(s.nbytes for s in self._segments.segments)

    def _make_report(self, segments_nbytes: int) -> CloseReport:
        return CloseReport(
            steps=self._intake.steps,
            raw_nbytes=self._intake.raw_nbytes,
            stored_nbytes=self._sink.stored_nbytes + segments_nbytes,
            dropped=self._committer.dropped + self._intake.unrecorded,
            failures=self._failures.count,
            stalled_s=self._quota.stalled_s,
            log_s=self._log_s,
        )


_open_writers: weakref.WeakSet[RunWriter] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for run in list(_open_writers):
        try:
            run.close()
        except TensorStoreError as error:  # the others want to be closed too
            warnings.warn(
                f"{run.url}: closing at exit failed: {error}", RuntimeWarning, stacklevel=1
            )


# Pools of threads end before what `atexit` calls, and the event loop of object stores needs one to
# look up hosts: every request would fail then. What is registered last here is called first.
threading._register_atexit(_close_all)  # type: ignore[attr-defined] # no public way

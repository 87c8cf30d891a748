"""From a call of `log` to the generation that it belongs to: all of the call, or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from tensorstore_fmt.format import layout
from tensorstore_fmt.writing.buffers import BufferPool
from tensorstore_fmt.writing.committer import Taken
from tensorstore_fmt.writing.convert import check_name, outline, snapshot
from tensorstore_fmt.writing.encoders import EncoderPool
from tensorstore_fmt.writing.failures import Failures
from tensorstore_fmt.writing.joining import Joined
from tensorstore_fmt.writing.options import StatsChoice, WriterOptions
from tensorstore_fmt.writing.pending import Generation, Held
from tensorstore_fmt.writing.quota import Quota
from tensorstore_fmt.writing.series import Kept
from tensorstore_fmt.writing.staging import Part, Staging, Tensor, check_box, check_part, flatten

__all__ = ["Intake"]

_MAX_TRIES = 3


@dataclass(slots=True)
class _Call:
    """One call of `log`, with all of its values copied."""

    step: int
    mode: int
    scalars: list[tuple[str, float]] = field(default_factory=list)
    tensors: list[tuple[Tensor, Kept, int, Held | None]] = field(default_factory=list)
    holds: list[Held] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # names of what no memory could be had for
    done: int = 0  # of the tensors
    is_begun: bool = False
    tries: int = 0

    def names(self) -> list[tuple[str, int, int]]:
        """Give name, mode and step of what is not taken yet."""
        left = [tensor.name for tensor, *_ in self.tensors[self.done :]]
        names = [*self.lost, *left, *(name for name, _ in self.scalars)]
        return [(name, self.mode, self.step) for name in names]


class Intake:
    """Copies what is logged, and adds it to the generation that is being filled.

    Ctrl-C, or another signal whose handler raises, may end `take` between any two statements. So
    the call is noted as a whole first, by one statement, and carried out then; if it was ended
    in between, whoever comes next carries it out again. Nothing is there twice then, as a later
    save of a step replaces an earlier one.

    Parameters
    ----------
    lock
        Reentrant; held while the generation changes.
    check_usable
        Raises if nothing can be logged any more.
    request
        Asks for a commit of the generations up to a number.

    Attributes
    ----------
    steps, raw_nbytes
        What was logged so far.
    """

    def __init__(
        self,
        options: WriterOptions,
        joined: Joined,
        *,
        pool: EncoderPool,
        quota: Quota,
        failures: Failures,
        check_usable: Callable[[], None],
        request: Callable[[int], None],
    ) -> None:
        self._options = options
        self._pool = pool
        self._quota = quota
        self._failures = failures
        self._check_usable = check_usable
        self._request = request
        self._buffers = BufferPool(options.queue_bytes)
        self._staging = Staging(options, put=pool.put, release=quota.release)
        self.lock = threading.RLock()
        self._generation = Generation(1)
        self._ended: tuple[Taken, ...] = ()
        self._taking: _Call | None = None
        # An attempt has nothing to say about steps before the one it resumes from.
        self._complete = [joined.resume_step - 1] * len(layout.MODES)
        self._max_step = [-1] * len(layout.MODES)
        self._mode_steps = {m: joined.mode_steps.get(m, 0) for m in range(len(layout.MODES))}
        self._last_logged: dict[int, int] = {}
        self._unknown: list[tuple[str, int, int]] = []  # name, mode, step
        self._unstamped: list[tuple[int, int]] = []  # step, mode; of calls that were lost whole
        self.steps = self.raw_nbytes = 0

    @property
    def number(self) -> int:
        """Number of the generation that is being filled."""
        with self.lock:
            return self._generation.number

    @property
    def unrecorded(self) -> int:
        """Tensors that were dropped, and of which the run has no record: nor their name."""
        return len(self._unknown)

    @property
    def has_news(self) -> bool:
        """Whether anything was logged since the last flush."""
        return self._taking is not None or not self._generation.is_empty

    def clear(self) -> None:
        """Give back memory that is kept for snapshots."""
        self._buffers.clear()

    def set_stats(self, name: str, choice: StatsChoice) -> None:
        """Say how the statistics of one name are kept."""
        with self.lock:
            self._staging.set_stats(check_name(name), choice)

    # --- a call of `log` ------------------------------------------------------------

    def take(self, data: Mapping[str, object], step: int, mode: int) -> None:
        """Copy all values, then take them; nothing is taken if one is refused."""
        call = _Call(step, mode)
        try:
            self._copy(data, call)
            with self.lock:
                self._check_usable()
                self._finish_interrupted()
                if self._is_shared(call):
                    # What follows is published later than what is there.
                    self._end_generation()
                    self._request(self._ended[-1].generation.number)
                self._taking, call.is_begun = call, True
                self._carry_out(call)
                self._taking = None
                generation = self._generation
        except BaseException as error:
            if not call.is_begun:
                self._quota.release(call.holds)
            if not isinstance(error, MemoryError) or not self._failures.is_quiet:
                raise
            self._failures.note(error)
            if not call.is_begun:  # else whoever comes next carries it out
                self._unknown += call.names()
                self._unstamped.append((step, mode))
            return
        if generation.raw_nbytes >= self._options.flush_bytes:
            self._request(generation.number)

    def _copy(self, data: Mapping[str, object], call: _Call) -> None:
        items = data.items()
        # Asking an abstract class takes long; these two are what is logged all the time.
        if any(
            isinstance(value, Mapping)
            for value in data.values()
            if type(value) is not float and type(value) is not np.ndarray
        ):
            items = dict(flatten(data)).items()
        floats, mode = self._generation.floats, call.mode
        for name, value in items:
            try:
                if type(value) is float:
                    if (mode, name) not in floats:
                        self._staging.plan_float(name, mode)
                    call.scalars.append((name, value))
                else:
                    self._copy_tensor(check_name(name), value, call)
            except MemoryError as error:  # the other values are taken nevertheless
                if not self._failures.is_quiet:
                    raise
                self._failures.note(error)
                self._quota.release(call.holds[-1:] if type(value) is not float else ())
                call.lost.append(name)

    def _copy_tensor(self, name: str, value: object, call: _Call) -> None:
        global_shape: tuple[int, ...] = ()
        origin: tuple[int, ...] = ()
        if isinstance(value, Part):
            global_shape, origin = check_part(name, value)
            value = value.value
        size = getattr(value, "nbytes", 0)
        nbytes = size if isinstance(size, int) and size > layout.INLINE_STEP_NBYTES else 0
        held = Held()
        call.holds.append(held)
        is_taken = self._reserve(held, nbytes)
        shot = outline(value) if not is_taken else None
        shot = shot or snapshot(name, value, empty=self._buffers.empty)
        self._plan(Tensor(name, shot, global_shape, origin), call, held if is_taken else None)

    def _plan(self, tensor: Tensor, call: _Call, held: Held | None) -> None:
        if tensor.global_shape:
            check_box(tensor)
        kept, nbytes = self._staging.plan(tensor, call.mode)
        if held is not None:
            queued = nbytes if kept.storing != "inline" else 0
            if queued != held.nbytes:  # what the value said of itself was a guess
                self._quota.correct(held, queued)
        call.tensors.append((tensor, kept, nbytes, held))

    def _reserve(self, held: Held, nbytes: int) -> bool:
        return not nbytes or self._quota.reserve(
            held,
            nbytes,
            ask_flush=self._ask_flush,
            has_work=self._pool.has_work,
            hurry=self._pool.hurry,
        )

    def _ask_flush(self) -> None:
        self._request(self._generation.number)

    # --- under the lock -------------------------------------------------------------

    def _is_shared(self, call: _Call) -> bool:
        generation = self._generation
        step = call.step
        kepts = [kept for _, kept, _, _ in call.tensors if step <= kept.group.last_step]
        if call.lost:
            kepts += filter(None, [self._staging.last(name, call.mode) for name in call.lost])
        if generation.joined:  # a name may have been a larger tensor before it was a number
            kepts += [self._staging.plan_float(name, call.mode) for name, _ in call.scalars]
        return any(self._staging.is_shared(generation, kept, call.step) for kept in kepts)

    def _finish_interrupted(self) -> None:
        call = self._taking
        if call is None:
            return
        call.tries += 1
        if call.tries <= _MAX_TRIES:
            self._carry_out(call)
        else:
            self._unknown += call.names()
        self._taking = None

    def _carry_out(self, call: _Call) -> None:
        """Add a call to the generation; right also if that was begun before, and ended anywhere."""
        generation, step, mode = self._generation, call.step, call.mode
        if self._unstamped:
            self._stamp_lost()
        if self._last_logged.get(mode) != step:
            self._stamp(generation, step, mode, self._options.clock_us())
        floats = generation.floats
        for name, value in call.scalars:
            stage = floats.get((mode, name))
            if stage is None:
                stage = self._staging.float_stage(generation, name, mode)
            group = stage.kept.group
            if step <= group.last_step:
                self._staging.replace(generation, stage.kept, step)
            else:
                group.last_step = step
            stage.rows.append((step, value))
        nbytes = 8 * len(call.scalars)
        call.scalars, self.raw_nbytes = [], self.raw_nbytes + nbytes
        generation.raw_nbytes += nbytes
        if call.lost or self._unknown:
            self._drop_lost(generation, call)
        while call.done < len(call.tensors):
            tensor, kept, nbytes, held = call.tensors[call.done]
            ready = None
            if held is None:
                self._staging.drop(generation, kept, step)
                nbytes = 0
            else:
                ready = self._staging.add(generation, kept, tensor, step, held)
            call.done, self.raw_nbytes = call.done + 1, self.raw_nbytes + nbytes
            generation.raw_nbytes += nbytes
            if ready is not None:
                self._staging.send(generation, ready)

    def _drop_lost(self, generation: Generation, call: _Call) -> None:
        """Record what could not be copied as soon as it is known what its name stands for."""
        self._unknown = list(
            dict.fromkeys([*self._unknown, *((name, call.mode, call.step) for name in call.lost)])
        )
        call.lost = []
        for lost in list(self._unknown):
            if self._staging.drop_named(generation, *lost):
                self._unknown.remove(lost)

    def _stamp_lost(self) -> None:
        """Note the steps of calls of which nothing could be taken: they were made."""
        while self._unstamped:
            step, mode = self._unstamped[0]
            if self._last_logged.get(mode) != step:
                self._stamp(self._generation, step, mode, self._options.clock_us())
            del self._unstamped[0]

    def _stamp(self, generation: Generation, step: int, mode: int, time_us: int) -> None:
        """Note the step in the step table, and what is complete now."""
        rows = generation.step_tables.setdefault(mode, [])
        rows.append((step, self._mode_steps[mode], time_us))
        if step > self._max_step[mode]:
            self._complete[mode] = max(self._complete[mode], step - 1)
            self._max_step[mode] = step
        following = self._mode_steps[mode] + 1
        self._mode_steps[mode], self._last_logged[mode] = following, step
        self.steps += 1

    def stamp(self, step: int, mode: int, *, mode_step: int, time_us: int) -> None:
        """Say when a step was made, and its number in its mode, before it is logged."""
        with self.lock:
            self._finish_interrupted()
            following = max(self._mode_steps[mode], mode_step + 1)
            self._mode_steps[mode] = mode_step
            self._stamp(self._generation, step, mode, time_us)
            self._mode_steps[mode] = following

    # --- for the committer ----------------------------------------------------------

    def end(self, is_last: bool) -> Taken:  # noqa: FBT001 - the committer's protocol
        """Give the oldest generation that was not committed; the committer calls this."""
        with self.lock:
            self._finish_interrupted()
            if not self._ended:
                self._stamp_lost()
                self._end_generation(is_last=is_last)
            taken, self._ended = self._ended[0], self._ended[1:]
        self._staging.finish(taken.generation)
        return taken

    def _end_generation(self, *, is_last: bool = False) -> None:
        generation = self._generation
        last = self._max_step if is_last else self._complete
        steps = [max(pair) for pair in zip(last, self._complete, strict=True)]
        taken = Taken(generation, (steps[0], steps[1], steps[2], steps[3]))
        ended, following = (*self._ended, taken), Generation(generation.number + 1)
        self._ended, self._generation = ended, following

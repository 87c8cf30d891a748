"""Rules inside the training process: a thread that looks at what the writer has flushed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.rules.actions import Action
from tensorstore_fmt.rules.places import reopen
from tensorstore_fmt.rules.rule import Rule
from tensorstore_fmt.rules.runner import Report, Runner

if TYPE_CHECKING:
    from tensorstore_fmt.writing.run import RunWriter

__all__ = ["RulesInside", "run_inside"]


_logger = logging.getLogger("tensorstore_fmt")


class _HasRun(Protocol):
    @property
    def run(self) -> RunWriter | None: ...


def run_inside(
    hook: RunWriter | _HasRun,
    rules: Sequence[Rule],
    *,
    actions: Sequence[Action] = (),
    record: bool = True,
) -> RulesInside:
    """Evaluate rules in a thread of the training process, on what it saves.

    Parameters
    ----------
    hook
        A hook, or a writer. On workers other than 0 nothing is evaluated.

    Returns
    -------
    RulesInside
        Close it after the run to have the last step evaluated, too; or use it in a ``with``
        statement around the one that writes.
    """
    from tensorstore_fmt.writing.run import RunWriter

    writer = hook if isinstance(hook, RunWriter) else hook.run
    if writer is None or writer.worker != 0:
        return RulesInside(None, None)
    storage = reopen(writer._storage, writable=False)
    run = Run(Session(storage.url, None, storage=storage))
    return RulesInside(Runner(run, rules, actions=actions, record=record), writer)


class RulesInside(Closeable):
    """What `run_inside` gives."""

    def __init__(self, runner: Runner | None, writer: RunWriter | None) -> None:
        self._runner = runner
        self._writer = writer
        self.failure: Exception | None = None
        """Why the rules ended before the training, if they did."""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if runner is not None:
            self._thread = threading.Thread(
                target=self._work, args=(runner,), name="tsf-rules", daemon=True
            )
            self._thread.start()

    @property
    def report(self) -> Report:
        """What was found so far."""
        return self._runner.report if self._runner is not None else Report()

    def close(self) -> Report:
        """Evaluate what is complete, and end; more than once is fine.

        If the run is not closed, its last step is not complete and is not looked at.
        """
        if self._writer is not None and not self._writer.is_closed:
            self._writer.flush()
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        return self.report

    def _work(self, runner: Runner) -> None:
        run = runner.run
        try:
            with runner:
                runner.follow(stop=self._end)
        except Exception as error:  # noqa: BLE001 - the training goes on without its rules
            self.failure = error
            _logger.warning("the rules ended: %s: %s", type(error).__name__, error)
        finally:
            run.close()

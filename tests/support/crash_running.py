"""Running many trials in forked children, two at a time; shared by the crash tests."""

from __future__ import annotations

import os
import queue
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tensorstore_fmt.testing.forks import ForkServer

T = TypeVar("T")


def tell(text: str) -> None:
    """Print what was done: it helps where it failed."""
    sys.stdout.write(f"{text}\n")


@contextmanager
def quick_folder() -> Iterator[Path]:
    """Give a folder in memory, where there is one: syncing is not what these trials are about."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="tsf-crash-", dir=memory) as folder:
        yield Path(folder)


def run_trials(
    modules: Sequence[str], trials: Sequence[T], work: Callable[[ForkServer, T], object]
) -> list[str]:
    """Do the work on all trials; give what failed, one text each."""
    servers: queue.SimpleQueue[ForkServer] = queue.SimpleQueue()

    def one(trial: T) -> str | None:
        server = servers.get()
        try:
            work(server, trial)
        except Exception as error:  # noqa: BLE001 - all that is wrong is gathered
            return f"{trial}: {error}"
        finally:
            servers.put(server)
        return None

    with ForkServer(modules) as first, ForkServer(modules) as second:
        servers.put(first)
        servers.put(second)
        with ThreadPoolExecutor(2) as pool:
            return [text for text in pool.map(one, trials) if text is not None]

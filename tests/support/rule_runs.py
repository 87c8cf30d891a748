"""Small runs for rules, made with NumPy."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Any

import tensorstore_fmt as tsf
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.testing.storage import CountingStorage
from tensorstore_fmt.testing.writers import create_test_run

Maker = Callable[[int], Any]


def memory() -> str:
    return f"memory://rules/{uuid.uuid4()}"


def make_run(
    steps: Iterable[int] = range(20), *, mode: str | None = "TRAIN", url: str = "", **makers: Maker
) -> str:
    """Save what each function gives for each step (None: nothing), and close the run.

    In names ``__`` stands for ``/`` and a leading ``EVAL_`` says the mode.
    """
    url = url or memory()
    with create_test_run(url) as run:
        for step in steps:
            by_mode: dict[str | None, dict[str, Any]] = {}
            for key, make in makers.items():
                name = key.removeprefix("EVAL_").replace("__", "/")
                value = make(step)
                if value is not None:
                    of = "EVAL" if key.startswith("EVAL_") else mode
                    by_mode.setdefault(of, {})[name] = value
            for of, values in by_mode.items():
                run.log(values, step=step, mode=of)
    return url


def counted(url: str) -> tuple[tsf.Run, CountingStorage]:
    """Open a run on a storage that counts."""
    counting = CountingStorage(open_storage(url, writable=False))
    session = Session(url, None, storage=counting)
    session.view  # noqa: B018 - looks at the run
    return tsf.Run(session), counting

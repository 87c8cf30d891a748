"""Opening the run that a verb is about, and saying what is there if it is none."""

from __future__ import annotations

import json
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tensorstore_fmt.cli.expressions import parse_step, parse_steps
from tensorstore_fmt.cli.failures import UsageError
from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.parser import PROGRAM
from tensorstore_fmt.errors import NotARunError
from tensorstore_fmt.storage.folders import find_runs

if TYPE_CHECKING:
    from tensorstore_fmt.interop.picking import Step, Where
    from tensorstore_fmt.reading.run import Run

__all__ = [
    "explaining",
    "json_options",
    "one_step",
    "open_quietly",
    "open_run",
    "open_url",
    "selection",
    "step_range",
    "storage_options",
]

_SHOWN_RUNS = 5


def storage_options(arguments: Namespace) -> Mapping[str, object] | None:
    """Give the options of ``--storage-options``.

    Raises
    ------
    UsageError
        It is no JSON object, or the file cannot be read.
    """
    return json_options(arguments.storage_options, "--storage-options")


def json_options(text: str | None, where: str) -> Mapping[str, object] | None:
    """Give the object that is the value of an option; None if it was not given.

    Raises
    ------
    UsageError
        It is no JSON object, or the file cannot be read.
    """
    if text is None:
        return None
    if text.startswith("@"):
        where = f"{where} {text}"
        try:
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where}: cannot read the file: {error}") from None
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where}: no JSON, line {error.lineno}, column {error.colno}: {error.msg}; "
            """write an object such as '{"endpoint_url": "http://127.0.0.1:5000"}'""",
            code="bad_json",
        ) from None
    if not isinstance(options, dict):
        raise UsageError(
            f"{where}: a JSON object is needed, this is {type(options).__name__}", code="bad_json"
        )
    return options


def open_run(arguments: Namespace, output: Output) -> Run:
    """Open the run at ``URL``; damage of its index is said on stderr.

    Raises
    ------
    NotARunError
        There is none; the message says what is there instead, the fact ``runs`` which runs are.
    """
    return open_quietly(arguments.url, storage_options(arguments), output)


def open_quietly(url: str, options: Mapping[str, object] | None, output: Output) -> Run:
    """Open a run; see `open_run`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = open_url(url, options)
    for warning in caught:
        output.note(f"{PROGRAM}: warning: {warning.message}")
    return run


def open_url(url: str, options: Mapping[str, object] | None) -> Run:
    """Open a run; damage of its index is a Python warning."""
    from tensorstore_fmt.reading.run import (
        open_run as open_,
    )  # NumPy and Arrow, which help needs not

    with explaining(url, options):
        return open_(url, storage_options=options)


@contextmanager
def explaining(url: str, options: Mapping[str, object] | None) -> Iterator[None]:
    """Say more about a place where there is no run: what is there instead."""
    try:
        yield
    except NotARunError as error:
        if error.code != NotARunError.default_code:
            raise
        raise _explained(error, url, options) from None


def _explained(error: NotARunError, url: str, options: Mapping[str, object] | None) -> NotARunError:
    """Say why there is no run, as far as a look around can tell."""
    if "://" not in url and not os.path.isdir(url):
        what = "is a file, not the folder of a run" if os.path.exists(url) else "does not exist"
        here = "" if os.path.isabs(url) else f" (in {os.getcwd()})"
        return NotARunError(f"{url} {what}{here}", url=url)
    runs = find_runs(url, options)
    if not runs:
        return error
    shown = ", ".join(f"{url.rstrip('/')}/{name}" for name in runs[:_SHOWN_RUNS])
    more = f" and {len(runs) - _SHOWN_RUNS} more" if len(runs) > _SHOWN_RUNS else ""
    return NotARunError(
        f"{url} is not a run, but holds {len(runs)}: {shown}{more}; name one of them",
        url=url,
        runs=runs,
    )


def selection(arguments: Namespace) -> Where:
    """Give ``--mode``, ``--worker`` and ``--attempt``."""
    return {
        "mode": arguments.mode,
        "worker": arguments.worker,
        "attempt": arguments.attempt,
    }


def step_range(arguments: Namespace) -> slice | None:
    """Give the range that ``--steps`` means; None for all."""
    return None if arguments.steps is None else parse_steps(arguments.steps)


def one_step(arguments: Namespace) -> Step | None:
    """Give what ``--step`` means, if it is there."""
    return None if arguments.step is None else parse_step(arguments.step)

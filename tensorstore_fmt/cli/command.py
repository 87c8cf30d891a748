"""The command itself: parse, find the verb, turn what happens into an exit code."""

from __future__ import annotations

import io
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module

from tensorstore_fmt.cli.failures import (
    EXIT_INTERRUPTED,
    EXIT_PIPE,
    EXIT_PROBLEM,
    EXIT_USAGE,
    describe,
    is_usage,
)
from tensorstore_fmt.cli.output import Output
from tensorstore_fmt.cli.parser import PROGRAM, VERBS, parse
from tensorstore_fmt.cli.text import escape
from tensorstore_fmt.errors import TensorStoreError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and give its exit code.

    Parameters
    ----------
    argv
        Arguments without the program's name; by default those of the process.

    Returns
    -------
    int
        0 fine, 1 a problem was found, 2 wrong usage, 130 interrupted, 141 nobody reads stdout.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names are in every script
    output = Output(is_json="--json" in words)
    notes = _Notes(output)
    logger = logging.getLogger("tensorstore_fmt")
    logger.addHandler(notes)
    try:
        code = _run(words, output)
        sys.stdout.flush()
    except BrokenPipeError:
        # At its end Python flushes again, which must not fail then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt:
        output.note("interrupted")
        return EXIT_INTERRUPTED
    finally:
        logger.removeHandler(notes)
    return code


class _Notes(logging.Handler):
    """Says on stderr what the library has to say meanwhile: that a store is asked again."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        self._output.note(f"{PROGRAM}: {record.getMessage()}")


def _run(words: Sequence[str], output: Output) -> int:
    is_debug = "--debug" in words
    try:
        arguments = parse(words)
        module, function = VERBS[arguments.verb].split(".")
        verb: Callable[[Namespace, Output], int] = getattr(
            import_module(f"tensorstore_fmt.cli.{module}"), function
        )
        return verb(arguments, output)
    except SystemExit as leaving:  # argparse printed help or the version
        return leaving.code if isinstance(leaving.code, int) else 0
    except BrokenPipeError:
        raise
    except (TensorStoreError, OSError) as error:
        if is_debug:
            raise
        output.end_progress()
        facts = describe(error)
        if output.is_json:
            output.json({"error": facts})
        print(f"{PROGRAM}: {escape(str(facts['message']))}", file=sys.stderr)
        return EXIT_USAGE if is_usage(error) else EXIT_PROBLEM
    finally:
        output.end_progress()

"""What went wrong, as one line, as JSON and as an exit code."""

from __future__ import annotations

import errno
from typing import Final

from tensorstore_fmt.errors import (
    AmbiguousError,
    ArgumentError,
    StepNotYetWrittenError,
    TensorStoreError,
)

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_PIPE",
    "EXIT_PROBLEM",
    "EXIT_USAGE",
    "UsageError",
    "describe",
    "is_usage",
]

EXIT_PROBLEM: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130
EXIT_PIPE: Final = 141

_USAGE_CODES: Final = ("bad_argument", "unknown_format")
_OS_CODES: Final = {
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.EEXIST: "exists",
    errno.ENOENT: "no_such_file",
    errno.ENOSPC: "no_space",
    errno.ETIMEDOUT: "timeout",
}


class UsageError(ArgumentError):
    """The command line itself cannot be used."""

    default_code = "usage"


def describe(error: TensorStoreError | OSError) -> dict[str, object]:
    """Give code, message and facts of an error, for ``{"error": …}``."""
    if isinstance(error, TensorStoreError):
        message = _with_notes(error, str(error)) + _hint(error)
        return {"code": error.code, "message": message, "facts": error.facts}
    facts: dict[str, object] = {"type": type(error).__name__}
    text = error.strerror or str(error) or type(error).__name__
    if error.errno is not None:
        facts["errno"] = error.errno
    if error.filename is not None:
        facts["file"] = str(error.filename)
        text = f"{error.filename}: {text}"
    code = _OS_CODES.get(error.errno or 0, "storage")
    return {"code": code, "message": _with_notes(error, text), "facts": facts}


def is_usage(error: BaseException) -> bool:
    """Say whether the command line is to blame, not what it was used on."""
    return isinstance(error, ArgumentError) and (
        isinstance(error, UsageError) or error.code in _USAGE_CODES
    )


def _hint(error: TensorStoreError) -> str:
    """Say in words of the command line what the library says in Python's."""
    modes, workers = error.facts.get("modes"), error.facts.get("workers")
    if isinstance(error, AmbiguousError) and isinstance(modes, list):
        return f" (here: --mode {modes[0]})"
    if isinstance(error, AmbiguousError) and isinstance(workers, list):
        return f" (here: --worker {workers[0]})"
    if isinstance(error, StepNotYetWrittenError):
        return " (here: try again later)"
    return ""


def _with_notes(error: BaseException, text: str) -> str:
    notes = getattr(error, "__notes__", ())
    return "; ".join([text, *notes])

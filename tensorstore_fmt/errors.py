"""The errors of tensorstore_fmt, one tree sorted by what a handler would do.

::

    TensorStoreError
    ├── FormatError                     bytes do not follow the spec ("Failures")
    │   ├── NotARunError
    │   ├── TruncatedError
    │   ├── ChecksumError
    │   ├── UnsupportedError            newer version, unknown feature, codec or dtype
    │   ├── LimitError
    │   └── MissingFileError            named by the index, but not there
    ├── NotThereError (KeyError)        asked for what is not there
    │   ├── NameNotFoundError
    │   ├── StepNotFoundError           never saved
    │   ├── StepNotYetWrittenError      the run may still write it
    │   └── StepDroppedError            the writer recorded that it had to drop it
    ├── SelectionError (IndexError)     a selection that the tensor does not have
    ├── ArgumentError (ValueError)      any other argument that cannot be used
    │   └── AmbiguousError              several workers or modes saved it: say which
    └── StateError (RuntimeError)       not now: closed, exists already, failed before
        ├── ClosedError
        ├── RunExistsError
        └── StorageFailedError          the writer gave up on the storage

Failures of the storage itself (``OSError``, ``PermissionError``, the store's own
exceptions) pass through unchanged: they never mean "not there".

Every error has a ``code`` that never changes and ``facts``, a dict with what was
found, where. Match these, never the text.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AmbiguousError",
    "ArgumentError",
    "ChecksumError",
    "ClosedError",
    "FormatError",
    "LimitError",
    "MissingFileError",
    "NameNotFoundError",
    "NotARunError",
    "NotThereError",
    "RunExistsError",
    "SelectionError",
    "StateError",
    "StepDroppedError",
    "StepNotFoundError",
    "StepNotYetWrittenError",
    "StorageFailedError",
    "TensorStoreError",
    "TruncatedError",
    "UnsupportedError",
]


class TensorStoreError(Exception):
    """Anything that tensorstore_fmt itself raises.

    Attributes
    ----------
    code
        Stable, append-only; for `FormatError` the codes of the spec, "Failures".
    facts
        What was found, where: names as in the spec (``file``, ``offset``, ``name``, ``step`` …).
    """

    default_code: ClassVar[str] = "error"

    def __init__(self, message: str, *, code: str | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.facts = facts

    def __str__(self) -> str:  # KeyError would show the repr
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.code, self.facts)


def _rebuild(
    cls: type[TensorStoreError], message: str, code: str, facts: dict[str, object]
) -> TensorStoreError:
    return cls(message, code=code, **facts)


class FormatError(TensorStoreError):
    """Stored bytes do not follow the spec."""

    default_code = "malformed"


class NotARunError(FormatError):
    """There is no run at this place."""

    default_code = "not_a_run"


class TruncatedError(FormatError):
    """A file is shorter than it must be."""

    default_code = "truncated"


class ChecksumError(FormatError):
    """Stored bytes do not have the checksum they should have."""

    default_code = "checksum"


class UnsupportedError(FormatError):
    """Written by a newer version, or with a feature this version does not know."""

    default_code = "unsupported_version"


class LimitError(FormatError):
    """A declared size is above the limits of the spec."""

    default_code = "limit"


class MissingFileError(FormatError):
    """A file that the index names is not there."""

    default_code = "missing_file"


class NotThereError(TensorStoreError, KeyError):
    """What was asked for is not in the run (and no storage failure says so)."""

    default_code = "not_there"


class NameNotFoundError(NotThereError):
    """No tensor has this name."""

    default_code = "unknown_name"


class StepNotFoundError(NotThereError):
    """A step that was never saved, and never will be."""

    default_code = "never_saved"


class StepNotYetWrittenError(NotThereError):
    """A step that is not there, but the run may still write it."""

    default_code = "not_yet_written"


class StepDroppedError(NotThereError):
    """The writer could not store this step and recorded that."""

    default_code = "dropped"


class SelectionError(TensorStoreError, IndexError):
    """A selection that this tensor does not have."""

    default_code = "bad_selection"


class ArgumentError(TensorStoreError, ValueError):
    """An argument that cannot be used."""

    default_code = "bad_argument"


class AmbiguousError(ArgumentError):
    """Several workers, modes or shapes fit; the caller has to say which."""

    default_code = "ambiguous"


class StateError(TensorStoreError, RuntimeError):
    """Not possible in this state."""

    default_code = "state"


class ClosedError(StateError):
    """The run was closed."""

    default_code = "closed"


class RunExistsError(StateError):
    """A finished run is already there."""

    default_code = "run_exists"


class StorageFailedError(StateError):
    """The writer gave up on the storage; what had not been committed is lost."""

    default_code = "storage_failed"

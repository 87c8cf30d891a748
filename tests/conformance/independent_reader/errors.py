"""Failures ("14. Failures")."""

from __future__ import annotations

from typing import NoReturn


class SpecError(Exception):
    """A failure of section 14, or an answer: dropped, never_saved, not_yet_written, ambiguous."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


def fail(code: str, message: str) -> NoReturn:
    raise SpecError(code, message)


def need(condition: object, message: str, code: str = "malformed") -> None:
    if not condition:
        raise SpecError(code, message)

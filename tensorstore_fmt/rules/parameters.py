"""Parameters of rules: declared in the class, checked when a rule is made, read from texts."""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Union, get_args, get_origin

from tensorstore_fmt.errors import ArgumentError

__all__ = ["Parameter", "declared", "parameter"]

_MISSING: Final = object()
_YES: Final = ("true", "yes", "1", "on")
_NO: Final = ("false", "no", "0", "off")


@dataclass(frozen=True, slots=True)
class _Declared:
    """What `parameter` gives, until the class is complete."""

    default: object
    least: float | None
    most: float | None
    is_pattern: bool
    choices: tuple[str, ...]


def parameter(
    default: object = _MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    is_pattern: bool = False,
    choices: tuple[str, ...] = (),
) -> Any:  # noqa: ANN401 - stands where a value of the annotated type stands
    """Declare a parameter of a rule, with more than its type to check.

    Parameters
    ----------
    default
        Without one the parameter has to be given.
    least, most
        Bounds of a number, both included.
    is_pattern
        The text is a regular expression.
    choices
        The texts that it may be.
    """
    return _Declared(default, least, most, is_pattern, choices)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a rule.

    Attributes
    ----------
    name
        As in the class.
    kind
        ``bool``, ``int``, ``float``, ``str`` or ``tuple`` (of texts).
    optional
        Whether it may be None.
    """

    name: str
    kind: type
    optional: bool
    declared: _Declared

    @property
    def default(self) -> object:
        """Its value if it is not given."""
        return self.declared.default

    @property
    def is_required(self) -> bool:
        """Whether it has to be given."""
        return self.declared.default is _MISSING

    @property
    def text(self) -> str:
        """Its type, for a message."""
        return self.kind.__name__ + (" or none" if self.optional else "")

    def check(self, rule: str, value: object) -> object:
        """Give the value in its type.

        Raises
        ------
        ArgumentError
            It has another type, or is out of bounds; the fact ``parameter`` names it.
        """
        if value is None and self.optional:
            return None
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.kind is tuple and isinstance(value, list):
            value = tuple(value)
        is_right = isinstance(value, self.kind)
        if self.kind is int and isinstance(value, bool):
            is_right = False
        if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
            is_right = False
        if not is_right:
            raise self._wrong(rule, value, f"it is of type {self.text}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_bounds(rule, value)
        if isinstance(value, str):
            self._check_text(rule, value)
        return value

    def _check_bounds(self, rule: str, value: float) -> None:
        least, most = self.declared.least, self.declared.most
        if math.isnan(value):
            raise self._wrong(rule, value, "it is a number")
        if least is not None and value < least:
            raise self._wrong(rule, value, f"it is at least {least:g}")
        if most is not None and value > most:
            raise self._wrong(rule, value, f"it is at most {most:g}")

    def _check_text(self, rule: str, value: str) -> None:
        if self.declared.choices and value not in self.declared.choices:
            raise self._wrong(rule, value, f"it is one of {', '.join(self.declared.choices)}")
        if self.declared.is_pattern:
            try:
                re.compile(value)
            except re.error as error:
                raise self._wrong(rule, value, f"it is a regular expression: {error}") from None

    def parse(self, rule: str, text: str) -> object:
        """Read the value from a text, as it stands on a command line.

        Raises
        ------
        ArgumentError
            The text is no such value.
        """
        if self.optional and text.lower() in ("none", ""):
            return None
        try:
            return self.check(rule, self._parsed(text))
        except ArgumentError:
            raise
        except ValueError:
            raise self._wrong(rule, text, f"it is of type {self.text}") from None

    def _parsed(self, text: str) -> object:
        if self.kind is bool:
            if text.lower() not in _YES + _NO:
                raise ValueError(text)
            return text.lower() in _YES
        if self.kind is tuple:
            return tuple(part for part in text.split("|") if part)
        return self.kind(text)

    def _wrong(self, rule: str, value: object, must: str) -> ArgumentError:
        return ArgumentError(
            f"rule {rule}: {self.name} is {value!r:.100}; {must}",
            code="rule_parameter",
            rule=rule,
            parameter=self.name,
        )


def declared(cls: type) -> Mapping[str, Parameter]:
    """Give the parameters that a class and those it stands on declare, in their order."""
    found: dict[str, Parameter] = {}
    for base in reversed(cls.__mro__):
        own = inspect.get_annotations(base)
        if not own:
            continue
        hints = typing.get_type_hints(base)
        for name in own:
            hint = hints[name]
            if name.startswith("_") or get_origin(hint) is ClassVar:
                continue
            found[name] = _parameter(base, name, hint)
    return found


def _parameter(cls: type, name: str, hint: object) -> Parameter:
    value = cls.__dict__.get(name, _MISSING)
    if not isinstance(value, _Declared):
        value = _Declared(value, None, None, is_pattern=False, choices=())
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
        optional, hint = True, kinds[0] if len(kinds) == 1 else None
    kind = get_origin(hint) or hint
    if kind not in (bool, int, float, str, tuple):
        raise TypeError(
            f"{cls.__qualname__}.{name}: a parameter of a rule is bool, int, float, str or "
            f"tuple[str, ...] (or None), not {hint}; use ClassVar for what is no parameter"
        )
    assert isinstance(kind, type)
    return Parameter(name, kind, optional, value)

"""Registry: rules by name, by entry point, or by ``module:Class``. A run's content names none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.rules.builtin import BUILT_IN
from tensorstore_fmt.rules.rule import Rule

__all__ = ["GROUP", "find_rule", "make_rule", "rule_names"]

GROUP: Final = "tensorstore_fmt.rules"
"""Entry point group: a package that brings rules names them there."""

_SPEC: Final = re.compile(
    r"(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_][\w.]*(?=:|$))?)(?::(?P<rest>.*))?", re.DOTALL
)
_COMMA: Final = re.compile(r",(?=\s*[A-Za-z_]\w*=)")


def rule_names() -> dict[str, str]:
    """Give the names by which rules are found, each with the first line of what it does."""
    names = {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        names.setdefault(point.name, f"({point.value})")
    return dict(sorted(names.items()))


def find_rule(name: str) -> type[Rule]:
    """Find a rule: built in, by entry point (group `GROUP`), or ``module:Class``.

    Importing a module runs its code: only ever give a name that the user gave.

    Raises
    ------
    ArgumentError
        Code ``unknown_rule``.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" in name:
        module, _, place = name.partition(":")
        return _checked(name, _imported(name, module, place))
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _checked(name, _imported(name, point.module, point.attr))
    near = get_close_matches(name, rule_names(), n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise _unknown(
        name,
        f"there is no rule {name!r}; {hint}there are {', '.join(rule_names())}, or module:Class",
    )


def _imported(name: str, module: str, place: str) -> object:
    try:
        found: object = import_module(module)
        for part in place.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _unknown(name, f"rule {name!r} cannot be imported: {error}") from error
    return found


def _checked(name: str, found: object) -> type[Rule]:
    if not (isinstance(found, type) and issubclass(found, Rule)):
        raise _unknown(name, f"{name!r} is no subclass of tensorstore_fmt.rules.Rule")
    return found


def _unknown(name: str, message: str) -> ArgumentError:
    return ArgumentError(message, code="unknown_rule", rule=name)


def make_rule(text: str) -> Rule:
    """Make a rule of ``NAME``, or of ``NAME:parameter=value,parameter=value``.

    A comma parts two parameters only where a name and ``=`` follow it, so that patterns may
    have commas.

    Raises
    ------
    ArgumentError
        No such rule, or a parameter that it cannot take.
    """
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise _unknown(text, f"{text!r:.100} is no rule; write NAME or NAME:parameter=value,…")
    name, rest = match["name"], match["rest"]
    first, _, second = name.partition(":")
    if second and first in BUILT_IN:  # no module: something that is no parameter=value
        name, rest = first, second
    return find_rule(name).parse(_parameters(text, rest))


def _parameters(text: str, rest: str | None) -> Mapping[str, str]:
    if not rest:
        return {}
    found: dict[str, str] = {}
    for part in _COMMA.split(rest):
        name, equals, value = part.partition("=")
        if not equals:
            raise ArgumentError(
                f"{text!r:.200}: {part!r} is no parameter=value", code="rule_parameter",
                parameter=part,
            )  # fmt: skip
        found[name.strip()] = value
    return found

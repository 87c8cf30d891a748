"""The peers there are, so that a case can ask for those that can do what it needs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TypeVar

import peers
from suite.contestant import Codec, Contestant, Store

_C = TypeVar("_C", bound=Contestant)
_OWN = {"known", "ours", "check", "layout"}


def _all(base: type[_C]) -> list[type[_C]]:
    found = []
    for module in sorted(m.name for m in pkgutil.iter_modules(peers.__path__)):
        if module in _OWN:
            continue
        for cls in vars(importlib.import_module(f"peers.{module}")).values():
            # Bases that several configurations share have no name of their own.
            is_one = inspect.isclass(cls) and issubclass(cls, base) and hasattr(cls, "name")
            if is_one and cls.__module__ == f"peers.{module}":
                found.append(cls)
    return found


def stores(
    *, compresses: bool | None = None, reads_parts: bool | None = None, takes_s3: bool | None = None
) -> list[type[Store]]:
    """Give the stores other than ours with these abilities; None: either."""
    wanted = {"compresses": compresses, "reads_parts": reads_parts, "takes_s3": takes_s3}
    return [
        store
        for store in _all(Store)
        if all(value is None or getattr(store, key) == value for key, value in wanted.items())
    ]


def codecs() -> list[type[Codec]]:
    """Give the codecs other than ours."""
    return _all(Codec)


def store(name: str) -> type[Store]:
    """Give one store by its name."""
    return next(s for s in _all(Store) if s.name == name)

"""The cases there are: each module of ``cases/`` gives a list named ``CASES``."""

from __future__ import annotations

import importlib
import pkgutil

import cases

from suite.case import Case
from suite.contestant import Contestant


def all_cases() -> list[Case]:
    """Give every case, by number; those with one number in the order of their module."""
    found: list[Case] = []
    for module in sorted(m.name for m in pkgutil.iter_modules(cases.__path__)):
        found += getattr(importlib.import_module(f"cases.{module}"), "CASES", ())
    return sorted(found, key=lambda case: case.number)


def find(case_name: str, contestant_name: str) -> tuple[Case, type[Contestant]]:
    """Give one case and one of its contestants by their names."""
    case = next(case for case in all_cases() if case.name == case_name)
    return case, next(c for c in case.contestants() if c.name == contestant_name)

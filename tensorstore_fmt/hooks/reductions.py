"""In what form something is saved: whole, or as smaller tensors made of it when it is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tensorstore_fmt.errors import ArgumentError

__all__ = ["NAMES", "Reduction", "Reductions"]

NAMES: Final = (
    "min",
    "max",
    "mean",
    "median",
    "std",
    "var",
    "sum",
    "prod",
    "l1",
    "l2",
    "absmax",
    "absmean",
)
"""Reductions that are known by name. ``std`` and ``var`` divide by n. ``l1`` is the sum of |x|,
``l2`` the root of the sum of x². They are computed in float32 at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """One smaller tensor made of one or two tensors of a step.

    Attributes
    ----------
    name
        What it is saved as: ``<tensor>/<name>``. One of `NAMES`, unless `function` is given.
    axis
        Axes that vanish; None: all. What is left keeps their order.
    function
        Called with the tensor (and that named by `other`), detached, on their device; gives a
        tensor or a number. It must not change them.
    other
        Name of a second tensor of the same step (or a function that gives it for the first's),
        one that comes later, as a gradient comes after its activation: a copy of the first waits
        for it on its device. Then `function` is called as ``function(tensor, other)``.
    """

    name: str
    axis: int | Sequence[int] | None = None
    function: Callable[..., Any] | None = None
    other: str | Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.function is None and self.name not in NAMES:
            raise ArgumentError(
                f"no reduction is named {self.name!r}; there are {', '.join(NAMES)}, or give "
                "function=",
                argument="name",
            )
        if self.function is None and self.other is not None:
            raise ArgumentError(f"{self.name!r}: other= needs function=", argument="other")
        if self.function is not None and self.axis is not None:
            raise ArgumentError(
                f"{self.name!r}: the function decides about axes; leave axis= out", argument="axis"
            )
        if self.axis is not None and not isinstance(self.axis, int):
            object.__setattr__(self, "axis", tuple(self.axis))

    def other_of(self, name: str) -> str | None:
        """Give the name of the second tensor for the first."""
        return self.other(name) if callable(self.other) else self.other


@dataclass(frozen=True, slots=True, kw_only=True)
class Reductions:
    """What is saved of a tensor.

    Attributes
    ----------
    raw
        True: the tensor. ``"stats"``: only its ten statistics, in the index, where
        `Tensor.stats` finds them. False: neither.
    reductions
        Names (``"mean"``, ``"l2"``) and `Reduction` objects.
    quantiles
        Between 0 and 1; saved as one vector named ``<tensor>/quantiles``.
    """

    raw: bool | Literal["stats"] = True
    reductions: Sequence[str | Reduction] = ()
    quantiles: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.raw not in (True, False, "stats"):
            raise ArgumentError(
                f"raw is {self.raw!r}; it is True, False or 'stats'", argument="raw"
            )
        made = tuple(r if isinstance(r, Reduction) else Reduction(name=r) for r in self.reductions)
        object.__setattr__(self, "reductions", made)
        for q in self.quantiles:
            if not 0 <= q <= 1:
                raise ArgumentError(
                    f"the quantile {q!r} is not between 0 and 1", argument="quantiles"
                )
        object.__setattr__(self, "quantiles", tuple(float(q) for q in self.quantiles))

    @property
    def all(self) -> tuple[Reduction, ...]:
        """The reductions as objects."""
        return self.reductions  # type: ignore[return-value] # __post_init__ made them

"""Rules: what looks at the tensors of a run step by step, and what it finds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, dataclass_transform

import numpy as np
from numpy.typing import NDArray

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.reading.modes import mode_number
from tensorstore_fmt.reading.selection import Index
from tensorstore_fmt.rules.parameters import Parameter, declared, parameter

if TYPE_CHECKING:
    from tensorstore_fmt.rules.block import Block
    from tensorstore_fmt.rules.view import View

__all__ = ["Finding", "Needs", "Outcome", "Rule", "Series"]

NAN = math.nan


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one name in one mode, of one worker or put together from parts of all.

    Attributes
    ----------
    name
        Of the tensor.
    mode
        ``"TRAIN"``, ``"EVAL"``, ``"PREDICT"`` or ``"NONE"``.
    worker
        Who saved it; None if it is put together from parts.
    """

    name: str
    mode: str = "NONE"
    worker: int | None = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a rule reads.

    Attributes
    ----------
    names
        Regular expression (`re.search`) on names.
    mode
        Only of this mode; None: of each.
    values
        Whether `Rule.invoke_at_step` reads the values. Else their statistics are enough, and no
        chunk is fetched.
    index
        Which slice of each value, as NumPy's basic indexing.
    """

    names: str
    mode: str | None = None
    values: bool = False
    index: Index = ()

    def __post_init__(self) -> None:
        mode_number(self.mode)
        try:
            re.compile(self.names)
        except re.error as error:
            raise ArgumentError(
                f"{self.names!r} is no regular expression: {error}", argument="names"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a rule found.

    Attributes
    ----------
    rule
        Name of the rule.
    step, mode
        Where; the mode as in `Series`.
    series
        Name of the tensor; empty if it is about the whole run.
    value, threshold
        What was found, and what was allowed; NaN where there is no such number.
    message
        One sentence.
    worker
        Of the series, see there.
    """

    rule: str
    step: int
    message: str
    mode: str = "NONE"
    series: str = ""
    value: float = NAN
    threshold: float = NAN
    worker: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Give the attributes by name."""
        return asdict(self)

    def __str__(self) -> str:
        where = f" [{self.mode}]" if self.mode != "NONE" else ""
        return f"step {self.step}{where} {self.rule}: {self.message}"


Outcome: TypeAlias = bool | Finding | Iterable[Finding] | None
"""What `Rule.invoke_at_step` may give."""


@dataclass_transform(kw_only_default=True, field_specifiers=(parameter,))
class Rule:
    """Looks at a run step by step. Subclass it; an object of it serves one runner.

    Annotated attributes of a subclass are its parameters: given by keyword, checked when the rule
    is made. They are of type bool, int, float, str or ``tuple[str, ...]``, or None::

        class LargeGradient(Rule):
            names: str = parameter(r"^gradient/", is_pattern=True)
            limit: float = parameter(20.0, least=0)

            def needs(self):
                return [Needs(names=self.names)]

            def invoke_at_step(self, step, view):
                return any(view.stats(s)["max"] > self.limit for s in view.series())

    Attributes
    ----------
    repeat
        Whether a series that goes on to fire is reported at each step; else when it begins.

    Raises
    ------
    ArgumentError
        Code ``rule_parameter``: a parameter that does not exist, is missing, or has a wrong value.
    """

    name: ClassVar[str] = ""
    """What it is called; by default the class's name in small letters with underscores."""
    joins_modes: ClassVar[bool] = False
    """Whether it compares modes: then steps of all modes it reads come in one ascending order.
    As the last step of a mode is complete only when its next one begins, it looks at the others
    then. Else each mode is looked at by itself, as soon as its steps are complete."""
    parameters: ClassVar[Mapping[str, Parameter]] = {}

    repeat: bool = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.parameters = declared(cls)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, **values: Any) -> None:  # noqa: ANN401 - checked below, one by one
        cls = type(self)
        for given in values:
            if given not in cls.parameters:
                raise ArgumentError(
                    f"rule {cls.name} has no parameter {given!r}; it has "
                    f"{', '.join(cls.parameters) or 'none'}",
                    code="rule_parameter",
                    rule=cls.name,
                    parameter=given,
                )
        for each in cls.parameters.values():
            if each.name not in values and each.is_required:
                raise ArgumentError(
                    f"rule {cls.name} needs {each.name}= ({each.text})",
                    code="rule_parameter",
                    rule=cls.name,
                    parameter=each.name,
                )
            value = values.get(each.name, each.default)
            setattr(self, each.name, each.check(cls.name, value))
        self._fired: dict[object, bool] = {}
        self.check()
        self.begin()

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> Self:
        """Make a rule of parameters as they stand on a command line."""
        values = {
            name: cls.parameters[name].parse(cls.name, text) if name in cls.parameters else text
            for name, text in texts.items()
        }
        return cls(**values)

    @property
    def settings(self) -> dict[str, object]:
        """The values of its parameters."""
        return {name: getattr(self, name) for name in self.parameters}

    # --- for subclasses ----------------------------------------------------------------

    def check(self) -> None:
        """Check parameters against each other; raise `ArgumentError`."""

    def begin(self) -> None:
        """Forget what was seen: called at the beginning, and when a later attempt goes back."""

    def needs(self) -> Sequence[Needs]:
        """Say what it reads; asked once."""
        return []

    def invoke_at_step(self, step: int, view: View) -> Outcome:
        """Look at one step; called once for each, ascending (of each mode).

        Parameters
        ----------
        view
            The run as of this step: later ones cannot be seen.

        Returns
        -------
        bool, Finding or iterable of them
            Whether it fires, or what was found.
        """
        raise NotImplementedError(f"rule {self.name} has neither invoke_at_step nor invoke_on")

    def invoke_on(self, block: Block) -> Iterable[Finding]:
        """Look at many steps at once: what rules override that are to catch up fast.

        What it finds has to be what `invoke_at_step` would, however steps are cut into blocks.
        """
        for view in block.views(self.needs()):
            yield from self._findings(view, self.invoke_at_step(view.step, view))

    def invoke_when_quiet(self, now: float) -> Iterable[Finding]:  # noqa: ARG002 - for subclasses
        """Look at the clock (seconds since 1970): called now and then while nothing comes."""
        return ()

    def invoke_at_end(self) -> Iterable[Finding]:
        """Look at what is left when the run was closed and all steps were looked at."""
        return ()

    def rewound(self) -> None:
        """Begin again; for runners."""
        self._fired.clear()
        self.begin()

    # --- help for subclasses ---------------------------------------------------------------

    def found(
        self, series: Series, step: int, message: str, *, value: float, threshold: float = NAN
    ) -> Finding:
        """Make a finding about a series."""
        return Finding(
            rule=self.name, step=int(step), mode=series.mode, series=series.name,
            value=float(value), threshold=float(threshold), message=message, worker=series.worker,
        )  # fmt: skip

    def begins(self, key: object, fires: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Give where a condition begins to hold; with `repeat` where it holds.

        Parameters
        ----------
        key
            Whose condition; what it was in the block before is remembered.
        fires
            Shape (n,): whether it holds, step by step.
        """
        if not len(fires):
            return np.empty(0, np.int64)
        before = self._fired.get(key, False)
        self._fired[key] = bool(fires[-1])
        if self.repeat:
            return np.flatnonzero(fires)
        was = np.concatenate([[before], fires[:-1]])
        return np.flatnonzero(fires & ~was)

    def _findings(self, view: View, outcome: Outcome) -> Iterator[Finding]:
        if outcome is None or outcome is False:
            return
        if outcome is True:
            yield Finding(
                rule=self.name, step=view.step, mode=view.mode, message=f"{self.name} fired"
            )
        elif isinstance(outcome, Finding):
            yield outcome
        elif isinstance(outcome, bool | np.bool_):
            yield from self._findings(view, bool(outcome))
        else:
            yield from outcome

    def __repr__(self) -> str:
        changed = {
            name: value
            for name, value in self.settings.items()
            if value != self.parameters[name].default
        }
        said = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        return f"{type(self).__name__}({said})"


Rule.parameters = declared(Rule)

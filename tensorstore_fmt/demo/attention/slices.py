"""What is read of a run to draw it: slices of one pair, one layer and one head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ArgumentError, FormatError

__all__ = [
    "MADE_BY",
    "Choice",
    "HeadSlices",
    "NeuronSlices",
    "Shape",
    "check_choice",
    "check_step",
    "read_head",
    "read_neuron",
]

MADE_BY = "tensorstore-fmt demo attention"
"""What the attribute ``made_by`` of a run says that can be drawn."""

_SPECIAL = ("[CLS]", "[SEP]")
_PADDING = "[PAD]"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How much there is to choose from; kept in the run's attributes."""

    layers: int
    heads: int
    head_width: int
    pairs: int
    tokens: int

    @classmethod
    def of(cls, run: tsf.Run) -> Shape:
        """Read it.

        Raises
        ------
        FormatError
            The run was made by something else.
        """
        if run.attrs.get("made_by") != MADE_BY:
            raise FormatError(
                f"{run.describe()}: there is a run, and this demo did not make it; choose "
                "another place"
            )
        fields = {name: run.attrs.get(name) for name in cls.__slots__}
        numbers = {name: value for name, value in fields.items() if isinstance(value, int)}
        if len(numbers) < len(fields):
            raise FormatError(f"{run.describe()}: its attributes are not those of this demo")
        return cls(**numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is looked at; all count from 0.

    Attributes
    ----------
    layer, head, pair
        Of the model, of the layer, of the probes.
    step
        Of the pictures; None: the last.
    token
        The one whose query the neuron view shows; None: the one that looks hardest at a single
        token of the other sentence.
    """

    layer: int
    head: int
    pair: int
    step: int | None
    token: int | None


def check_choice(choice: Choice, shape: Shape) -> None:
    """Refuse what is not there.

    Raises
    ------
    ArgumentError
        Naming what, and what there is.
    """
    for name, value, count in (
        ("layer", choice.layer, shape.layers),
        ("head", choice.head, shape.heads),
        ("pair", choice.pair, shape.pairs),
    ):
        if not 0 <= value < count:
            raise ArgumentError(
                f"there is no {name} {value}: choose 0 to {count - 1}", argument=name
            )


def check_step(step: int | None, steps: npt.NDArray[np.int64]) -> int:
    """Give the step to draw, the last one for None.

    Raises
    ------
    ArgumentError
        It was not saved.
    """
    if step is None:
        return int(steps[-1])
    if step not in steps:
        saved = ", ".join(map(str, steps))
        raise ArgumentError(f"step {step} was not saved: choose one of {saved}", argument="step")
    return step


@dataclass(frozen=True, slots=True)
class HeadSlices:
    """What the attention-head view shows.

    Attributes
    ----------
    choice
        With its step filled in.
    tokens
        Text of the pair, without padding.
    second
        Number of the first token of the second sentence.
    follows
        Whether the second sentence follows the first.
    steps
        Those that were saved.
    scores
        Shape (steps, tokens, tokens); a row belongs to the token that looks, and adds up to 1.
    loss, probability
        Of all probes, and what the model says of this pair, by saved step.
    """

    choice: Choice
    tokens: tuple[str, ...]
    second: int
    follows: bool
    steps: npt.NDArray[np.int64]
    scores: Floats
    loss: npt.NDArray[np.float64]
    probability: Floats

    def is_special(self, token: int) -> bool:
        """Say whether a token stands for no text."""
        return self.tokens[token] in _SPECIAL

    @property
    def position(self) -> int:
        """Where the chosen step stands among the saved ones."""
        return int(np.flatnonzero(self.steps == self.choice.step)[0])


@dataclass(frozen=True, slots=True)
class NeuronSlices:
    """What the neuron view shows of the token that was chosen.

    Attributes
    ----------
    head
        With its token filled in.
    query, key
        Shape (steps, width of a head), and (steps, tokens, width of a head).
    """

    head: HeadSlices
    query: Floats
    key: Floats


def read_head(run: tsf.Run, choice: Choice) -> HeadSlices:
    """Read the scores of one pair, layer and head, at all saved steps.

    Raises
    ------
    ArgumentError
        There is no such layer, head, pair or step.
    """
    shape = Shape.of(run)
    check_choice(choice, shape)
    series = run[f"{_place(choice)}.scores/output"]
    steps = series.steps
    choice = replace(choice, step=check_step(choice.step, steps))
    begin = choice.pair * shape.tokens
    padded = run["tokens"].read(step=int(steps[0]), index=np.s_[begin : begin + shape.tokens])
    tokens = tuple(str(token) for token in padded if token != _PADDING)
    length = len(tokens)
    return HeadSlices(
        choice=choice,
        tokens=tokens,
        second=tokens.index("[SEP]") + 1,
        follows=bool(run["follows"].read(step=int(steps[0]), index=choice.pair)),
        steps=steps,
        scores=series.read(index=np.s_[choice.pair, choice.head, :length, :length]),
        loss=run["loss"].read(mode="EVAL"),
        probability=run["probability"].read(index=choice.pair),
    )


def read_neuron(run: tsf.Run, choice: Choice) -> NeuronSlices:
    """Read query and keys of one token, beside what `read_head` reads.

    Raises
    ------
    ArgumentError
        There is no such layer, head, pair, step or token.
    """
    head = read_head(run, choice)
    width, length = Shape.of(run).head_width, len(head.tokens)
    token = choice.token
    if token is None:
        token = _hardest(head)
    elif not 0 <= token < length:
        named = ", ".join(f"{number} {text}" for number, text in enumerate(head.tokens))
        raise ArgumentError(
            f"pair {choice.pair} has no token {token}: choose one of {named}", argument="token"
        )
    head = replace(head, choice=replace(head.choice, token=token))
    columns = slice(choice.head * width, (choice.head + 1) * width)
    place = _place(choice)
    return NeuronSlices(
        head,
        query=run[f"{place}.query/output"].read(index=np.s_[choice.pair, token, columns]),
        key=run[f"{place}.key/output"].read(index=np.s_[choice.pair, :length, columns]),
    )


def _place(choice: Choice) -> str:
    return f"encoder.layer.{choice.layer}.attention.self"


def _hardest(head: HeadSlices) -> int:
    """Choose the token of the first sentence that looks hardest at one of the second."""
    words = [n for n in range(len(head.tokens)) if not head.is_special(n)]
    first = [n for n in words if n < head.second]
    second = [n for n in words if n >= head.second]
    across = head.scores[head.position][np.ix_(first, second)]
    return first[int(across.max(axis=1).argmax())]

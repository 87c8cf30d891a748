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
    "PairSlices",
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
class PairSlices:
    """What both views show of a pair.

    Attributes
    ----------
    choice
        With its step filled in, and its token in the neuron view.
    tokens
        Text of the pair, without padding.
    second
        Number of the first token of the second sentence.
    follows
        Whether the second sentence follows the first.
    steps
        Those that were saved.
    loss, probability
        Of all probes, and what the model says of this pair, by saved step.
    """

    choice: Choice
    tokens: tuple[str, ...]
    second: int
    follows: bool
    steps: npt.NDArray[np.int64]
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
class HeadSlices:
    """What the attention-head view shows.

    Attributes
    ----------
    scores
        Shape (steps, tokens, tokens); a row belongs to the token that looks, and adds up to 1.
    """

    pair: PairSlices
    scores: Floats


@dataclass(frozen=True, slots=True)
class NeuronSlices:
    """What the neuron view shows of the token that was chosen.

    Attributes
    ----------
    query, key
        Shape (steps, width of a head), and (steps, tokens, width of a head).
    """

    pair: PairSlices
    query: Floats
    key: Floats


def read_head(run: tsf.Run, choice: Choice) -> HeadSlices:
    """Read the scores of one pair, layer and head, at all saved steps.

    Raises
    ------
    ArgumentError
        There is no such layer, head, pair or step.
    """
    pair = _read_pair(run, choice, "scores")
    length = slice(len(pair.tokens))
    series = run[_name(choice, "scores")]
    return HeadSlices(
        pair, scores=series.read(index=np.s_[choice.pair, choice.head, length, length])
    )


def read_neuron(run: tsf.Run, choice: Choice) -> NeuronSlices:
    """Read query and keys of one token at all saved steps.

    Scores are read at one step, and only if the token has to be chosen: they follow from
    query and keys.

    Raises
    ------
    ArgumentError
        There is no such layer, head, pair, step or token.
    """
    pair = _read_pair(run, choice, "query")
    length, token = len(pair.tokens), choice.token
    if token is None:
        token = _hardest(run, pair)
    elif not 0 <= token < length:
        named = ", ".join(f"{number} {text}" for number, text in enumerate(pair.tokens))
        raise ArgumentError(
            f"pair {choice.pair} has no token {token}: choose one of {named}", argument="token"
        )
    width = Shape.of(run).head_width
    columns = slice(choice.head * width, (choice.head + 1) * width)
    query, key = run[_name(choice, "query")], run[_name(choice, "key")]
    return NeuronSlices(
        replace(pair, choice=replace(pair.choice, token=token)),
        query=query.read(index=np.s_[choice.pair, token, columns]),
        key=key.read(index=np.s_[choice.pair, :length, columns]),
    )


def _read_pair(run: tsf.Run, choice: Choice, part: str) -> PairSlices:
    shape = Shape.of(run)
    check_choice(choice, shape)
    steps = run[_name(choice, part)].steps
    choice = replace(choice, step=check_step(choice.step, steps))
    begin, first = choice.pair * shape.tokens, int(steps[0])
    padded = run["tokens"].read(step=first, index=np.s_[begin : begin + shape.tokens])
    tokens = tuple(str(token) for token in padded if token != _PADDING)
    return PairSlices(
        choice=choice,
        tokens=tokens,
        second=tokens.index("[SEP]") + 1,
        follows=bool(run["follows"].read(step=first, index=choice.pair)),
        steps=steps,
        loss=run["loss"].read(mode="EVAL"),
        probability=run["probability"].read(index=choice.pair),
    )


def _name(choice: Choice, part: str) -> str:
    return f"encoder.layer.{choice.layer}.attention.self.{part}/output"


def _hardest(run: tsf.Run, pair: PairSlices) -> int:
    """Choose the token of the first sentence that looks hardest at one of the second."""
    choice, length = pair.choice, slice(len(pair.tokens))
    assert choice.step is not None  # `_read_pair` chose one
    scores = run[_name(choice, "scores")].read(
        step=choice.step, index=np.s_[choice.pair, choice.head, length, length]
    )
    words = [n for n in range(len(pair.tokens)) if not pair.is_special(n)]
    first = [n for n in words if n < pair.second]
    second = [n for n in words if n >= pair.second]
    return first[int(scores[np.ix_(first, second)].max(axis=1).argmax())]

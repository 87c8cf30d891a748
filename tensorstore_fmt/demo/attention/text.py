"""Pairs of sentences from Python's own reference manual, which every Python brings along.

Some follow each other in the manual, in others the second sentence is from another topic: to tell
them apart is what the model learns.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

__all__ = ["ZEN", "Follower", "Pair", "Text", "load_text"]

ZEN: Final = (
    ("Beautiful is better than ugly.", "Explicit is better than implicit."),
    ("Simple is better than complex.", "Complex is better than complicated."),
    ("Errors should never pass silently.", "Unless explicitly silenced."),
    (
        "If the implementation is hard to explain, it's a bad idea.",
        "If the implementation is easy to explain, it may be a good idea.",
    ),
)
"""Sentences of Tim Peters (``import this``): short, well known, and good to look at."""

_SENTENCE = re.compile(r"[A-Z][\w ,;:'()\-.]+\.")
_BORDER = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
_WORDS = range(4, 23)
_LEAST_PAIRS = 100  # of the manual; some systems strip it


@dataclass(frozen=True, slots=True)
class Follower:
    """Two sentences that follow each other, and the topic of the manual they are from."""

    topic: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sentences, and whether the second follows the first."""

    first: str
    second: str
    follows: bool


@dataclass(frozen=True, slots=True)
class Text:
    """What there is to learn from, and what is looked at.

    Attributes
    ----------
    train
        From it batches are drawn.
    probes
        Always the same pairs, from topics that training never sees; the first are the Zen of
        Python.
    """

    train: Sequence[Follower]
    probes: Sequence[Pair]

    def draw(self, chance: random.Random, count: int) -> list[Pair]:
        """Draw pairs for training, half of them torn apart."""
        return _mix(self.train, chance, count)


def load_text(*, probes: int, seed: int) -> Text:
    """Cut the manual into pairs, and set whole topics aside for `probes` pairs.

    Raises
    ------
    RuntimeError
        This Python came without the manual.
    """
    chance = random.Random(seed)
    found = _followers()
    if len(found) < _LEAST_PAIRS:
        raise RuntimeError(
            "this Python has no reference manual (pydoc_data.topics), which the demo learns from; "
            "install the documentation of its standard library, or use another Python"
        )
    topics = sorted({pair.topic for pair in found})
    chance.shuffle(topics)
    aside: list[Follower] = []
    while len(aside) < probes - len(ZEN):
        topic = topics.pop()
        aside += [pair for pair in found if pair.topic == topic]
    known = {sentence for pair in aside for sentence in (pair.first, pair.second)}
    train = [
        pair
        for pair in found
        if pair.topic in topics and pair.first not in known and pair.second not in known
    ]
    shown = [Pair(first, second, follows=True) for first, second in ZEN]
    return Text(train=train, probes=shown + _mix(aside, chance, probes - len(ZEN)))


def _mix(pool: Sequence[Follower], chance: random.Random, count: int) -> list[Pair]:
    pairs = []
    for number, drawn in enumerate(chance.sample(pool, count)):
        second, follows = drawn.second, number % 2 == 0
        while not follows and second in {drawn.second, drawn.first}:
            other = chance.choice(pool)
            second = drawn.second if other.topic == drawn.topic else other.second
        pairs.append(Pair(drawn.first, second, follows))
    return pairs


def _followers() -> list[Follower]:
    try:
        from pydoc_data.topics import topics  # late: half a megabyte, and some systems strip it
    except ModuleNotFoundError:
        return []
    found: dict[tuple[str, str], Follower] = {}
    for topic, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            if not paragraph[:1].isalpha():
                continue  # a list, a heading, an example
            plain = re.sub(r"[*\"]", "", " ".join(paragraph.split()))
            sentences = _BORDER.split(plain)
            for first, second in pairwise(sentences):
                if _is_plain(first) and _is_plain(second):
                    found.setdefault((first, second), Follower(topic, first, second))
    return list(found.values())


def _is_plain(sentence: str) -> bool:
    return _SENTENCE.fullmatch(sentence) is not None and len(sentence.split()) in _WORDS

"""Sentences as the tokens of the model's vocabulary (WordPiece)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from tensorstore_fmt.demo.attention.model import Batch
from tensorstore_fmt.demo.attention.text import Pair

__all__ = ["PADDING", "SPECIAL", "TOKENS", "PairTokenizer"]

TOKENS: Final = 64
"""Of each pair, with padding."""

PADDING: Final = "[PAD]"
SPECIAL: Final = frozenset({"[CLS]", "[SEP]"})
"""Tokens that stand for no text: the begin, and the end of each sentence."""


class PairTokenizer:
    """Makes batches of pairs: [CLS] first [SEP] second [SEP].

    Parameters
    ----------
    folder
        With the ``tokenizer.json`` of the model.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(TOKENS)
        self._tokenizer.enable_padding(length=TOKENS)

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        """Give the numbers of the tokens."""
        encoded = self._tokenizer.encode_batch([(pair.first, pair.second) for pair in pairs])
        return Batch(
            tokens=torch.tensor([each.ids for each in encoded]),
            segments=torch.tensor([each.type_ids for each in encoded]),
            mask=torch.tensor([each.attention_mask for each in encoded]),
        )

    def words(self, pairs: Sequence[Pair]) -> list[str]:
        """Give the tokens as text, `TOKENS` for each pair, one pair after the other."""
        encoded = self._tokenizer.encode_batch([(pair.first, pair.second) for pair in pairs])
        return [token for each in encoded for token in each.tokens]

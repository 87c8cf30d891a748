"""The summary: one HTML page beside the pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from tensorstore_fmt.demo.attention.slices import PairSlices
from tensorstore_fmt.demo.attention.views import Drawn
from tensorstore_fmt.demo.report import bytes_text
from tensorstore_fmt.storage.base import without_credentials

__all__ = ["share_text", "write_page"]

_TITLES: Final = {
    "heads.png": "The attention-head view",
    "heads.gif": "… over all saved steps",
    "neuron.png": "The neuron view",
    "neuron.gif": "… over all saved steps",
    "change.png": "What learning changed",
}
_WORDS: Final = {
    "heads.png": "Each line joins a token to one it looks at, and is as wide as the score. Lines "
    "to [CLS] and [SEP], where a head looks that has nothing better to look at, are grey.",
    "heads.gif": "The same, as it was before the first update and after more and more of them.",
    "neuron.png": "The query of one token is multiplied with the key of each token, element by "
    "element. The sums, made positive by softmax so that they add up to 1, are the scores.",
    "neuron.gif": "The colours and bars have one scale for all steps.",
    "change.png": "Where that token looks, and how well the model does: on the batches it learns "
    "from, and on pairs from topics of the manual that it never learns from.",
}
_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #f4f5f7; margin: 0; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.5rem 4rem; }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 1rem 1.4rem;
  margin-top: 1.2rem; }
img { max-width: 100%; height: auto; display: block; margin: 0.6rem auto; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 0.2rem 0; }
p { margin: 0.3rem 0; } table { border-collapse: collapse; }
th, td { padding: 0.3rem 1.2rem 0.3rem 0; text-align: left; border-bottom: 1px solid #eee;
  font-variant-numeric: tabular-nums; }
"""


def share_text(nbytes: int, stored_nbytes: int) -> str:
    """Give a share in per cent, with the digits that a small one needs."""
    return f"{100 * nbytes / stored_nbytes:.3f} %"


def write_page(
    path: Path, url: str, pair: PairSlices, drawn: Sequence[Drawn], stored_nbytes: int
) -> None:
    """Write the page to `path`; it shows the pictures that lie beside it."""
    choice, border = pair.choice, pair.second
    first, second = _words(pair.tokens[1 : border - 1]), _words(pair.tokens[border:-1])
    rows = "".join(
        f"<tr><td>{escape(' and '.join(file.name for file in view.files))}</td>"
        f"<td>{bytes_text(view.tensor_nbytes)}</td><td>{bytes_text(view.index_nbytes)}</td>"
        f"<td>{view.requests}</td><td>{share_text(view.nbytes, stored_nbytes)}</td></tr>"
        for view in drawn
    )
    pictures = "".join(_section(file.name) for view in drawn for file in view.files)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Attention</title><style>{_STYLE}</style><main>
<h1>What one head of a transformer looks at, while it learns</h1>
<p>Run {escape(without_credentials(url))}: MiniLM learns which sentences of Python's manual
follow each other. Layer {choice.layer}, head {choice.head}, step {choice.step}, pair {choice.pair}:
“{escape(first)}” “{escape(second)}”</p>
<section><h2>What was read</h2>
<p>Of {bytes_text(stored_nbytes)} of stored tensors, by a reader that had nothing before:</p>
<table><tr><th>for</th><th>of tensors</th><th>of the index</th><th>requests</th>
<th>share</th></tr>{rows}</table></section>
{pictures}</main></html>
""",
        "utf-8",
    )


def _words(tokens: Sequence[str]) -> str:
    """Put the pieces of words together again."""
    return re.sub(r" ##| (?=[.,;:)'-])", "", " ".join(tokens))


def _section(file: str) -> str:
    title, words = _TITLES[file], _WORDS.get(file, "")
    return f'<section><h2>{title}</h2><p>{words}</p><img src="{file}" alt="{title}"></section>\n'

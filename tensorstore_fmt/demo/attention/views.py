"""The views of a run: each opens it anew, reads slices, and makes a picture and an animation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tensorstore_fmt.demo.attention.animation import save_animation
from tensorstore_fmt.demo.attention.change import draw_change
from tensorstore_fmt.demo.attention.heads import draw_heads
from tensorstore_fmt.demo.attention.meter import Meter, metered
from tensorstore_fmt.demo.attention.neuron import draw_neuron
from tensorstore_fmt.demo.attention.slices import Choice, PairSlices, read_head, read_neuron
from tensorstore_fmt.demo.attention.style import DPI

__all__ = ["Drawn", "draw_views"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One view: its files, and what it read.

    Attributes
    ----------
    name
        ``heads`` or ``neuron``.
    files
        In the order a person would look at them.
    tensor_nbytes, index_nbytes, requests
        What a reader that had nothing before fetched for all of them.
    """

    name: str
    files: tuple[Path, ...]
    tensor_nbytes: int
    index_nbytes: int
    requests: int

    @property
    def nbytes(self) -> int:
        """All that was read."""
        return self.tensor_nbytes + self.index_nbytes


def draw_views(
    url: str, choice: Choice, folder: Path, *, storage_options: Mapping[str, object] | None
) -> tuple[PairSlices, list[Drawn]]:
    """Draw all views of a choice; give what was chosen, in full, and what was drawn.

    Raises
    ------
    ArgumentError
        There is no such layer, head, pair, step or token; nothing was drawn then.
    """
    with metered(url, storage_options=storage_options) as (run, meter):
        # The neuron view first: only it can refuse the token.
        neuron = read_neuron(run, choice)
        neuron_read = meter
        batch_loss = run["loss"].read(mode="TRAIN")
    with metered(url, storage_options=storage_options) as (run, meter):
        head = read_head(run, choice)
        head_read = meter
    folder.mkdir(parents=True, exist_ok=True)
    heads = folder / "heads.png", folder / "heads.gif"
    draw_heads(head, head.pair.position).savefig(heads[0], dpi=DPI)
    save_animation((draw_heads(head, each) for each in range(len(head.pair.steps))), heads[1])
    neurons = folder / "neuron.png", folder / "neuron.gif", folder / "change.png"
    draw_neuron(neuron, head.pair.position).savefig(neurons[0], dpi=DPI)
    save_animation((draw_neuron(neuron, each) for each in range(len(head.pair.steps))), neurons[1])
    draw_change(neuron, batch_loss).savefig(neurons[2], dpi=DPI)
    return neuron.pair, [_drawn("heads", heads, head_read), _drawn("neuron", neurons, neuron_read)]


def _drawn(name: str, files: tuple[Path, ...], meter: Meter) -> Drawn:
    return Drawn(
        name=name,
        files=files,
        tensor_nbytes=meter.tensor_nbytes,
        index_nbytes=meter.index_nbytes,
        requests=meter.requests,
    )

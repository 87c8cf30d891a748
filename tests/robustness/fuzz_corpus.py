"""The small runs that are damaged, each with the oracle of what it must give."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from support.build_run import Put, RunBuilder, step_row
from support.mutate import Answer, Files, Oracle, load

from tensorstore_fmt.format import layout
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing.staging import Part

ATTRS: dict[str, Any] = {"lr": 0.1, "text": "é\u202e", "list": [1, None, True]}
STEPS = 2

Corpus = tuple[Files, Oracle]


def _planes(rng: np.random.Generator, n: int) -> np.ndarray:
    return (rng.standard_normal(n) * 0.02).astype(np.float32)


def values(step: int, *, seed: int = 0) -> dict[str, Any]:
    """Give what is logged at a step: every codec and every way to lie in files."""
    rng = np.random.default_rng([seed, step])
    every = {
        "loss": 1.0 / (step + 1 + seed),
        "planes": _planes(rng, 140).astype(ml_dtypes.bfloat16),
        "complex": _planes(rng, 40).view(np.complex64),
        "zstd": np.repeat(rng.integers(0, 250, 260).astype(np.uint8), 4),
        "constant": np.full(200, seed + 7.0),
        "grid": rng.integers(0, 200, (5, 20)).astype(np.int32),
        "frozen": np.arange(70, dtype=np.float32) + seed,
        "varies": np.arange(40 * (step + 1), dtype=np.uint8),
        "texts": ["a" * 9, "ü" * step, "b" * 2],
        "sparse": np.where(rng.random(120) < 0.2, _planes(rng, 120), 0).astype(np.float32),
        "wide": np.tile(rng.integers(0, 30_000, 12), 12),
    }
    if step == 0:
        return every
    return {name: every[name] for name in ("loss", "planes", "varies", "texts")}


def _answers(steps: range, *, seed: int = 0, **select: Any) -> list[Answer]:
    every = {step: values(step, seed=seed) for step in steps}
    return [
        Answer(
            name,
            {step: logged[name] for step, logged in every.items() if name in logged},
            dict(select),
        )
        for name in every[0]
    ]


def _log(run: Any, steps: range, *, seed: int = 0, **options: Any) -> None:
    for step in steps:
        run.log(values(step, seed=seed), step=step, **options)
        run.flush()


@cache
def codecs(*, closed: bool = True, seed: int = 0) -> Corpus:
    """Give a run of one worker with all codecs, as it is when closed, or while its writer lives."""
    options: dict[str, Any] = {"chunks": {"grid": (5, 16)}, "attrs": ATTRS, "grace_s": 60.0}
    options["new_id"] = iter(range(seed * 1000 + 1, seed * 1000 + 999)).__next__
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        with create_test_run(folder, **options) as run:
            _log(run, range(STEPS), seed=seed)
            files = load(folder)
        if closed:
            files = load(folder)
    return files, Oracle(_answers(range(STEPS), seed=seed), ATTRS)


def unbundled(corpus: Corpus) -> Corpus:
    """Take the bundle away, so that segments themselves are read."""
    files, oracle = corpus
    return {path: data for path, data in files.items() if path != layout.BUNDLE}, oracle


def _part(half: np.ndarray, worker: int) -> Part:
    return Part(value=half, global_shape=(4, 40), origin=(2 * worker, 0))


@cache
def parts() -> Corpus:
    """Give a run of two workers that save the halves of a tensor, modes, and two attempts."""
    wholes = {s: np.arange(160, dtype=np.float32).reshape(4, 40) * (s + 1) for s in range(3)}
    evals = {s: np.full(3, s, np.int64) for s in range(3)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        for attempt in (0, 1):
            steps = range(2) if attempt == 0 else range(1, 3)
            for worker in (0, 1):
                with create_test_run(
                    folder, worker=worker, num_workers=2, attrs=ATTRS,
                    resume_from=1 if attempt else None,
                    new_id=iter(range(worker * 10 + attempt * 100 + 1, 10**6)).__next__,
                ) as run:  # fmt: skip
                    for step in steps:
                        half = wholes[step][2 * worker : 2 * worker + 2]
                        shift = 0 if attempt or step < 1 else 1
                        run.log({"w": _part(half + shift, worker)}, step=step)
                        if worker == 0:
                            run.log({"acc": evals[step] + shift}, step=step, mode="EVAL")
        files = load(folder)
    answers = [
        Answer("w", dict(wholes)),
        Answer("w", {s: v[:2] for s, v in wholes.items()}, {"worker": 0}),
        Answer("w", {s: wholes[s] + (s == 1) for s in range(2)}, {"attempt": 0}),
        Answer("acc", dict(evals)),
        Answer("acc", dict(evals), {"mode": "EVAL"}),
    ]
    return files, Oracle(answers, ATTRS)


@cache
def by_hand() -> Corpus:
    """Give a run with what a writer rarely makes: delta, repeats, strides, steps saved twice."""
    rng = np.random.default_rng(1)
    delta = rng.integers(-(2**62), 2**62, (4, 2))
    with tempfile.TemporaryDirectory() as place:
        builder = RunBuilder(Path(place) / "run", attrs=ATTRS)
        writer = builder.writer()
        writer.flush()
        writer.flush(
            Put(name="d", step=0, count=4, value=delta, codec=layout.CODEC_DELTA, inline=True),
            Put(name="r", step=0, stride=5, count=3, value=np.arange(6.0), repeat=True),
            Put(name="s", step=2, stride=2, count=3, value=np.arange(12.0).reshape(3, 4)),
            Put(name="t", step=0, value=np.zeros(3)),
            Put(name="c", step=0, value=np.full(9, 2.5), codec=layout.CODEC_CONSTANT),
            Put(name="z", step=0, value=np.zeros((0, 4), np.int8)),
            Put(name="v", step=0, value=np.arange(3, dtype=np.int16), shape=(-1,)),
            Put(name="t", step=1, value=None, dtype="float64", shape=(3,)),
            *(step_row(s) for s in range(6)),
            through=5,
        )
        writer.flush(Put(name="t", step=0, value=np.ones(3)), closed=True, through=9)
        files = load(Path(place) / "run")
    answers = [
        Answer("d", {s: delta[s] for s in range(4)}),
        Answer("r", {s: np.arange(6.0) for s in (0, 5, 10)}),
        Answer("s", {2 + 2 * i: np.arange(4.0) + 4 * i for i in range(3)}),
        Answer("t", {0: np.ones(3)}, older={0: np.zeros(3)}),
        Answer("c", {0: np.full(9, 2.5)}),
        Answer("v", {0: np.arange(3, dtype=np.int16)}),
        Answer("z", {0: np.zeros((0, 4), np.int8)}),
    ]
    return files, Oracle(answers, ATTRS)


RUNS: dict[str, Callable[[], Corpus]] = {
    "live": lambda: codecs(closed=False),
    "closed": codecs,
    "closed-unbundled": lambda: unbundled(codecs()),
    "parts": lambda: unbundled(parts()),
    "by-hand": by_hand,
}


def copied(files: Files, folder: Path) -> Path:
    """Write a run to a disk, in the place of another."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder

"""The demo from beginning to end: train, follow, report, read back, draw."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import tensorstore_fmt as tsf
from tensorstore_fmt.demo import packages, places, report
from tensorstore_fmt.demo.digits import training
from tensorstore_fmt.demo.digits.companion import Companion
from tensorstore_fmt.demo.digits.comparison import read_back
from tensorstore_fmt.demo.digits.dataset import CLASSES, load_digits
from tensorstore_fmt.demo.digits.observation import Observation
from tensorstore_fmt.demo.digits.training import BATCH, COPIED, HIDDEN, Memory, train
from tensorstore_fmt.demo.display import Display
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.testing.storage import CountingStorage

__all__ = ["run_demo"]

_DEFAULT_FOLDER = "./tensorstore-demo"
_START_S = 60.0
_CATCH_UP_S = 30.0
_OBSERVED_LINES = 30  # about as many lines of the follower are shown, however long the training


def run_demo(
    url: str | None = None,
    *,
    steps: int = 300,
    save_every: int = 10,
    seed: int = 0,
    storage_options: Mapping[str, object] | None = None,
    pictures: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Train a small network into a run at `url`, and give the exit code of the command.

    While it trains a second process follows the run and checks its gradients. At the end the
    run is listed, slices are read back and compared with memory, and pictures are drawn.

    Parameters
    ----------
    url
        Where to put the run; nothing that exists is overwritten. By default
        ``./tensorstore-demo``, or the first free one of ``-2``, ``-3``, …
    steps, save_every, seed
        Training steps; how many of them from one save of the tensors to the next; of the
        initial weights, the split and the batches.
    storage_options
        For the file system of `url`; the follower gets them as JSON.
    pictures
        Local folder for the pictures; by default ``RUN-pictures`` in the working directory.
    quiet
        Print what failed only.
    as_json
        Print one JSON document at the end and nothing else.

    Returns
    -------
    int
        0 if all is well; 1 if a check failed or the follower did not keep up; 2 if a package
        that the demo needs is not installed.

    Raises
    ------
    ArgumentError
        `steps` or `save_every` is below 1, `storage_options` do not fit into JSON, or `url`
        is one that a second process cannot see.
    RunExistsError
        There is a run at `url` already.
    """
    _check_arguments(url, steps, save_every, storage_options)
    if not packages.are_there(("sklearn", "matplotlib"), extra="demo"):
        return 2
    demo = _Demo(
        url=places.free_folder(_DEFAULT_FOLDER) if url is None else url,
        steps=steps,
        save_every=save_every,
        seed=seed,
        storage_options=storage_options,
        display=Display(None if quiet or as_json else sys.stdout),
    )
    if url is None and demo.url != _DEFAULT_FOLDER:
        demo.display.line(f"{_DEFAULT_FOLDER} exists already; this run goes to {demo.url}")
    try:
        document = demo.play(Path(pictures) if pictures else Path.cwd() / f"{demo.name}-pictures")
    finally:
        demo.display.end_progress()  # Ctrl-C and errors speak below the bar, not inside it
    if as_json:
        print(json.dumps(document, indent=2))
    for problem in demo.problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if demo.problems else 0


def _check_arguments(
    url: str | None, steps: int, save_every: int, storage_options: Mapping[str, object] | None
) -> None:
    if url is not None and url.startswith("memory://"):
        raise ArgumentError("memory:// is seen by one process only, and the demo has two")
    for name, value in (("steps", steps), ("save_every", save_every)):
        if value < 1:
            raise ArgumentError(f"{name} is {value}; it must be at least 1", argument=name)
    if storage_options is not None:
        try:
            json.dumps(dict(storage_options))
        except TypeError as error:
            raise ArgumentError(
                f"the demo hands storage options to its second process as JSON: {error}",
                argument="storage_options",
            ) from None


class _Demo:
    """One performance: what its acts share."""

    def __init__(
        self,
        *,
        url: str,
        steps: int,
        save_every: int,
        seed: int,
        storage_options: Mapping[str, object] | None,
        display: Display,
    ) -> None:
        self.url = url
        self.name = places.run_name(url)
        self.steps = steps
        self.save_every = save_every
        self.seed = seed
        self.storage_options = storage_options
        self.display = display
        self.problems: list[str] = []
        self._observations: list[Observation] = []
        self._lags: list[int] = []
        self._trained = 0

    def play(self, folder: Path) -> dict[str, object]:
        """Do everything; give what ``--json`` prints."""
        memory = self._train_and_follow()
        run, counting = report.open_counting(self.url, storage_options=self.storage_options)
        with run:
            stored = self._report(run)
            checks = self._read_back(run, counting, memory)
            drawn = self._draw(run, folder)
        return {
            "run": self.url,
            "steps": self.steps,
            "test_accuracy": memory.test_accuracy[self.steps - 1],
            "names": [asdict(row) for row in stored],
            "checks": [asdict(check) for check in checks],
            "follower": {
                "observations": [asdict(seen) for seen in self._observations],
                "before_close": sum(not seen.is_closed for seen in self._observations),
                "most_steps_behind": max(self._lags, default=None),
            },
            "pictures": [str(path) for path in drawn],
            "problems": self.problems,
        }

    def _train_and_follow(self) -> Memory:
        digits = load_digits(seed=self.seed)
        sizes = "-".join(map(str, (digits.train_images.shape[1], *HIDDEN, CLASSES)))
        places.check_free(self.url, storage_options=self.storage_options)
        with (
            tsf.create_run(
                self.url,
                attrs={"made_by": "tensorstore-fmt demo", "network": sizes, "seed": self.seed},
                storage_options=self.storage_options,
                # An object store answers in tens of milliseconds, and a flush is a few requests.
                flush_interval_s=1.0 if places.is_remote(self.url) else 0.5,
                # Units are what will be read of it: one costs a sixteenth of the whole.
                chunks={COPIED: (None, HIDDEN[0] // 16)},
            ) as run,
            Companion(
                self.url,
                storage_options=self.storage_options,
                on_observation=self._on_observation,
                on_text=lambda text: self.display.line(f"  | {text}", style="bad"),
            ) as companion,
        ):
            self._introduce(run.url, sizes, len(digits.train_images))
            has_started = companion.wait_until_ready(timeout_s=_START_S)
            memory = train(
                run,
                digits,
                steps=self.steps,
                save_every=self.save_every,
                seed=self.seed,
                on_step=self._on_step,
            )
            # Not closed before the follower has seen all that it can see of an open run: each
            # saved step but the last, which only the close makes complete.
            run.flush()
            if has_started:
                step = (self.steps - 2) // self.save_every * self.save_every
                companion.wait_for_step(step, timeout_s=_CATCH_UP_S)
            self.display.end_progress()
            written = run.close()
            code = companion.wait_for_end(timeout_s=_CATCH_UP_S)
        if not has_started:
            self._fail("the follower did not start")
        elif code is None:
            self._fail("the follower did not notice that the run was closed")
        elif code != 0:
            self._fail(f"the follower found a problem, or broke off (exit code {code})")
        elif [seen.step for seen in self._observations] != list(memory.test_loss):
            self._fail("the follower did not see every saved step")
        if written.dropped:
            self._fail(f"{written.dropped} tensors could not be stored and were dropped")
        self._conclude(memory, written)
        return memory

    def _introduce(self, place: str, sizes: str, images: int) -> None:
        say = self.display.line
        say(f"Run: {place}", style="strong")
        say(f"A {sizes} network learns {images} digits in batches of {BATCH}:")
        say(f"{self.steps} steps, tensors logged every {self.save_every}, slowed down to take")
        say(f"{training.SHORTEST_S:g} s at least, so that there is something to watch.")
        say("Lines with | are from a second process, which only reads the run's files.")
        say()

    def _conclude(self, memory: Memory, written: tsf.CloseReport) -> None:
        behind = max(self._lags, default=0)
        before_close = sum(not seen.is_closed for seen in self._observations)
        say = self.display.line
        say()
        say(f"Trained to {100 * memory.test_accuracy[self.steps - 1]:.1f} % of the test digits.")
        say(
            f"The follower saw {before_close} of {len(memory.test_loss)} saved steps before the "
            f"close, at most {behind} steps late."
        )
        say(str(written))

    def _on_step(self, step: int, loss: float, accuracy: float) -> None:
        self._trained = step + 1
        self.display.progress(self._trained, self.steps, f"loss {loss:.3f}  acc {accuracy:.3f}")

    def _on_observation(self, seen: Observation) -> None:
        self._lags.append(self._trained - 1 - seen.step)
        self._observations.append(seen)
        every = max(1, self.steps // self.save_every // _OBSERVED_LINES)
        if seen.problems:
            self.display.line(f"  | {seen}", style="bad")
        elif seen.step // self.save_every % every == 0 or seen.step == self.steps - 1:
            self.display.line(f"  | {seen}", style="other")

    def _report(self, run: tsf.Run) -> list[report.Stored]:
        stored = report.take_stock(run)
        self.display.line()
        heading, *rows = report.table(stored)
        self.display.line(heading, style="strong")
        for row in rows:
            self.display.line(row)
        if not places.is_remote(self.url):
            sizes = [
                path.stat().st_size for path in places.folder(self.url).rglob("*") if path.is_file()
            ]
            self.display.line(
                f"on disk: {report.bytes_text(sum(sizes))} in {len(sizes)} files, "
                "with index and statistics"
            )
        return stored

    def _read_back(
        self, run: tsf.Run, counting: CountingStorage, memory: Memory
    ) -> list[report.Check]:
        say = self.display.line
        say()
        say("Read back, and compared bit for bit with copies kept in memory:", style="strong")
        say(f"({COPIED} was logged in chunks of {HIDDEN[0] // 16} units, for reads of few units)")
        checks = read_back(run, counting, memory)
        for check in checks:
            say(f"  {check.call}")
            say(f"      {check}", style="good" if check.is_equal else "bad")
            if not check.is_equal:
                self._fail(f"{check.call} gave something else than was logged")
        return checks

    def _draw(self, run: tsf.Run, folder: Path) -> list[Path]:
        from tensorstore_fmt.demo.digits.pictures import draw  # late: it needs matplotlib, last

        began = time.perf_counter()
        paths = draw(run, folder)
        self.display.line()
        self.display.line(
            f"Pictures, drawn from the run in {time.perf_counter() - began:.1f} s:", style="strong"
        )
        for path in paths:
            self.display.line(f"  {path}")
        return paths

    def _fail(self, problem: str) -> None:
        self.problems.append(problem)
        self.display.line(f"FAILED: {problem}", style="bad")

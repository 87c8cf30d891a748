"""The demo from beginning to end: it starts the processes, and says what they say."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tensorstore_fmt.demo.curves.processes import Process, Processes
from tensorstore_fmt.demo.digits.observation import OPTIONS_VARIABLE
from tensorstore_fmt.demo.display import Display
from tensorstore_fmt.demo.packages import are_there
from tensorstore_fmt.demo.places import check_free, folder, free_folder, is_remote, run_name
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.storage.folders import join

__all__ = ["LEARNING_RATES", "RULES", "SHORTEST_S", "run_demo"]

LEARNING_RATES = (0.02, 0.2, 2.0)
"""The last one is too large for this network: it learns fast at first, and then diverges."""

SHORTEST_S = 15.0
"""The trainings take at least this long, so that there is something to watch."""

# A loss that noise lets rise does not double from one ten steps to the next; one that diverges is
# hundreds of times what it was. After that the network is often dead: its gradients are zero.
RULES = (
    "loss_not_decreasing:mode=TRAIN,decrease=-4,increase=4",
    "exploding_tensor:names=^(loss|gradient/)",
    "all_zero:names=^gradient/",
)
"""What is evaluated on each run, as ``tensorstore-fmt watch --rule`` takes it."""

_DEFAULT_FOLDER = "./tensorstore-curves"
_MOST_RUNS = 8
_START_S = 120.0
_END_S = 120.0
_LOOK_S = 0.1
_MODULES = "tensorstore_fmt.demo.curves"


def run_demo(
    url: str | None = None,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    steps: int = 300,
    save_every: int = 10,
    seed: int = 0,
    stop: bool = True,
    storage_options: Mapping[str, object] | None = None,
    pictures: str | None = None,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """Train once for each learning rate, watch and compare, and give the command's exit code.

    Each training, each watcher (``tensorstore-fmt watch``) and the drawing is a process of its
    own; they know of each other nothing but where the runs lie.

    Parameters
    ----------
    url
        Folder for the runs; nothing that exists is overwritten. By default
        ``./tensorstore-curves``, or the first free one of ``-2``, ``-3``, …
    learning_rates
        One to eight different ones.
    steps, save_every, seed
        Training steps; how many of them from one save of the tensors to the next; of the
        initial weights, the split and the batches.
    stop
        Whether a rule that fires stops its training.
    storage_options
        For the file system of `url`; the processes get them as JSON, on no command line.
    pictures
        Local folder for pictures and page; by default ``URL-pictures`` in the working directory.
    quiet
        Print what failed only.
    as_json
        Print one JSON document at the end and nothing else.

    Returns
    -------
    int
        0 if all is well; 1 if a process failed; 2 if a package that the demo needs is not there.

    Raises
    ------
    ArgumentError
        A learning rate, `steps`, `save_every` or `seed` cannot be used, `storage_options` do not
        fit into JSON, or `url` is one that a second process cannot see.
    RunExistsError
        There is a run already where one would go.
    OSError
        A folder cannot be made.
    """
    _check(url, learning_rates, storage_options)
    for name, value, least in (
        ("steps", steps, 1),
        ("save_every", save_every, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ArgumentError(f"{name} is {value}; it must be at least {least}", argument=name)
    if not are_there(("sklearn", "matplotlib"), extra="demo"):
        return 2
    display = Display(None if quiet or as_json else sys.stdout)
    place = free_folder(_DEFAULT_FOLDER) if url is None else url
    if url is None and place != _DEFAULT_FOLDER:
        display.line(f"{_DEFAULT_FOLDER} exists already; the runs go to {place}")
    runs = {f"lr-{rate:g}": rate for rate in learning_rates}
    for name in runs:
        check_free(join(place, name), storage_options=storage_options)
    if not is_remote(place):
        folder(place).mkdir(parents=True, exist_ok=True)  # what cannot be made is said at once
    drawn = Path(pictures) if pictures else Path.cwd() / f"{run_name(place)}-pictures"
    drawn.mkdir(parents=True, exist_ok=True)
    demo = _Demo(place, runs, drawn, storage_options=storage_options, display=display, stops=stop)
    try:
        document = demo.play(steps=steps, save_every=save_every, seed=seed)
    except KeyboardInterrupt:
        display.line(f"Runs that had begun in {place} are closed, and can be read. Drawn: {drawn}")
        raise
    if as_json:
        print(json.dumps(document, indent=2))
    for problem in demo.problems:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if demo.problems else 0


def _check(
    url: str | None,
    learning_rates: Sequence[float],
    storage_options: Mapping[str, object] | None,
) -> None:
    if url is not None and url.startswith("memory://"):
        raise ArgumentError("memory:// is seen by one process only, and the demo has several")
    if url is not None and not is_remote(url) and folder(url).is_file():
        raise ArgumentError(f"{url} is a file; name a folder for the runs", argument="url")
    if not 1 <= len(learning_rates) <= _MOST_RUNS:
        raise ArgumentError(
            f"{len(learning_rates)} learning rates were given; give 1 to {_MOST_RUNS}",
            argument="learning_rates",
        )
    for rate in learning_rates:
        if not (0 < rate < math.inf):
            raise ArgumentError(
                f"learning rate {rate:g}: it must be above 0 and finite", argument="learning_rates"
            )
    if len({f"{rate:g}" for rate in learning_rates}) < len(learning_rates):
        raise ArgumentError(
            "two learning rates are the same to six digits; each run needs a name of its own",
            argument="learning_rates",
        )
    if storage_options is not None:
        try:
            json.dumps(dict(storage_options))
        except TypeError as error:
            raise ArgumentError(
                f"the demo hands storage options to its other processes as JSON: {error}",
                argument="storage_options",
            ) from None


class _Demo:
    """One performance: what its acts share."""

    def __init__(
        self,
        place: str,
        runs: Mapping[str, float],
        drawn: Path,
        *,
        storage_options: Mapping[str, object] | None,
        display: Display,
        stops: bool,
    ) -> None:
        self._place = place
        self._runs = runs
        self._drawn = drawn
        self._options = None if storage_options is None else dict(storage_options)
        self._display = display
        self._stops = stops
        self.problems: list[str] = []

    def play(self, *, steps: int, save_every: int, seed: int) -> dict[str, Any]:
        """Do everything; give what ``--json`` prints."""
        self._introduce(steps)
        with Processes() as processes:
            (viewer,) = processes.add([self._viewer()])
            watchers = processes.add([self._watcher(name) for name in self._runs])
            for process in (viewer, *watchers):
                if not process.wait_until_spoken(timeout_s=_START_S) or process.code is not None:
                    self._fail(f"{process.name} did not start")
            if not self.problems:
                trainings = processes.add(
                    [
                        self._training(name, rate, steps=steps, save_every=save_every, seed=seed)
                        for name, rate in self._runs.items()
                    ]
                )
                self._wait(trainings, watchers, viewer)
        document: dict[str, Any] = {"folder": self._place, "problems": self.problems}
        summary = self._drawn / "summary.json"
        if not self.problems:
            document |= json.loads(summary.read_text("utf-8"))
            self._conclude(document["runs"])
        document["pictures"] = [str(path) for path in sorted(self._drawn.iterdir())]
        return document

    def _introduce(self, steps: int) -> None:
        say = self._display.line
        rates = ", ".join(f"{rate:g}" for rate in self._runs.values())
        say(f"Runs: {self._place}", style="strong")
        say(f"One training for each learning rate ({rates}), {steps} steps each, slowed down to")
        say(f"take {SHORTEST_S:g} s. Watch: {self._drawn / 'report.html'}")
        say("Lines with | are from the process that draws, lines with ! from a watcher:")
        verb = f"tensorstore-fmt watch RUN{' --stop' if self._stops else ''}"
        say(" \\\n      ".join([f"  {verb}", *(f"--rule '{rule}'" for rule in RULES)]))
        say()

    # --- the processes --------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        return {OPTIONS_VARIABLE: json.dumps(self._options)}

    def _url(self, name: str) -> str:
        return join(self._place, name)

    def _viewer(self) -> Process:
        return Process(
            "the process that draws",
            [f"{_MODULES}.viewer", str(self._drawn), *map(self._url, self._runs)],
            environment=self._environment(),
            on_line=lambda line: self._display.line(f"  | {line}".rstrip(), style="other"),
        )

    def _watcher(self, name: str) -> Process:
        words = ["tensorstore_fmt", "watch", self._url(name), "--wait", f"{2 * _START_S:g}"]
        words += [word for rule in RULES for word in ("--rule", rule)]
        words += ["--stop"] if self._stops else []
        words += ["--poll", "1"] if is_remote(self._place) else []
        # A command line is there for all to see, a pipe is not.
        words += ["--storage-options", "@/dev/stdin"] if self._options is not None else []
        return Process(
            f"the watcher of {name}",
            words,
            environment={},
            said=json.dumps(self._options),
            on_line=partial(self._on_watcher, name),
        )

    def _on_watcher(self, name: str, line: str) -> None:
        if "waiting up to" not in line:
            self._display.line(f"  ! {name}: {line}", style="bad" if "step " in line else "faint")

    def _training(
        self, name: str, rate: float, *, steps: int, save_every: int, seed: int
    ) -> Process:
        options = {
            "--learning-rate": repr(float(rate)),
            "--steps": str(steps),
            "--save-every": str(save_every),
            "--seed": str(seed),
            "--seconds": str(SHORTEST_S),
        }
        words = [word for option in options.items() for word in option]
        return Process(
            f"the training {name}",
            [f"{_MODULES}.training", self._url(name), *words],
            environment=self._environment(),
            on_line=lambda line: self._display.line(f"  {name}: {line}", style="bad"),
        )

    def _wait(
        self, trainings: Sequence[Process], watchers: Sequence[Process], viewer: Process
    ) -> None:
        while not self.problems:
            is_over = all(training.code is not None for training in trainings)
            for process in (*trainings, viewer):
                if process.code not in (None, 0):
                    self._fail(f"{process.name} ended with exit code {process.code}")
            if is_over:
                break
            time.sleep(_LOOK_S)
        if self.problems:
            return
        for process in (*watchers, viewer):
            code = process.wait(timeout_s=_END_S)
            # A watcher gives 1 if a rule fired; that is what it is for.
            if code is None or code > (process in watchers):
                what = "did not end" if code is None else f"ended with exit code {code}"
                self._fail(f"{process.name} {what}")

    def _conclude(self, runs: Sequence[Mapping[str, Any]]) -> None:
        say = self._display.line
        say()
        for run in runs:
            if run["state"] == "stopped":
                say(
                    f"{run['name']} was stopped by {run['stopped_by']}, which fired at step "
                    f"{run['fired_at']}: {run['steps']} of {run['planned']} steps were done.",
                    style="strong",
                )
            elif run["alerts"] and self._stops:
                say(f"{run['name']} had ended before it could be stopped.", style="strong")
        if not any(run["alerts"] for run in runs):
            say("No rule has fired: all trainings went on to their end.", style="strong")
        say(f"Report: {self._drawn / 'report.html'}", style="strong")

    def _fail(self, problem: str) -> None:
        self.problems.append(problem)
        self._display.line(f"FAILED: {problem}", style="bad")

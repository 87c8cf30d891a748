"""Damage and hostility for runs in memory: storage, oracle, counts."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
from support.goals import record
from support.memory import peak_kib

from tensorstore_fmt.errors import NotThereError, TensorStoreError, TruncatedError
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.reader import read
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import FileInfo, Listing, Prefix, Range, Request, Storage

T = TypeVar("T")

SPEC: Final = Path(__file__).resolve().parents[2] / "spec" / "format.md"

Files = dict[str, bytes]
"""The files of a run: path relative to it, and the bytes."""

# --- runs in memory -------------------------------------------------------------------


class MemoryStorage(Storage):
    """A run in a dict, for reading: opening one costs no system call."""

    is_local = True
    can_write = False
    max_gap_bytes = 64

    def __init__(self, files: Mapping[str, bytes], *, can_list: bool = True) -> None:
        self.url = "memory://run"
        self.files = dict(files)
        self.can_list = can_list

    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        return [cast("T | Exception", self._answer(each)) for each in requests]

    def _answer(self, request: object) -> object:
        if isinstance(request, Listing):
            begin = request.directory + "/"
            return [
                FileInfo(path[len(begin) :], len(data))
                for path, data in sorted(self.files.items())
                if path.startswith(begin)
            ]
        assert isinstance(request, Range | Prefix)
        data = self.files.get(request.path)
        if data is None:
            return FileNotFoundError(request.path)
        if isinstance(request, Prefix):
            return data[: request.nbytes], len(data)
        if request.stop > len(data) and request.nbytes:
            return TruncatedError(f"{request.path} was cut short", file=request.path)
        return data[request.start : request.stop]

    def publish(
        self,
        path: str,
        buffers: Sequence[Any],
        *,
        if_absent: bool = False,
        synced: bool = False,
    ) -> None:
        raise AssertionError("a reader writes nothing")

    def sync(self, paths: Iterable[str]) -> None:
        raise AssertionError("a reader writes nothing")

    def delete(self, paths: Iterable[str]) -> None:
        raise AssertionError("a reader writes nothing")


def load(folder: Path) -> Files:
    """Take a run into memory."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def save(files: Mapping[str, bytes], folder: Path) -> Path:
    """Write a run to a disk."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def opened(files: Mapping[str, bytes]) -> Run:
    """Open a run in memory."""
    session = Session("memory://run", None, storage=MemoryStorage(files))
    session.view  # noqa: B018 - looks at the run
    return Run(session)


# --- the oracle ------------------------------------------------------------------------


@dataclass
class Answer:
    """What was logged of one name under one selection.

    Attributes
    ----------
    values
        By step.
    older
        What was saved before that at the same step. Where the index is damaged, and says so, it
        may come back: "a value that is found is given" (spec, "Damage and merges").
    """

    name: str
    values: dict[int, Any]
    select: dict[str, Any] = field(default_factory=dict)
    older: dict[int, Any] = field(default_factory=dict)
    stacked: Any = None

    def __post_init__(self) -> None:
        values = list(self.values.values())
        is_text = isinstance(values[0], str | list)
        if is_text or len({np.shape(v) for v in values}) == 1:
            self.stacked = values if is_text else np.stack(values)


@dataclass
class Oracle:
    """What a run must give."""

    answers: list[Answer]
    attrs: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return sorted({a.name for a in self.answers})


def same(found: Any, wanted: Any) -> bool:
    """Compare bit for bit; strings as texts."""
    if isinstance(wanted, str):
        return bool(found == wanted)
    if isinstance(wanted, list):
        return bool(np.asarray(found).tolist() == wanted)
    a, b = np.asarray(found), np.asarray(wanted)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


class WrongError(AssertionError):
    """The reader gave something that was not logged, or denied what was."""


@dataclass
class Outcome:
    """What a reader made of a damaged run.

    Attributes
    ----------
    codes
        Of all failures: of opening, of the index (`Run.damage`), of questions.
    unreadable
        (name, step) that could not be read.
    """

    codes: set[str] = field(default_factory=set)
    unreadable: list[tuple[str, int]] = field(default_factory=list)
    is_refused: bool = False
    has_damage: bool = False

    @property
    def is_detected(self) -> bool:
        """Whether anything at all was said."""
        return bool(self.codes)


def examine(files: Mapping[str, bytes], oracle: Oracle, *, turn: int | None = None) -> Outcome:
    """Open a run and read all of it: what is given must be right, all else a typed error.

    If not all can be read, each name is read alone, and then each step; with `turn` only the
    name that the failure tells and two that take turns, and with damage only every fifth time.
    """
    return examine_storage(MemoryStorage(files), oracle, turn=turn)


def examine_storage(storage: Storage, oracle: Oracle, *, turn: int | None = None) -> Outcome:
    """Do as `examine`, with any storage."""
    outcome = Outcome()
    session = caught_opening(storage, outcome)
    if session is not None:
        ask_all(Run(session), oracle, outcome, turn=turn)
    return outcome


def caught_opening(storage: Storage, outcome: Outcome) -> Session | None:
    """Open a run; what is damaged must be said, and goes to `outcome`. None if it is refused."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            session = Session("memory://run", None, storage=storage)
            damage = session.view.damage
        except TensorStoreError as error:
            outcome.codes.add(error.code)
            outcome.is_refused = True
            return None
    outcome.has_damage = bool(damage)
    if outcome.has_damage != any(issubclass(w.category, RuntimeWarning) for w in caught):
        raise WrongError("damage and its warning do not go together")
    outcome.codes |= {problem.code for problem in damage}
    return session


def check_names(run: Run, oracle: Oracle, outcome: Outcome) -> None:
    """Check attributes and names."""
    if run.attrs != oracle.attrs:
        raise WrongError(f"attrs are {run.attrs}")
    names = set(run.names())
    if not names <= set(oracle.names):
        raise WrongError(f"names that were never logged: {names - set(oracle.names)}")
    if names != set(oracle.names) and not outcome.has_damage:
        raise WrongError(f"names are missing in silence: {set(oracle.names) - names}")


def ask_all(run: Run, oracle: Oracle, outcome: Outcome, *, turn: int | None = None) -> None:
    """Ask an open run for everything; `turn` as in `examine`."""
    check_names(run, oracle, outcome)
    told = _ask_at_once(run, oracle, outcome)
    if told is None:
        return
    answers = oracle.answers
    if turn is not None:
        if outcome.has_damage and turn % 5:
            return
        n = len(answers)
        picked = {turn % n, (turn * 7 + 3) % n}
        answers = [a for i, a in enumerate(answers) if i in picked or a.name == told]
    for answer in answers:
        ask(run, answer, outcome)


def _ask_at_once(run: Run, oracle: Oracle, outcome: Outcome) -> str | None:
    """Read all steps of all names in one go; give the name that the failure tells, if it fails."""
    answers = [a for a in oracle.answers if a.stacked is not None]
    single = [(a, step) for a in oracle.answers if a.stacked is None for step in a.values]
    try:
        tensors = [run[a.name].select(**a.select) for a in answers]
        asks = [t.ask() for t in tensors]
        asks += [run[a.name].select(**a.select).ask(step=step) for a, step in single]
        found = read(run._session, asks)
    except NotThereError as error:
        raise WrongError(f"what was logged is denied: {error}") from error
    except TensorStoreError as error:
        outcome.codes.add(error.code)
        return str(error.facts.get("name", ""))
    wanted = [a.stacked for a in answers] + [a.values[step] for a, step in single]
    for ask, value, right in zip(asks, found, wanted, strict=True):
        if not same(value, right):
            raise WrongError(f"{ask.query.name}: other data")
    for answer, tensor in zip(answers, tensors, strict=True):
        if tensor.steps.tolist() != list(answer.values):
            raise WrongError(f"{answer.name}: other steps")
    return None


def ask(run: Run, answer: Answer, outcome: Outcome) -> None:
    wanted = answer.values
    try:
        tensor = run[answer.name].select(**answer.select)
    except TensorStoreError as error:
        _failed(error, answer.name, list(wanted), outcome)
        return
    try:
        steps = tensor.steps.tolist()
        if not set(steps) <= set(wanted) or (len(steps) < len(wanted) and not outcome.has_damage):
            raise WrongError(f"{answer.name}: steps {steps}")
        if answer.stacked is not None:
            if not same(tensor.read(), answer.stacked):
                raise WrongError(f"{answer.name}: other data")
            return
    except TensorStoreError as error:
        if isinstance(error, NotThereError):
            raise WrongError(f"{answer.name}: {error}") from error
        outcome.codes.add(error.code)
    for step, value in wanted.items():
        try:
            found = tensor.read(step=step)
        except TensorStoreError as error:
            _failed(error, answer.name, [step], outcome)
        else:
            if same(found, value):
                continue
            if not (outcome.has_damage and step in answer.older):
                raise WrongError(f"{answer.name}, step {step}: other data")
            if not same(found, answer.older[step]):
                raise WrongError(f"{answer.name}, step {step}: neither save")
            outcome.codes.add("older")


def _failed(error: TensorStoreError, name: str, steps: list[int], outcome: Outcome) -> None:
    if isinstance(error, NotThereError):
        raise WrongError(f"{name}, steps {steps}: what was logged is denied: {error}") from error
    outcome.codes.add(error.code)
    outcome.unreadable += [(name, step) for step in steps]


# --- trials -------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts trials, and keeps what went wrong, how long the slowest took, and memory."""

    what: str
    trials: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    rss_kib: int = field(default_factory=peak_kib)

    def trial(self, label: object, work: Callable[[], Outcome | None]) -> Outcome | None:
        """Do one; whatever is raised is a failure of the reader."""
        self.trials += 1
        begin = time.perf_counter()
        outcome = None
        try:
            outcome = work()
        except Exception as error:  # noqa: BLE001 - any is what the test looks for
            self.wrong.append(f"{label}: {type(error).__name__}: {error}")
        self.slowest_s = max(self.slowest_s, time.perf_counter() - begin)
        if outcome is not None:
            self.outcomes[_kind(outcome)] += 1
        return outcome

    def finish(self, *, most_s: float = 20.0, most_mib: int = 256) -> None:
        """Print the counts and assert that nothing went wrong."""
        grown = (peak_kib() - self.rss_kib) >> 10
        record(
            self.what,
            self.trials,
            wrong=len(self.wrong),
            **self.outcomes,
            slowest_ms=round(self.slowest_s * 1e3),
            memory_grew_mib=grown,
        )
        shown = "\n".join(self.wrong[:10])
        assert not self.wrong, f"{len(self.wrong)} of {self.trials}:\n{shown}"
        assert self.slowest_s < most_s
        assert grown < most_mib


def _kind(outcome: Outcome) -> str:
    if outcome.is_refused:
        return "refused"
    if not outcome.is_detected:
        return "same"
    return "damage" if outcome.has_damage else "error"


# --- where payloads lie ---------------------------------------------------------------------


def payload_ranges(files: Mapping[str, bytes]) -> dict[str, list[tuple[int, int]]]:
    """Give the bytes of each shard that entries of maximal segments name."""
    return {p: [(a, b) for a, b, _ in found] for p, found in _payloads(files).items()}


def _payloads(files: Mapping[str, bytes]) -> dict[str, list[tuple[int, int, bool]]]:
    """Give the same, each with whether a later flush of its writer saved the step again."""
    found: dict[str, list[tuple[int, int, bool]]] = {}
    saves: dict[tuple[object, ...], int] = {}
    places: list[tuple[tuple[object, ...], int, str, int, int]] = []
    for segment in opened(files)._session.view.segments:
        data = files[segment.name.path]
        for number in segment.head.entry_pages().tolist():
            row = segment.head.root[number]
            page = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
            for each in segment.head.decode_entries(number, page).rows:
                series, flush = segment.head.catalog[int(each["series"])], int(each["last_flush"])
                tensor = (segment.name.key, series.group, int(each["step"]), int(each["count"]))
                saves[tensor] = max(flush, saves.get(tensor, 0))
                if each["shard"] != layout.INLINE_SHARD:
                    path = segment.head.shards[int(each["shard"])][0].path
                    begin = int(each["offset"])
                    places.append((tensor, flush, path, begin, begin + int(each["nbytes"])))
    for tensor, flush, path, begin, end in places:
        found.setdefault(path, []).append((begin, end, flush < saves[tensor]))
    return found


# --- bytes that may be damaged without anybody noticing ------------------------------------------


def irrelevant(files: Mapping[str, bytes]) -> dict[str, list[tuple[int, int, str]]]:
    """Give the bytes whose damage a reader need not notice, each with its row in the spec.

    The table "unnoticed" of the spec says why. Every byte that is not in here has to be noticed
    by whoever reads all of the run.
    """
    found: dict[str, list[tuple[int, int, str]]] = {}
    view = opened(files)._session.view
    names = {segment.name.path: segment for segment in view.segments}
    payloads = _payloads(files)
    for path, data in files.items():
        if path == layout.BUNDLE:
            found[path] = [(0, len(data), "bundle")]
        elif path.startswith(layout.LOCKS_DIR + "/"):
            found[path] = [(0, len(data), "lock")]
        elif path.startswith(layout.SHARDS_DIR + "/"):
            found[path] = [
                (begin, end, "shard structure")
                for begin, end in _gaps([p[:2] for p in payloads.get(path, [])], len(data))
            ] + [
                (begin, end, "replaced payload")
                for begin, end, is_replaced in payloads.get(path, [])
                if is_replaced
            ]
        elif path in names and layout.BUNDLE in files:
            found[path] = [(0, len(data), "bundled segment")]
        elif path in names:
            root = names[path].head.header.root_nbytes
            found[path] = [
                (0, 256 + root, "first header and root"),
                (len(data) - 256 - root, len(data), "last header and root"),
            ]
        elif path.startswith(layout.INDEX_DIR + "/"):
            found[path] = [(0, len(data), "covered segment")]
    allowed = unnoticed_places()
    assert all(place in allowed for places in found.values() for _, _, place in places)
    return found


@functools.cache
def unnoticed_places() -> frozenset[str]:
    """Give the first column of the spec's table of bytes whose damage need not be noticed."""
    lines = SPEC.read_text("utf-8").splitlines()
    rows = itertools.takewhile(
        lambda line: line.startswith("|"), lines[lines.index("<!-- table: unnoticed -->") + 3 :]
    )
    return frozenset(row.split("|")[1].strip() for row in rows)


def _gaps(ranges: Iterable[tuple[int, int]], nbytes: int) -> list[tuple[int, int]]:
    at, gaps = 0, []
    for begin, end in sorted(ranges):
        if begin > at:
            gaps.append((at, begin))
        at = max(at, end)
    return [*gaps, (at, nbytes)] if at < nbytes else gaps


def may_be_missed(places: Iterable[tuple[int, int, str]], offset: int) -> bool:
    """Say whether a byte is in one of the ranges."""
    return any(begin <= offset < end for begin, end, _ in places)

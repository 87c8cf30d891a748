"""Damage and hostility for runs in memory: storage, oracle, editor of segments, counts."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import crc32c
import numpy as np
import pyarrow as pa
import zstandard
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


# --- segments, taken apart and put together ---------------------------------------------------

HEADER: Final = np.dtype(
    [
        ("magic", "V8"), ("major", "<u2"), ("minor", "<u2"), ("flags", "<u4"), ("run_id", "V16"),
        ("writer", "<u8"), ("worker", "<u4"), ("attempt", "<u4"), ("num_workers", "<u4"),
        ("root_crc32c", "<u4"), ("resume_step", "<i8"), ("first_flush", "<u8"),
        ("last_flush", "<u8"), ("required", "<u8"), ("file_nbytes", "<u8"),
        ("head_nbytes", "<u8"), ("root_nbytes", "<u4"), ("series", "<u4"), ("opened_us", "<i8"),
        ("published_us", "<i8"), ("complete_through", "<i8", (4,)), ("recovers", "<u8"),
        ("reserved", "V84"), ("crc32c", "<u4"),
    ]
)  # fmt: skip
NUMBERS_OF_HEADER: Final = tuple(
    name
    for name in HEADER.names or ()
    if HEADER[name].kind in "ui" and name not in ("crc32c", "root_crc32c")
)
NUMBERS_OF_ROOT: Final = tuple(
    name for name in layout.ROOT_ROW.names or () if layout.ROOT_ROW[name].kind in "ui"
)

_compressor = zstandard.ZstdCompressor(level=1)
_decompressor = zstandard.ZstdDecompressor()


def wrapped(value: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Give an integer as the bits that a field of the type has for it."""
    bits = (value % (1 << (8 * dtype.itemsize))).to_bytes(dtype.itemsize, "little")
    return cast("np.ndarray", np.frombuffer(bits, dtype)[0])


class SegmentEditor:
    """A segment whose parts can be changed; `encode` mends lengths and checksums.

    What stands in `header` and `root` overrides what would be right.
    """

    def __init__(self, data: bytes) -> None:
        self.first = np.frombuffer(data, HEADER, 1)
        nbytes = int(self.first["root_nbytes"][0])
        self.rows = np.frombuffer(data, layout.ROOT_ROW, nbytes // 64, 256).copy()
        self.stored = [
            data[int(r["offset"]) : int(r["offset"]) + int(r["nbytes"])] for r in self.rows
        ]
        self.raw = [_decompressor.decompress(each) for each in self.stored]
        self.header: dict[str, Any] = {}
        self.root: dict[tuple[int, str], int] = {}

    def copy(self) -> SegmentEditor:
        """Give one that can be changed by itself."""
        other = copy.copy(self)
        other.rows = self.rows.copy()
        other.stored, other.raw = list(self.stored), list(self.raw)
        other.header, other.root = dict(self.header), dict(self.root)
        return other

    def pages(self, kind: int) -> list[int]:
        """Give the numbers of the pages of a kind."""
        return np.flatnonzero(self.rows["kind"] == kind).tolist()

    def batch(self, number: int) -> pa.RecordBatch:
        """Give the rows of a page."""
        with pa.ipc.open_stream(self.raw[number]) as reader:
            return reader.read_next_batch()

    def set_stored(self, number: int, stored: bytes, *, raw_nbytes: int | None = None) -> None:
        """Put other bytes in the place of a page."""
        self.stored[number] = stored
        if raw_nbytes is not None:
            self.rows[number]["raw_nbytes"] = raw_nbytes

    def set_raw(self, number: int, raw: bytes) -> None:
        """Put another Arrow stream in a page."""
        self.raw[number] = raw
        self.set_stored(number, _compressor.compress(raw), raw_nbytes=len(raw))

    def set_columns(self, number: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Change columns of a page; what the root says of entries follows."""
        batch = self.batch(number)
        arrays = [
            pa.array(columns[f.name], f.type) if f.name in columns else batch.column(f.name)
            for f in batch.schema
        ]
        self.set_batch(number, pa.RecordBatch.from_arrays(arrays, schema=batch.schema))

    def set_batch(self, number: int, batch: pa.RecordBatch) -> None:
        """Put other rows in a page; what the root says of entries follows."""
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        self.set_raw(number, sink.getvalue())
        row = self.rows[number]
        row["rows"] = batch.num_rows
        if row["kind"] != layout.PAGE_ENTRIES or not batch.num_rows:
            return
        with np.errstate(all="ignore"):
            series, step, stride, counts = (
                batch.column(c).to_numpy() for c in ("series", "step", "stride", "count")
            )
            row["first_series"], row["last_series"] = series[0], series[-1]
            last = step + stride * (counts.astype(np.int64) - 1)
            row["min_step"], row["max_step"] = step.min(), last.max()

    def encode(self) -> bytes:
        """Give the bytes of the file."""
        rows = self.rows.copy()
        lengths = [len(each) for each in self.stored]
        begin = 256 + 64 * len(rows)
        rows["nbytes"] = lengths
        rows["offset"] = [begin + at for at in itertools.accumulate([0, *lengths])][:-1]
        rows["crc32c"] = [crc32c.crc32c(each) for each in self.stored]
        head = begin + sum(
            n for n, kind in zip(lengths, rows["kind"], strict=True) if kind != layout.PAGE_ENTRIES
        )
        for (number, name), value in self.root.items():
            rows[name][number] = wrapped(value, layout.ROOT_ROW[name])
        catalog = rows["kind"] == layout.PAGE_CATALOG
        header = self.first.copy()
        header["root_nbytes"], header["head_nbytes"] = rows.nbytes, head
        header["file_nbytes"] = 2 * begin + sum(lengths)
        header["series"] = int(rows["rows"][catalog].sum()) & 0xFFFFFFFF
        header["root_crc32c"] = crc32c.crc32c(rows.tobytes())
        for name, value in self.header.items():
            set_field(header, name, value)
        header["crc32c"] = crc32c.crc32c(header.tobytes()[:252])
        first = header.tobytes()
        return b"".join([first, rows.tobytes(), *self.stored, rows.tobytes(), first])


def set_field(record: np.ndarray, name: str, value: Any) -> None:
    """Set a field of a record to an integer, wrapped to its width, or to bytes."""
    kind = record.dtype[name]
    if isinstance(value, bytes):
        record[name] = np.frombuffer(value, kind)
    elif kind.subdtype is not None:
        record[name] = wrapped(value, kind.subdtype[0])
    else:
        record[name] = wrapped(value, kind)


def run_json(body: bytes) -> bytes:
    """Give a `run.json` with a right checksum; `body` has no closing brace."""
    return body + layout.RUN_JSON_TAIL + b"%08x" % crc32c.crc32c(body) + b'"}\n'


def mended_bundle(data: bytes, *, header: Mapping[int, bytes], table: Mapping[int, bytes]) -> bytes:
    """Change bytes of a bundle's header and table (by offset), and mend the checksums."""
    changed = bytearray(data)
    rows = int.from_bytes(data[12:16], "little")
    for at, new in table.items():
        changed[64 + at : 64 + at + len(new)] = new
    changed[48:52] = crc32c.crc32c(bytes(changed[64 : 64 + 64 * rows])).to_bytes(4, "little")
    for at, new in header.items():
        changed[at : at + len(new)] = new
    changed[60:64] = crc32c.crc32c(bytes(changed[:60])).to_bytes(4, "little")
    return bytes(changed)


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

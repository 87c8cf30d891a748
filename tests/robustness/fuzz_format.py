"""D5: structure-aware fuzzing with mended checksums, so that the parsers behind them are reached.

    PYTHONPATH=tests python tests/robustness/fuzz_format.py --seconds 120 --seed 1

Each input has a number, and is made from seed and number alone: ``--only NUMBER`` makes it again.
The number is in the file `--note` while it is tried, so that one that ends the process is known.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from conformance.independent_reader import Run as IndependentRun
from conformance.independent_reader import SpecError
from conformance.independent_reader import open_run as open_independently
from robustness.fuzz_corpus import by_hand, codecs, parts, unbundled
from support.editing import (
    NUMBERS_OF_HEADER,
    NUMBERS_OF_ROOT,
    SegmentEditor,
    mended_bundle,
    run_json,
    wrapped,
)
from support.memory import peak_kib
from support.mutate import Files, opened, save

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import TensorStoreError
from tensorstore_fmt.format import bundle as bundle_file
from tensorstore_fmt.format import codec, layout, runfile, segment, strings
from tensorstore_fmt.format.strings import pack_strings
from tensorstore_fmt.reading.run import Run

INTERESTING: Final = (
    0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 1000, 4095, 65535, 65536, 2**17, 2**20,
    2**20 + 1,
    2**24, 2**27, 2**27 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**47, 2**48, 2**48 + 1, 2**61,
    2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63),
)  # fmt: skip
TEXTS: Final = (
    "", "x", "loss", "grid", "string", "float32", "int64", "uint8", "bfloat16", "complex128",
    "bool",
    "float7", "\0", "../../etc/passwd", "\x1b[2J", "\u202e", "a" * 1024, "a" * 1025, "é" * 512,
)  # fmt: skip
MAX_MIB: Final = 2048
SLOW_S: Final = 5.0
HANG_S: Final = 120.0
"""After so long without an end of an input the process ends, with a traceback."""
WATCHED: Final = 64
"""The watch is set anew for each so many inputs."""
WHOLE_SHARE: Final = 0.05
COMPARED_SHARE: Final = 0.01
"""Shares of inputs that are read as part of a run, and by two readers; others are parsed."""
_QUICK: Final = Path("/dev/shm")

Work = Callable[[], object]


def number(rng: random.Random, near: int) -> int:
    """Give an integer: one at a border, or one near what is there."""
    if rng.random() < 0.3:
        return near + rng.choice((-8, -2, -1, 1, 2, 8, 1 << rng.randrange(63)))
    return rng.choice(INTERESTING) + rng.choice((0, 0, 0, -1, 1))


def scratched(rng: random.Random, data: bytes, *, most: int = 4) -> bytes:
    """Change bytes, or 4 or 8 of them at once, or cut, or repeat some."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if not changed:
            return b"\0"
        at, kind = rng.randrange(len(changed)), rng.randrange(6)
        if kind < 2:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at] = rng.randrange(256)
        elif kind == 3:
            n = rng.choice((2, 4, 8))
            at -= at % n
            changed[at : at + n] = (number(rng, 0) % (1 << 8 * n)).to_bytes(n, "little")
        elif kind == 4:
            del changed[at : at + rng.randint(1, 16)]
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 16)]
    return bytes(changed)


# --- runs ---------------------------------------------------------------------------------


def use(files: Files) -> None:
    """Do with a run whatever a reader can; each failure must be a typed one."""
    try:
        run = opened(files)
    except TensorStoreError:
        return
    names = run.names()[:40]
    for ask in (repr, lambda r: r._repr_html_(), lambda r: r.table(), lambda r: r.steps()):
        _try(lambda ask=ask: ask(run))
    _try(run.scalars)
    _try(run.statistics)
    for name in names:
        _try(lambda name=name: _use_tensor(run, name))
    _try(lambda: run.read([(name, 0, ()) for name in names]))
    _try(lambda: run.read([("absent", 0, ())]))


def _use_tensor(run: Any, name: str) -> None:
    tensor = run[name]
    repr(tensor)
    if tensor.has_data:
        _try(tensor.read)
        _try(lambda: tensor.read(step=0, index=np.s_[..., :1]))
    _try(lambda: tensor.shape_at(1))
    _try(tensor.stats)
    _try(lambda: tensor.select(worker=0, attempt=0).steps)


def _try(work: Work) -> None:
    with suppress(TensorStoreError):
        work()


# --- two readers ----------------------------------------------------------------------------

outcomes: Counter[str] = Counter()
"""What came of it when two readers were asked the same."""


def compare(files: Files) -> None:
    """Read with the independent reader too: each question gets the same answer of both.

    That is the same value, bit for bit, or none: for the specification says of every page and
    every field what is lost with it.
    """
    ours = theirs = None
    with suppress(TensorStoreError):
        ours = opened(files)
    with tempfile.TemporaryDirectory(dir=_QUICK if _QUICK.is_dir() else None) as place:
        with suppress(SpecError):
            theirs = open_independently(save(files, Path(place)))
        _check_alike("the run", ours, theirs)
        if ours is None or theirs is None:
            outcomes["both refuse the run"] += 1
            return
        for name in ours.names()[:20]:
            for step in range(3):
                _compare_value(ours, theirs, name, step)


def _compare_value(run: Run, other: IndependentRun, name: str, step: int) -> None:
    ours = theirs = None
    with suppress(TensorStoreError):
        ours = np.asarray(run[name].read(step=step))
    with suppress(SpecError):
        theirs = other.read(name, step)
    _check_alike(f"{name!r} at step {step}", ours, theirs)
    if ours is None or theirs is None:
        outcomes["neither gives a value"] += 1
        return
    is_text = theirs.dtype == object
    same = ours.tolist() == theirs.tolist() if is_text else ours.tobytes() == theirs.tobytes()
    if not same or ours.shape != theirs.shape:
        raise AssertionError(f"{name!r} at step {step}: the readers differ")
    outcomes["the same value"] += 1


def _check_alike(what: str, ours: object, theirs: object) -> None:
    if (ours is None) != (theirs is None):
        who = "the independent reader" if ours is None else "the library"
        raise AssertionError(f"only {who} gives {what}")


def _segment(rng: random.Random, corpora: list[Files]) -> tuple[Files, str, SegmentEditor]:
    files = rng.choice(corpora)
    path = rng.choice([p for p in files if p.startswith("index/") and len(files[p]) > 600])
    return files, path, _editor(files[path])


_editors: dict[bytes, SegmentEditor] = {}


def _editor(data: bytes) -> SegmentEditor:
    if data not in _editors:
        _editors[data] = SegmentEditor(data)
    return _editors[data].copy()


def _used(rng: random.Random, files: Files, path: str, editor: SegmentEditor) -> Work:
    data = editor.encode()
    return _mostly(rng, lambda: _parse_segment(path, data), {**files, path: data})


def _mostly(rng: random.Random, parse: Work, changed: Files) -> Work:
    """Mostly call the parser alone; now and then use the run, or compare two readers."""
    chance = rng.random()
    if chance < WHOLE_SHARE:
        return lambda: use(changed)
    if chance < WHOLE_SHARE + COMPARED_SHARE:
        return lambda: compare(changed)
    return lambda: _try(parse)


def _parse_segment(path: str, data: bytes) -> None:
    name = layout.parse_segment_name(path.removeprefix("index/"))
    header = segment.decode_header(data, where=path, name=name, nbytes=len(data))
    head = segment.decode_head(header, data)
    for page in head.entry_pages().tolist():
        row = head.root[page]
        stored = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
        _try(lambda page=page, stored=stored: head.decode_entries(page, stored))


def header(rng: random.Random, corpora: list[Files]) -> Work:
    files, path, editor = _segment(rng, corpora)
    for name in rng.choices(NUMBERS_OF_HEADER, k=rng.randint(1, 3)):
        editor.header[name] = number(rng, int(editor.first[name].reshape(-1)[0]))
    return _used(rng, files, path, editor)


def root(rng: random.Random, corpora: list[Files]) -> Work:
    files, path, editor = _segment(rng, corpora)
    for _ in range(rng.randint(1, 3)):
        row, name = rng.randrange(len(editor.rows)), rng.choice(NUMBERS_OF_ROOT)
        editor.root[row, name] = number(rng, int(editor.rows[row][name]))
    return _used(rng, files, path, editor)


def columns(rng: random.Random, corpora: list[Files]) -> Work:
    """Change cells of a page."""
    files, path, editor = _segment(rng, corpora)
    for _ in range(rng.choice((1, 1, 2))):
        page = rng.randrange(len(editor.rows))
        batch = editor.batch(page)
        changed: dict[str, list[Any]] = {}
        for _ in range(rng.choice((1, 1, 2, 4))):
            field = rng.choice(list(batch.schema))
            values = changed.setdefault(field.name, batch.column(field.name).to_pylist())
            at = rng.randrange(len(values))
            values[at] = cell(rng, field.type, values[at])
        try:
            editor.set_columns(page, changed)
        except (pa.ArrowException, OverflowError, ValueError, UnicodeError):
            continue
    return _used(rng, files, path, editor)


def cell(rng: random.Random, kind: pa.DataType, value: Any) -> Any:
    """Give another value for a cell."""
    if pa.types.is_integer(kind):
        return int(wrapped(number(rng, value), np.dtype(kind.to_pandas_dtype())))
    if pa.types.is_string(kind):
        return rng.choice(TEXTS)
    if pa.types.is_binary(kind):
        return scratched(rng, value)
    values = list(value)
    for _ in range(rng.randint(1, 2)):
        if values and rng.random() < 0.6:
            values[rng.randrange(len(values))] = _int64(rng)
        elif rng.random() < 0.5:
            values.insert(rng.randint(0, len(values)), _int64(rng))
        elif values:
            values.pop()
    return values


def _int64(rng: random.Random) -> int:
    return int(wrapped(number(rng, 4), np.dtype(np.int64)))


def rows(rng: random.Random, corpora: list[Files]) -> Work:
    """Drop, repeat, reorder rows of a page."""
    files, path, editor = _segment(rng, corpora)
    page = rng.randrange(len(editor.rows))
    batch = editor.batch(page)
    order = list(range(batch.num_rows))
    for _ in range(rng.randint(1, 3)):
        a, b = rng.choice(order), rng.randrange(len(order))
        if rng.random() < 0.4:
            order.insert(b, a)
        elif rng.random() < 0.6 and len(order) > 1:
            order.pop(b)
        else:
            order[b] = a
    editor.set_batch(page, batch.take(pa.array(order)))
    return _used(rng, files, path, editor)


def arrow(rng: random.Random, corpora: list[Files]) -> Work:
    """Change bytes of the Arrow stream in a page: its metadata, or a column."""
    files, path, editor = _segment(rng, corpora)
    page = rng.randrange(len(editor.rows))
    editor.set_raw(page, scratched(rng, editor.raw[page]))
    return _used(rng, files, path, editor)


def frame(rng: random.Random, corpora: list[Files]) -> Work:
    """Change the zstd frame of a page."""
    files, path, editor = _segment(rng, corpora)
    page = rng.randrange(len(editor.rows))
    editor.set_stored(page, scratched(rng, editor.stored[page]))
    return _used(rng, files, path, editor)


def bundle(rng: random.Random, _: list[Files]) -> Work:
    files, _oracle = codecs()
    changes: dict[int, bytes] = {}
    for _ in range(rng.randint(1, 3)):
        at, n = rng.choice((0, 4, 8, 16, 24, 32, 40, 48, 56)), 8
        at += 64 * rng.randrange(4)
        changes[at] = (number(rng, 3) % (1 << 64)).to_bytes(n, "little")
    head = (
        {12: number(rng, 4).to_bytes(16, "little", signed=True)[:4]} if rng.random() < 0.2 else {}
    )
    data = mended_bundle(files[layout.BUNDLE], header=head, table=changes)
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data))]
    run_id = runfile.decode(files[layout.RUN_JSON]).run_id
    parse = partial(bundle_file.decode, data, run_id=run_id, nbytes=len(data))
    return _mostly(rng, parse, {**files, layout.BUNDLE: data})


VALUES: Final = (
    "null", "true", "-1", "1e999", "NaN", "[]", "{}", '""', "1" * 5000, "[" * 9000, "1e5",
    '"\\ud800"', "[1,0]", "[1,1e3]", "[2,0]", '["x"]', "[[]]", "[{}]", '"tensorstore_fmt"',
    "9" * 30, '"' + "0" * 32 + '"',
)  # fmt: skip


def runjson(rng: random.Random, corpora: list[Files]) -> Work:
    """Change `run.json`, and mend its digits."""
    files = rng.choice(corpora)
    data = files[layout.RUN_JSON]
    body = data[: data.rindex(layout.RUN_JSON_TAIL)]
    if rng.random() < 0.5:
        body = b"{" + scratched(rng, body[1:])
    else:
        members = json.loads(body + b"}")
        texts = {key: json.dumps(value) for key, value in members.items()}
        texts[rng.choice([*texts, "more"])] = rng.choice(VALUES)
        body = ("{" + ",".join(f'"{k}":{v}' for k, v in texts.items())).encode()
    made = run_json(body)
    return _mostly(rng, lambda: runfile.decode(made), {**files, layout.RUN_JSON: made})


# --- payloads -------------------------------------------------------------------------------


def _payloads() -> list[tuple[int, str, int, int, bytes]]:
    """Give payloads: codec, dtype, rows, raw length, bytes."""
    rng = np.random.default_rng(0)
    floats = (rng.standard_normal(300) * 0.02).astype(np.float32).view(np.uint8)
    sparse = np.arange(240, dtype=np.uint8) // 80
    text = np.frombuffer(pack_strings(["loss", "é"] * 30), np.uint8)
    auto, squeezed = codec.Encoder(), codec.Encoder("zstd")
    made = [
        ("float32", 1, floats, auto.encode(floats, dtype="float32")),
        ("complex64", 1, sparse, auto._encode_planes(sparse, (3, 0, 1, 0), 1)),
        ("float32", 1, sparse, auto._encode_planes(sparse, (1, 2, 0, 3), 0)),
        ("int64", 1, sparse, auto._encode_planes(sparse, (3, 0, 1, 0), layout.PLANES_WIDE)),
        ("float32", 1, sparse, auto._encode_sparse(sparse, (1, 2, 0, 3, 0), 1)),
        ("bfloat16", 1, sparse, auto._encode_sparse(sparse, (1, 0, 3), 0)),
        ("bool", 1, sparse & 1, auto._encode_sparse(sparse & 1, (0, 3), 0)),
        ("uint8", 1, sparse, squeezed.encode(sparse, dtype="uint8")),
        ("string", 1, text, squeezed.encode(text, dtype="string")),
        ("float64", 1, sparse, auto.encode(np.zeros(240, np.uint8), dtype="float64")),
        ("int64", 5, sparse, codec.encode_delta(sparse, rows=5)),
    ]
    return [(e.codec, dtype, n, len(raw), e.to_bytes()) for dtype, n, raw, e in made]


PAYLOADS: Final = _payloads()


def payload(rng: random.Random, _: list[Files]) -> Work:
    """Change a payload; what is decoded beside it must stay untouched."""
    number_, dtype, n, nbytes, data = rng.choice(PAYLOADS)
    data = scratched(rng, data)
    if rng.random() < 0.1:
        number_ = rng.choice((0, 1, 2, 3, 4, 5, 254, 255))
    if rng.random() < 0.1:
        nbytes = rng.choice((0, 1, nbytes - 1, nbytes + 8, 65536))
    if rng.random() < 0.05:
        dtype = rng.choice(dtypes.NAMES)
    guarded = np.full(nbytes + 64, 0x5A, np.uint8)

    def work() -> None:
        _try(lambda: codec.decode(data, guarded[32:-32], codec=number_, dtype=dtype, rows=n))
        assert (guarded[:32] == 0x5A).all()
        assert (guarded[-32:] == 0x5A).all()

    return work


def texts(rng: random.Random, _: list[Files]) -> Work:
    raw = scratched(rng, pack_strings([rng.choice(TEXTS) for _ in range(rng.randint(1, 6))]))
    n = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 2**20, 2**40))
    return lambda: _try(lambda: strings.unpack_strings(raw, n))


TARGETS: Final[dict[str, tuple[int, Callable[[random.Random, list[Files]], Work]]]] = {
    "header": (2, header), "root": (2, root), "columns": (6, columns), "rows": (2, rows),
    "arrow": (5, arrow), "frame": (2, frame), "bundle": (2, bundle), "run.json": (2, runjson),
    "payload": (60, payload), "texts": (20, texts),
}  # fmt: skip
"""Of each how many of a hundred inputs; those of payloads take microseconds."""


# --- the loop ---------------------------------------------------------------------------------


# Counted, not fatal: a result that was asked for and does not fit. Few bytes may stand for many
# equal steps.
KNOWN: Final = {("MemoryError", "_room")}


class Fuzzer:
    """Makes inputs and tries them."""

    def __init__(self, seed: int, note: Path | None) -> None:
        self.seed = seed
        self.corpora = [codecs(closed=False)[0], by_hand()[0], unbundled(parts())[0]]
        self.names = [n for n, (weight, _) in TARGETS.items() for _ in range(weight)]
        self.note = None if note is None else note.open("wb", buffering=0)
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.known: Counter[str] = Counter()
        self.warned: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = (0.0, 0)

    def one(self, number_: int) -> None:
        """Make and try one input."""
        if number_ % WATCHED == 0:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
        rng = random.Random(f"{self.seed}:{number_}")
        name = rng.choice(self.names)
        if self.note is not None:
            self.note.seek(0)
            self.note.write(b"%12d" % number_)
        begin = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                TARGETS[name][1](rng, self.corpora)()
            except Exception as error:  # noqa: BLE001 - any is what is looked for
                self._failed(name, number_, error)
        seconds = time.perf_counter() - begin
        self.counts[name] += 1
        self.seconds[name] += seconds
        self.slowest = max(self.slowest, (seconds, number_))
        if seconds > SLOW_S:
            self.failures.append(f"{name} {number_}: took {seconds:.1f} s")
        for each in caught:
            if "index is damaged" not in str(each.message):
                self.warned[f"{each.category.__name__}: {each.message}"[:100]] += 1

    def _failed(self, name: str, number_: int, error: Exception) -> None:
        places = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
        for known in KNOWN:
            if known[0] == kind and known[1] in places:
                self.known[" in ".join(known)] += 1
                return
        last = traceback.extract_tb(error.__traceback__)[-1]
        self.failures.append(
            f"{name} {number_}: {kind}: {error!s:.200} ({last.filename}:{last.lineno} {last.name})"
        )

    def report(self) -> dict[str, Any]:
        """Say what was done."""
        rates = {n: round(c / max(self.seconds[n], 1e-9)) for n, c in self.counts.items()}
        return {
            "seed": self.seed, "inputs": self.counts.total(), "of": dict(self.counts),
            "per_second": rates, "failures": self.failures[:40], "n_failures": len(self.failures),
            "known": dict(self.known), "two_readers": dict(outcomes),
            "warned": dict(self.warned.most_common(8)),
            "slowest_s": round(self.slowest[0], 3), "slowest": self.slowest[1],
            "max_rss_mib": peak_kib() >> 10,
        }  # fmt: skip


def limit_memory(mib: int) -> None:
    """Let the process have so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> int:
    """Fuzz until the time or the count is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--count", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--note", type=Path)
    arguments = parser.parse_args()
    faulthandler.enable()
    fuzzer = Fuzzer(arguments.seed, arguments.note)
    limit_memory(MAX_MIB)
    deadline = time.monotonic() + arguments.seconds
    if arguments.only is not None:
        fuzzer.one(arguments.only)
    else:
        done = 0
        while done < arguments.count and time.monotonic() < deadline:
            fuzzer.one(done)
            done += 1
    sys.stdout.write(json.dumps(fuzzer.report(), indent=1) + "\n")
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())

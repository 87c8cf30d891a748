"""D3, D4: files cut at every byte, blocks zeroed, moved and swapped, files of other runs.

Every file of every run is cut at every byte; ``TSF_COUNT`` multiplies the other trials.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from robustness.fuzz_corpus import RUNS, codecs
from support.goals import SEED, trials
from support.mutate import (
    Files,
    MemoryStorage,
    Oracle,
    Outcome,
    Tally,
    WrongError,
    ask_all,
    examine,
    irrelevant,
    may_be_missed,
)
from support.rereading import Rereader, remembered_parsing

from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session

BLOCKS = (512, 4096)


# --- D3 -----------------------------------------------------------------------------------


class Cutter:
    """Cuts files of a run."""

    def __init__(self, files: Files, oracle: Oracle) -> None:
        self.files = files
        self.needed = {path: _needed(files, path) for path in files}
        self.rereader = Rereader(files, oracle)

    def check(self, path: str, nbytes: int) -> Outcome:
        """Cut; nothing that is missing may be passed over in silence."""
        data = self.files[path]
        outcome = self.rereader.reread(
            path, data[:nbytes], begin=nbytes, end=len(data), turn=nbytes
        )
        if path.startswith("index/") and layout.BUNDLE not in self.files:
            if not outcome.has_damage and not outcome.is_refused:
                raise WrongError("a cut segment that nobody reports")
        elif not outcome.is_detected and nbytes < self.needed[path]:
            raise WrongError("bytes that matter are missing in silence")
        return outcome


def _needed(files: Files, path: str) -> int:
    """Say where the last byte of a file ends that may not be missed."""
    places = irrelevant(files).get(path, [])
    offsets = range(len(files[path]) - 1, -1, -1)
    return next((at + 1 for at in offsets if not may_be_missed(places, at)), 0)


@pytest.mark.parametrize("name", list(RUNS))
def test_cut_files_are_refused_or_a_shorter_run_is_announced(name: str) -> None:
    """Every file is cut at every byte."""
    files, oracle = RUNS[name]()
    tally = Tally(f"D3 {name}")
    with remembered_parsing():
        cutter = Cutter(files, oracle)
        for path, data in files.items():
            for nbytes in range(len(data)):
                tally.trial(
                    f"{path} cut at {nbytes}", lambda p=path, n=nbytes: cutter.check(p, n)
                )  # fmt: skip
    tally.finish(most_mib=128)
    assert tally.trials == sum(len(data) for data in files.values())


# --- D4 -----------------------------------------------------------------------------------


def _block(rng: random.Random, data: bytes) -> tuple[int, int]:
    size = min(rng.choice(BLOCKS), max(1, len(data) // 2))
    return rng.randrange(0, max(1, len(data) - size + 1)), size


def zeroed(rng: random.Random, files: Files, path: str) -> Files:
    at, size = _block(rng, files[path])
    data = files[path]
    return {**files, path: data[:at] + bytes(size) + data[at + size :]}


def filled(rng: random.Random, files: Files, path: str) -> Files:
    at, size = _block(rng, files[path])
    data = files[path]
    return {**files, path: data[:at] + rng.randbytes(size) + data[at + size :]}


def duplicated(rng: random.Random, files: Files, path: str) -> Files:
    """Write a block over another one."""
    data = files[path]
    at, size = _block(rng, data)
    to = rng.randrange(0, max(1, len(data) - size + 1))
    return {**files, path: data[:to] + data[at : at + size] + data[to + size :]}


def inserted(rng: random.Random, files: Files, path: str) -> Files:
    data = files[path]
    at, size = _block(rng, data)
    return {**files, path: data[: at + size] + data[at : at + size] + data[at + size :]}


def removed(rng: random.Random, files: Files, path: str) -> Files:
    data = files[path]
    at, size = _block(rng, data)
    return {**files, path: data[:at] + data[at + size :]}


def swapped(rng: random.Random, files: Files, path: str) -> Files:
    data = bytearray(files[path])
    size = min(rng.choice(BLOCKS), max(1, len(data) // 3))
    one, other = rng.randrange(len(data) - size + 1), rng.randrange(len(data) - size + 1)
    a, b = bytes(data[one : one + size]), bytes(data[other : other + size])
    data[one : one + size], data[other : other + size] = b, a
    return {**files, path: bytes(data)}


def junk(rng: random.Random, files: Files, path: str) -> Files:
    return {**files, path: files[path] + rng.randbytes(rng.choice([1, 7, 512, 4096]))}


def emptied(rng: random.Random, files: Files, path: str) -> Files:
    return {**files, path: b""}


def of_other_run(rng: random.Random, files: Files, path: str) -> Files:
    """Put the file of another run there: the same names and shapes, other values."""
    others, _ = codecs(seed=rng.randrange(1, 5))
    kind = path.partition("/")[0]
    fitting = [data for name, data in others.items() if name.partition("/")[0] == kind]
    return {**files, path: rng.choice(fitting or [b""])}


def renamed(rng: random.Random, files: Files, path: str) -> Files:
    """Give a segment's bytes to another name, beside the right one or in place of another."""
    names = [n for n in files if n.startswith("index/")]
    name = rng.choice(names)
    if rng.random() < 0.5:
        return {**files, name: files[rng.choice(names)]}
    parsed = layout.parse_segment_name(name.removeprefix("index/"))
    assert parsed is not None
    others = [{"worker": 7}, {"attempt": 9}, {"writer": 255}]
    other = replace(parsed, key=replace(parsed.key, **rng.choice(others)))
    return {**files, other.path: files[name]}


def shards_crossed(rng: random.Random, files: Files, path: str) -> Files:
    """Swap two shards of a run, or take that of another."""
    names = [n for n in files if n.startswith("shards/")]
    if len(names) > 1:
        one, other = rng.sample(names, 2)
        return {**files, one: files[other], other: files[one]}
    others, _ = codecs(seed=rng.randrange(1, 5))
    found = [data for n, data in others.items() if n.startswith("shards/")]
    return {**files, **({names[0]: found[0]} if names and found else {})}


OPERATIONS: list[Callable[[random.Random, Files, str], Files]] = [
    zeroed, filled, duplicated, inserted, removed, swapped, junk, emptied, of_other_run, renamed,
    shards_crossed,
]  # fmt: skip


def test_blocks_and_whole_files() -> None:
    rng, tally = random.Random(SEED), Tally("D4")
    runs = {name: make() for name, make in RUNS.items()}
    for number in range(trials(1000)):
        name = rng.choice(list(runs))
        files, oracle = runs[name]
        path = rng.choice([p for p in files if not p.startswith("locks/")])
        operation = rng.choice(OPERATIONS)
        changed = operation(rng, files, path)
        label = f"{number}: {name}, {operation.__name__}, {path}"
        tally.trial(label, lambda c=changed, o=oracle, n=number: examine(c, o, turn=n))
    tally.finish(most_mib=128)


def test_stale_segments_put_back_change_nothing() -> None:
    """Covered segments that come back, whole or damaged, are ignored."""
    live, oracle = RUNS["live"]()
    before = {p: d for p, d in live.items() if p.startswith("index/")}
    after = _compacted(live)
    tally = Tally("D4 stale")
    assert not set(before) <= set(after)
    rng = random.Random(SEED)
    for number in range(trials(60)):
        some = {p: before[p] for p in rng.sample(sorted(before), rng.randint(1, len(before)))}
        if rng.random() < 0.5:
            some = {p: rng.choice([d[: len(d) // 2], b"", d + b"x"]) for p, d in some.items()}
        outcome = tally.trial(
            f"{number}: {sorted(some)}",
            lambda s=some, n=number: examine(
                {**after, **{p: d for p, d in s.items() if p not in after}}, oracle, turn=n
            ),
        )
        assert outcome is None or not outcome.is_detected
    tally.finish()


def test_damaged_merged_segment_is_replaced_by_those_it_covers() -> None:
    live, oracle = RUNS["live"]()
    before = {p: d for p, d in live.items() if p.startswith("index/")}
    after = _compacted(live)
    (big,) = [p for p in after if p.startswith("index/") and p not in before]
    tally = Tally("D4 covered")
    rng = random.Random(SEED)
    for number in range(trials(60)):
        data = bytearray(after[big])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        cut = bytes(data)[: rng.choice([len(data), len(data), len(data) - 1, 700, 0])]
        tally.trial(
            number, lambda c=cut, n=number: examine({**after, **before, big: c}, oracle, turn=n)
        )
    tally.finish()


def _compacted(files: Files) -> Files:
    """Merge the segments of a run into one (spec, "Duties of a writer", 7)."""
    import tempfile
    from pathlib import Path

    from support.mutate import load, save

    from tensorstore_fmt.upkeep import compact

    with tempfile.TemporaryDirectory() as place:
        folder = save(files, Path(place))
        compact(folder)
        return load(folder)


def test_open_reader_meets_damage_later() -> None:
    """Files change under a reader that is open: it refreshes, reads on, and gives nothing wrong."""
    rng, tally = random.Random(SEED), Tally("D4 under an open reader")
    for number in range(trials(100)):
        files, oracle = RUNS[rng.choice(["live", "by-hand"])]()
        storage = MemoryStorage(files)
        run = Run(Session("memory://run", None, storage=storage))
        run.names()
        path = rng.choice([p for p in files if not p.startswith("locks/")])
        operation = rng.choice([zeroed, filled, swapped, junk, emptied, removed])
        storage.files = operation(rng, files, path)

        def work(run: Run = run, oracle: Oracle = oracle, number: int = number) -> Outcome:
            outcome = Outcome()
            ask_all(run, oracle, outcome, turn=number)
            return outcome

        tally.trial(f"{number}: {operation.__name__} {path}", work)
    tally.finish()

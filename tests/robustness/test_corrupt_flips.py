"""D1, D2: one bit flipped in every byte of every file is noticed, or does not matter.

What does not matter is listed with its reason in the spec (`support.mutate.irrelevant`), and is
exactly what goes unnoticed. ``TSF_COUNT=8`` flips all bits of all bytes of all runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from robustness.fuzz_corpus import RUNS, codecs, copied
from support.goals import COUNT, SEED, record, trials
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
    payload_ranges,
)

from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.upkeep import verify

# By default every byte that must be noticed of a live run; others of its bytes, and the files that
# repeat its forms, less densely.
STRIDES = {
    ("live", "index"): 1, ("live", "run.json"): 1, ("live", "shards"): 1,
    ("closed", "index.bundle"): 9, ("by-hand", "index"): 6, ("parts", "index"): 101,
}  # fmt: skip
OTHER_STRIDE = 37
UNNOTICED_STRIDE = 5


def bits(offset: int) -> list[int]:
    """Give which bits of a byte to flip: one, by its position, or more in a long run."""
    n = min(8, trials(1))
    return [(offset * 5 + 3 * SEED + 3 + i) % 8 for i in range(n)]


def offsets(run: str, path: str, nbytes: int) -> range:
    """Give the bytes of a file that are flipped."""
    stride = STRIDES.get((run, path.partition("/")[0]), OTHER_STRIDE)
    return range(0, nbytes, 1 if COUNT > 1 else stride)


def flipped(data: bytes, offset: int, bit: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


class Examiner:
    """Reads a run again and again; the index only when it changes."""

    def __init__(self, files: Files, oracle: Oracle) -> None:
        self.files, self.oracle = files, oracle
        self.storage = MemoryStorage(files)
        self.run = Run(Session("memory://run", None, storage=self.storage))

    def flip(self, path: str, offset: int, bit: int) -> Outcome:
        """Damage one bit, and read all."""
        turn = None if COUNT > 1 else offset
        changed = flipped(self.files[path], offset, bit)
        if not path.startswith("shards/"):
            return examine({**self.files, path: changed}, self.oracle, turn=turn)
        # Opening reads no shard: what is open may go on.
        self.storage.files[path] = changed
        outcome = Outcome()
        try:
            ask_all(self.run, self.oracle, outcome, turn=turn)
        finally:
            self.storage.files[path] = self.files[path]
        return outcome


@pytest.mark.parametrize("name", list(RUNS))
def test_flipped_bits_are_noticed_or_do_not_matter(name: str) -> None:
    files, oracle = RUNS[name]()
    examiner, tally = Examiner(files, oracle), Tally(f"D1 {name}")
    missed: Counter[str] = Counter()
    for path, data in files.items():
        places = irrelevant(files).get(path, [])
        for offset in offsets(name, path, len(data)):
            expected = not may_be_missed(places, offset)
            if not expected and offset % UNNOTICED_STRIDE and COUNT <= 1:
                continue
            for bit in bits(offset):

                def work(path: str = path, offset: int = offset, bit: int = bit) -> Outcome:
                    outcome = examiner.flip(path, offset, bit)
                    if outcome.is_detected != expected:  # noqa: B023 - called at once
                        raise WrongError(f"detected {outcome.is_detected}, {outcome}")
                    return outcome

                tally.trial(f"{path} byte {offset} bit {bit}", work)
            if not expected:
                missed[_reason(places, offset)] += 1
    record(f"D2 {name}", tally.trials, unnoticed_as_they_may=dict(missed))
    tally.finish(most_mib=128)


def _reason(places: list[tuple[int, int, str]], offset: int) -> str:
    return next(why for begin, end, why in places if begin <= offset < end)


def verified_bytes(files: Files) -> Iterator[tuple[str, int]]:
    """Give bytes of every kind of file, and of every kind of place in it."""
    rng = np.random.default_rng(SEED)
    for path, data in files.items():
        if path.startswith("locks/"):
            continue
        for offset in rng.integers(0, len(data), trials(2)).tolist():
            yield path, offset


def test_verify_finds_what_readers_need_not_notice(tmp_path: Path) -> None:
    """Each byte of each file but locks is in the duty of `verify`."""
    files, _ = codecs()
    tally = Tally("D2 verify")
    payloads = payload_ranges(files)
    missed: list[str] = []
    for path, offset in verified_bytes(files):
        folder = copied({**files, path: flipped(files[path], offset, offset % 8)}, tmp_path / "r")
        report = verify(folder)
        tally.trials += 1
        if report.ok:
            is_payload = any(a <= offset < b for a, b in payloads.get(path, []))
            missed.append(f"{path} byte {offset}{' in a payload' if is_payload else ''}")
    record("D2 verify", tally.trials, missed=missed)
    # Arrow's own padding and reserved fields are no one's: nothing reads them, nothing covers them.
    assert all(m.startswith(layout.SHARDS_DIR) and "payload" not in m for m in missed), missed
    tally.finish()

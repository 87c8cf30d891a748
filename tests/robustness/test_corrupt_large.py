"""D1 in a large file: bits flipped in place, at random, anywhere in a shard.

32 MB and 200 flips; ``TSF_COUNT=32`` makes 1 GB (no more), ``TSF_COUNT=500`` 100,000 flips.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from support.goals import COUNT, SEED, trials
from support.mutate import Outcome, Tally, WrongError

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import ChecksumError
from tensorstore_fmt.testing.writers import create_test_run

MIB = 2**20
STEP_NBYTES = 2 * MIB
CHUNK = (128, 512)
SHAPE = (1024, 512)


def value(step: int) -> np.ndarray:
    """Give values that do not get smaller when stored: other ones at each step."""
    return np.random.default_rng([SEED, step]).integers(0, 2**32, SHAPE, np.uint32)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    n_steps = int(min(32 * COUNT, 1024)) * MIB // STEP_NBYTES
    with create_test_run(tmp_path / "run", chunks={"w": CHUNK}, stats=False) as run:
        for step in range(max(2, n_steps)):
            run.log({"w": value(step)}, step=step)
            if step % 8 == 7:
                run.flush()
    return tmp_path / "run"


class Flipper:
    """Flips bits in the shards of a run, and reads the chunk that holds them."""

    def __init__(self, folder: Path) -> None:
        self.run = tsf.open_run(folder)
        self.folder = folder
        self.places: list[tuple[str, int, int, int, int]] = []  # path, begin, end, step, chunk
        for segment in self.run._session.view.segments:
            head, data = segment.head, (folder / segment.name.path).read_bytes()
            for number in head.entry_pages().tolist():
                row = head.root[number]
                page = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
                for each in head.decode_entries(number, page).rows:
                    if each["shard"] < len(head.shards):
                        path = head.shards[int(each["shard"])][0].path
                        begin, nbytes = int(each["offset"]), int(each["nbytes"])
                        which = int(each["step"]), int(each["chunk"])
                        self.places.append((path, begin, begin + nbytes, *which))
        self.of_step: dict[int, list[tuple[str, int, int, int, int]]] = {}
        for place in self.places:
            self.of_step.setdefault(place[3], []).append(place)
        self.files = {p[0]: os.open(folder / p[0], os.O_RDWR) for p in self.places}

    def box(self, chunk: int) -> tuple[slice, slice]:
        return slice(chunk * CHUNK[0], (chunk + 1) * CHUNK[0]), slice(None)

    def read(self, place: tuple[str, int, int, int, int], wanted: np.ndarray) -> bool:
        """Read one chunk: True if it is right, False if it is refused."""
        _, _, _, step, chunk = place
        # What was found to be right is not looked at again in a file that is mapped.
        self.run._session.checked.clear()
        try:
            found = self.run["w"].read(step=step, index=self.box(chunk))
        except ChecksumError:
            return False
        if found.tobytes() != wanted[self.box(chunk)].tobytes():
            raise WrongError(f"other data at step {step}, chunk {chunk}")
        return True

    def flip(self, path: str, offset: int, bit: int) -> None:
        (byte,) = os.pread(self.files[path], 1, offset)
        os.pwrite(self.files[path], bytes([byte ^ 1 << bit]), offset)

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


def test_flips_in_a_large_shard(large: Path) -> None:
    rng, tally, flipper = random.Random(SEED), Tally("D1 large"), Flipper(large)
    nbytes = sum(p.stat().st_size for p in large.rglob("*") if p.is_file())
    values: dict[int, np.ndarray] = {}

    def wanted(step: int) -> np.ndarray:
        if step not in values:
            values.clear()
        return values.setdefault(step, value(step))

    # The flips of one step come together, so that its values are made once.
    picked = sorted(rng.choices(flipper.places, k=trials(200)), key=lambda p: p[3])
    for number, place in enumerate(picked):
        path, begin, end, step, _ = place
        offset, bit = rng.randrange(begin, end), rng.randrange(8)
        other = rng.choice([p for p in flipper.of_step[step] if p[1] != begin])

        def work(
            place: tuple[str, int, int, int, int] = place,
            other: tuple[str, int, int, int, int] = other,
            at: tuple[str, int, int] = (path, offset, bit),
        ) -> Outcome:
            flipper.flip(*at)
            try:
                if flipper.read(place, wanted(place[3])):
                    raise WrongError("not noticed")
                if not flipper.read(other, wanted(other[3])):
                    raise WrongError("a chunk that is whole was refused")
            finally:
                flipper.flip(*at)
            return Outcome(codes={"checksum"})

        tally.trial(f"{number}: {path} byte {offset} bit {bit}", work)
    flipper.close()
    assert nbytes > min(32 * COUNT, 1024) * MIB
    tally.finish(most_mib=256)

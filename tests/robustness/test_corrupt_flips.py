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
from support.goals import SEED, record, trials
from support.mutate import (
    Files,
    Outcome,
    Tally,
    irrelevant,
    may_be_missed,
    opened,
    payload_ranges,
)
from support.rereading import Rereader, check_sound, remembered_parsing

from tensorstore_fmt.format import layout
from tensorstore_fmt.upkeep import verify


def bits(offset: int) -> list[int]:
    """Give which bits of a byte to flip: one, by its position, or more in a long run."""
    n = min(8, trials(1))
    return [(offset * 5 + 3 * SEED + 3 + i) % 8 for i in range(n)]


def flipped(data: bytes, offset: int, bit: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


def test_every_codec_is_in_these_runs() -> None:
    """Also both ways to store a payload, repeats, digests, strings, statistics, both states."""
    found: set[tuple[str, object]] = set()
    for make in RUNS.values():
        files, _ = make()
        view = opened(files)._session.view
        found |= {("closed", s.head.header.is_closed) for s in view.segments}
        for segment in view.segments:
            catalog = segment.head.catalog
            for number in segment.head.entry_pages().tolist():
                row, data = segment.head.root[number], files[segment.name.path]
                page = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
                entries = segment.head.decode_entries(number, page).rows
                found |= {("codec", int(codec)) for codec in entries["codec"]}
                found |= {("flags", int(flags)) for flags in entries["flags"]}
                found |= {("inline", bool(s == layout.INLINE_SHARD)) for s in entries["shard"]}
            found |= {("kind", int(kind)) for kind in catalog.kind}
            found |= {("dtype", catalog[n].dtype) for n in range(len(catalog))}
            found |= {("varies", bool(n)) for n in catalog.varying}
    wanted = {("codec", codec) for codec in layout.CODEC_NAMES}
    wanted |= {("kind", kind) for kind in (0, 1, 2)} | {("dtype", "string")}
    wanted |= {("flags", flags) for flags in (0, layout.ENTRY_REPEAT, layout.ENTRY_HAS_DIGEST)}
    wanted |= {(what, value) for what in ("closed", "inline", "varies") for value in (True, False)}
    assert wanted <= found, wanted - found


@pytest.mark.parametrize("name", list(RUNS))
def test_flipped_bits_are_noticed_or_do_not_matter(name: str) -> None:
    """Every byte of every file."""
    files, oracle = RUNS[name]()
    tally, missed = Tally(f"D1 {name}"), Counter[str]()
    with remembered_parsing():
        rereader = Rereader(files, oracle)
        for path, data in files.items():
            places = irrelevant(files).get(path, [])
            for offset in range(len(data)):
                expected = not may_be_missed(places, offset)
                for bit in bits(offset):

                    def work(path: str = path, offset: int = offset, bit: int = bit) -> Outcome:
                        changed = flipped(data, offset, bit)  # noqa: B023 - called at once
                        turn = 8 * offset + bit
                        outcome = rereader.reread(
                            path, changed, begin=offset, end=offset + 1, turn=turn
                        )
                        return check_sound(outcome, expected=expected)  # noqa: B023 - at once

                    tally.trial(f"{path} byte {offset} bit {bit}", work)
                if not expected:
                    missed[_reason(places, offset)] += 1
    nbytes = sum(len(data) for data in files.values())
    record(f"D2 {name}", nbytes, never_read=rereader.never_read, unnoticed_as_they_may=dict(missed))
    tally.finish(most_mib=128)
    assert tally.trials == nbytes * len(bits(0))


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

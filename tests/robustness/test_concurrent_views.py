"""Views while segments are merged and deleted, compacted, and listed in pages (N4)."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.concurrent_races import KINDS, MODULE, check, log
from support.concurrent_views import DictStorage, Files, PagedStorage
from support.crash_running import quick_folder, run_trials
from support.crash_scripts import settle
from support.goals import COUNT, SEED, record, trials

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.testing.forks import ForkServer
from tensorstore_fmt.testing.writers import create_test_run

FLUSHES = 10 if COUNT < 25 else 18


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


def history() -> list[Files]:
    """Give all states of a bucket while a run is written, merged, tidied up and closed."""
    storage = DictStorage()
    run = create_test_run(storage, grace_s=0.0)
    for step in range(FLUSHES):
        log(run, step)
        assert run.flush()
        settle(run)
    run.close()
    return storage.states[1:]


def names_in(state: Files) -> list[layout.SegmentName]:
    parsed = [layout.parse_segment_name(path.rpartition("/")[2]) for path in state]
    return [name for name in parsed if name is not None]


def steps_in(state: Files) -> int:
    """Say how many steps a state shows: each flush has one, the last of all has none."""
    return min(FLUSHES, max(name.last for name in names_in(state)))


def test_listings_cut_at_every_key() -> None:
    states = history()
    seen: set[tuple[frozenset[layout.SegmentName], int]] = set()
    cuts = relisted = 0
    for j, after in enumerate(states):
        for before in states[: j + 1]:
            bases = sorted({name.path.rpartition("/")[2] for name in names_in({**before, **after})})
            for cut in ["", *bases]:
                listed = [n for n in names_in(before) if n.path.rpartition("/")[2] <= cut]
                listed += [n for n in names_in(after) if n.path.rpartition("/")[2] > cut]
                cuts += 1
                if (frozenset(listed), j) in seen:
                    continue
                seen.add((frozenset(listed), j))
                relisted += look(before, after, cut)
    record("N4", cuts, kind="pages", different=len(seen), states=len(states), relisted=relisted)
    assert len(seen) > 500
    assert relisted, "some had to be listed again"


def look(before: Files, after: Files, cut: str) -> bool:
    """Open, and refresh, with a listing that is cut; say whether it was listed again."""
    least, most = steps_in(before), steps_in(after)
    storage = PagedStorage(before, after, cut)
    run = tsf.Run(Session("dict://run", None, storage=storage))
    steps = len(run.steps())
    assert least <= steps <= most
    check(run, steps, kinds=["loss"])
    refreshed = tsf.Run(Session("dict://run", None, storage=PagedStorage(before, after, cut, 1)))
    check(refreshed, least, kinds=["loss"])
    refreshed.refresh()
    steps = len(refreshed.steps())
    assert least <= steps <= most
    check(refreshed, steps, kinds=["middle"])
    return storage.listings > 1


def test_races(folder: Path) -> None:
    rng = random.Random(SEED)
    met: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    jobs = [(KINDS[i % 3], f"{folder}/run-{i}", rng.randrange(2**32)) for i in range(trials(200))]

    def race(server: ForkServer, job: tuple[str, str, int]) -> None:
        kind, url, seed = job
        met[kind].update(server.call(MODULE, kind, url, seed))
        met[kind]["races"] += 1
        shutil.rmtree(url)

    wrong = run_trials([MODULE], jobs, race)
    for kind, counted in met.items():
        facts = {name: n for name, n in counted.items() if name != "races"}
        record("N4", counted["races"], kind=kind, **facts, wrong=len(wrong))
    assert not wrong, "\n".join(wrong[:3])
    for counted in met.values():
        assert counted["values"] > 10 * counted["races"] > 0
    assert met["merging"]["old views"] > met["merging"]["races"]
    assert met["merging"]["deleted"] > 7 * met["merging"]["races"]
    assert met["compacting_race"]["compacted"] >= met["compacting_race"]["races"]
    assert met["compacting_race"]["old views"] == 3 * met["compacting_race"]["races"]

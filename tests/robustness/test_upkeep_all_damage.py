"""D7: `verify` finds and `recover` saves, over the damage of D1, D3 and D4.

By default a sample; with a ``TSF_COUNT`` large enough all flips and all cuts have their turn.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from robustness.fuzz_corpus import RUNS
from robustness.test_corrupt_blocks import OPERATIONS
from support.goals import SEED, record, trials
from support.mutate import Files
from support.saving import LastingChild, Saving, flip

from tensorstore_fmt.errors import TensorStoreError
from tensorstore_fmt.upkeep import recovering, verifying

QUICK = Path("/dev/shm")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a place in memory where there is one; one child process serves all trials."""
    child = LastingChild()
    monkeypatch.setattr(recovering, "_GRACE_S", 0.0)
    for module in (recovering, verifying):
        monkeypatch.setattr(module, "ShardChild", lambda: child)
    with tempfile.TemporaryDirectory(dir=QUICK if QUICK.is_dir() else None) as place:
        yield Path(place) / "run"
    child.end()


def places(files: Files) -> list[tuple[str, int]]:
    """Give the bytes of all files, in random order: a long run takes them all."""
    every = [(path, i) for path, data in files.items() for i in range(len(data))]
    random.Random(SEED).shuffle(every)
    return every


def flips(files: Files) -> Iterator[tuple[str, Files]]:
    for path, i in places(files)[: trials(24)]:
        bit = (5 * i + SEED) % 8
        yield f"{path} byte {i} bit {bit}", flip(files, path, i, bit)


def cuts(files: Files) -> Iterator[tuple[str, Files]]:
    for path, i in places(files)[: trials(18)]:
        yield f"{path} cut at {i}", {**files, path: files[path][:i]}


def blocks(files: Files) -> Iterator[tuple[str, Files]]:
    rng = random.Random(SEED)
    for number in range(min(trials(18), 2000)):
        path = rng.choice([p for p in files if not p.startswith("locks/")])
        operation = rng.choice(OPERATIONS)
        yield f"{number} {operation.__name__} {path}", operation(rng, files, path)


@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize("damage", [flips, cuts, blocks], ids=["D1", "D3", "D4"])
def test_all_damage_is_found_and_what_is_left_is_saved(
    damage: object, name: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    files, oracle = RUNS[name]()
    saving, wrong, kinds, tried = Saving(files, oracle, folder), [], Counter[str](), 0
    assert callable(damage)
    for label, changed in damage(files):
        tried += 1
        try:
            report = saving.trial(changed)
        except (AssertionError, TensorStoreError, OSError, LookupError, ValueError) as error:
            wrong.append(f"{label}: {type(error).__name__}: {error}")
        else:
            kinds.update({a.kind for a in report.actions} if report else ["nothing is left"])
    record(f"D7 {request.node.callspec.id}", tried, wrong=len(wrong), **kinds)
    shown = "\n".join(wrong[:10])
    assert not wrong, f"{len(wrong)} of {tried}:\n{shown}"

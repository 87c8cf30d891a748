"""`verify` finds every kind of damage in every kind of file, and names what is hit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.damage import (
    closed_run,
    cut,
    flip,
    killed_run,
    live_copy,
    segments,
    shards,
    unreadable,
    zero,
)

from tensorstore_fmt.errors import NotARunError
from tensorstore_fmt.upkeep import verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs") / "closed"
    return folder, closed_run(folder)


@pytest.fixture
def run(pristine: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    folder, oracle = pristine
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    return copy, oracle


def test_whole_run_is_ok(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    seen: list[tuple[int, int, str]] = []
    report = verify(folder, progress=lambda *a: seen.append(a))
    assert report.ok
    assert not report.problems
    assert report.segments == len(segments(folder))
    assert report.shards == 1
    assert report.nbytes == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert report.chunks > 5 * 3
    assert seen
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True
    assert "ok" in str(report)
    assert not unreadable(folder, oracle)


def test_every_bit_of_small_files_counts(run: tuple[Path, Any]) -> None:
    folder, _ = run
    rng = np.random.default_rng(1)
    for path in [*segments(folder)[:3], folder / "run.json", folder / "index.bundle"]:
        data = path.read_bytes()
        for offset in rng.integers(0, len(data), 3).tolist():
            flip(path, offset, int(rng.integers(8)))
            report = verify(folder)
            assert not report.ok, (path.name, offset)
            assert any((p.file or "").endswith(path.name) for p in report.damage), (path, offset)
            path.write_bytes(data)


def test_payload_damage_names_tensor_and_step(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    (shard,) = shards(folder)
    data = shard.read_bytes()
    rng = np.random.default_rng(2)
    for offset in rng.integers(5000, len(data) - 5000, 6).tolist():
        flip(shard, offset)
        failed = unreadable(folder, oracle)
        report = verify(folder)
        assert not report.ok, offset
        named = {(n, s) for p in report.damage for n, steps in p.names for s in steps}
        assert set(failed) <= named
        if failed:  # not metadata of Arrow or padding
            assert named == set(failed)
            (code,) = set(failed.values())
            assert code in {p.code for p in report.damage}
        shard.write_bytes(data)


def test_entry_page_damage_names_what_is_in_it(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    path = segments(folder)[3]
    flip(path, path.stat().st_size - 256 - 3 * 64 - 40)  # in the last page, before root and header
    (problem,) = [p for p in verify(folder).damage if p.file == f"index/{path.name}"]
    assert problem.code == "checksum"
    assert problem.offset is not None
    named = {(n, s) for n, steps in problem.names for s in steps}
    assert {("loss", 2), ("large", 2), ("text", 2)} <= named
    assert named <= {*oracle, ("", 2)}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.999])
def test_cut_shard_is_truncated(run: tuple[Path, Any], fraction: float) -> None:
    folder, oracle = run
    (shard,) = shards(folder)
    cut(shard, int(shard.stat().st_size * fraction))
    failed = unreadable(folder, oracle)
    report = verify(folder)
    named = {(n, s) for p in report.damage for n, steps in p.names for s in steps}
    assert named == set(failed)
    assert not report.ok


def test_zeroed_block_of_shard(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    (shard,) = shards(folder)
    for offset in (0, 512, 4096, 100_000, 1_000_000):
        data = shard.read_bytes()
        zero(shard, offset, 4096)
        report = verify(folder)
        assert not report.ok
        named = {(n, s) for p in report.damage for n, steps in p.names for s in steps}
        assert set(unreadable(folder, oracle)) <= named
        shard.write_bytes(data)


def test_missing_files_are_named(run: tuple[Path, Any]) -> None:
    folder, oracle = run
    (shard,) = shards(folder)
    shard.unlink()
    (problem,) = verify(folder).damage
    assert problem.code == "missing_file"
    assert {n for n, _ in problem.names} == {"large", "frozen", "middle"}
    assert dict(problem.names)["large"] == tuple(range(5))
    assert set(unreadable(folder, oracle)) == {(n, s) for n, v in problem.names for s in v}


def test_missing_segment_is_named_by_the_bundle_and_by_shards(run: tuple[Path, Any]) -> None:
    folder, _ = run
    segments(folder)[2].unlink()
    (problem,) = verify(folder).damage
    assert problem.code == "missing_segment"
    assert {("loss", (1,)), ("large", (1,))} <= set(problem.names)
    (folder / "index.bundle").unlink()
    (problem,) = verify(folder).damage
    assert problem.code == "missing_segment"
    assert ("large", (1,)) in problem.names


def test_swapped_files_are_found(run: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = run
    other = tmp_path / "other"
    closed_run(other)
    shards(folder)[0].write_bytes(shards(other)[0].read_bytes())
    codes = {p.code for p in verify(folder).damage}
    assert "wrong_run" in codes
    a, b = segments(folder)[1:3]
    b.write_bytes(a.read_bytes())
    assert "wrong_run" in {p.code for p in verify(folder).damage if p.file == f"index/{b.name}"}


def test_live_and_killed_writers_are_fine(tmp_path: Path) -> None:
    live_copy(tmp_path / "live", tmp_path / "copy", 4)
    report = verify(tmp_path / "copy")
    assert report.ok
    assert {p.code for p in report.problems} >= {"unsealed", "not_closed"}
    killed_run(tmp_path / "killed", 3)
    report = verify(tmp_path / "killed")
    assert report.ok
    assert {p.code for p in report.problems} == {"unsealed", "not_closed"}


def test_torn_tail_is_a_note(tmp_path: Path) -> None:
    live_copy(tmp_path / "live", tmp_path / "copy", 3)
    (shard,) = shards(tmp_path / "copy")
    with shard.open("ab") as file:
        file.write(b"\xff\xff\xff\xff\x10\x05\0\0torn")
    report = verify(tmp_path / "copy")
    assert report.ok
    assert "torn" in {p.code for p in report.problems}
    assert report.unreferenced_nbytes == 12


def test_hostile_arrow_does_not_kill_us(run: tuple[Path, Any]) -> None:
    """Bytes of Arrow's own metadata: the child may die of them, we may not."""
    folder, _ = run
    (shard,) = shards(folder)
    data = shard.read_bytes()
    rng = np.random.default_rng(3)
    for offset in rng.integers(8, 2500, 6).tolist():
        flip(shard, offset, 7)
        verify(folder)
        shard.write_bytes(data)
    for offset in rng.integers(len(data) - 2000, len(data), 6).tolist():
        flip(shard, offset, 6)
        verify(folder)
        shard.write_bytes(data)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotARunError):
        verify(tmp_path)

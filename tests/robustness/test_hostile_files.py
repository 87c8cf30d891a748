"""H4: links, FIFOs, devices and folders in the place of files; files that change meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from robustness.fuzz_corpus import by_hand, copied
from support.goals import record, trials
from support.mutate import Oracle, same

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import FormatError, TensorStoreError
from tensorstore_fmt.format import layout

SECRET = b"secret" * 1000


def _link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def _folder_link(path: Path, outside: Path) -> None:
    inner = path.parent.rename(outside.parent / "moved")
    path.parent.symlink_to(inner)


def _fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path, outside: Path) -> None:
    path.mkdir()


def _device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def _socket(path: Path, outside: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


REPLACEMENTS = [_link, _folder_link, _fifo, _folder, _device, _loop, _socket]
PLACES = ["run.json", "index.bundle", "index", "shards"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda f: f.__name__.strip("_"))
def test_nothing_but_regular_files_inside_is_read(
    place: str, replace: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    if replace is _folder_link and "." in place:
        pytest.skip("these lie in the run's own folder")
    folder = copied(by_hand()[0], tmp_path / "run")
    outside = tmp_path / "outside"
    target = folder / place if "." in place else max((folder / place).iterdir())
    outside.write_bytes(target.read_bytes() if target.exists() else SECRET)
    if replace is not _folder_link:
        target.unlink(missing_ok=True)
    replace(target, outside)
    with warnings.catch_warnings(action="ignore"):
        codes = _codes(folder)
    if place == "index.bundle":
        assert not codes
    elif place == "index" and replace is _folder:
        assert not codes  # not listed: as if its writer had never made its newest flush
    else:
        assert codes


def _codes(folder: Path) -> set[str]:
    """Open and read; give the codes of failures."""
    codes = set()
    try:
        run = tsf.open_run(folder)
    except TensorStoreError as error:
        return {error.code}
    codes |= {problem.code for problem in run.damage}
    for name in run.names():
        try:
            run[name].read()
        except TensorStoreError as error:
            codes.add(error.code)
    return codes


def test_hard_links_are_files(tmp_path: Path) -> None:
    folder = copied(by_hand()[0], tmp_path / "run")
    (shard, *_) = sorted((folder / "shards").iterdir())
    os.link(shard, tmp_path / "same")
    assert not _codes(folder)


def test_run_json_of_17_mib(tmp_path: Path) -> None:
    folder = copied(by_hand()[0], tmp_path / "run")
    (folder / "run.json").write_bytes(b"{" + b" " * (17 << 20))
    with pytest.raises(TensorStoreError) as caught:
        tsf.open_run(folder)
    assert caught.value.code == "limit"


# --- files that change while they are read -----------------------------------------------


def _swap(path: Path, tmp_path: Path, kind: str) -> None:
    """Put something else in the place of a file, at once."""
    other = tmp_path / f"other-{kind}"
    if kind == "link":
        other.symlink_to(tmp_path / "outside")
    elif kind == "fifo":
        os.mkfifo(other)
    elif kind == "short":
        other.write_bytes(path.read_bytes()[:100])
    elif kind == "bytes":
        other.write_bytes(SECRET[: path.stat().st_size].ljust(path.stat().st_size, b"!"))
    os.rename(other, path)


@pytest.mark.parametrize("kind", ["link", "fifo", "short", "bytes"])
@pytest.mark.parametrize("place", ["index", "shards"])
def test_a_file_swapped_after_opening(place: str, kind: str, tmp_path: Path) -> None:
    files, oracle = by_hand()
    folder = copied(files, tmp_path / "run")
    (tmp_path / "outside").write_bytes(SECRET * 100)
    run = tsf.open_run(folder)
    for path in (folder / place).iterdir():
        _swap(path, tmp_path, kind)
    found = _values(run, oracle.names)
    assert SECRET[:6] not in b"".join(np.asarray(v).tobytes() for v in found.values())
    for answer in oracle.answers:
        for step, value in answer.values.items():
            if (answer.name, step) in found:
                assert same(found[answer.name, step], value)
    if place == "shards":  # none was read before
        assert len(found) < sum(len(answer.values) for answer in oracle.answers)


def _values(run: tsf.Run, names: list[str]) -> dict[tuple[str, int], object]:
    """Give what can be read."""
    found = {}
    for name in names:
        for step in range(12):
            with contextlib.suppress(TensorStoreError):
                found[name, step] = run[name].read(step=step)
    return found


def test_files_swapped_all_the_time(tmp_path: Path) -> None:
    """Between the right ones and others; what is read is right, or a typed error."""
    files, oracle = by_hand()
    folder = copied(files, tmp_path / "run")
    (tmp_path / "outside").write_bytes(SECRET * 100)
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != layout.RUN_JSON]
    right = {path: path.read_bytes() for path in paths}
    stop = threading.Event()

    def swapping() -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            path = paths[turn % len(paths)]
            _swap(path, tmp_path, ("link", "short", "fifo", "bytes")[turn // 7 % 4])
            (tmp_path / "right").write_bytes(right[path])
            os.rename(tmp_path / "right", path)

    thread = threading.Thread(target=swapping)
    thread.start()
    outcomes: Counter[str] = Counter()
    try:
        for _ in range(trials(60)):
            with warnings.catch_warnings(action="ignore"):
                outcomes[_read_while_swapped(folder, oracle)] += 1
    finally:
        stop.set()
        thread.join()
    record("H4", outcomes.total(), **outcomes)
    assert outcomes["all"] + outcomes["some"] + outcomes["refused"] == outcomes.total()
    assert len(outcomes) > 1


def _read_while_swapped(folder: Path, oracle: Oracle) -> str:
    try:
        run = tsf.open_run(folder)
    except TensorStoreError:
        return "refused"
    n = 0
    for answer in oracle.answers:
        for step, value in answer.values.items():
            try:
                found = run[answer.name].read(step=step)
            except FormatError:
                continue
            older = answer.older.get(step) if run.damage else None
            assert same(found, value) or (older is not None and same(found, older))
            n += 1
    return "all" if n == sum(len(answer.values) for answer in oracle.answers) else "some"

"""H2, H3, H6: links, FIFOs and folders in the place of files; names on a screen; patterns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from robustness.fuzz_corpus import by_hand, copied
from robustness.test_hostile_cases import NAMES
from support.build_run import Put, RunBuilder

import tensorstore_fmt as tsf
from tensorstore_fmt.errors import TensorStoreError
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
    begin = time.monotonic()
    with warnings.catch_warnings(action="ignore"):
        codes = _codes(folder)
    assert time.monotonic() - begin < 10
    if place == "index.bundle":
        assert not codes
    elif place == "index" and replace is not _folder_link:
        # not listed, so it is as if it had never been there: the newest flush of a writer
        assert codes <= {"missing_segment", "malformed"}
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


# --- names on a screen --------------------------------------------------------------------


def _named(folder: Path) -> RunBuilder:
    builder = RunBuilder(folder, attrs={"\x1b[2J": "\u202e<script>"})
    names = sorted({n for n in NAMES if len(n.encode()) <= layout.MAX_NAME_NBYTES})
    writer = builder.writer()
    writer.flush()
    writer.flush(
        *(Put(name=n, value=np.float32(1), inline=True) for n in names), closed=True, through=9
    )
    return builder


def test_html_and_text_show_no_name_as_it_is(tmp_path: Path) -> None:
    run = tsf.open_run(_named(tmp_path / "run").url)
    assert len(run) > 25
    shown = [run._repr_html_(), repr(run)]
    for name in run:
        shown += [repr(run[name]), run[name]._repr_html_()]
        with pytest.raises(TensorStoreError) as caught:
            run[name].read(step=7)
        shown.append(str(caught.value))
        with pytest.raises(TensorStoreError) as caught:
            run[name + "x"]
        shown.append(str(caught.value))
    for text in shown:
        assert text.replace("\n", "").isprintable(), ascii(text)
    assert not any("<script" in text or "<img" in text for text in shown if text.startswith("<t"))


@pytest.mark.parametrize(
    "verb",
    [
        ["ls"],
        ["ls", "-l"],
        ["info"],
        ["stat"],
        pytest.param(
            ["ls", "--json"],
            marks=pytest.mark.xfail(
                raises=AssertionError,
                reason="JSON has C1 controls (CSI) and bidi marks as they are",
            ),
        ),
    ],
)
def test_command_line_obeys_no_name(verb: list[str], tmp_path: Path) -> None:
    builder = _named(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "tensorstore_fmt", verb[0], builder.url, *verb[1:]],
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    text = (done.stdout + done.stderr).decode()
    bad = {c for c in text if not c.isprintable() and c != "\n"}
    assert not bad, ascii(text)


# --- many names and patterns ------------------------------------------------------------------


def test_patterns_on_many_long_names_are_quick(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    writer = builder.writer()
    writer.flush()
    names = [f"{'a' * 1000}{i:06d}" for i in range(2000)]
    writer.flush(
        *(Put(name=n, value=np.float32(1), inline=True) for n in names), closed=True, through=9
    )
    run = tsf.open_run(builder.url)
    begin = time.monotonic()
    for pattern in ("*a" * 40 + "b", "*" * 500, "[a-z]" * 300, "*[!a]*[!a]*[!a]*x", "(a+)+$"):
        run.names(pattern)
    with pytest.raises(tsf.NameNotFoundError):
        run["a" * 1000]
    assert time.monotonic() - begin < 30

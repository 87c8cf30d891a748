"""H3, H6: names that are paths, commands, markup or code are names: shown, exported, never obeyed.

A run of them is read, shown and exported in a process that writes down each file it opens and each
module it imports (audit hooks).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from robustness.fuzz_corpus import by_hand
from support.build_run import Put, RunBuilder
from support.editing import run_json
from support.goals import record
from support.mutate import save

import tensorstore_fmt as tsf
from tensorstore_fmt.cli import main
from tensorstore_fmt.errors import TensorStoreError
from tensorstore_fmt.interop.export import export

TESTS = Path(__file__).resolve().parents[1]
VERBS = (["ls"], ["ls", "-l"], ["ls", "--steps"], ["info"], ["verify"])
ENDINGS = (".csv", ".parquet", ".npz", ".safetensors")
MODULE = "hostile_module"
REFUSED = ("a\0b", "x\0.npy", "__metadata__")
"""By exporters to formats that cannot have these names."""


def _paths() -> Iterator[str]:
    for n in range(1, 9):
        yield "../" * n + "etc/passwd"
        yield "..\\" * n + "windows\\win.ini"
        yield "%2e%2e%2f" * n + "x"
        yield "%252e%252e%252f" * n + "x"
    yield from (
        ".", "..", "/", "//", "\\", "./x", "a/../../b", "a//b", "a/", "/etc/passwd", "//server/x",
        "\\\\server\\x", "\\\\?\\C:\\x", "C:\\x", "C:x", "file:///etc/passwd", "s3://bucket/x",
        "http://127.0.0.1/x", "~", "~/x", "~root/x", "$HOME/x", "${HOME}", "%USERPROFILE%",
        "....//....//x", "..;/x", "..%c0%af", "x\0.npy", "run.json", "index/x.seg",
        "shards/x.arrow", ".x.part", "-rf", "--force", "--out=/x",
    )  # fmt: skip


def _devices() -> Iterator[str]:
    for name in ("con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in (1, 9))):
        yield from (name, name.upper(), f"{name}.txt", f"x/{name}")


def _characters() -> Iterator[str]:
    for code in (*range(0x20), *range(0x7F, 0xA1), 0xAD, 0x61C, *range(0x200B, 0x2010)):
        yield f"a{chr(code)}b"
    for code in (*range(0x2028, 0x202F), *range(0x2060, 0x206A), 0xFEFF, 0xFFF9, 0xE0001, 0xE0041):
        yield f"a{chr(code)}b"
    yield from ("e\u0301" * 100, "\U0001f469\u200d\U0001f680", "\uffff", "\U0010ffff", "é" * 512)


def _code() -> Iterator[str]:
    yield from (
        "\x1b[2J\x1b[1;1H", "\x1b]0;title\x07", "\x1b]8;;http://x\x07y\x1b]8;;\x07", "\x1bPq\x1b\\",
        "\x9b31m", "\x1b[6n", "\r\nSet-Cookie: x", "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>', "<svg/onload=alert(1)>", "javascript:alert(1)", "&lt;b",
        "]]>", "<!--", "=1+1", "+1", "-1", "@SUM(1)", "\t=1", '=HYPERLINK("http://x")',
        "=cmd|' /C calc'!A0", '"', "'", '""', "a,b", "a;b", "a\nb,c", "'; DROP TABLE x; --",
        "{0.__class__}", "{", "%s%n%d", "%(x)s", "$(id)", "`id`", "|id", ";id", "&& id",
        "__import__('os').system('id')", "cos\nsystem\n(S'id'\ntR.", "${jndi:ldap://x}", MODULE,
        f"{MODULE}.x", "os.system", "__reduce__", "__class__", "nan", "null", "true", "0", "step",
        "mode", "value", "__metadata__", "*", "**", "?", "[", "[!a]", "]", "(a+)+$", ".*",
        "?" * 500, "a" * 1024, "\ufffd",
    )  # fmt: skip


NAMES = sorted({*_paths(), *_devices(), *_characters(), *_code()})


def write(folder: Path, names: Sequence[str]) -> None:
    """Write a run with these names."""
    builder = RunBuilder(folder, attrs={"\x1b[2J": "\u202e<script>", "__reduce__": MODULE})
    writer = builder.writer()
    writer.flush()
    writer.flush(
        *(Put(name=n, value=np.float32(i), inline=True) for i, n in enumerate(names)),
        *(Put(name=n, step=1, value=np.float32(i), inline=True) for i, n in enumerate(names)),
        closed=True,
        through=9,
    )


def use(place: Path) -> dict[str, Any]:
    """Do all with a run of plain names, to import what that takes, then with the hostile one."""
    _use(str(place / "plain"), ["a", "b"], [str(place / "out" / f"plain{e}") for e in ENDINGS])
    opened: list[str] = []
    done: list[str] = []
    watched = ("os.", "shutil.", "subprocess.", "socket.", "pickle.", "ctypes.", "exec", "import")
    harmless = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.link", "os.remove")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & 3:
            opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str) else "?")
        elif event.startswith(watched) and event not in harmless:
            done.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    outs = [str(place / "out" / f"file{ending}") for ending in ENDINGS]
    found = _use(str(place / "run"), NAMES, outs)
    return {**found, "outs": outs, "opened": opened, "done": done}


def _use(url: str, names: Sequence[str], outs: Sequence[str]) -> dict[str, Any]:
    """Read, show and export a run."""
    said = []
    for verb, *more in (*VERBS, *([*verb, "--json"] for verb in VERBS)):
        said.append(_said([verb, url, *more]))
    for verb, name in zip(itertools.cycle(["cat", "stat"]), names, strict=False):
        said.append(_said([verb, url, "--", name]))
    run = tsf.open_run(url)
    wrong = [name for i, name in enumerate(names) if run[name].read(step=1) != i]
    said += [_said(["export", url, out]) for out in outs[:2]]
    refused = [_said(["export", url, out, "--step", "1"])[1] for out in outs[2:]]
    for out in outs[2:]:
        Path(out).unlink(missing_ok=True)
        kept = [name for name in names if name not in REFUSED]
        export(run, out, names=kept, step=1)
    return {"said": said, "wrong": wrong, "refused": refused}


def _said(words: list[str]) -> tuple[list[str], int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(words)
    return words, code, out.getvalue(), err.getvalue()


def test_names_are_shown_and_exported_but_never_obeyed(tmp_path: Path) -> None:
    write(tmp_path / "run", NAMES)
    write(tmp_path / "plain", ["a", "b"])
    (tmp_path / "out").mkdir()
    (tmp_path / f"{MODULE}.py").write_text("raise SystemExit(99)")
    before = _files(tmp_path)
    code = (
        "import json, pathlib; from robustness.test_hostile_names import use; "
        "print('\\n' + json.dumps(use(pathlib.Path.cwd())))"
    )
    places = os.pathsep.join([str(TESTS.parent), str(TESTS), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True, text=True, timeout=250, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    outs = {Path(out) for out in found["outs"]}
    record("H3 H6", len(NAMES), calls=len(found["said"]), opened=len(found["opened"]))
    assert len(NAMES) >= 200
    assert not found["wrong"]
    assert found["refused"] == [2, 2]
    _check_said(found["said"])
    # Nothing but the outputs was written, under a name of its own first; nothing else was done.
    plain = {tmp_path / "out" / f"plain{ending}" for ending in ENDINGS}
    assert set(_files(tmp_path)) - set(before) == outs | plain
    assert {path: before[path] for path in before} == {p: _files(tmp_path)[p] for p in before}
    assert {Path(path).parent for path in found["opened"]} == {tmp_path / "out"}
    assert not found["done"], "\n".join(found["done"])
    _check_outputs(tmp_path / "out")


def _files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _check_said(said: list[tuple[list[str], int, str, str]]) -> None:
    for words, code, out, err in said:
        shown = (out + err).replace("\n", "")
        assert shown.isprintable(), (words, ascii(shown)[:500])
        assert code == 0, (words, err)
        if words[-1] == "--json":
            json.loads(out)
    names = {row["name"] for row in json.loads(said[len(VERBS)][2])["names"]}
    assert names == set(NAMES)


def _check_outputs(folder: Path) -> None:
    """Each holds all names as they are."""
    with (folder / "file.csv").open(newline="", encoding="utf-8") as file:
        heading, *_ = csv.reader(file)
    assert set(NAMES) <= set(heading)
    assert set(parquet.read_table(folder / "file.parquet")["name"].to_pylist()) == set(NAMES)
    head = (folder / "file.safetensors").read_bytes()
    named = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
    assert named.keys() - {"__metadata__"} == set(NAMES) - set(REFUSED)
    with np.load(folder / "file.npz", allow_pickle=False) as file:
        assert set(file) == set(NAMES) - set(REFUSED)


def test_no_name_is_longer_than_the_limit(tmp_path: Path) -> None:
    builder = RunBuilder(tmp_path / "run")
    builder.writer().flush(Put(name="x" * 2**20, value=np.float32(1), inline=True))
    with pytest.warns(RuntimeWarning, match="damaged"):
        run = tsf.open_run(builder.url)
    assert {problem.code for problem in run.damage} == {"limit", "missing_segment"}
    assert not len(run)


def test_html_and_text_show_no_name_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "run", NAMES)
    run = tsf.open_run(tmp_path / "run")
    shown = [run._repr_html_(), repr(run)]
    for name in run:
        shown += [repr(run[name]), run[name]._repr_html_()]
        with pytest.raises(TensorStoreError) as caught:
            run[name].read(step=7)
        shown.append(str(caught.value))
    for name in NAMES[::9]:  # each is compared with all others
        with pytest.raises(TensorStoreError) as caught:
            run[name + "x"]
        shown.append(str(caught.value))
    for text in shown:
        assert text.replace("\n", "").isprintable(), ascii(text)
    html = [text for text in shown if text.startswith("<t")]
    assert not any(mark in text for text in html for mark in ("<script", "<img", "<svg", "<!--"))


RUN_JSON = (
    b'{"format":"tensorstore_fmt","format_version":[1,0],'
    b'"run_id":"000102030405060708090a0b0c0d0e0f","required":[],%s'
)
ATTRS = [
    *(
        b'"created_us":%s,"attrs":{}' % created
        for created in (b"1" + b"0" * 30, b"1" + b"0" * 400, b"-1" + b"0" * 18, b"-1", b"0")
    ),
    *(
        b'"created_us":1,"attrs":{"a":%s%s}' % (opening * n, closing * n)
        for opening, closing in ((b"[", b"]"), (b'{"b":', b"1}"))
        for n in (1, 300, 900)
        if opening == b"[" or n == 1
    ),
    b'"created_us":1,"attrs":{"a":1e400,"b":-0.0}',
    b'"created_us":1,"attrs":{"a":"\\ud800","\\ud800":1,"b":"\xc2\x9b31m"}',
    b'"created_us":1,"attrs":{"run":1,"damage":[],"":{"":""}}',
]


@pytest.mark.parametrize("body", ATTRS, ids=range(len(ATTRS)))
@pytest.mark.parametrize("words", [["info"], ["info", "--json"], ["ls", "-l"]], ids=" ".join)
def test_command_line_shows_any_time_and_any_attributes(
    body: bytes, words: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "one"
    save({**by_hand()[0], "run.json": run_json(RUN_JSON % body)}, folder)
    where = folder.parent if words[0] == "ls" else folder
    _, code, out, err = _said([words[0], str(where), *words[1:]])
    assert code in (0, 1)
    assert (out + err).replace("\n", "").isprintable()
    if "--json" in words:
        assert json.loads(out).keys() & {"attrs", "error"}
    elif code == 0:
        assert out


def test_patterns_on_many_long_names_are_quick(tmp_path: Path) -> None:
    """`fnmatch` makes regular expressions that do not backtrack; others would take for ever."""
    builder = RunBuilder(tmp_path / "run")
    names = [f"{'a' * 1000}{i:06d}" for i in range(2000)]
    builder.writer().flush(
        *(Put(name=n, value=np.float32(1), inline=True) for n in names), closed=True, through=9
    )
    run = tsf.open_run(builder.url)
    for pattern in ("*a" * 40 + "b", "*" * 500, "[a-z]" * 300, "*[!a]*[!a]*[!a]*x", "(a+)+$"):
        assert not run.names(pattern) or pattern.strip("*") == ""
    with pytest.raises(tsf.NameNotFoundError):
        run["a" * 1000]

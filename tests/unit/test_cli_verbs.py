"""The command on real runs: what it prints, its JSON, its exit codes, its messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorstore_fmt.cli import main
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.writing.run import create_run

REPOSITORY = Path(__file__).parents[2]
EVIL = "evil\x1b[2J\n\u202ename"


@dataclass(frozen=True, slots=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.out, parse_constant=refuse)

    @property
    def words(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*argv: object) -> Said:
        code = main([str(word) for word in argv])
        printed = capsys.readouterr()
        return Said(code, printed.out, printed.err)

    return run


def write(url: str, **options: Any) -> None:
    generator = np.random.default_rng(0)
    with create_run(url, attrs={"lr": 0.1, "note": "\x1b[31mred"}, **options) as run:
        for step in range(30):
            run.log({"loss": 1 / (step + 1), "epoch": step // 10}, step=step, mode="TRAIN")
            if step % 10 == 0:
                run.log({"loss": 2.0}, step=step, mode="EVAL")
                run.log(
                    {
                        "fc1.weight": weight(step),
                        "fc1.bias": np.array([np.nan, np.inf, 0, 1], "f4"),
                        "brain": generator.standard_normal(4).astype(ml_dtypes.bfloat16),
                        "text": f"step {step}",
                        "seed": 2**60 + step,
                        EVIL: 1.0,
                    },
                    step=step,
                )


def weight(step: int) -> np.ndarray:
    return (np.arange(64 * 32, dtype="f4") + step).reshape(64, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write(str(folder / "first"))
    with create_run(str(folder / "second")) as run:
        run.log({"loss": 1.0}, step=0)
    (folder / "other").mkdir()
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> str:
    return str(folder / "first")


# --- ls --------------------------------------------------------------------------------
def test_ls(command: Command, url: str) -> None:
    said = command("ls", url)
    assert (said.code, said.err) == (0, "")
    names = ["brain", "epoch", "evil\\x1b[2J\\x0a\\u202ename", "fc1.bias", "fc1.weight"]
    assert said.out.splitlines() == [*names, "loss", "seed", "text"]
    assert command("ls", url, "fc1.*").out == "fc1.bias\nfc1.weight\n"


@pytest.mark.parametrize("order", [("-l", "fc1.weight"), ("fc1.weight", "-l")])
def test_ls_long(command: Command, url: str, order: tuple[str, ...]) -> None:
    heading, row = command("ls", url, *order).words
    assert heading == ["name", "kind", "dtype", "shape", "steps", "saved", "raw", "stored"]
    assert row[:8] == ["fc1.weight", "tensor", "float32", "64", "x", "32", "0..20", "3"]


def test_ls_json(command: Command, url: str) -> None:
    rows = {row["name"]: row for row in command("ls", url, "*", "--json", "--steps").json["names"]}
    assert list(rows) == sorted(rows)
    assert rows[EVIL]["kind"] == "scalar"
    assert rows["loss"]["modes"] == ["EVAL", "TRAIN"]
    assert rows["text"]["kind"] == "string"
    row = rows["fc1.weight"]
    assert row["shape"] == [64, 32]
    assert row["raw_nbytes"] == 3 * 64 * 32 * 4
    assert (row["steps"], row["saved"]) == ([0, 10, 20], 3)


def test_ls_steps(command: Command, url: str) -> None:
    assert command("ls", url, "--steps").words[1] == ["TRAIN", "30:", "0..29"]
    assert command("ls", url, "fc*", "--steps").words[1] == ["fc1.weight", "0..20", "by", "10"]
    assert command("ls", url, "--steps", "--json").json["steps"]["EVAL"] == [0, 10, 20]


def test_ls_of_a_folder_lists_its_runs(command: Command, folder: Path) -> None:
    said = command("ls", folder)
    assert (said.code, said.out.splitlines()) == (0, [f"{folder}/first", f"{folder}/second"])
    rows = command("ls", folder, "-l", "--json").json["runs"]
    assert [row["names"] for row in rows] == [8, 1]


def test_ls_of_a_folder_shows_unreadable_runs(command: Command, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("nonsense")
    said = command("ls", tmp_path, "-l")
    assert said.code == 0
    assert "unreadable" in said.out


# --- info, stat ------------------------------------------------------------------------
def test_info(command: Command, url: str) -> None:
    said = command("info", url)
    assert said.code == 0
    assert "closed" in said.out
    assert "\x1b" not in said.out
    facts = command("info", url, "--json").json
    assert facts["attrs"]["note"] == "\x1b[31mred"
    assert facts["steps"]["TRAIN"] == {"count": 30, "first": 0, "last": 29}
    assert (facts["names"], facts["is_closed"], facts["damage"]) == (8, True, [])


def test_info_of_a_live_run(command: Command, tmp_path: Path) -> None:
    with create_run(str(tmp_path / "run"), num_workers=4) as run:
        run.log({"loss": 1.0}, step=0)
        run.flush()
        said = command("info", tmp_path / "run")
        assert said.code == 0
        assert "live" in said.out
        assert "4, of which 0 have written" in said.out
        late = command("cat", tmp_path / "run", "loss", "--step", 5, "--json")
    assert (late.code, late.json["error"]["code"]) == (1, "not_yet_written")


def test_stat(command: Command, url: str) -> None:
    heading, *rows = command("stat", url, "fc1.weight").words
    assert heading == ["step", "count", "zero", "min", "max", "mean", "std", "l2"]
    assert [row[0] for row in rows] == ["0", "10", "20"]
    assert rows[1][3:6] == ["10", "2057", "1033.5"]
    assert "nan" in command("stat", url, "fc1.bias", "--steps", "0:1").words[0]


def test_stat_of_several_names_and_modes(command: Command, url: str) -> None:
    said = command("stat", url, "fc1.*", "loss", "--step", "10", "--json").json["statistics"]
    assert [(each["name"], each.get("mode")) for each in said] == [
        ("fc1.bias", None),
        ("fc1.weight", None),
        ("loss", "TRAIN"),
        ("loss", "EVAL"),
    ]
    assert said[0]["max"] == ["inf"]
    assert command("stat", url, "fc1.weight", "--step", "last", "--json").json["statistics"][0][
        "step"
    ] == [20]
    assert "cat" in command("stat", url, "text").err


# --- cat, slice ------------------------------------------------------------------------
def test_cat_of_a_scalar(command: Command, url: str) -> None:
    said = command("cat", url, "loss", "--steps", "9:12")
    assert said.words == [
        ["step", "mode", "value"],
        ["9", "TRAIN", "0.1"],
        ["10", "EVAL", "2.0"],
        ["10", "TRAIN", "0.09090909090909091"],
        ["11", "TRAIN", "0.08333333333333333"],
    ]
    assert len(command("cat", url, "loss", "--mode", "train").words) == 31
    values = command("cat", url, "seed", "--json").json["values"]
    assert [value["value"] for value in values] == [2**60, 2**60 + 10, 2**60 + 20]
    assert command("cat", url, "epoch", "--step", "last").words[-1] == ["29", "TRAIN", "2"]
    assert command("cat", url, "text", "--step", "first").words[-1] == ["0", "step", "0"]


def test_cat_of_a_tensor(command: Command, url: str) -> None:
    said = command("cat", url, "fc1.weight")
    assert said.out.startswith("step 20, float32, 64 x 32\n[[")
    assert "last of 3" in said.err
    both = command("cat", url, "fc1.bias", "--steps", "5:")
    assert both.out.count("step ") == 2
    values = command("cat", url, "fc1.bias", "--step", "0", "--json").json["values"]
    assert values == [{"step": 0, "shape": [4], "values": ["nan", "inf", 0.0, 1.0]}]


def test_slice(command: Command, url: str, tmp_path: Path) -> None:
    said = command("slice", url, "fc1.weight", "--step", 10, "[-1, :3]", "--json").json
    assert (said["shape"], said["values"]) == ([3], weight(10)[-1, :3].tolist())
    stacked = command("slice", url, "fc1.weight", "--steps", ":20", "-1,:3").out
    assert stacked.startswith("2 steps stacked, float32, 2 x 3\n")
    out = tmp_path / "part.npy"
    assert command("slice", url, "fc1.weight", "::2", "--step", "last", "--out", out).code == 0
    assert np.array_equal(np.load(out), weight(20)[::2])
    again = command("slice", url, "fc1.weight", "--step", 0, "--out", out)
    assert (again.code, "--force" in again.err) == (1, True)
    assert command("slice", url, "fc1.weight", "--step", 0, "--out", out, "--force").code == 0
    assert np.array_equal(np.load(out), weight(0))


def test_slice_of_bfloat16(command: Command, url: str, tmp_path: Path) -> None:
    out = tmp_path / "part.npy"
    refused = command("slice", url, "brain", "--step", 0, "--out", out, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "unfit_dtype")
    assert not out.exists()
    assert command("slice", url, "brain", "--step", 0, "--out", out, "--cast", "float32").code == 0
    assert np.load(out).dtype == np.float32


# --- what goes wrong ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("argv", "code", "kind"),
    [
        ("lss RUN", 2, "usage"),
        ("", 2, "usage"),
        ("ls", 2, "usage"),
        ("ls RUN a b", 2, "usage"),
        ("ls RUN --wrong", 2, "usage"),
        ("cat RUN loss --step 1 --steps 1:2", 2, "usage"),
        ("cat RUN loss --worker x", 2, "usage"),
        ("slice RUN fc1.weight 0", 2, "usage"),
        ("slice RUN fc1.weight --step 0 --force", 2, "usage"),
        ("slice RUN fc1.weight --step 0 --out x.txt", 2, "usage"),
        ("slice RUN fc1.weight --step 0 [a]", 2, "bad_index"),
        ("cat RUN loss --steps 5-8", 2, "bad_steps"),
        ("cat RUN loss --mode TEST", 2, "bad_argument"),
        ("ls RUN --storage-options {", 2, "bad_json"),
        ("ls RUN --storage-options []", 2, "bad_json"),
        ("ls RUN --storage-options @/nowhere", 2, "usage"),
        ('ls RUN --storage-options {"a":1}', 2, "bad_argument"),
        ("ls nonsense://x", 2, "bad_argument"),
        ("ls RUN zz*", 1, "unknown_name"),
        ("cat RUN los", 1, "unknown_name"),
        ("stat RUN los", 1, "unknown_name"),
        ("cat RUN loss --step 999", 1, "never_saved"),
        ("cat RUN fc1.weight --step 5", 1, "never_saved"),
        ("cat RUN fc1.weight --steps 11:19", 1, "never_saved"),
        ("stat RUN fc1.weight --step 5", 1, "never_saved"),
        ("cat RUN fc1.weight --mode EVAL", 1, "empty_selection"),
        ("slice RUN loss --step 10", 1, "ambiguous"),
        ("slice RUN fc1.weight --step 0 99", 1, "out_of_range"),
        ("slice RUN fc1.weight --step 0 1,2,3", 1, "too_many_indices"),
        ("info /nowhere/at/all", 1, "not_a_run"),
        ("verify /nowhere/at/all", 1, "not_a_run"),
        ("info memory://nowhere", 1, "not_a_run"),
    ],
)
def test_what_goes_wrong(command: Command, url: str, argv: str, code: int, kind: str) -> None:
    words = [url if word == "RUN" else word for word in argv.split()]
    said = command(*words)
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith("tensorstore-fmt: ")
    assert said.err.count("\n") == 1
    error = command(*words, "--json").json["error"]
    assert error["code"] == kind
    assert said.err == f"tensorstore-fmt: {error['message']}\n"


def test_messages_say_what_to_do(command: Command, url: str, folder: Path) -> None:
    assert "did you mean ls" in command("lss", url).err
    assert "'loss'" in command("cat", url, "los").err
    assert "10 before it and 20 after it" in command("cat", url, "fc1.weight", "--step", 15).err
    assert "(here: --mode TRAIN)" in command("slice", url, "loss", "--step", 10).err
    assert f"{folder}/second" in command("info", folder).err
    assert "does not exist" in command("info", folder / "third").err
    assert "is a file" in command("info", folder / "first" / "run.json").err
    assert "\x1b" not in command("info", "a\x1b[31m").err


def test_damage_is_said_and_found(command: Command, tmp_path: Path) -> None:
    url = tmp_path / "run"
    with create_run(str(url)) as run:
        for step in range(3):
            run.log({"loss": 1.0}, step=step)
            run.flush()
    segments = sorted((url / "index").glob("*.seg"))
    (url / "index.bundle").unlink(missing_ok=True)
    segments[0].unlink()
    said = command("info", url)
    assert said.code == 1
    assert "DAMAGE" in said.out
    assert said.err.startswith("tensorstore-fmt: warning: ")
    assert command("verify", url).code == 1


def test_recover_and_compact(command: Command, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    script = (
        "import os, sys\n"
        "from tensorstore_fmt.writing.run import create_run\n"
        "run = create_run(sys.argv[1])\n"
        "for step in range(20):\n"
        "    run.log({'loss': 1.0}, step=step)\n"
        "    run.flush()\n"
        "os._exit(9)\n"
    )
    killed = process("-c", script, url)
    killed.communicate(timeout=60)
    assert killed.returncode == 9
    assert "recover" in command("info", url).out
    planned = command("recover", url, "--dry-run", "--json").json
    assert planned["actions"]
    assert not command("info", url, "--json").json["is_closed"]
    done = command("recover", url)
    assert (done.code, done.err) == (0, "")
    assert command("info", url, "--json").json["is_closed"]
    report = command("compact", url, "--json").json
    assert report["segments_after"] <= report["segments_before"]
    assert len(command("cat", url, "loss").words) == 21


def test_recover_and_compact_refuse_a_live_run(command: Command, tmp_path: Path) -> None:
    with create_run(str(tmp_path / "run")) as run:
        run.log({"loss": 1.0}, step=0)
        run.flush()
        for verb in ("recover", "compact"):
            said = command(verb, tmp_path / "run")
            assert (said.code, said.out) == (1, "")
            assert said.err.startswith("tensorstore-fmt: ")


def test_demo_gets_its_options(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorstore_fmt.demo.digits

    calls: list[tuple[Any, Any]] = []

    def run_demo(*args: object, **options: object) -> int:
        calls.append((args, options))
        return 1

    monkeypatch.setattr(tensorstore_fmt.demo.digits, "run_demo", run_demo)
    assert command("demo", "--steps", 7, "./place", "--pictures", "p", "--json").code == 1
    assert command("demo", "--json", "digits", "./place", "--steps", 7, "--pictures", "p").code == 1
    assert calls == 2 * [
        (
            ("./place",),
            {
                "steps": 7, "save_every": 10, "seed": 0, "storage_options": None,
                "pictures": "p", "quiet": False, "as_json": True,
            },
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("digit",), "there is no demonstration 'digit'; did you mean digits? names: attention"),
        (("place",), "there is no demonstration 'place'; names: attention curves digits"),
        (("--seed", "3", "digits"), "write first: demo digits"),
        (("digits", "--speed", "3"), "does not know '--speed'"),
    ],
)
def test_a_demo_that_is_not_there(command: Command, words: tuple[str, ...], said: str) -> None:
    done = command("demo", *words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_progress_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorstore_fmt.cli.output import Output

    Output(is_json=False).progress(1, 2, "x")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    output = Output(is_json=False)
    output.progress(1, 2, "part\x1b[31m")
    output.end_progress()
    err = capsys.readouterr().err
    assert " 50 %  part\\x1b[31m" in err
    assert err.endswith("\r")


def test_debug_shows_where(command: Command) -> None:
    from tensorstore_fmt.errors import NotARunError

    with pytest.raises(NotARunError):
        command("ls", "/nowhere", "--debug")


# --- other places ------------------------------------------------------------------------
def test_memory(command: Command) -> None:
    write("memory://cli/one")
    assert "loss" in command("ls", "memory://cli/one").out
    assert command("ls", "memory://cli").out == "memory://cli/one\n"
    assert command("verify", "memory://cli/one").code == 0


def test_s3(command: Command, s3: S3Server, tmp_path: Path) -> None:
    options = tmp_path / "options.json"
    options.write_text(json.dumps(s3.storage_options))
    url = s3.url("cli/one")
    write(url, storage_options=s3.storage_options)
    at = ("--storage-options", f"@{options}")
    assert command("slice", url, "fc1.weight", "--step", 0, "0,:2", *at).words[-1] == ["[0.", "1.]"]
    assert command(*at, "ls", s3.url("cli")).out == f"{url}\n"
    assert command("verify", url, *at).code == 0
    gone = command("ls", "s3://no-such-bucket/run", *at)
    assert (gone.code, "no-such-bucket" in gone.err) == (1, True)
    assert gone.err.count("\n") == 1


# --- as a process ------------------------------------------------------------------------
def process(*argv: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def test_help_imports_nothing_heavy() -> None:
    done = process("-X", "importtime", "-m", "tensorstore_fmt", "--help")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0
    assert "usage: tensorstore-fmt" in out
    imported = {line.rsplit("|", 1)[-1].strip() for line in err.splitlines() if "|" in line}
    assert "tensorstore_fmt.cli.verbs" in imported
    assert not {name.split(".")[0] for name in imported} & {
        "numpy", "pyarrow", "fsspec", "ml_dtypes", "zstandard", "asyncio", "s3fs",
    }  # fmt: skip


@pytest.mark.parametrize(
    "verb",
    ["ls", "info", "stat", "cat", "slice", "verify", "recover", "compact", "export", "demo"],
)
def test_each_verb_has_help(
    command: Command, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = command(verb, "--help")
    assert (said.code, said.out.startswith(f"usage: tensorstore-fmt {verb}")) == (0, True)
    assert "--json" in said.out
    assert verb in command("--help").out


def test_version(command: Command) -> None:
    from tensorstore_fmt._version import __version__

    assert command("--version").out == f"tensorstore-fmt {__version__}\n"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with create_run(url) as run:
        run.log({f"{'name' * 50}{number}": 1.0 for number in range(2000)}, step=0)
    done = process("-m", "tensorstore_fmt", "ls", url)
    assert done.stdout is not None
    assert done.stderr is not None
    assert done.stdout.readline().startswith("name")
    done.stdout.close()
    err = done.stderr.read()
    done.stderr.close()
    assert (done.wait(timeout=60), err) == (141, "")


def test_interrupt_leaves_without_a_traceback() -> None:
    # Nobody listens on this port, so opening retries for a while.
    script = (
        "import signal, sys, threading, _thread\n"
        "from tensorstore_fmt.cli import main\n"
        # A shell in the background would have it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Timer(2.0, _thread.interrupt_main).start()\n"
        "sys.exit(main(['ls', 'http://127.0.0.1:9/run']))\n"
    )
    done = process("-c", script, start_new_session=True)
    out, err = done.communicate(timeout=60)
    assert done.returncode in (130, -signal.SIGINT)
    said, *others = err.splitlines()[::-1]
    assert (out, said) == ("", "interrupted")
    assert all("trying again" in line for line in others)

"""The whole demo ``digits``, short: two processes, a run, its reads and its pictures."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import tensorstore_fmt as tsf
from tensorstore_fmt.demo.digits import run_demo, training
from tensorstore_fmt.demo.digits.comparison import strongest_units
from tensorstore_fmt.demo.display import Display
from tensorstore_fmt.demo.report import Stored, bytes_text, table
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.testing.servers import serve_s3

STEPS = 60
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own; the follower still finds a package that is not installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=":")
    monkeypatch.setattr(training, "SHORTEST_S", 1.5)
    return tmp_path


def test_the_whole_demo(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("run", steps=STEPS, as_json=True) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    document = json.loads(printed.out)

    assert document["problems"] == []
    assert document["test_accuracy"] > 0.8
    assert len(document["checks"]) == 8
    assert all(check["is_equal"] for check in document["checks"])

    rows = {row["name"]: row for row in document["names"]}
    assert rows["loss"]["steps"] == STEPS
    assert rows["fc1.weight"]["steps"] == 7  # 0, 10, ... 50, and the last
    assert rows["gradient/fc2.weight"]["nbytes"] == 7 * 256 * 128 * 4

    # Its own word for it: the follower saw them in a run that was still open. The last step is
    # complete, and therefore seen, when the run is closed.
    observations = document["follower"]["observations"]
    assert [seen["step"] for seen in observations] == [0, 10, 20, 30, 40, 50, 59]
    assert [seen["is_closed"] for seen in observations] == [False] * 6 + [True]
    with tsf.open_run("run") as run:
        assert run.is_closed
        for seen in observations:
            assert seen["loss"] == float(run["loss"].read(step=seen["step"], mode="TRAIN"))

    assert len(document["pictures"]) == 4
    for picture in map(Path, document["pictures"]):
        assert picture.parent == here / "run-pictures"
        assert_not_blank(picture)


def assert_not_blank(picture: Path) -> None:
    from matplotlib import image

    pixels = image.imread(picture)[..., :3]
    assert min(pixels.shape[:2]) > 400
    inked = np.any(pixels < 0.95, axis=2)
    assert 0.02 < inked.mean() < 0.98
    # Something on every side of the middle, not a title alone.
    rows, columns = np.nonzero(inked)
    assert rows.min() < 0.2 * len(inked)
    assert rows.max() > 0.8 * len(inked)
    assert columns.min() < 0.2 * inked.shape[1]
    assert columns.max() > 0.8 * inked.shape[1]


def test_plain_lines_and_a_new_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tensorstore-demo").mkdir()
    assert run_demo(steps=20, save_every=5, pictures="drawn") == 0
    printed = capsys.readouterr().out
    assert "./tensorstore-demo exists already; this run goes to ./tensorstore-demo-2" in printed
    assert "  | step  19 " in printed
    assert "trained 20 of 20 steps" in printed
    assert "NaN" in printed
    assert "\r" not in printed
    assert "\x1b" not in printed
    assert (here / "drawn" / "curves.png").exists()


def test_one_step_is_enough(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("run", steps=1, quiet=True) == 0
    assert capsys.readouterr().out == ""
    assert (here / "run-pictures" / "units.png").exists()


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_run_is_never_overwritten(here: Path, is_closed: bool) -> None:
    other = tsf.create_run("run")
    other.log({"loss": 1.0}, step=0)
    if is_closed:
        other.close()
    with pytest.raises(tsf.RunExistsError):
        run_demo("run", steps=1, quiet=True)
    other.close()
    assert tsf.open_run("run").names() == ["loss"]
    assert not (here / "run-pictures").exists()


def test_in_a_bucket_with_secrets(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[str] = []
    start = subprocess.Popen.__init__

    def watch(self: subprocess.Popen[str], command: list[str], **options: object) -> None:
        commands.extend(command)
        start(self, command, **options)  # type: ignore[call-overload]  # passed on as they came

    with serve_s3() as server:
        monkeypatch.setattr(subprocess.Popen, "__init__", watch)
        options = server.storage_options | {"secret": "a secret that nobody may see"}
        url = server.url("some/run")
        assert run_demo(url, steps=STEPS, storage_options=options, as_json=True) == 0
        assert set(tsf.open_run(url, storage_options=options)["fc1.bias"].steps) >= {0, 59}
    printed = capsys.readouterr().out
    assert all(check["is_equal"] for check in json.loads(printed)["checks"])
    assert "tensorstore_fmt.demo.digits.follower" in commands
    assert "a secret" not in printed + " ".join(commands)
    assert (here / "run-pictures" / "curves.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"url": "memory://run"},
        {"steps": 0},
        {"save_every": 0},
        {"storage_options": {"session": object()}},
    ],
)
def test_wrong_arguments_leave_nothing_behind(here: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ArgumentError):
        run_demo(**{"url": "run"} | arguments)  # type: ignore[arg-type]  # wrong ones are the point
    assert list(here.iterdir()) == []


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """What a terminal would show: a carriage return goes back, later characters overwrite."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_line_does_not_break_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    display = Display(out)
    display.progress(1, 2, "loss 2.000")
    display.line("  | step 0", style="other")
    display.progress(2, 2, "loss 1.000")
    display.end_progress()
    display.line("done")
    assert "\x1b" not in out.getvalue()
    shown = screen(out.getvalue())
    assert shown[0] == "  | step 0"
    assert shown[1].startswith("training ━")
    assert shown[1].endswith("━ 2/2  loss 1.000")
    assert len(shown[1]) == 59
    assert shown[2:] == ["done", ""]


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    Display(out).line("well", style="good")
    assert out.getvalue() == "\x1b[32mwell\x1b[0m\n"
    plain = io.StringIO()
    Display(plain).line("well", style="good")
    assert plain.getvalue() == "well\n"


def test_the_table_is_aligned() -> None:
    lines = table(
        [
            Stored(
                name="fc1.weight",
                steps=31,
                dtype="float32",
                shape=(64, None),
                nbytes=2_000_000,
                stored_nbytes=1_000_000,
            ),
            Stored(name="loss", steps=300, dtype="float64", shape=(), nbytes=0, stored_nbytes=0),
        ]
    )
    assert lines == [
        "name        steps  dtype    shape      raw  stored  ratio",
        "fc1.weight     31  float32  64 x ?  2.0 MB  1.0 MB   2.00",
        "loss          300  float64  scalar     0 B     0 B      -",
        "---------------------------------------------------------",
        "total                               2.0 MB  1.0 MB   2.00",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_940, "99.9 kB"), (123_456, "123 kB"),
     (999_999, "1.0 MB"), (5 * 10**15, "5000 TB")],
)  # fmt: skip
def test_bytes_in_a_unit_a_person_would_choose(nbytes: int, text: str) -> None:
    assert bytes_text(nbytes) == text


def test_strongest_units_differ() -> None:
    # Unit 1 is twice unit 0, and unit 2 another direction; unit 3 is dead.
    weight = np.array([[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.5, 0.0], [0.0, 0.0, -1.0, 0.0]])
    assert strongest_units(weight, count=2) == [1, 2]

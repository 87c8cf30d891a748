"""Text that the command prints, and expressions that it reads: no run is needed."""

from __future__ import annotations

import contextlib
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorstore_fmt.cli.expressions import parse_index, parse_step, parse_steps
from tensorstore_fmt.cli.failures import UsageError, describe
from tensorstore_fmt.cli.output import json_value
from tensorstore_fmt.cli.text import (
    bytes_text,
    columns_of,
    cut_middle,
    escape,
    shape_text,
    steps_text,
    table,
)


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("[3, 5, :20, ::2]", (3, 5, slice(None, 20), slice(None, None, 2))),
        ("3,5,:20", (3, 5, slice(None, 20))),
        ("-1", (-1,)),
        ("[-1,:5]", (-1, slice(None, 5))),
        ("(0, ...)", (0, Ellipsis)),
        ("...", (Ellipsis,)),
        ("[1:2:-1,]", (slice(1, 2, -1),)),
        (" [ : ] ", (slice(None),)),
        ("", ()),
        ("[]", ()),
    ],
)
def test_an_index(text: str, index: tuple[object, ...]) -> None:
    assert parse_index(text) == index


@pytest.mark.parametrize(
    ("text", "character"),
    [
        ("[1, x]", 5),
        ("[1,,2]", 4),
        ("[1", 3),
        ("1:2:3:4", 1),
        ("::0", 3),
        ("..., ...", 6),
        ("1.5", 1),
        ("True", 1),
        ("__import__('os')", 1),
        ("[[0, 1]]", 2),
        ("9" * 30, 1),
        ("\N{ARABIC-INDIC DIGIT ONE}", 1),
    ],
)
def test_a_malformed_index_points_at_the_place(text: str, character: int) -> None:
    with pytest.raises(UsageError) as caught:
        parse_index(text)
    assert (caught.value.code, caught.value.facts["character"]) == ("bad_index", character)


_BOUND = st.none() | st.integers(-30, 30)


@given(
    st.lists(
        st.integers(-9, 9) | st.builds(slice, _BOUND, _BOUND, _BOUND.filter(lambda n: n != 0)),
        max_size=4,
    ),
    st.booleans(),
)
def test_an_index_is_what_python_would_read(items: list[int | slice], brackets: bool) -> None:
    def written(item: int | slice) -> str:
        if isinstance(item, int):
            return str(item)
        return ":".join("" if n is None else str(n) for n in (item.start, item.stop, item.step))

    text = ",".join(map(written, items))
    assert parse_index(f"[{text}]" if brackets else text) == tuple(items)


@given(st.text(max_size=30))
def test_any_text_is_an_index_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_index(text)


def test_steps() -> None:
    assert parse_steps("100:200") == slice(100, 200)
    assert parse_steps(":50") == slice(None, 50)
    assert parse_steps("0:1000:100") == slice(0, 1000, 100)
    assert parse_steps("7") == slice(7, 8)
    assert parse_step("last") == "last"
    assert parse_step(" 12 ") == 12
    for text in ("", "-5:3", "a:b", "1:2:0", "1:2:3:4", "1.5", "9" * 5000):
        with pytest.raises(UsageError) as caught:
            parse_steps(text)
        assert caught.value.code == "bad_steps"
    for text in ("", "-1", "newest", "1:2", "9" * 5000):
        with pytest.raises(UsageError):
            parse_step(text)


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert escape("fc1.weight") == "fc1.weight"
    assert escape("a\x1b[31mb\n\r\t") == "a\\x1b[31mb\\x0a\\x0d\\x09"
    assert escape("x\u202ey\u2066z\u200b") == "x\\u202ey\\u2066z\\u200b"
    assert escape("\U000e0001") == "\\U000e0001"
    assert escape("größe 重み") == "größe 重み"


@given(st.text(max_size=40))
def test_escaped_text_is_printable(text: str) -> None:
    assert escape(text).isprintable()


@given(st.text(st.characters(categories=["L", "N", "P"]), max_size=60), st.integers(3, 40))
def test_a_cut_name_fits(text: str, width: int) -> None:
    cut = cut_middle(text, width)
    assert columns_of(cut) <= width
    assert cut == text or "…" in cut


def test_small_texts() -> None:
    assert bytes_text(0) == "0 B"
    assert bytes_text(999) == "999 B"
    assert bytes_text(1000) == "1.0 kB"
    assert bytes_text(999_999) == "1.0 MB"
    assert bytes_text(12_345_678_901) == "12.3 GB"
    assert shape_text((64, None)) == "64 x ?"
    assert shape_text(()) == "scalar"
    assert steps_text([]) == ""
    assert steps_text([5]) == "5"
    assert steps_text([0, 7]) == "0, 7"
    assert steps_text(list(range(0, 300, 10))) == "0..290 by 10"
    assert steps_text([0, 1, 2, 3, 10, 20, 30, 99]) == "0..3, 10..30 by 10, 99"
    assert steps_text([0, 1, 3, 7, 15, 31, 63]).endswith("…, 63")


@given(st.sets(st.integers(0, 50), max_size=12))
def test_shown_steps_are_the_steps(steps: set[int]) -> None:
    ordered = sorted(steps)
    text = steps_text(ordered)
    if "…" in text:
        return
    shown: list[int] = []
    for part in text.split(", ") if text else []:
        first, _, rest = part.partition("..")
        last, _, stride = rest.partition(" by ")
        shown += range(int(first), int(last or first) + 1, int(stride or 1))
    assert shown == ordered


def test_a_table_is_aligned_and_fits() -> None:
    lines = table(("name", "n"), [("重み", "1"), ("a" * 50, "123")], left=("name",), width=30)
    assert [columns_of(line) for line in lines] == [30, 30, 30]
    assert "…" in lines[2]
    assert lines[2].endswith(" 123")
    assert table(("name", "n"), [("a" * 50, "1")], left=("name",))[1].startswith("a" * 50)


def test_json_is_strict_and_exact() -> None:
    document = {
        "floats": np.array([np.nan, np.inf, -np.inf, 0.1]),
        "half": np.array([0.1], "f2"),
        "brain": np.array([1.5, np.nan], ml_dtypes.bfloat16),
        "nibbles": np.array([-8, 7], ml_dtypes.int4),
        "flags": np.array([True]),
        "complex": np.array([1 - 2j], "c8"),
        "big": np.uint64(2**64 - 1),
        "text": np.array(["a", ""], object),
        "none": None,
        "one": np.float32(0.1),
        "bytes": b"\x00\xff",
        "shape": (2, None),
    }
    said = json.loads(json.dumps(json_value(document), allow_nan=False))
    assert said == {
        "floats": ["nan", "inf", "-inf", 0.1],
        "half": [float(np.float16(0.1))],
        "brain": [1.5, "nan"],
        "nibbles": [-8, 7],
        "flags": [True],
        "complex": [[1.0, -2.0]],
        "big": 2**64 - 1,
        "text": ["a", ""],
        "none": None,
        "one": float(np.float32(0.1)),
        "bytes": "00ff",
        "shape": [2, None],
    }


def test_failures_of_the_system_have_codes() -> None:
    denied = describe(PermissionError(13, "Permission denied", "/x"))
    assert denied["code"] == "permission"
    assert denied["message"] == "/x: Permission denied"
    assert describe(OSError("odd"))["code"] == "storage"

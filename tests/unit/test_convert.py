"""Snapshots: right name, right bits, one copy, and a clear refusal of the rest."""

from __future__ import annotations

import array as stdlib_array
import datetime as dt
import decimal
import enum
import struct
import subprocess
import sys
from collections import deque
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.snapshots import bits, check_owned, refusal

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.format import layout
from tensorstore_fmt.writing.convert import (
    check_mode,
    check_name,
    check_step,
    snapshot,
)

PLAIN = [name for name in dtypes.NAMES if name != dtypes.STRING]


# --- Python values -------------------------------------------------------------


class Level(enum.IntEnum):
    HIGH = 7


class Colour(str, enum.Enum):  # noqa: UP042 - not StrEnum: its str() is not its value
    RED = "red"


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, "bool"),
        (False, "bool"),
        (0, "int64"),
        (-(2**63), "int64"),
        (2**63 - 1, "int64"),
        (2**63, "uint64"),
        (2**64 - 1, "uint64"),
        (Level.HIGH, "int64"),
        (-0.0, "float64"),
        (5e-324, "float64"),
        (float("inf"), "float64"),
        (1 - 2j, "complex128"),
        ("", "string"),
        ("naïve \N{SNOWMAN} \0", "string"),
        (Colour.RED, "string"),
    ],
)
def test_python_scalars(value: object, dtype: str) -> None:
    shot = snapshot("x", value)
    check_owned(shot)
    assert (shot.dtype, shot.array.shape) == (dtype, ())
    assert shot.array.item() == value
    if dtype == "string":
        assert type(shot.array.item()) is str
    if dtype == "float64":
        assert bits(shot.array) == struct.pack("<d", value)


def test_a_float_keeps_the_payload_of_its_nan() -> None:
    raw = bytes.fromhex("010203040506f4ff")
    assert bits(snapshot("x", struct.unpack("<d", raw)[0]).array) == raw


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 10**400])
def test_integers_beyond_64_bits_are_refused(value: int) -> None:
    assert "64 bits" in str(refusal(value))


# --- NumPy ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 4), (2, 0, 3), (2, 3, 5)])
def test_arrays_of_every_dtype(name: str, shape: tuple[int, ...]) -> None:
    dtype = dtypes.numpy_dtype(name)
    value = (np.arange(int(np.prod(shape))) % 2).reshape(shape).astype(dtype)
    shot = snapshot("x", value)
    check_owned(shot)
    assert (shot.dtype, shot.array.shape) == (name, shape)
    assert bits(shot.array) == bits(value)
    assert not np.shares_memory(shot.array, value)


@pytest.mark.parametrize("name", PLAIN)
def test_numpy_scalars_of_every_dtype(name: str) -> None:
    value = np.ones(1, dtypes.numpy_dtype(name))[0]
    shot = snapshot("x", value)
    check_owned(shot)
    assert (shot.dtype, shot.array.shape) == (name, ())
    assert shot.array[()] == value


@pytest.mark.parametrize("name", ["float32", "float64", "int16", "uint64", "complex64", "float16"])
def test_big_endian_arrays_keep_every_bit(name: str) -> None:
    size = np.dtype(name).itemsize
    raw = np.random.default_rng(0).integers(0, 256, 64 * size, dtype=np.uint8)
    raw[:size] = 0xFF  # a NaN with a payload, where there are NaNs
    little = raw.view(np.dtype(name).newbyteorder("<"))
    shot = snapshot("x", little.astype(little.dtype.newbyteorder(">")))
    check_owned(shot)
    assert shot.dtype == name
    assert bits(shot.array) == raw.tobytes()


@pytest.mark.parametrize("name", ["float32", "bool", "int4", "bfloat16"])
def test_any_memory_layout_becomes_c_order(name: str) -> None:
    base = (np.arange(2 * 6 * 8) % 2).reshape(2, 6, 8).astype(dtypes.numpy_dtype(name))
    layouts = {
        "fortran": np.asfortranarray(base),
        "transposed": base.transpose(2, 0, 1),
        "reversed": base[::-1, :, ::-1],
        "strided": base[:, 1::2, ::3],
        "broadcast": np.broadcast_to(base[0, 0], (3, 5, 8)),
        "read-only": np.frombuffer(base.tobytes(), base.dtype).reshape(base.shape),
        "unaligned": np.frombuffer(b"x" + base.tobytes(), base.dtype, offset=1)[1:],
        "0-d view": base[0, 0, 0, ...],
    }
    for label, value in layouts.items():
        shot = snapshot("x", value)
        check_owned(shot)
        assert shot.array.shape == value.shape, label
        assert bits(shot.array) == value.tobytes(order="C"), label
        assert not np.shares_memory(shot.array, value), label


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, min_side=0)), st.data())
def test_property_any_basic_slice_is_copied_exactly(array: np.ndarray, data: st.DataObject) -> None:
    index = data.draw(hnp.basic_indices(array.shape, allow_ellipsis=True))
    view = array[index]
    shot = snapshot("x", view)
    check_owned(shot)
    assert bits(shot.array) == np.asarray(view).tobytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bool", [0, 1, 1, 1, 1]),
        ("int4", [0x00, 0x01, 0xF8, 0xFF, 0xFF]),
        ("int2", [0x00, 0x01, 0x00, 0xFF, 0xFF]),
        ("uint4", [0x00, 0x01, 0x08, 0x0F, 0x0F]),
        ("uint2", [0x00, 0x01, 0x00, 0x03, 0x03]),
        ("float4_e2m1fn", [0x00, 0x01, 0x08, 0x0F, 0x0F]),
        ("float6_e2m3fn", [0x00, 0x01, 0x38, 0x3F, 0x0F]),
        ("float6_e3m2fn", [0x00, 0x01, 0x38, 0x3F, 0x0F]),
    ],
)
def test_unused_bits_are_as_the_spec_wants(name: str, expected: list[int]) -> None:
    raw = np.array([0x00, 0x01, 0xF8, 0xFF, 0x0F], np.uint8)
    shot = snapshot("x", raw.view(dtypes.numpy_dtype(name)))
    check_owned(shot)
    assert list(bits(shot.array)) == expected
    assert list(bits(snapshot("x", raw.view(dtypes.numpy_dtype(name))[3]).array)) == expected[3:4]


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_negative_small_integers(name: str) -> None:
    value = np.array([-2, -1, 0, 1], dtypes.numpy_dtype(name))
    assert snapshot("x", value).array.view(np.int8).tolist() == [-2, -1, 0, 1]


def test_subclasses_become_plain_arrays(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "m", np.float32, "w+", shape=(3,))
    shot = snapshot("x", mapped)
    check_owned(shot)
    assert not np.shares_memory(shot.array, mapped)
    check_owned(snapshot("x", np.zeros(2, np.dtype("f4", metadata={"unit": "m"}))))


def test_masked_arrays_only_without_masked_elements() -> None:
    assert bits(snapshot("x", np.ma.array([1, 2], mask=[False, False], dtype="i4")).array)[0] == 1
    assert ".filled" in str(refusal(np.ma.array([1, 2], mask=[False, True])))


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array([1, "a"], object),
        np.array([], object),
        np.array(["2026-01-01"], "M8[s]"),
        np.datetime64("now"),
        np.array([1], "m8[s]"),
        np.zeros(2, [("a", "f4"), ("b", "i4")]),
        np.zeros(2, "V3"),
        np.array([b"bytes"]),
        np.bytes_(b"bytes"),
        pytest.param(
            np.zeros(1, np.longdouble),
            marks=pytest.mark.skipif(np.finfo(np.longdouble).bits == 64, reason="is a float64"),
        ),
        np.zeros((1,) * 33),
        np.zeros((0, 2**49)),
    ],
)
def test_arrays_without_a_place_are_refused(value: Any) -> None:
    error = refusal(value)
    assert ("dtype" in error.facts) or ("shape" in error.facts)


# --- strings ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        ["a", "", "日本語", "\0\0"],
        ("a", "", "日本語", "\0\0"),
        deque(["a", "", "日本語", "\0\0"]),
        np.array(["a", "", "日本語", "\0\0"], object),
        np.array(["a", "", "日本語", "\0\0"], np.dtypes.StringDType()),
        np.array(["\0\0", "x", "日本語", "x", "", "x", "a"], np.dtypes.StringDType())[::-2],
        [np.str_("a"), "", "日本語", "\0\0"],
    ],
)
def test_rows_of_strings(value: object) -> None:
    shot = snapshot("x", value)
    check_owned(shot)
    assert shot.dtype == "string"
    assert shot.array.tolist() == ["a", "", "日本語", "\0\0"]
    assert {type(item) for item in shot.array.tolist()} == {str}


def test_fixed_width_strings_and_single_ones() -> None:
    assert snapshot("x", np.array(["ab", "c"])).array.tolist() == ["ab", "c"]
    assert snapshot("x", np.array(["ab", "c"], ">U5")).array.tolist() == ["ab", "c"]
    for value in (np.str_("ab"), np.array("ab"), np.array("ab", object)):
        shot = snapshot("x", value)
        check_owned(shot)
        assert (shot.array.shape, shot.array.item()) == ((), "ab")
    assert snapshot("x", np.array([], "U3")).array.shape == (0,)


@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        ["fine", "\udc80"],
        np.array(["a\ud800"]),
        np.array(["\ud83d", "\ude00"], object),  # halves of one character in two elements
        [["a", "b"], ["c", "d"]],
        np.array([["a", "b"]]),
        ["a", 1],
        [1, "a"],
        ["a", None],
        ["a", b"b"],
        np.array(["a", None], object),
        np.array(["a", float("nan")], np.dtypes.StringDType(na_object=np.nan)),
    ],
)
def test_what_is_no_row_of_strings_is_refused(value: object) -> None:
    refusal(value)


def test_a_string_that_no_chunk_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_CHUNK_RAW_NBYTES", 20)
    assert snapshot("x", "é" * 6).array.item() == "é" * 6
    assert snapshot("x", ["x" * 12, "y" * 12]).array.shape == (2,)
    assert refusal("é" * 7).facts["nbytes"] == 14


# --- sequences and protocols --------------------------------------------------------


class Pair(NamedTuple):
    left: int
    right: int


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        ([1, 2], "int64", [1, 2]),
        ((1.5, 2), "float64", [1.5, 2]),
        ([[1, 2], [3, 4]], "int64", [[1, 2], [3, 4]]),
        ([True, False], "bool", [True, False]),
        ([1j], "complex128", [1j]),
        ([], "float64", []),
        ([[], []], "float64", [[], []]),
        ([2**63], "uint64", [2**63]),
        ([np.float32(1), np.float32(2)], "float32", [1, 2]),
        ([np.zeros(2, ">i2"), np.ones(2, ">i2")], "int16", [[0, 0], [1, 1]]),
        ([2**60, 0.5], "float64", [2**60, 0.5]),
        (range(3), "int64", [0, 1, 2]),
        (deque([1, 2]), "int64", [1, 2]),
        (Pair(1, 2), "int64", [1, 2]),
        (stdlib_array.array("f", [1, 2]), "float32", [1, 2]),
        (memoryview(b"\x01\x02"), "uint8", [1, 2]),
        (bytearray(b"\x01\x02"), "uint8", [1, 2]),
    ],
)
def test_sequences_and_buffers(value: object, dtype: str, expected: list[object]) -> None:
    shot = snapshot("x", value)
    check_owned(shot)
    assert shot.dtype == dtype
    assert shot.array.tolist() == expected


@pytest.mark.parametrize(
    "value",
    [
        [[1], [1, 2]],
        [None],
        [1, None],
        [{}],
        [2**64],
        [[2**63 + 1], [-1]],
        [2**60 + 1, 0.5],
        [b"a"],
        [dt.datetime(2026, 1, 1)],  # noqa: DTZ001 - any date will do
        None,
        {},
        {"a": 1},
        set(),
        b"bytes",
        object(),
        decimal.Decimal(1),
        dt.datetime(2026, 1, 1),  # noqa: DTZ001 - any date will do
        len,
        (x for x in (1, 2)),
        int,
        np.ndarray,
    ],
)
def test_other_values_are_refused(value: object) -> None:
    refusal(value)


class HasArray:
    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self.value


class HasDLPack:
    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def __dlpack__(self, **options: Any) -> object:
        return self.value.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.value.__dlpack_device__()


class OnADevice(HasDLPack):
    """Its elements have to be asked to the host."""

    def __dlpack__(self, **options: Any) -> object:
        options.pop("dl_device", None)
        return self.value.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


class BothProtocols(HasDLPack):
    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise TypeError("not from a device")


class Broken:
    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        raise RuntimeError("no value yet")


@pytest.mark.parametrize("wrap", [HasArray, HasDLPack, BothProtocols])
def test_protocols(wrap: Any) -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    shot = snapshot("x", wrap(value))
    check_owned(shot)
    assert bits(shot.array) == value.tobytes()
    assert not np.shares_memory(shot.array, value)


def test_protocols_of_dtypes_that_only_array_knows() -> None:
    value = np.ones(3, ml_dtypes.bfloat16)
    assert snapshot("x", HasArray(value)).dtype == "bfloat16"
    refusal(HasArray(np.array([None])))


def test_a_broken_protocol_is_refused_with_its_own_words() -> None:
    error = refusal(Broken())
    assert "no value yet" in str(error)
    assert isinstance(error.__cause__, RuntimeError)


def test_running_out_of_memory_is_no_bad_argument() -> None:
    class Huge:
        def __array__(self, *args: Any, **options: Any) -> np.ndarray:
            raise MemoryError

    with pytest.raises(MemoryError):
        snapshot("x", Huge())


def test_no_framework_is_imported() -> None:
    code = (
        "import sys; from tensorstore_fmt.writing.convert import snapshot; snapshot('x', [1.0]);"
        "assert not {'torch', 'jax', 'tensorflow', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- the other arguments of `log` -----------------------------------------------------


@pytest.mark.parametrize("name", ["a", "a/b c", "日本語", "\0", "x" * 1024, "é" * 512, Colour.RED])
def test_names(name: str) -> None:
    checked = check_name(name)
    assert checked == name
    assert type(checked) is str


@pytest.mark.parametrize(
    "name", ["", "x" * 1025, "é" * 512 + "x", "\ud800", None, 1, b"a", ("a",), ["a"]]
)
def test_bad_names(name: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_name(name)
    assert caught.value.facts["argument"] == "name"


@pytest.mark.parametrize(
    "step",
    [0, 1, layout.MAX_STEP, np.int64(5), np.uint8(5), np.array(5), Level.HIGH],
)
def test_steps(step: Any) -> None:
    checked = check_step(step)
    assert checked == int(step)
    assert type(checked) is int


@pytest.mark.parametrize(
    "step",
    [
        -1,
        layout.MAX_STEP + 1,
        2**100,
        True,
        np.True_,
        1.0,
        np.float64(1),
        "1",
        None,
        np.array([5, 6]),
        np.uint64(2**63),
    ],
)
def test_bad_steps(step: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_step(step)
    assert caught.value.facts["argument"] == "step"


@pytest.mark.parametrize(
    ("mode", "number"),
    [(None, 0), ("TRAIN", 1), ("train", 1), ("Eval", 2), ("PREDICT", 3), (np.str_("eval"), 2)],
)
def test_modes(mode: object, number: int) -> None:
    assert check_mode(mode) == number


@pytest.mark.parametrize("mode", ["", "none", "TEST", " train", 1, True, b"TRAIN", ["TRAIN"]])
def test_bad_modes(mode: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        check_mode(mode)
    assert caught.value.facts["argument"] == "mode"

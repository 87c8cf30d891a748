from __future__ import annotations

import struct
import zlib
from typing import Any

import crc32c
import ml_dtypes
import numpy as np
import pytest
import zstandard

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError, FormatError, LimitError, UnsupportedError
from tensorstore_fmt.format import codec, layout, planes, sampling
from tensorstore_fmt.format.strings import pack_strings, unpack_strings

pytestmark = pytest.mark.usefixtures("implementation")

CHUNK = 256 * 1024


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def weights(n: int = CHUNK // 4) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(n) * 0.02).astype(np.float32)


def noise(nbytes: int = CHUNK) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)


def decoded(payload: bytes, nbytes: int, **kwargs: Any) -> bytes:
    out = np.full(nbytes, 0xAA, np.uint8)
    codec.decode(payload, out, **kwargs)
    return out.tobytes()


def encode(raw: np.ndarray, dtype: str, compression: codec.Compression = "auto") -> codec.Encoded:
    encoded = codec.Encoder(compression).encode(raw, dtype=dtype)
    payload = encoded.to_bytes()
    assert encoded.nbytes == len(payload) <= raw.nbytes
    assert encoded.crc32c == crc32c.crc32c(payload)
    assert decoded(payload, raw.nbytes, codec=encoded.codec, dtype=dtype) == raw.tobytes()
    return encoded


def planes_payload(
    lengths: list[int], body: bytes, *, flags: int = 0, w: int | None = None, reserved: int = 0
) -> bytes:
    head = struct.pack("<BBH", flags, len(lengths) if w is None else w, reserved)
    return head + struct.pack(f"<{len(lengths)}I", *lengths) + body


# --- what the encoder picks -----------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "array", "name", "ratio"),
    [
        ("float32", weights(), "planes", 1.18),
        ("bfloat16", weights().astype(ml_dtypes.bfloat16), "planes", 1.45),
        ("float64", weights().astype(np.float64) * np.pi, "planes", 1.11),
        ("complex64", weights().view(np.complex64), "planes", 1.18),
        ("float8_e4m3fn", (weights() * 50).astype(ml_dtypes.float8_e4m3fn), "zstd", 1.15),
        ("int64", np.arange(CHUNK // 8), "planes", 3),
        ("float32", np.maximum(weights() - 0.03, 0), "sparse", 10),
        ("bool", noise() < 20, "sparse", 2.4),
        ("uint8", np.where(noise() < 20, noise(), 0), "sparse", 5),
        ("int64", np.tile(noise(2000).view(np.uint16), 40).astype(np.int64), "planes", 100),
        ("uint8", noise(), "raw", 1),
        ("float32", noise().view(np.float32), "raw", 1),
        ("float64", np.full(CHUNK, -0.0), "constant", 1000),
    ],
)
def test_auto_picks_what_pays(dtype: str, array: np.ndarray, name: str, ratio: float) -> None:
    raw = as_bytes(array)
    encoded = encode(raw, dtype)
    assert layout.CODEC_NAMES[encoded.codec] == name
    assert raw.nbytes / encoded.nbytes >= ratio


@pytest.mark.parametrize("dtype", [name for name in dtypes.NAMES if name != dtypes.STRING])
@pytest.mark.parametrize("compression", ["auto", "none", "zstd"])
def test_every_dtype_comes_back(dtype: str, compression: codec.Compression) -> None:
    for raw in (noise(16 * 1000), np.repeat(noise(80), 200), np.tile(noise(16), 100)):
        encode(raw, dtype, compression)


@pytest.mark.parametrize("dtype", ["float32", "string", "bool"])
def test_no_bytes_are_an_empty_raw_payload(dtype: str) -> None:
    encoded = encode(np.empty(0, np.uint8), dtype)
    assert (encoded.codec, encoded.nbytes, encoded.crc32c) == (layout.CODEC_RAW, 0, 0)


def test_constant_is_about_bits() -> None:
    nan = np.full(1000, 0x7FC0_1234, np.uint32)
    assert encode(as_bytes(nan), "float32").codec == layout.CODEC_CONSTANT
    zeros = np.zeros(1000, np.float32)
    zeros[999] = -0.0
    assert encode(as_bytes(zeros), "float32").codec != layout.CODEC_CONSTANT
    halves = np.tile(np.array([1, 2], np.uint8), 1000)
    assert encode(halves, "uint16").codec == layout.CODEC_CONSTANT
    assert encode(halves, "uint8").codec != layout.CODEC_CONSTANT


@pytest.mark.parametrize("at", [0, 1, 20, CHUNK // 4, 2 * CHUNK // 4, 3 * CHUNK // 4 - 1])
def test_one_other_element_is_not_constant(at: int) -> None:
    array = np.full(3 * CHUNK // 4, 7, np.uint32)
    array[at] ^= 1 << 31
    assert encode(as_bytes(array), "uint32").codec != layout.CODEC_CONSTANT


def test_strings_are_never_constant() -> None:
    raw = np.zeros(400, np.uint8)
    assert encode(raw, "string").codec == layout.CODEC_ZSTD


def test_none_stores_raw_without_a_copy() -> None:
    raw = np.zeros(1000, np.uint8)
    encoded = encode(raw, "float32", "none")
    assert encoded.codec == layout.CODEC_RAW
    assert np.shares_memory(np.frombuffer(encoded.parts[0], np.uint8), raw)


def test_zstd_falls_back_to_raw() -> None:
    assert encode(noise(), "float32", "zstd").codec == layout.CODEC_RAW
    assert encode(as_bytes(weights()), "float32", "zstd").codec == layout.CODEC_ZSTD


def test_parts_survive_later_chunks() -> None:
    encoder, hint = codec.Encoder(), sampling.Hint()
    chunks = [as_bytes(np.roll(weights(), i) * (i + 1)) for i in range(4)]
    encoded = [encoder.encode(chunk, dtype="float32", hint=hint) for chunk in chunks]
    for chunk, one in zip(chunks, encoded, strict=True):
        assert one.codec == layout.CODEC_PLANES
        assert crc32c.crc32c(one.to_bytes()) == one.crc32c
        assert decoded(one.to_bytes(), CHUNK, codec=one.codec, dtype="float32") == chunk.tobytes()


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentError):
        codec.Encoder("lz4")  # type: ignore[arg-type] # what is under test
    with pytest.raises(ArgumentError):
        codec.Encoder().encode(np.zeros(7, np.uint8), dtype="float32")


# --- hints ----------------------------------------------------------------------


class Counting(codec.Encoder):
    samples = 0

    def _choose(self, *args: Any) -> Any:
        self.samples += 1
        return super()._choose(*args)


def test_a_hint_makes_sampling_rare() -> None:
    encoder, hint, raw = Counting(), sampling.Hint(), as_bytes(weights())
    for _ in range(100):
        encoder.encode(raw, dtype="float32", hint=hint)
    assert encoder.samples == 3
    encoder.encode(raw, dtype="float32")
    assert encoder.samples == 4


def test_a_hint_samples_again_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_FIRST_INTERVAL_NBYTES", 8 * 1024)
    monkeypatch.setattr(sampling, "_FIRST_PAUSE_NBYTES", 1024)
    encoder, hint, raw = Counting(), sampling.Hint(), as_bytes(weights(256))
    for _ in range(2 + 4 + 8 + 16 + 1):
        encoder.encode(raw, dtype="float32", hint=hint)
    assert encoder.samples == 5


def test_a_hint_of_small_chunks_samples_rarely() -> None:
    encoder, hint, raw = Counting(), sampling.Hint(), as_bytes(weights(1024))
    for _ in range(500):
        encoder.encode(raw, dtype="float32", hint=hint)
    assert encoder.samples == 1


def test_a_hint_notices_other_data() -> None:
    encoder, hint = Counting(), sampling.Hint()
    dense, sparse = as_bytes(weights()), as_bytes(np.maximum(weights() - 0.05, 0))
    encoder.encode(dense, dtype="float32", hint=hint)
    codecs = [encoder.encode(sparse, dtype="float32", hint=hint).codec for _ in range(40)]
    assert codecs[0] == layout.CODEC_PLANES
    assert codecs[-1] == layout.CODEC_SPARSE
    assert encoder.samples == 4


def test_a_hint_takes_chunks_together() -> None:
    """Chunks that are unlike each other are no change of the series."""
    encoder, hint = Counting(), sampling.Hint()
    random = np.random.default_rng(3)
    values = weights(1 << 18)
    for _ in range(60):
        is_zero = random.random(1 << 18) > random.uniform(0.2, 0.35)
        sparse = np.where(is_zero, np.float32(0), values)
        encoder.encode(as_bytes(sparse), dtype="float32", hint=hint)
    assert encoder.samples == 4  # three that count together, and the one after 32 MiB


def test_slow_settings_are_tried_where_they_may_win() -> None:
    zstd, slow = sampling.compressors(), set(sampling._SLOW_OF_PLANES)

    def searched(raw: np.ndarray) -> set[int]:
        sample = sampling.choose(raw, "float32", zstd).samples[0]
        return {cut for (cut, i), found in sample.items() if i >= 0 and slow & set(found)}

    random = np.random.default_rng(5)
    phrases = random.integers(0, 256, (256, 32), np.uint8)
    assert searched(phrases[random.integers(0, 256, 8192)].reshape(-1)) == set()
    # Rotated or not, with zeros or without, whichever is best.
    waves = np.sin(np.arange(1 << 16) / 3) * np.exp2(random.integers(0, 9, 64)).repeat(1 << 10)
    assert len(searched(as_bytes(waves.astype(np.float32)))) == 1
    waves[random.random(len(waves)) < 0.5] = 0
    assert searched(as_bytes(waves.astype(np.float32))) == {sampling._SPARSE}


def test_a_hint_survives_another_dtype_and_size() -> None:
    encoder, hint = Counting(), sampling.Hint()
    for dtype, raw in [("float32", as_bytes(weights(100))), ("float32", as_bytes(weights())),
                       ("bfloat16", as_bytes(weights())), ("bool", noise() & 1)]:  # fmt: skip
        one = encoder.encode(raw, dtype=dtype, hint=hint)
        assert decoded(one.to_bytes(), raw.nbytes, codec=one.codec, dtype=dtype) == raw.tobytes()
    assert encoder.samples == 4


def test_runs_of_flags_are_searched() -> None:
    flags = (np.sin(np.arange(1 << 18) ** 1.3 / 500) > 0.5).view(np.uint8)
    assert len(codec.Encoder().encode(flags, dtype="bool").to_bytes()) < 0.9 * len(
        zstandard.ZstdCompressor(level=3).compress(flags.data)
    )


def test_a_changing_scale_gets_a_table_for_each_part() -> None:
    values = weights(1 << 16) * np.repeat(2.0 ** np.arange(-32, 32), 1 << 10).astype("f4")
    raw = as_bytes(values)
    exponents = np.ascontiguousarray((values.view("u4") >> 23).astype(np.uint8))
    whole = len(zstandard.ZstdCompressor(level=1).compress(exponents.data))
    assert len(codec.Encoder().encode(raw, dtype="float32").to_bytes()) < 3 * len(values) + whole


# --- planes ---------------------------------------------------------------------


def test_planes_are_as_in_the_spec() -> None:
    raw = np.array([0x80000001, 0x01020304], "<u4").view(np.uint8)
    cut = np.empty((4, 2), np.uint8)
    planes.split(raw, list(cut), rotated=False)
    assert cut.tolist() == [[0x01, 0x04], [0x00, 0x03], [0x00, 0x02], [0x80, 0x01]]
    planes.split(raw, list(cut), rotated=True)
    # 0x80000001 becomes 0x00000003, 0x01020304 becomes 0x02040608.
    assert cut.tolist() == [[0x03, 0x08], [0x00, 0x06], [0x00, 0x04], [0x00, 0x02]]


def test_planes_by_hand() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(range(20)) * 5)
    payload = planes_payload([100, 1, len(frame), 1], bytes(100) + b"\x07" + frame + b"\x09")
    words = np.frombuffer(decoded(payload, 400, codec=layout.CODEC_PLANES, dtype="float32"), "<u4")
    assert words.tolist() == [0x0900_0700 + (i % 20 << 16) for i in range(100)]


def test_a_frame_that_is_no_shorter_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(range(100)))
    assert len(frame) > 100
    with pytest.raises(FormatError):
        decoded(planes_payload([len(frame)], frame), 100, codec=layout.CODEC_PLANES, dtype="uint8")


def test_wide_planes_by_hand() -> None:
    payload = planes_payload([6, 1], bytes(range(1, 7)) + b"\x09", flags=2, w=4)
    words = np.frombuffer(decoded(payload, 12, codec=layout.CODEC_PLANES, dtype="int32"), "<u4")
    assert words.tolist() == [0x0909_0201, 0x0909_0403, 0x0909_0605]
    payload = planes_payload([6, 1], bytes(range(1, 7)) + b"\x09", flags=3, w=4)
    turned = np.frombuffer(decoded(payload, 12, codec=layout.CODEC_PLANES, dtype="int32"), "<u4")
    assert turned.tolist() == [(word >> 1) | (word & 1) << 31 for word in words.tolist()]


def test_sparse_by_hand() -> None:
    payload = planes_payload([2, 1, 2], b"\x01\x02" + b"\x07" + b"\x02\x02", w=2)
    words = np.frombuffer(decoded(payload, 20, codec=layout.CODEC_SPARSE, dtype="int16"), "<u2")
    assert words.tolist() == [0, 0x0701, 0, 0, 0, 0, 0, 0, 0, 0x0702]
    mask = planes_payload([1, 2], b"\x01" + b"\x05\xff", w=1)
    assert decoded(mask, 10, codec=layout.CODEC_SPARSE, dtype="bool") == bytes(
        [1, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    )


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float32", "int64", "complex128"])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.93, 1])
def test_parts_of_chunks(dtype: str, share: float) -> None:
    """What is decoded for a slice is what is decoded for all, whatever the codec."""
    rng = np.random.default_rng(int(share * 100))
    size, word = dtypes.itemsize(dtype), dtypes.word_nbytes(dtype)
    n = 3000
    words = (np.arange(n * size // word) % 700).astype(f"<u{word}")
    words[rng.random(len(words)) > share] = 0
    if dtype == "bool":
        words = (words != 0).astype(np.uint8)
    raw = words.view(np.uint8)
    for encoded in every_way(raw, word):
        payload = encoded.to_bytes()
        for first, last in [(0, n), (0, 1), (n - 1, n), (7, 7), (501, 1717)]:
            out = np.full(raw.nbytes, 0xEE, np.uint8)
            span = (first * size, last * size)
            codec.decode(payload, out, codec=encoded.codec, dtype=dtype, span=span)
            np.testing.assert_array_equal(out[slice(*span)], raw[slice(*span)])


def every_way(raw: np.ndarray, w: int) -> list[codec.Encoded]:
    """Give payloads of all codecs and flags that words can have."""
    encoder, some = codec.Encoder(), (3, 0, 1, 4, 0, 3, 1, 0)
    ways = [encoder._encode_whole(raw, 3)]
    for flags in (0, layout.PLANES_ROTATED):
        ways += [encoder._encode_planes(raw, some[:w], flags),
                 encoder._encode_sparse(raw, (*some[:w], 3), flags),
                 encoder._encode_sparse(raw, (0,) * (w + 1), flags)]  # fmt: skip
    if w >= 4:
        ways.append(encoder._encode_planes(raw, some[: w // 2], layout.PLANES_WIDE))
    return ways


def test_one_word_is_stored_as_it_is() -> None:
    payload = planes_payload([1, 1], b"\x12\x34")
    assert decoded(payload, 2, codec=layout.CODEC_PLANES, dtype="uint16") == b"\x12\x34"


@pytest.mark.parametrize("w", [1, 2, 4, 8])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("words", [1, 1000, 32768 + 1, 3 * 65536 + 7])
def test_split_and_join(w: int, rotated: bool, words: int) -> None:
    # One byte further than memory is aligned.
    raw = np.concatenate([np.zeros(1, np.uint8), noise(words * w)])[1:]
    x = raw.copy().view(f"<u{w}").astype(np.uint64)
    if rotated:
        x = (x << np.uint64(1)) | (x >> np.uint64(8 * w - 1))
    cut = np.empty((w, words), np.uint8)
    planes.split(raw, list(cut), rotated=rotated)
    for i in range(w):
        np.testing.assert_array_equal(cut[i], ((x >> np.uint64(8 * i)) & np.uint64(255)))
    out = np.empty(words * w + 1, np.uint8)[1:]
    planes.join(list(cut), out, rotated=rotated)
    np.testing.assert_array_equal(out, raw)


# --- damage ---------------------------------------------------------------------

FRAME = zstandard.ZstdCompressor().compress(bytes(range(100)))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(range(100)))
SKIPPABLE = struct.pack("<II", 0x184D2A50, 100) + bytes(100)
# A window of 2 GiB, no single segment, 8 bytes of content size.
WIDE = b"\x28\xb5\x2f\xfd\xc0\xa8" + struct.pack("<Q", 100) + bytes(20)


@pytest.mark.parametrize(
    ("payload", "nbytes", "codec_name", "dtype"),
    [
        (b"", 4, "raw", "float32"),
        (bytes(8), 4, "raw", "float32"),
        (bytes(4), 0, "raw", "float32"),
        (bytes(4), 0, "constant", "float32"),
        (b"", 0, "zstd", "float32"),
        (b"", 0, "planes", "float32"),
        (bytes(6), 6, "raw", "float32"),
        (b"", 8, "constant", "float32"),
        (bytes(2), 8, "constant", "float32"),
        (bytes(8), 8, "constant", "float32"),
        (bytes(1), 8, "constant", "string"),
        (b"", 100, "zstd", "uint8"),
        (FRAME, 104, "zstd", "uint8"),
        (FRAME, 96, "zstd", "uint8"),
        (FRAME[:-1], 100, "zstd", "uint8"),
        (FRAME[:5], 100, "zstd", "uint8"),
        (FRAME + b"\0", 100, "zstd", "uint8"),
        (FRAME + FRAME, 100, "zstd", "uint8"),
        (FRAME + FRAME, 200, "zstd", "uint8"),
        (SKIPPABLE + FRAME, 100, "zstd", "uint8"),
        (UNSIZED, 100, "zstd", "uint8"),
        (zlib.compress(bytes(100)), 100, "zstd", "uint8"),
        (b"", 8, "planes", "float32"),
        (planes_payload([2, 2, 2, 2], bytes(8))[:19], 8, "planes", "float32"),
        (planes_payload([2, 2, 2, 2], bytes(7)), 8, "planes", "float32"),
        (planes_payload([2, 2, 2, 2], bytes(9)), 8, "planes", "float32"),
        (planes_payload([2, 2, 2, 2], bytes(8), flags=2), 8, "planes", "float32"),
        (planes_payload([2, 2, 2, 2], bytes(8), reserved=256), 8, "planes", "float32"),
        (planes_payload([2, 2, 2, 2], bytes(8), w=2), 8, "planes", "float32"),
        (planes_payload([4, 4], bytes(8)), 8, "planes", "float32"),
        (planes_payload([1] * 16, bytes(16)), 32, "planes", "complex128"),
        (planes_payload([0, 2, 2, 2], bytes(6)), 8, "planes", "float32"),
        (planes_payload([3, 2, 2, 2], bytes(9)), 8, "planes", "float32"),
        (planes_payload([2**32 - 1] * 4, bytes(8)), 8, "planes", "float32"),
        (planes_payload([], bytes(8)), 8, "planes", "string"),
        (planes_payload([len(FRAME), 1], FRAME + b"\0"), 202, "planes", "float16"),
        (bytes(8), 16, "delta", "int64"),
        (bytes(16), 16, "delta", "float64"),
        (b"", 8, "dropped", "int64"),
    ],
)
def test_what_is_malformed(payload: bytes, nbytes: int, codec_name: str, dtype: str) -> None:
    number = {name: number for number, name in layout.CODEC_NAMES.items()}[codec_name]
    with pytest.raises(FormatError) as caught:
        decoded(payload, nbytes, codec=number, dtype=dtype)
    assert caught.value.code == "malformed"


def test_rows_that_do_not_fit() -> None:
    for rows in (0, -1, 3):
        with pytest.raises(FormatError) as caught:
            decoded(bytes(16), 16, codec=layout.CODEC_DELTA, dtype="int64", rows=rows)
        assert caught.value.code == "malformed"


def test_unknown_codec_and_dtype() -> None:
    for number in (6, 77, 254, 256, -1):
        with pytest.raises(UnsupportedError) as caught:
            decoded(bytes(4), 4, codec=number, dtype="float32")
        assert caught.value.code == "unknown_codec"
    with pytest.raises(UnsupportedError) as caught:
        decoded(bytes(4), 4, codec=0, dtype="float31")
    assert caught.value.code == "unknown_dtype"


def test_limits() -> None:
    # Virtual memory only: nothing touches it.
    huge = np.empty(layout.MAX_CHUNK_NBYTES + 8, np.uint8)
    out = np.empty(layout.MAX_CHUNK_RAW_NBYTES + 8, np.uint8)
    for payload, room in ((huge, out[:8]), (huge[:8], out)):
        with pytest.raises(LimitError) as caught:
            codec.decode(payload, room, codec=layout.CODEC_RAW, dtype="float32")
        assert caught.value.code == "limit"
    with pytest.raises(LimitError) as caught:
        decoded(WIDE, 100, codec=layout.CODEC_ZSTD, dtype="uint8")
    assert caught.value.code == "limit"


# --- delta ----------------------------------------------------------------------


def test_delta_is_as_in_the_spec() -> None:
    rows = np.array([[10, -1], [11, 2**62], [13, -(2**63)]], "<i8")
    encoded = codec.encode_delta(as_bytes(rows), rows=3)
    payload = encoded.to_bytes()
    differences = [10, 2**64 - 1, 1, 2**62 + 1, 2, 2**64 - 2**63 - 2**62]
    words = [(d % 2**64).to_bytes(8, "little") for d in differences]
    assert payload == bytes(word[i] for i in range(8) for word in words)
    assert (encoded.codec, encoded.nbytes) == (layout.CODEC_DELTA, 48)
    assert encoded.crc32c == crc32c.crc32c(payload)
    assert decoded(payload, 48, codec=4, dtype="int64", rows=3) == rows.tobytes()


@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 20), (1000, 1), (37, 5), (3000, 7)])
def test_delta_comes_back(k: int, m: int) -> None:
    raw = noise(8 * k * m)
    payload = codec.encode_delta(raw, rows=k).to_bytes()
    assert decoded(payload, raw.nbytes, codec=4, dtype="int64", rows=k) == raw.tobytes()


# --- strings --------------------------------------------------------------------


@pytest.mark.parametrize(
    "strings",
    [
        [],
        [""],
        ["", "", ""],
        ["a"],
        ["loss", "", "größe", "損失", "\U0001f600", "\0"],
        ["x"] * 1000,
    ],
)
def test_strings_come_back(strings: list[str]) -> None:
    raw = pack_strings(strings)
    assert unpack_strings(raw, len(strings)) == strings
    assert unpack_strings(np.frombuffer(raw, np.uint8), len(strings)) == strings


def test_strings_are_as_in_the_spec() -> None:
    assert pack_strings(["é", "", "b"]) == struct.pack("<4I", 0, 2, 2, 3) + b"\xc3\xa9b"
    assert pack_strings([]) == b""


@pytest.mark.parametrize(
    ("raw", "n"),
    [
        (b"", 1),
        (bytes(4), 0),
        (bytes(7), 1),
        (struct.pack("<2I", 1, 1) + b"a", 1),
        (struct.pack("<2I", 0, 2) + b"a", 1),
        (struct.pack("<2I", 0, 0) + b"a", 1),
        (struct.pack("<3I", 0, 2, 1) + b"a", 2),
        (struct.pack("<3I", 0, 2**32 - 1, 1) + b"a", 2),
        (struct.pack("<3I", 0, 1, 2) + "é".encode(), 2),
        (struct.pack("<2I", 0, 1) + b"\xff", 1),
        (struct.pack("<2I", 0, 3) + b"\xed\xa0\x80", 1),
        (struct.pack("<3I", 0, 1, 2) + b"\xc3a", 2),
    ],
)
def test_strings_that_are_malformed(raw: bytes, n: int) -> None:
    with pytest.raises(FormatError) as caught:
        unpack_strings(raw, n)
    assert caught.value.code == "malformed"


def test_strings_that_cannot_be_stored() -> None:
    with pytest.raises(ArgumentError):
        pack_strings(["\ud800"])
    with pytest.raises(ArgumentError):
        pack_strings(["x" * 1024 * 1024] * 128)


@pytest.mark.parametrize("compression", ["auto", "zstd", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int16", "uint8"])
def test_part_of_a_chunk(dtype: str, compression: str) -> None:
    rng = np.random.default_rng(3)
    size = dtypes.itemsize(dtype)
    values = (rng.standard_normal(40_000) * 100).astype(dtypes.numpy_dtype(dtype))
    raw = values.view(np.uint8)
    encoded = codec.Encoder(compression).encode(raw, dtype=dtype)
    for first, last in ((0, 40_000), (0, 1), (39_999, 40_000), (123, 30_001), (7, 7)):
        out = np.zeros(len(raw), np.uint8)
        span = (first * size, last * size)
        codec.decode(encoded.to_bytes(), out, codec=encoded.codec, dtype=dtype, span=span)
        assert (out[slice(*span)] == raw[slice(*span)]).all()

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import codec, layout, planes, sampling
from tensorstore_fmt.format.strings import pack_strings, unpack_strings

pytestmark = pytest.mark.usefixtures("implementation")

FIXED = [name for name in dtypes.NAMES if name != dtypes.STRING]
ENCODERS: dict[str, codec.Encoder] = {}


def encoder(compression: codec.Compression) -> codec.Encoder:
    return ENCODERS.setdefault(compression, codec.Encoder(compression))


@st.composite
def chunks(draw: st.DrawFn, max_elements: int = 400_000) -> tuple[str, np.ndarray]:
    """Chunks of any dtype whose bytes compress well, badly or not at all."""
    dtype = draw(st.sampled_from(FIXED))
    size = dtypes.itemsize(dtype)
    most = min(max_elements, 3 * planes.BLOCK_NBYTES // size)
    n = draw(st.one_of(st.integers(0, 70), st.integers(0, most)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    # How many of the bits of each byte of a word are random: exponents have few.
    masks = [(1 << draw(st.integers(0, 8))) - 1 for _ in range(size)]
    raw = rng.integers(0, 256, (n, size), np.uint8) & np.array(masks, np.uint8)
    if draw(st.booleans()):
        raw = raw[np.sort(rng.integers(0, max(1, n), n))]
    return dtype, np.ascontiguousarray(raw).reshape(-1)


def comes_back(encoded: codec.Encoded, raw: np.ndarray, dtype: str) -> bool:
    out = np.full(raw.nbytes, 0xAA, np.uint8)
    codec.decode(encoded.to_bytes(), out, codec=encoded.codec, dtype=dtype)
    return out.tobytes() == raw.tobytes()


@given(chunks(), st.sampled_from(["auto", "none", "zstd"]))
def test_what_was_encoded_comes_back(
    chunk: tuple[str, np.ndarray], compression: codec.Compression
) -> None:
    dtype, raw = chunk
    before = raw.copy()
    encoded = encoder(compression).encode(raw, dtype=dtype)
    assert encoded.nbytes == len(encoded.to_bytes()) <= raw.nbytes
    assert comes_back(encoded, raw, dtype)
    np.testing.assert_array_equal(raw, before)


@given(chunks(), st.sampled_from([0, layout.PLANES_ROTATED]), st.data())
def test_planes_come_back_whatever_the_settings(
    chunk: tuple[str, np.ndarray], flags: int, data: st.DataObject
) -> None:
    dtype, raw = chunk
    w = dtypes.word_nbytes(dtype)
    settings = tuple(data.draw(st.integers(0, 3)) for _ in range(w + 1))
    auto = encoder("auto")
    encoded = [auto._encode_planes(raw, settings[:w], flags)]
    if w >= 4:
        encoded.append(auto._encode_planes(raw, settings[: w // 2], layout.PLANES_WIDE))
    if raw.nbytes:
        zeros = raw.reshape(-1, w).copy()
        zeros[data.draw(st.integers(0, 3)) :: data.draw(st.integers(1, 3))] = 0
        encoded.append(auto._encode_sparse(raw, settings, flags))
        assert comes_back(auto._encode_sparse(zeros.reshape(-1), settings, flags), zeros, dtype)
        assert all(comes_back(one, raw, dtype) for one in encoded)


@given(st.lists(chunks(max_elements=3000), min_size=1, max_size=8))
def test_any_series_comes_back_with_one_hint(series: list[tuple[str, np.ndarray]]) -> None:
    hint = sampling.Hint()
    encoded = [encoder("auto").encode(raw, dtype=dtype, hint=hint) for dtype, raw in series]
    for one, (dtype, raw) in zip(encoded, series, strict=True):
        assert comes_back(one, raw, dtype)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
@example(["\ufeff", "\U0010ffff", "\x7f\x80"])
def test_strings_come_back(strings: list[str]) -> None:
    raw = np.frombuffer(pack_strings(strings) or b"", np.uint8)
    assert unpack_strings(raw, len(strings)) == strings
    encoded = encoder("auto").encode(raw, dtype="string")
    assert comes_back(encoded, raw, "string")


@given(st.integers(1, 50), st.integers(0, 9), st.integers(0, 2**32))
def test_delta_comes_back(rows: int, columns: int, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, 8 * rows * columns, np.uint8)
    encoded = codec.encode_delta(raw, rows=rows)
    if columns:
        out = np.empty(raw.nbytes, np.uint8)
        codec.decode(encoded.to_bytes(), out, codec=encoded.codec, dtype="int64", rows=rows)
        assert out.tobytes() == raw.tobytes()


# --- damage ---------------------------------------------------------------------


def bits_or_error(payload: bytes, nbytes: int, number: int, dtype: str, rows: int = 1) -> None:
    """Decode what may be damaged: bytes of the right number, or a `FormatError`."""
    guarded = np.full(nbytes + 64, 0x5A, np.uint8)
    try:
        codec.decode(payload, guarded[32 : 32 + nbytes], codec=number, dtype=dtype, rows=rows)
    except FormatError as error:
        code = error.code
    else:
        code = ""
    assert code in ("", "malformed", "limit", "unknown_codec")
    assert (guarded[:32] == 0x5A).all()
    assert (guarded[32 + nbytes :] == 0x5A).all()


def small_payloads() -> list[tuple[str, str, codec.Encoded, int]]:
    raw = (np.random.default_rng(0).standard_normal(60) * 0.02).astype(np.float32).view(np.uint8)
    auto = codec.Encoder()
    text = np.frombuffer(pack_strings(["loss", "accuracy"] * 9), np.uint8)
    # Planes that are not constant but compress: each frame is short.
    sparse = np.arange(240, dtype=np.uint8) // 80
    rotated = layout.PLANES_ROTATED
    return [
        ("planes", "float32", auto._encode_planes(sparse, (1, 2, 0, 3), rotated), 240),
        ("planes", "complex64", auto._encode_planes(sparse, (3, 0, 1, 0), 0), 240),
        ("planes", "int64", auto._encode_planes(sparse, (3, 0, 1, 0), layout.PLANES_WIDE), 240),
        ("sparse", "float32", auto._encode_sparse(sparse, (1, 2, 0, 3, 0), rotated), 240),
        ("sparse", "uint16", auto._encode_sparse(sparse, (1, 0, 3), 0), 240),
        ("sparse", "bool", auto._encode_sparse(sparse & 1, (0, 3), 0), 240),
        ("zstd", "float32", auto._encode_whole(sparse, 3), 240),
        ("zstd", "string", auto._encode_whole(text, 2), len(text)),
        ("constant", "float64", auto.encode(np.zeros(240, np.uint8), dtype="float64"), 240),
        ("raw", "float32", codec.Encoder("none").encode(raw, dtype="float32"), 240),
        ("delta", "int64", codec.encode_delta(raw, rows=5), 240),
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "encoded", "nbytes"), small_payloads(), ids=lambda value: str(value)[:12]
)
def test_any_flipped_or_missing_byte(
    name: str, dtype: str, encoded: codec.Encoded, nbytes: int
) -> None:
    assert layout.CODEC_NAMES[encoded.codec] == name
    payload = encoded.to_bytes()
    for at in range(len(payload)):
        for mask in (0x01, 0x02, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[at] ^= mask
            bits_or_error(bytes(damaged), nbytes, encoded.codec, dtype, rows=5)
        with pytest.raises(FormatError):
            codec.decode(payload[:at], np.empty(nbytes, np.uint8), codec=encoded.codec, dtype=dtype)
    with pytest.raises(FormatError):
        codec.decode(payload + b"\0", np.empty(nbytes, np.uint8), codec=encoded.codec, dtype=dtype)


@given(
    st.binary(max_size=200), st.integers(0, 40), st.integers(0, 6), st.sampled_from(dtypes.NAMES)
)
def test_any_bytes(payload: bytes, nbytes: int, number: int, dtype: str) -> None:
    bits_or_error(payload, nbytes, number, dtype)


@given(st.binary(max_size=100), st.integers(0, 20))
def test_any_bytes_as_strings(raw: bytes, n: int) -> None:
    try:
        strings = unpack_strings(raw, n)
    except FormatError:
        return
    assert len(strings) == n
    assert pack_strings(strings) == raw


def test_threads_do_not_share_scratch() -> None:
    """Several threads encode and decode at once, each with its own encoder."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            mine, hint = codec.Encoder(), sampling.Hint()
            rng = np.random.default_rng(seed)
            for _ in range(20):
                raw = rng.standard_normal(40_000).astype(np.float32).view(np.uint8)
                assert comes_back(mine.encode(raw, dtype="float32", hint=hint), raw, "float32")
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures

"""Codecs at their borders: sizes at which the encoder changes its mind, frames that lie."""

from __future__ import annotations

import crc32c
import numpy as np
import pytest
import zstandard

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import codec, layout, sampling

RNG = np.random.default_rng(0)


def back(encoded: codec.Encoded, raw: np.ndarray, dtype: str) -> bytes:
    payload = encoded.to_bytes()
    assert len(payload) == encoded.nbytes <= raw.nbytes
    assert crc32c.crc32c(payload) == encoded.crc32c
    out = np.full(raw.nbytes, 0xAA, np.uint8)
    codec.decode(payload, out, codec=encoded.codec, dtype=dtype)
    return out.tobytes()


def test_below_64_bytes_nothing_but_raw_and_constant_is_tried() -> None:
    encoder = codec.Encoder()
    for nbytes, name in ((63, layout.CODEC_RAW), (64, layout.CODEC_ZSTD)):
        raw = np.zeros(nbytes, np.uint8)
        raw[0] = 1
        encoded = encoder.encode(raw, dtype="uint8")
        assert encoded.codec == name
        assert back(encoded, raw, "uint8") == raw.tobytes()
        assert encoder.encode(raw * 0, dtype="uint8").codec == layout.CODEC_CONSTANT


def test_planes_that_turn_out_too_long_are_stored_raw() -> None:
    """A hint was right for the chunks before; this one is noise."""
    encoder, hint = codec.Encoder(), sampling.Hint()
    smooth = (np.arange(32768) // 7).astype("<i4").view(np.uint8)
    assert encoder.encode(smooth, dtype="int32", hint=hint).codec == layout.CODEC_PLANES
    noise = RNG.integers(0, 256, smooth.nbytes, np.uint8)
    encoded = encoder.encode(noise, dtype="int32", hint=hint)
    assert encoded.codec == layout.CODEC_RAW
    assert back(encoded, noise, "int32") == noise.tobytes()


@pytest.mark.parametrize("mib", [3, 4, 5])
def test_chunks_larger_than_the_scratch_that_is_kept(mib: int) -> None:
    encoder = codec.Encoder()
    values = (RNG.standard_normal(mib << 18) * 0.02).astype("<f4").view(np.uint8)
    encoded = encoder.encode(values, dtype="float32")
    assert encoded.codec == layout.CODEC_PLANES
    assert encoder._scratch.nbytes <= 4 << 20
    small = values[: 1 << 18]
    later = encoder.encode(small, dtype="float32").to_bytes()
    assert back(encoded, values, "float32") == values.tobytes()
    assert later == codec.Encoder().encode(small, dtype="float32").to_bytes()


def refused(payload: bytes, nbytes: int, dtype: str = "uint8") -> FormatError:
    with pytest.raises(FormatError) as caught:
        codec.decode(payload, np.empty(nbytes, np.uint8), codec=layout.CODEC_ZSTD, dtype=dtype)
    return caught.value


def test_frames_that_lie() -> None:
    raw = RNG.integers(0, 4, 4096, np.uint8).tobytes()
    frame = zstandard.ZstdCompressor(level=3).compress(raw)
    out = np.empty(4096, np.uint8)
    codec.decode(frame, out, codec=layout.CODEC_ZSTD, dtype="uint8")
    assert out.tobytes() == raw
    assert refused(frame, 4095).code == "malformed"
    assert refused(frame[:-1], 4096).code == "malformed"
    assert refused(frame + b"\0", 4096).code == "malformed"
    assert refused(b"\x29" + frame[1:], 4096).code == "malformed"
    assert refused(frame[:5], 4096).code == "malformed"
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(raw)
    assert refused(unsized, 4096).code == "malformed"
    # Its header says one byte more than comes out.
    assert frame[4] & 0xE3 == 0x60  # two bytes of content size, which count from 256
    lying = frame[:5] + (4096 - 256 + 1).to_bytes(2, "little") + frame[7:]
    assert refused(lying, 4097).code == "malformed"


def test_frames_that_need_a_dictionary() -> None:
    samples = [RNG.integers(0, 4, 600, np.uint8).tobytes() for _ in range(200)]
    dictionary = zstandard.train_dictionary(2048, samples)
    assert dictionary.dict_id()
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(samples[0])
    assert refused(frame, 600).code == "malformed"


def test_a_window_is_memory_that_a_frame_asks_for() -> None:
    magic = (0xFD2FB528).to_bytes(4, "little")
    log = codec._MAX_WINDOW_NBYTES.bit_length() - 1
    for more, code in ((0, "malformed"), (1, "limit")):  # no block follows
        head = magic + bytes([0x80, (log - 10) << 3 | more]) + (1 << 20).to_bytes(4, "little")
        assert refused(head, 1 << 20).code == code

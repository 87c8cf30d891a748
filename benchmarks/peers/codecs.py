"""Codecs: what compresses one chunk in memory, each set up as its documentation advises."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from suite.contestant import Codec


class Zstd(Codec):
    """zstd alone; base of its levels."""

    needs = ("zstandard",)
    distributions = ("zstandard",)
    level: ClassVar[int]

    def __init__(self) -> None:
        import zstandard

        self._compressor = zstandard.ZstdCompressor(level=self.level)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, values: np.ndarray, dtype: str) -> bytes:
        return self._compressor.compress(values.view(np.uint8).data)

    def decode(self, data: bytes, like: np.ndarray, dtype: str) -> np.ndarray:
        return np.frombuffer(self._decompressor.decompress(data), like.dtype)


class Zstd1(Zstd):
    """Fast."""

    name = "zstd-1"
    settings = "zstd level 1 of the chunk's bytes, contexts used again"
    level = 1


class Zstd3(Zstd):
    """The default level."""

    name = "zstd-3"
    settings = "zstd level 3 of the chunk's bytes, contexts used again"
    level = 3


class Blosc2(Codec):
    """Blosc2's chunks; base of its settings."""

    needs = ("blosc2",)
    distributions = ("blosc2",)
    codec: ClassVar[str]
    level: ClassVar[int]
    filter: ClassVar[str]

    def __init__(self) -> None:
        import blosc2

        self._blosc2 = blosc2
        self._settings: dict[int, Any] = {}
        self._decoding = blosc2.DParams(nthreads=1)
        self._room = Room()

    def _encoding(self, typesize: int) -> Any:
        if typesize not in self._settings:
            self._settings[typesize] = self._blosc2.CParams(
                codec=getattr(self._blosc2.Codec, self.codec),
                clevel=self.level,
                filters=[getattr(self._blosc2.Filter, self.filter)],
                typesize=typesize,
                nthreads=1,
            )
        return self._settings[typesize]

    def encode(self, values: np.ndarray, dtype: str) -> bytes:
        return self._blosc2.compress2(values, cparams=self._encoding(values.itemsize))

    def decode(self, data: bytes, like: np.ndarray, dtype: str) -> np.ndarray:
        out = self._room.like(like)
        self._blosc2.decompress2(data, dst=out, dparams=self._decoding)
        return out


class Blosc2Zstd1(Blosc2):
    """What its documentation advises for a good ratio at good speed."""

    name = "blosc2-zstd1-codec"
    settings = "compress2: zstd level 1, shuffle, one thread, automatic blocks; decompress2(dst=)"
    codec, level, filter = "ZSTD", 1, "SHUFFLE"


class Blosc2Zstd5(Blosc2):
    """Its default codec, level and filter."""

    name = "blosc2-zstd5-codec"
    settings = "compress2: zstd level 5, shuffle (its defaults), one thread; decompress2(dst=)"
    codec, level, filter = "ZSTD", 5, "SHUFFLE"


class Blosc2Lz4(Blosc2):
    """What its documentation advises for speed."""

    name = "blosc2-lz4-codec"
    settings = "compress2: LZ4 level 5, bitshuffle, one thread; decompress2(dst=)"
    codec, level, filter = "LZ4", 5, "BITSHUFFLE"


class Pcodec(Codec):
    """Latent variables and tANS; has no bfloat16, whose bits it takes as uint16."""

    name = "pcodec-8"
    settings = "standalone.simple_compress, level 8 (its default), bfloat16 as uint16"
    needs = ("pcodec",)
    distributions = ("pcodec",)

    def __init__(self) -> None:
        import pcodec
        from pcodec import standalone

        self._standalone = standalone
        self._config = pcodec.ChunkConfig(compression_level=8, enable_8_bit=True)
        self._room = Room()

    def encode(self, values: np.ndarray, dtype: str) -> bytes:
        return self._standalone.simple_compress(_without_bool(values), self._config)

    def decode(self, data: bytes, like: np.ndarray, dtype: str) -> np.ndarray:
        out = self._room.like(like)
        self._standalone.simple_decompress_into(data, _without_bool(out))
        return out


class PcodecLarge(Pcodec):
    """In chunks as large as its own pages are for float32: 2^18 numbers."""

    name = "pcodec-8-1mib"
    settings = Pcodec.settings + ", chunks of 1 MiB"
    chunk_nbytes = 1 << 20


class ZipNN(Codec):
    """Huffman codes of exponents, made for the weights of models.

    It destroys what it compresses (0.5.4 reorders sign bits in place), so that whoever needs the
    values has to copy them; the clock does not see that here.
    """

    name = "zipnn"
    settings = "ZipNN(input_format='byte', bytearray_dtype=…, threads=1), chunks of 256 KiB"
    needs = ("zipnn",)
    distributions = ("zipnn",)

    def __init__(self) -> None:
        import zipnn

        self._make = zipnn.ZipNN
        self._made: dict[str, Any] = {}

    def _of(self, dtype: str) -> Any:
        if dtype not in self._made:
            self._made[dtype] = self._make(input_format="byte", bytearray_dtype=dtype, threads=1)
        return self._made[dtype]

    def takes(self, dtype: str) -> bool:
        return dtype in ("float32", "float16", "bfloat16")

    def encode(self, values: np.ndarray, dtype: str) -> bytes:
        return self._of(dtype).compress(values.view(np.uint8).data)

    def decode(self, data: bytes, like: np.ndarray, dtype: str) -> np.ndarray:
        return np.frombuffer(self._of(dtype).decompress(data), like.dtype)


class Room:
    """Memory that a codec decodes into, over and over."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def like(self, like: np.ndarray) -> np.ndarray:
        """Give room for as many values of the same dtype."""
        if self._bytes.nbytes < like.nbytes:
            self._bytes = np.empty(like.nbytes, np.uint8)
        return self._bytes[: like.nbytes].view(like.dtype)


def _without_bool(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8) if values.dtype == np.bool_ else values

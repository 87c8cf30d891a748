"""Valid runs that show what tensors can be: dtypes, shapes, chunks, codecs, strings, steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from build import noise
from cases import ITEMSIZE, RunCase, S, Value
from numpy.typing import NDArray
from payloads import CONSTANT, DELTA, PLANES, RAW, SPARSE, ZSTD

F32 = NDArray[np.float32]


def f32(*values: float) -> F32:
    """Give a vector."""
    return np.array(values, "<f4")


def scalar(value: float, dtype: str = "<f4") -> NDArray[np.generic]:
    """Give an array of rank 0."""
    return np.array(value, dtype)


def smooth(shape: Sequence[int], seed: int) -> F32:
    """Give values that compress: small multiples of 1/64."""
    n = int(np.prod(shape))
    return ((np.arange(n) * (seed + 3) % 97 - 48) / 64).astype("<f4").reshape(shape)


def cases() -> Iterator[RunCase]:
    """Give all of them."""
    yield _empty()
    yield _only_opened()
    yield _scalar()
    yield _scalar_series()
    yield _zero_length()
    yield _dtypes()
    yield _nan_payloads()
    yield _huge_steps()
    yield _names()
    yield _chunks()
    yield _codecs()
    yield _planes()
    yield _wide()
    yield _sparse()
    yield _steps_in_a_chunk()
    yield _repeat()
    yield _reuse()
    yield _varying_shape()
    yield _dtype_change()
    yield _overwritten()
    yield _strings()
    yield _strings_in_chunks()
    yield _statistics()


def _empty() -> RunCase:
    run = RunCase("run-empty", "A run.json and nothing else.", attrs={"lr": 0.5, "note": "é"})
    run.is_closed = False
    run.say("x", 0, "not_yet_written")
    return run


def _only_opened() -> RunCase:
    run = RunCase("run-only-opened", "Flush 0 alone: a segment without pages, 512 bytes long.")
    run.is_closed = False
    run.writer().begin()
    run.say("x", 0, "not_yet_written", mode=0)
    return run


def _scalar() -> RunCase:
    run = RunCase("one-scalar", "One value of one name at one step, inline, in a closed run.")
    writer = run.writer()
    writer.save(S("loss", "float64"), [7], [scalar(0.1, "<f8")])
    writer.log(0, [7])
    writer.publish(is_closed=True, complete=(7, -1, -1, -1))
    run.say("loss", 6, "never_saved")
    run.say("loss", 8, "never_saved", mode=0)
    return run


def _scalar_series() -> RunCase:
    run = RunCase(
        "scalar-series", "Steps with strides and gaps, several entries of one series, inline."
    )
    series, writer = S("loss", "float64"), run.writer()
    for steps in ([0, 10, 20, 30, 40], [41], [50, 53], [100, 101, 102], [1000, 3000, 5000]):
        writer.save(series, steps, [scalar(1 / (s + 1), "<f8") for s in steps])
        writer.log(0, steps)
    writer.publish(is_closed=True, complete=(5000, -1, -1, -1))
    for step in (1, 11, 42, 51, 103, 2000, 5001):
        run.say("loss", step, "never_saved")
    return run


def _zero_length() -> RunCase:
    run = RunCase("zero-length-axes", "Tensors without elements: one chunk, number 0, no bytes.")
    writer = run.writer()
    writer.save(S("a", "float32", (0,)), [1, 2, 3], [np.zeros(0, "<f4")] * 3)
    writer.save(S("b", "int8", (3, 0, 2), (2, 4, 1)), [1], [np.zeros((3, 0, 2), "i1")])
    varying = S("c", "float32", (-1,))
    for step, n in ((1, 0), (2, 2), (3, 0)):
        writer.save(varying, [step], [smooth((n,), step)])
    writer.publish(is_closed=True)
    run.ask("b", 1, np.zeros((0, 2), "i1"), dtype="int8", index=[2])
    run.ask("c", 2, smooth((2,), 2)[:0], index=[(5, None, None)])
    return run


_MASK = {
    "bool": 1, "float6_e2m3fn": 63, "float6_e3m2fn": 63, "float4_e2m1fn": 15, "uint4": 15,
    "uint2": 3,
}  # fmt: skip


def _dtypes() -> RunCase:
    run = RunCase("dtypes", "Every dtype, all bits in use, inline; as a scalar and as 2 x 3.")
    writer = run.writer()
    for dtype, size in ITEMSIZE.items():
        for shape in ((), (2, 3)):
            n = int(np.prod(shape))
            raw = np.frombuffer(noise(f"dtype {dtype} {shape}", n * size), "u1")
            if dtype in _MASK:
                raw = raw & _MASK[dtype]
            elif dtype in ("int4", "int2"):  # sign-extended
                half = 8 if dtype == "int4" else 2
                raw = ((raw.astype("i2") % (2 * half)) - half).astype("i1").view("u1")
            value = raw.view(f"V{size}").reshape(shape)
            writer.save(S(f"{dtype}/{len(shape)}", dtype, shape), [3], [value])
    writer.save(S("string/0", "string"), [3], [["ß€𝄞"]])
    writer.publish(is_closed=True)
    return run


def _nan_payloads() -> RunCase:
    run = RunCase(
        "nan-payloads", "Quiet and signalling NaN with payloads, -0, infinities, subnormals."
    )
    writer = run.writer()
    bits = {
        "float16": ("<u2", [0x7E01, 0xFE23, 0x7C01, 0x8000, 0x7C00, 0xFC00, 0x0001, 0x83FF]),
        "bfloat16": ("<u2", [0x7FC1, 0xFFE3, 0x7F81, 0x8000, 0x7F80, 0xFF80, 0x0001, 0x807F]),
        "float32": (
            "<u4", [0x7FC00001, 0xFFEDCBA9, 0x7F800001, 0x80000000, 0x7F800000, 0xFF800000, 1],
        ),
        "float64": (
            "<u8",
            [0x7FF8000000000001, 0xFFFEDCBA98765432, 0x7FF0000000000001, 1 << 63, 0x7FF << 52, 1],
        ),
    }  # fmt: skip
    for dtype, (words, values) in bits.items():
        value = np.array(values, words)
        writer.save(S(dtype, dtype, value.shape), [0], [value])
    pair = np.array([0x7FC00001, 0x80000000, 0xFF800001, 0x7F800000], "<u4").view("<u8")
    writer.save(S("complex64", "complex64", (2,)), [0], [pair])
    for number, codec in enumerate((PLANES, ZSTD)):
        value = np.tile(np.array(bits["float32"][1], "<u4"), 40)
        writer.save(
            S("coded", "float32", (280,)), [number], [value], codec=codec, rotated=codec == PLANES
        )
    writer.publish(is_closed=True)
    return run


def _huge_steps() -> RunCase:
    run = RunCase("huge-steps", "Steps beyond 53 bits, up to 2^62 - 1, and a stride of 2^61.")
    series, writer = S("x", "int64"), run.writer()
    last = 2**62 - 1
    for steps in ([0], [1, 1 + 2**61], [2**53 + 1], [last - 2, last - 1, last]):
        writer.save(series, steps, [np.array(-step, "<i8") for step in steps])
        writer.log(0, steps)
    writer.publish(is_closed=True, complete=(last, -1, -1, -1))
    run.say("x", 2**53, "never_saved")
    run.say("x", last - 3, "never_saved")
    return run


def _names() -> RunCase:
    run = RunCase(
        "names", "Names of 1 and 1,024 bytes, outside ASCII, in order of their bytes, not paths."
    )
    writer = run.writer()
    names = [
        "a", "a/b", "a\\b", "../a", ".", "run.json", "\t\n\x7f", "Z", "\x01", "ä", "äö/ß", "重み",
        "\uffff", "\U00010000", "😀", "𝛁loss", "x" * 1024, "é" * 512, "\u0301", " ", "\x00",
    ]  # fmt: skip
    for i, name in enumerate(names):
        writer.save(S(name, "uint8"), [i], [np.array(i, "u1")])
    writer.publish(is_closed=True)
    return run


def _chunks() -> RunCase:
    run = RunCase(
        "chunks",
        "Grids: one chunk and many, short chunks at the edges, a chunk longer than its axis.",
    )
    writer = run.writer()
    shard = writer.shard()
    table = np.arange(35, dtype="<i4").reshape(5, 7)
    cube = (np.arange(60, dtype="<i2") - 30).reshape(3, 4, 5)
    writer.save(S("whole", "int32", (5, 7)), [1], [table], shard=shard)
    writer.save(S("cut", "int32", (5, 7), (2, 3)), [1, 2], [table, -table], shard=shard)
    writer.save(S("rows", "int32", (5, 7), (1, 0)), [1], [table])
    writer.save(S("long", "int32", (5, 7), (100, 3)), [1], [table])
    writer.save(S("cube", "int16", (3, 4, 5), (2, 0, 2)), [1], [cube], shard=shard)
    writer.save(S("columns", "int16", (3, 4, 5), (1, 4, 5)), [1], [cube])
    writer.publish(is_closed=True)
    for name in ("whole", "cut", "rows", "long"):
        run.ask(name, 1, table[1:5:2, ::3], dtype="int32", index=[(1, 5, 2), (None, None, 3)])
        run.ask(name, 1, table[4, 6:2], dtype="int32", index=[4, (6, 2, None)])
        run.ask(name, 1, table[::-1, -1], dtype="int32", index=[(None, None, -1), -1])
    for name in ("cube", "columns"):
        part = cube[2, 1:3, ::-2]
        run.ask(name, 1, part, dtype="int16", index=[2, (1, 3, None), (None, None, -2)])
    return run


def _codecs() -> RunCase:
    run = RunCase("codecs", "Codecs raw, constant, zstd and delta, inline and in a shard.")
    writer = run.writer()
    shard = writer.shard()
    for where, place in (("inline", None), ("shard", shard)):
        value = smooth((64,), 5)
        writer.save(S(f"raw/{where}", shape=(64,)), [1, 2], [value, -value], shard=place)
        writer.save(S(f"zstd/{where}", shape=(64,)), [1], [value], codec=ZSTD, shard=place)
        for dtype in ("float32", "complex128", "bool", "uint2", "bfloat16"):
            one = np.frombuffer(noise(dtype, ITEMSIZE[dtype]), "u1") & 1
            full = np.tile(one, 40).view(f"V{ITEMSIZE[dtype]}").reshape(8, 5)
            writer.save(
                S(f"constant/{dtype}/{where}", dtype, (8, 5)), [1], [full], codec=CONSTANT,
                shard=place,
            )  # fmt: skip
        words = [np.array([2**63 - 1 - i, -(2**63) + 7 * i, i], "<i8") for i in range(5)]
        writer.save(
            S(f"delta/{where}", "int64", (3,)), [1, 2, 3, 4, 5], words, codec=DELTA, shard=place
        )
    mixed = {0: ZSTD, 1: CONSTANT, 2: RAW, 3: PLANES}
    value = smooth((4, 40), 6)
    value[1] = 0.25
    writer.save(S("mixed", shape=(4, 40), grid=(1, 0)), [1], [value], codec=mixed, shard=shard)
    writer.publish(is_closed=True)
    run.ask("mixed", 1, value[:, 39], index=[(None, None, None), 39])
    return run


def _planes() -> RunCase:
    run = RunCase(
        "codec-planes",
        "Planes, rotated and not, of words of 1, 2, 4 and 8 bytes; constant, raw and zstd planes.",
    )
    writer = run.writer()
    shard = writer.shard()
    for dtype in ("uint8", "int16", "float16", "bfloat16", "float32", "float64", "int64",
                  "complex64", "complex128"):  # fmt: skip
        size = ITEMSIZE[dtype]
        word = size // 2 if dtype.startswith("complex") else size
        length = 96 if size <= 4 else 30
        n = length * size // word
        low = np.frombuffer(noise(f"planes {dtype}", n * word), "u1").reshape(n, word).copy()
        low[:, -1] = np.frombuffer(noise(f"signs {dtype}", n), "u1") & 0x83  # signs, few exponents
        if word > 2:
            low[:, 1] = 0x5A  # a constant plane
        value = low.reshape(-1).view(f"V{size}")
        for rotated in (False, True):
            name = f"{dtype}/{'rotated' if rotated else 'plain'}"
            writer.save(
                S(name, dtype, (length,)), [1], [value], codec=PLANES, rotated=rotated, shard=shard
            )
    constant = np.full(10, 1.5, "<f8")
    writer.save(S("all-constant", "float64", (10,)), [1], [constant], codec=PLANES, rotated=True)
    writer.save(S("one-word", "float32", (1,)), [1], [f32(-2.5)], codec=PLANES, rotated=True)
    writer.publish(is_closed=True)
    return run


def _wide() -> RunCase:
    run = RunCase("codec-wide", "Planes of two bytes of each word: raw, constant and zstd ones.")
    writer = run.writer()
    shard = writer.shard()
    for dtype in ("int32", "uint32", "int64", "uint64", "float32", "complex128"):
        size = ITEMSIZE[dtype]
        word = size // 2 if dtype.startswith("complex") else size
        n = 60 * size // word
        pairs = np.frombuffer(noise(f"wide {dtype}", n * word), "<u2").reshape(n, -1).copy()
        pairs[:, -1] &= 0x8003  # is a frame; or constant, as most of token numbers
        if word > 4:
            pairs[:, 1:3] = 0
        value = pairs.reshape(-1).view(f"V{size}")
        for rotated in (False, True):
            series = S(f"{dtype}/{'rotated' if rotated else 'plain'}", dtype, (60,))
            writer.save(
                series, [1], [value], codec=PLANES, rotated=rotated, wide=True, shard=shard
            )  # fmt: skip
    tokens = np.tile(np.array([101, 30522, 7592, 102, 0, 0], "<i8"), 40)
    writer.save(
        S("tokens", "int64", (240,)), [1], [tokens], codec=PLANES, wide=True, shard=shard
    )  # fmt: skip
    writer.save(S("one", "int32", (1,)), [1], [tokens[:1].astype("<i4")], codec=PLANES, wide=True)
    writer.publish(is_closed=True)
    run.ask("tokens", 1, tokens[5:9], dtype="int64", index=[(5, 9, None)])
    return run


def _sparse() -> RunCase:
    run = RunCase(
        "codec-sparse",
        "Words that are 0 left out, planes and maps stored in each way; lengths that fill no byte.",
    )
    writer = run.writer()
    shard = writer.shard()
    for dtype in ("bool", "uint8", "int16", "float16", "bfloat16", "float32", "float64", "int64",
                  "complex64", "complex128"):  # fmt: skip
        size = ITEMSIZE[dtype]
        word = size // 2 if dtype.startswith("complex") else size
        length = 131
        n = length * size // word
        words = np.frombuffer(noise(f"sparse {dtype}", n * word), "u1").reshape(n, word).copy()
        words[:, -1] &= 0x83  # signs, few exponents
        words[np.frombuffer(noise(f"zeros {dtype}", n), "u1") < 150] = 0
        if dtype == "bool":
            words = (words != 0).astype("u1")
        value = words.reshape(-1).view(f"V{size}")
        for rotated in (False, True):
            name = f"{dtype}/{'rotated' if rotated else 'plain'}"
            writer.save(
                S(name, dtype, (length,)), [1], [value], codec=SPARSE, rotated=rotated, shard=shard
            )
    runs = np.repeat(f32(0, 3, 0, -0.0), 200)
    writer.save(S("map-is-a-frame", shape=(800,)), [1], [runs], codec=SPARSE, shard=shard)
    full, one = smooth((64,), 1) + 1, f32(0, 0, 0, 0, 0, 0, 0, 0, 0, 2.5, 0)
    writer.save(S("nothing-left-out", shape=(64,)), [1], [full], codec=SPARSE, rotated=True)
    writer.save(S("one-is-there", shape=(11,)), [1], [one], codec=SPARSE, rotated=True)
    writer.save(S("none-is-there", shape=(11,)), [1], [0 * one], codec=SPARSE)
    writer.publish(is_closed=True)
    run.ask("float32/plain", 1, np.zeros(0, "<f4"), index=[(40, 40, None)])
    run.ask("map-is-a-frame", 1, runs[199:403], index=[(199, 403, None)])
    return run


def _steps_in_a_chunk() -> RunCase:
    run = RunCase("steps-in-a-chunk", "Chunks that hold several steps, with a stride, per codec.")
    writer = run.writer()
    shard = writer.shard()
    steps = [100, 105, 110, 115]
    values: list[Value] = [smooth((6, 4), i) for i in range(4)]
    for name, codec in (("raw", RAW), ("zstd", ZSTD), ("planes", PLANES), ("sparse", SPARSE)):
        series = S(name, shape=(6, 4))
        writer.save(series, steps, values, codec=codec, rotated=True, shard=shard)
        writer.save(series, [120], values[:1], codec=codec)
    writer.save(S("cut", shape=(6, 4), grid=(4, 3)), steps, values, codec=ZSTD, shard=shard)
    writer.publish(is_closed=True)
    for step in (99, 101, 112, 121):
        run.say("raw", step, "never_saved")
    value = np.asarray(values[2])
    run.ask("cut", 110, value[3:5, 2:4], index=[(3, 5, None), (2, 4, None)])
    return run


def _repeat() -> RunCase:
    run = RunCase("repeat", "Entries whose payload holds one step that stands for all.")
    writer = run.writer()
    shard = writer.shard()
    value = smooth((40,), 1)
    series = S("x", shape=(40,))
    writer.save(series, [0, 2, 4, 6], [value] * 4, is_repeat=True, shard=shard, codec=ZSTD)
    writer.save(series, [7], [value + 1])
    writer.save(S("cut", shape=(40,), grid=(16,)), [0, 1, 2], [value] * 3, is_repeat=True)
    zero = np.zeros((2, 2), "<f4")
    writer.save(S("zero", shape=(2, 2)), [0, 5, 10], [zero] * 3, is_repeat=True, codec=CONSTANT)
    writer.save(S("one", "int8"), [3], [np.array(-1, "i1")], is_repeat=True)
    writer.save(S("text", "string", (2,)), [1, 2], [["ä", ""]] * 2, is_repeat=True)
    writer.publish(is_closed=True)
    run.say("x", 3, "never_saved")
    return run


def _reuse() -> RunCase:
    run = RunCase(
        "reuse", "Several entries name the same payload; digests; one lies in another's shard."
    )
    writer = run.writer()
    shard = writer.shard()
    value, series = smooth((80,), 2), S("w", shape=(80,), grid=(40,))
    first = writer.save(series, [0], [value], shard=shard, has_digest=True)
    shard.flush()
    frozen = value.copy()
    frozen[40:] += 1
    second = writer.save(series, [10], [frozen], shard=shard, has_digest=True)
    keep = ("shard", "offset", "nbytes", "raw_nbytes", "crc32c", "digest", "codec", "flags")
    shard.flush()
    second[0] |= {key: first[0][key] for key in keep}
    writer.publish(is_closed=True)
    later = run.writer(attempt=1, resume_step=11)
    third = later.save(series, [11], [frozen], has_digest=True)
    for entry, old in zip(third, second, strict=True):
        entry.update({key: old[key] for key in keep} | {"inline": b""})
    later.publish(is_closed=True)
    return run


def _varying_shape() -> RunCase:
    run = RunCase(
        "varying-shape", "Axes whose lengths stand in the entries, with and without grid."
    )
    writer = run.writer()
    shard = writer.shard()
    for step, n in enumerate((3, 1, 5, 3)):
        writer.save(S("batch", shape=(-1, 4)), [step], [smooth((n, 4), step)])
    cut = S("map", "int16", (-1, 2, -1), (2, 0, 3))
    for step, (a, b) in enumerate(((1, 1), (3, 4), (4, 7))):
        value = np.arange(a * 2 * b, dtype="<i2").reshape(a, 2, b) - step
        writer.save(cut, [step], [value], shard=shard)
    value = np.arange(56, dtype="<i2").reshape(4, 2, 7) - 2
    writer.publish(is_closed=True)
    run.ask("map", 2, value[3, :, 2:7:2], dtype="int16", index=[3, (None, None, None), (2, 7, 2)])
    return run


def _dtype_change() -> RunCase:
    run = RunCase("dtype-change", "One name whose dtype, rank and grid change: several series.")
    writer = run.writer()
    writer.save(S("x", "float32", (4,)), [0, 1], [smooth((4,), 0), smooth((4,), 1)])
    writer.save(S("x", "float64", (4,)), [2], [smooth((4,), 2).astype("<f8")])
    writer.save(S("x", "float32", (2, 2)), [3], [smooth((2, 2), 3)])
    writer.save(S("x", "float32", (4,), (3,)), [4], [smooth((4,), 4)])
    writer.save(S("x", "string"), [5], [["now a text"]])
    writer.publish(is_closed=True)
    return run


def _overwritten() -> RunCase:
    run = RunCase(
        "overwritten", "Steps saved again in later flushes: the same series, and another one."
    )
    writer = run.writer()
    series, other = S("x", shape=(4,), grid=(2,)), S("x", "int32", (3,))
    old: list[Value] = [smooth((4,), i) for i in range(4)]
    writer.save(series, [0, 1, 2, 3], old, is_visible=False)
    writer.publish()
    writer.expect(series, [0, 3], [old[0], old[3]], (4,))
    writer.save(series, [1], [smooth((4,), 11)])
    writer.save(other, [2], [np.array([1, 2, 3], "<i4")], is_visible=False)
    writer.publish()
    writer.save(series, [2], [smooth((4,), 12)])
    writer.publish(is_closed=True)
    return run


def _strings() -> RunCase:
    run = RunCase("strings", "Strings of rank 0 and 1, empty ones and none, one step and several.")
    writer = run.writer()
    writer.save(S("text", "string"), [0], [["Grüße, 世界 🌍"]])
    writer.save(S("text", "string"), [1, 2, 3], [[""], ["a"], ["a\x00b\n"]])
    writer.save(S("list", "string", (3,)), [0, 1], [["", "x", "é"], ["one", "", ""]])
    for step, texts in enumerate((["p"], [], ["", ""], ["q" * 300, "r"])):
        writer.save(S("varying", "string", (-1,)), [step], [texts])
    writer.save(S("none", "string", (0,)), [0, 1], [[], []])
    writer.publish(is_closed=True)
    return run


def _strings_in_chunks() -> RunCase:
    run = RunCase("strings-in-chunks", "Strings in a shard, compressed, and cut by a grid.")
    writer = run.writer()
    shard = writer.shard()
    texts = [f"token {i} " * 5 for i in range(20)]
    writer.save(S("zstd", "string", (20,)), [1], [texts], codec=ZSTD, shard=shard)
    writer.save(S("raw", "string", (20,)), [1], [texts], shard=shard)
    writer.save(S("cut", "string", (20,), (8,)), [1, 2], [texts, texts[::-1]], shard=shard)
    writer.publish(is_closed=True)
    return run


def _statistics() -> RunCase:
    run = RunCase(
        "statistics", "Statistics beside data, without data, of NaN and infinities, of nothing."
    )
    writer = run.writer()
    shard = writer.shard()
    series = S("w", shape=(100,))
    values = [smooth((100,), i) for i in range(3)]
    writer.save(series, [0, 1, 2], list(values), shard=shard)
    writer.stats(series, [0, 1, 2], values)
    odd = S("odd", "float64", (8,), mode=1)
    value = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0, -8.0, np.nan], "<f8")
    writer.save(odd, [0], [value], shard=shard)
    writer.stats(odd, [0], [value])
    writer.stats(S("only", shape=(6,)), [4, 8], [f32(1, 2, 3), f32(np.nan, np.nan)])
    writer.publish(is_closed=True)
    return run

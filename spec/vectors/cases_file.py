"""Single files and payloads that must be refused: bundle, run.json, payloads, strings."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import build
import payloads
from build import noise
from cases import FileCase, RunCase, S
from cases_damage import flip
from cases_index import f64
from payloads import CONSTANT, DELTA, PLANES, RAW, SPARSE, ZSTD


def cases() -> Iterator[FileCase]:
    """Give all of them."""
    yield from _bundles()
    yield from _run_jsons()
    yield from _payloads()
    yield from _planes()
    yield from _sparse()
    yield from _strings()


# --- bundle -----------------------------------------------------------------------------


def _bundles() -> Iterator[FileCase]:
    run = RunCase("bundle", "")
    writer = run.writer()
    writer.begin()
    writer.save(S("loss", "float64"), [0], [f64(1)])
    writer.publish()
    copied = [(name, len(s.encode()), s.encode()) for name, s in run.segments]
    good = build.bundle(run.run_id, copied)

    def case(title: str, about: str, code: str, data: bytes) -> FileCase:
        facts = {"run_id": run.run_id.hex(), "code": code}
        return FileCase(f"bundle-{title}", about, "bundle", data, facts)

    yield case("magic", "Another magic.", "bad_magic", flip(good, 3))
    yield case("checksum", "The header fails its checksum.", "checksum", flip(good, 33))
    yield case("table-checksum", "The table fails its checksum.", "checksum", flip(good, 64 + 20))
    for title, about, code, header in (
        ("major", "Major version 2.", "unsupported_version", {"major": 2}),
        ("required", "An unknown required bit.", "unknown_feature", {"required": 4}),
        ("run-id", "Another run.", "wrong_run", {"run_id": noise("another run", 16)}),
        ("limit-count", "2^32 - 1 rows.", "limit", {"count": 2**32 - 1}),
        ("reserved", "A reserved byte that is not zero.", "malformed", {"reserved": 1 << 56}),
        ("file-absurd", "file_nbytes is 2^63.", "truncated", {"file_nbytes": 1 << 63}),
        ("count", "A row fewer than the table has.", "checksum", {"count": 1}),
    ):
        data = build.bundle(run.run_id, copied, header=header)
        yield case(title, about, code, data)
    place = 64 + 128
    for title, about, row, code in (
        ("row-gap", "A row's bytes begin 8 late.", {"offset": place + 8}, "malformed"),
        ("row-overlap", "A row's bytes begin within the table.", {"offset": 64}, "malformed"),
        ("row-overflow", "A row's bytes begin at 2^64 - 8.", {"offset": 2**64 - 8}, "malformed"),
        ("row-nbytes", "A row with 2^63 bytes.", {"nbytes": 2**63}, "malformed"),
        ("row-short", "More bytes than the segment has.", {"file_nbytes": 8}, "malformed"),
        ("row-reserved", "A reserved byte that is not zero.", {"reserved": 9}, "malformed"),
        ("row-count-zero", "A segment of no flushes.", {"count": 0}, "malformed"),
        ("row-count", "A segment of more flushes than there are.", {"count": 9}, "malformed"),
        ("row-worker", "A segment of worker 10^6.", {"worker": 10**6}, "limit"),
        ("row-last", "A segment of flush 10^12.", {"last": 10**12}, "limit"),
    ):
        data = build.bundle(run.run_id, copied, rows={0: row})
        yield case(title, about, code, data)
    twice = build.bundle(run.run_id, [copied[0], copied[0]])
    yield case("row-twice", "The same segment twice.", "malformed", twice)
    yield case("longer", "A byte follows the end.", "malformed", good + b"\0")
    for title, about, at in (
        ("nothing", "No bytes.", 0),
        ("magic", "Cut behind the magic.", 8),
        ("header", "Cut within the header.", 63),
        ("table", "Cut before the table.", 64),
        ("within-table", "Cut within the table.", 128),
        ("copies", "Cut before the copies.", place),
        ("second-copy", "Cut between two copies.", place + copied[0][1]),
        ("last-byte", "The last byte is missing.", len(good) - 1),
    ):
        yield case(f"cut-{title}", about, "truncated", good[:at])


# --- run.json ---------------------------------------------------------------------------


def _run_jsons() -> Iterator[FileCase]:
    run_id = noise("run.json", 16)
    good = build.run_json(run_id, {"note": "x"})

    def case(title: str, about: str, code: str, data: bytes) -> FileCase:
        return FileCase(f"runjson-{title}", about, "run.json", data, {"code": code})

    yield case("empty", "No bytes.", "not_a_run", b"")
    yield case("not-json", "It does not begin with {.", "not_a_run", b"[]\n" + good)
    yield case("space", "A space before {.", "not_a_run", b" " + good)
    yield case("flipped", "A flipped bit.", "checksum", flip(good, 40, 1))
    yield case("digits", "Another checksum.", "checksum", good[:-11] + b'00000000"}\n')
    upper = build.run_json(run_id, {"note": "upper 3"})
    digits = upper[-11:-3]
    if not any(c in b"abcdef" for c in digits):
        raise ValueError("choose attributes whose checksum has a letter")
    yield case(
        "upper-case", "Upper-case digits.", "checksum", upper[:-11] + digits.upper() + b'"}\n'
    )
    for title, at in (
        ("first-byte", 1), ("half", len(good) // 2), ("before-checksum", len(good) - 22),
        ("within-checksum", len(good) - 5), ("line-feed", len(good) - 1),
    ):  # fmt: skip
        yield case(f"cut-{title}", f"Cut at byte {at}.", "checksum", good[:at])
    yield case("longer", "A line feed too many.", "checksum", good + b"\n")
    for title, about, code, members in (
        ("format", "Another format.", "not_a_run", {"format": "tensorstore"}),
        ("major", "Major version 2.", "unsupported_version", {"format_version": [2, 0]}),
        ("version", "A version that is a number.", "malformed", {"format_version": 1}),
        ("required", "An unknown feature.", "unknown_feature", {"required": ["parity"]}),
        ("required-type", "required is an object.", "malformed", {"required": {}}),
        ("run-id", "A run_id of 31 digits.", "malformed", {"run_id": run_id.hex()[1:]}),
        ("run-id-upper", "A run_id in upper case.", "malformed", {"run_id": "AB" * 16}),
        ("created", "created_us is a text.", "malformed", {"created_us": "now"}),
        ("attrs", "attrs is a list.", "malformed", {"attrs": []}),
        ("nan", "NaN in attrs.", "malformed", {"attrs": {"lr": float("nan")}}),
    ):
        yield case(title, about, code, build.run_json(run_id, {}, **members))
    body = json.dumps({"format": "tensorstore_fmt"})[:-1].encode()
    yield case("members", "Members are missing.", "malformed", build.sealed_json(body))
    broken = build.sealed_json(body + b",")
    yield case("syntax", "No JSON, with a good checksum.", "malformed", broken)
    utf8 = build.sealed_json(good[:-23] + b'\xff"}')
    yield case("utf8", "Not UTF-8, with a good checksum.", "malformed", utf8)


# --- payloads ---------------------------------------------------------------------------


def _payload(
    title: str, about: str, code: str, data: bytes, *, codec: int, dtype: str, raw_nbytes: int,
    rows: int = 1,
) -> FileCase:  # fmt: skip
    facts = {"codec": codec, "dtype": dtype, "raw_nbytes": raw_nbytes, "rows": rows, "code": code}
    return FileCase(f"payload-{title}", about, "payload", data, facts)


def _payloads() -> Iterator[FileCase]:
    raw = bytes(range(64)) * 2
    frame = payloads.zstd(raw)
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
    for title, about, codec, dtype, nbytes, data in (
        ("raw-short", "A byte too few.", RAW, "int8", 128, raw[1:]),
        ("raw-long", "A byte too many.", RAW, "int8", 128, raw + b"\0"),
        ("constant-short", "Less than one element.", CONSTANT, "float32", 128, raw[:3]),
        ("constant-long", "Two elements.", CONSTANT, "float32", 128, raw[:8]),
        ("constant-string", "A constant string.", CONSTANT, "string", 128, raw[:1]),
        ("constant-empty", "A chunk of no bytes that is constant.", CONSTANT, "int8", 0, b"\1"),
        ("raw-empty", "A chunk of no bytes with a payload.", RAW, "int8", 0, b"\1"),
        ("zstd-empty", "A chunk of no bytes in a frame.", ZSTD, "int8", 0, payloads.zstd(b"")),
        ("zstd-no-size", "No content size.", ZSTD, "int8", 128,
         payloads.zstd(raw, with_size=False)),
        ("zstd-size", "Another content size.", ZSTD, "int8", 120, frame),
        ("zstd-trailing", "Bytes behind the frame.", ZSTD, "int8", 128, frame + b"\0"),
        ("zstd-two", "Two frames.", ZSTD, "int8", 128,
         payloads.zstd(raw[:64]) + payloads.zstd(raw[64:])),
        ("zstd-skippable", "A skippable frame in front.", ZSTD, "int8", 128, skippable + frame),
        ("zstd-cut", "A frame that is cut.", ZSTD, "int8", 128, frame[:-3]),
        ("zstd-noise", "No frame.", ZSTD, "int8", 128, noise("frame", 60)),
        ("zstd-nothing", "No bytes.", ZSTD, "int8", 128, b""),
        ("delta-dtype", "delta of float64.", DELTA, "float64", 128, raw),
        ("delta-short", "delta with 8 bytes too few.", DELTA, "int64", 128, raw[8:]),
    ):  # fmt: skip
        yield _payload(title, about, "malformed", data, codec=codec, dtype=dtype, raw_nbytes=nbytes)
    bomb = payloads.zstd(bytes(1 << 20))
    yield _payload(
        "zstd-bomb", "A frame that says 1 MiB, for a chunk of 128 bytes.", "malformed", bomb,
        codec=ZSTD, dtype="int8", raw_nbytes=128,
    )  # fmt: skip
    yield _payload(
        "delta-rows", "16 words are not 3 rows.", "malformed", raw, codec=DELTA, dtype="int64",
        raw_nbytes=128, rows=3,
    )  # fmt: skip
    yield _payload(
        "limit-raw-nbytes", "A chunk of 2^27 + 8 bytes.", "limit", raw[:8], codec=CONSTANT,
        dtype="int64", raw_nbytes=2**27 + 8,
    )  # fmt: skip
    for codec in (6, 254):
        yield _payload(
            f"codec-{codec}", f"Codec {codec}.", "unknown_codec", raw, codec=codec, dtype="int8",
            raw_nbytes=128,
        )  # fmt: skip
    yield _payload(
        "dtype", "dtype float128.", "unknown_dtype", raw, codec=RAW, dtype="float128",
        raw_nbytes=128,
    )  # fmt: skip


def _planes() -> Iterator[FileCase]:
    low, high = noise("plane", 40), b"\x07" * 40
    planes = [low, payloads.zstd(high)]
    good = payloads.planes_of(planes, rotated=False)

    def header(flags: int, width: int, reserved: int, *lengths: int) -> bytes:
        return struct.pack(f"<BBH{len(lengths)}I", flags, width, reserved, *lengths)

    n, z = len(low), len(planes[1])
    body = low + planes[1]
    other = payloads.zstd(bytes(41))
    unsized = payloads.zstd(high, with_size=False)
    for title, about, data in (
        ("flags", "A reserved flag.", header(2, 2, 0, n, z) + body),
        ("width", "Words of 4 bytes for a dtype of 2.", header(0, 4, 0, n, z, 0, 0) + body),
        ("width-zero", "Words of 0 bytes.", header(0, 0, 0) + body),
        ("reserved", "A reserved byte.", header(0, 2, 1, n, z) + body),
        ("length-zero", "A plane of 0 bytes.", header(0, 2, 0, n, 0) + low),
        ("length-more", "A plane longer than n.",
         header(0, 2, 0, n + 1, z) + low + b"\0" + body[n:]),
        ("length-absurd", "A plane of 2^32 - 1 bytes.", header(0, 2, 0, n, 2**32 - 1) + body),
        ("trailing", "Bytes behind the planes.", good + b"\0"),
        ("cut", "The last byte is missing.", good[:-1]),
        ("cut-header", "Cut within the lengths.", good[:9]),
        ("nothing", "No bytes.", b""),
        ("frame-size", "A frame of another length than n.",
         payloads.planes_of([low, other], rotated=False)),
        ("frame-no-size", "A frame without its content size.",
         payloads.planes_of([low, unsized], rotated=False)),
        ("frame-noise", "A plane that is no frame.",
         payloads.planes_of([low, noise("frame", 12)], rotated=True)),
    ):  # fmt: skip
        yield _payload(
            f"planes-{title}", about, "malformed", data, codec=PLANES, dtype="int16", raw_nbytes=80
        )
    wide = noise("wide", 80)  # 20 words of 4 bytes, in two planes
    for title, about, data in (
        ("lengths", "As many lengths as bytes of a word.", header(2, 4, 0, 40, 40, 0, 0) + wide),
        ("length-less", "A plane of a byte of each word.", header(2, 4, 0, 20, 40) + wide[:60]),
        ("reserved-flag", "A reserved flag beside wide.", header(6, 4, 0, 40, 40) + wide),
        ("frame-size", "A frame of a byte of each word.",
         payloads.planes_of([wide[:40], payloads.zstd(bytes(20))], rotated=False, wide=True)),
    ):  # fmt: skip
        yield _payload(
            f"wide-{title}", about, "malformed", data, codec=PLANES, dtype="int32", raw_nbytes=80
        )
    yield _payload(
        "planes-string", "Strings in planes.", "malformed", good, codec=PLANES, dtype="string",
        raw_nbytes=80,
    )  # fmt: skip


def _sparse() -> Iterator[FileCase]:
    left = noise("left", 20)
    bits = b"\x55" * 5  # of 40 words, every second one stays
    good = payloads.sparse_of([left, b"\x07"], bits, rotated=False)

    def header(flags: int, width: int, reserved: int, *lengths: int) -> bytes:
        return struct.pack(f"<BBH{len(lengths)}I", flags, width, reserved, *lengths)

    body = left + b"\x07" + bits
    frame = payloads.zstd(bytes(20))
    for title, about, data in (
        ("flags", "A reserved flag.", header(2, 2, 0, 20, 1, 5) + body),
        ("width", "Words of 4 bytes for a dtype of 2.", header(0, 4, 0, 20, 1, 0, 0, 5) + body),
        ("reserved", "A reserved byte.", header(0, 2, 1, 20, 1, 5) + body),
        ("length-zero", "A plane of 0 bytes.", header(0, 2, 0, 20, 0, 5) + left + bits),
        ("length-of-all", "A plane of all words, not of those that stay.",
         payloads.sparse_of([noise("all", 40), b"\x07"], bits, rotated=False)),
        ("length-less", "A plane of fewer words than stay.",
         payloads.sparse_of([left[1:], b"\x07"], bits, rotated=False)),
        ("map-zero", "A map of 0 bytes.", header(0, 2, 0, 20, 1, 0) + left + b"\x07"),
        ("map-short", "A map of fewer words.",
         payloads.sparse_of([left, b"\x07"], bits[1:], rotated=False)),
        ("map-long", "A map of more words.",
         payloads.sparse_of([left, b"\x07"], bits + b"\0", rotated=False)),
        ("map-frame-size", "A map in a frame of another length.",
         payloads.sparse_of([left, b"\x07"], frame, rotated=False)),
        ("frame-size", "A plane in a frame of all words.",
         payloads.sparse_of([left, payloads.zstd(bytes(40))], bits, rotated=False)),
        ("none-but-planes", "No word stays, but there is a plane.",
         payloads.sparse_of([left, b""], b"\0", rotated=False)),
        ("trailing", "Bytes behind the map.", good + b"\0"),
        ("cut", "The last byte is missing.", good[:-1]),
        ("cut-header", "Cut within the lengths.", good[:13]),
    ):  # fmt: skip
        yield _payload(
            f"sparse-{title}", about, "malformed", data, codec=SPARSE, dtype="int16", raw_nbytes=80
        )
    yield _payload(
        "sparse-string", "Strings, sparse.", "malformed", good, codec=SPARSE, dtype="string",
        raw_nbytes=80,
    )  # fmt: skip


def _strings() -> Iterator[FileCase]:
    def raw(text: bytes, *offsets: int) -> bytes:
        return struct.pack(f"<{len(offsets)}I", *offsets) + text

    for title, about, count, data in (
        ("first", "The first offset is 1.", 2, raw(b"abcd", 1, 2, 4)),
        ("descend", "Offsets descend.", 3, raw(b"abcd", 0, 3, 2, 4)),
        ("last", "The last offset is beyond the bytes.", 2, raw(b"abcd", 0, 2, 5)),
        ("trailing", "Bytes behind the last offset.", 2, raw(b"abcd", 0, 2, 3)),
        ("offsets-cut", "Too few bytes for the offsets.", 2, raw(b"", 0, 0)),
        ("utf8", "Bytes that are not UTF-8.", 1, raw(b"a\xffb", 0, 3)),
        ("character-cut", "An offset within a character.", 2, raw("é".encode(), 0, 1, 2)),
        ("surrogate", "A surrogate, which UTF-8 does not have.", 1, raw(b"\xed\xa0\x80", 0, 3)),
        ("none", "An offset, but no strings.", 0, raw(b"", 0)),
    ):
        facts = {"count": count, "code": "malformed"}
        yield FileCase(f"strings-{title}", about, "strings", data, facts)

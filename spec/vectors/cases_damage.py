"""Runs with damage: what the format mends (valid), and what it must not pass over (invalid)."""

from __future__ import annotations

from collections.abc import Iterator

import build
import numpy as np
from cases import RunCase, S, Writer
from cases_content import f32, smooth
from cases_index import LOSS, f64


def flip(data: bytes, at: int, bit: int = 0x10) -> bytes:
    """Change one bit."""
    changed = bytearray(data)
    changed[at] ^= bit
    return bytes(changed)


def index_path(run: RunCase, number: int = -1) -> str:
    """Give the path of a segment."""
    return f"index/{run.segments[number][0]}"


def damage(run: RunCase, at: int, *, number: int = -1) -> None:
    """Flip a bit of a segment; a negative place counts from its end."""
    data = run.segments[number][1].encode()
    run.files[index_path(run, number)] = flip(data, at % len(data))


def _two_flushes(run: RunCase) -> Writer:
    writer = run.writer()
    writer.begin()
    writer.save(LOSS, [0, 1], [f64(0.5), f64(0.25)])
    writer.save(S("w", shape=(30,)), [1], [smooth((30,), 1)])
    writer.publish(is_closed=True)
    return writer


def valid_cases() -> Iterator[RunCase]:
    """Give runs whose damage a reader mends without loss."""
    for name, about, at in (
        ("header-damaged-copy-good", "The first header fails its checksum.", 130),
        ("magic-damaged-copy-good", "The magic of the first header is damaged.", 1),
        ("header-copy-damaged", "The last header is damaged, the first is good.", -100),
        ("root-damaged-copy-good", "The first root fails its checksum.", 256 + 8),
        ("root-copy-damaged", "The last root is damaged, the first is good.", -256 - 30),
    ):
        run = RunCase(f"mended-{name}", f"{about} Nothing is lost.")
        _two_flushes(run)
        damage(run, at)
        yield run
    run = RunCase(
        "mended-merged-segment",
        "The head of a merged segment is damaged; the segments that it covers are still there.",
    )
    writer = _two_flushes(run)
    writer.save(LOSS, [2], [f64(0.125)])
    writer.publish(is_closed=True)
    run.damage = ["checksum"]
    entries = writer.save(LOSS, [0], [f64(9)], flushes=(1, 1), is_visible=False)
    writer.publish(entries=entries, flushes=(0, 2), is_closed=True)
    data = run.segments[-1][1].encode()
    run.files[index_path(run)] = flip(flip(data, 40), len(data) - 200)
    yield run
    yield from _bad_bundles()


def _bad_bundles() -> Iterator[RunCase]:
    for name, about in (
        ("header", "The header of the bundle is damaged."),
        ("table", "The table of the bundle is damaged."),
        ("copy", "The bytes of a segment in the bundle are damaged."),
        ("cut", "The bundle was cut short."),
        ("other-run", "The bundle belongs to another run."),
    ):
        run = RunCase(f"mended-bundle-{name}", f"{about} It is a cache: nothing is lost.")
        _two_flushes(run)
        data = run.bundle_of()
        if name == "other-run":
            run_id = build.noise("another run", 16)
            data = build.bundle(run_id, [(n, len(s.encode()), s.encode()) for n, s in run.segments])
        place = {"header": 20, "table": 70, "copy": len(data) - 300, "cut": 0, "other-run": 0}[name]
        if place:
            data = flip(data, place)
        run.files["index.bundle"] = data[:-100] if name == "cut" else data
        yield run


def invalid_cases() -> Iterator[tuple[RunCase, str, str]]:
    """Give runs, the code that a reader must report, and the operation that must.

    A file that is None is taken away.
    """
    yield from _opening()
    yield from _index()
    yield from _reading()
    yield from _parts()


def _opening() -> Iterator[tuple[RunCase, str, str]]:
    run = RunCase("run-without-run-json", "A folder with segments and no run.json.")
    _two_flushes(run)
    run.files["run.json"] = None
    yield run, "not_a_run", "open"
    run = RunCase("run-of-newer-major", "run.json says format version 2.0.")
    run.json_members = {"format_version": [2, 0]}
    yield run, "unsupported_version", "open"
    run = RunCase("run-needs-feature", "run.json requires a feature that 1.0 does not have.")
    run.json_members = {"required": ["parity"]}
    yield run, "unknown_feature", "open"
    for name, code, field, value in (
        ("segment-needs-feature", "unknown_feature", "required", 1 << 40),
        ("segment-of-newer-major", "unsupported_version", "major", 2),
    ):
        run = RunCase(name, "A segment that only a newer reader may read; not damage, an error.")
        writer = _two_flushes(run)
        writer.save(LOSS, [2], [f64(2)])
        writer.publish().header[field] = value
        yield run, code, "open"


def _index() -> Iterator[tuple[RunCase, str, str]]:
    run = RunCase("run-with-gap", "A segment in the middle is gone: found values are given.")
    writer = _two_flushes(run)
    for step in (2, 3):
        writer.save(LOSS, [step], [f64(step)], is_visible=step == 3)
        writer.publish(is_closed=True)
    run.segments.pop(2)
    run.damage = ["missing_segment"]
    run.fail("loss", 2, "missing_segment")
    run.fail("w", 7, "missing_segment")
    yield run, "missing_segment", "damage"

    run = RunCase("run-with-gap-in-front", "Flush 0 and 1 of a writer are gone.")
    writer = run.writer()
    for step in (0, 1):
        writer.save(LOSS, [step], [f64(step)], is_visible=step == 1)
        writer.publish(is_closed=True)
    run.segments.pop(0)
    run.damage = ["missing_segment"]
    run.fail("loss", 0, "missing_segment")
    yield run, "missing_segment", "damage"

    for name, about, code in (
        ("segment-head-damaged", "Both headers of a segment are damaged.", "checksum"),
        ("segment-of-other-run", "A segment of another run.", "wrong_run"),
        ("segment-renamed", "A segment under another segment's name.", "wrong_run"),
    ):
        run = RunCase(name, f"{about} What it held is missing, and that is said.")
        run.is_closed = code == "checksum"
        writer = run.writer()
        writer.save(LOSS, [0], [f64(0)])
        writer.publish(is_closed=True)
        writer.save(LOSS, [1], [f64(1)], is_visible=False)
        segment = writer.publish(is_closed=True)
        path = index_path(run)
        data = segment.encode()
        if name == "segment-head-damaged":
            run.files[path] = flip(flip(data, 60), len(data) - 60)
        elif name == "segment-of-other-run":
            segment.run_id = build.noise("another run", 16)
        else:
            run.segments.pop()
            run.files[path.replace("000002-000000000001", "000003-000000000002")] = data
        run.is_closed = True
        run.damage = [code, "missing_segment"]
        run.fail("loss", 1, "missing_segment")
        yield run, code, "damage"

    run = RunCase(
        "segments-not-nested", "Flushes 0 to 2 and 1 to 3 of one writer: neither holds the other."
    )
    writer = run.writer()
    for flushes in ((0, 2), (1, 3)):
        entries = writer.save(LOSS, [flushes[1]], [f64(1)], flushes=(2, 2), is_visible=False)
        writer.pending = []
        writer.publish(entries=entries, flushes=flushes, is_closed=True)
    run.is_code_only = True  # which of the two a reader takes is not said
    yield run, "malformed", "damage"

    run = RunCase(
        "page-damaged", "One entry page of several is damaged: only what it holds is lost."
    )
    writer = run.writer()
    for name in ("a", "b", "c"):
        writer.save(S(name, shape=(3,)), [0, 1], [smooth((3,), 0)] * 2, is_visible=name != "b")
    segment = writer.publish(is_closed=True, page_rows=1)
    place = next(at for i, (_, at) in enumerate(segment.borders) if i == 2 + 3 + 1)
    run.files[index_path(run)] = flip(segment.encode(), place + 20)
    run.names, run.unlistable = ["a", "b", "c"], {"b": "checksum"}
    for step in (0, 1):
        run.fail("b", step, "checksum")
    run.say("a", 2, "never_saved")
    run.say("b", 2, "never_saved")  # the root says that the page holds no step 2
    yield run, "checksum", "read"


def _reading() -> Iterator[tuple[RunCase, str, str]]:
    """Chunks and series that cannot be read, beside others that can."""
    for name, about, code in (
        ("payload-damaged", "A bit of a payload in a shard is flipped.", "checksum"),
        ("shard-missing", "A shard that entries name is not there.", "missing_file"),
        ("shard-cut-in-payload", "A shard ends within a payload.", "truncated"),
        ("shard-cut-before-payload", "A shard ends before a payload.", "truncated"),
        ("shard-cut-in-magic", "A shard of 4 bytes.", "truncated"),
        ("shard-empty", "A shard of 0 bytes.", "truncated"),
        ("inline-payload-damaged", "An inline payload does not have its checksum.", "checksum"),
        ("unknown-codec", "A chunk with codec 77.", "unknown_codec"),
        ("unknown-dtype", "A series of dtype float1.", "unknown_dtype"),
    ):
        run = RunCase(name, f"{about} The rest can be read.")
        writer = run.writer()
        shard = writer.shard()
        writer.save(S("good", shape=(20,)), [0], [smooth((20,), 3)])
        first = smooth((20,), 4)
        is_all = name in ("shard-missing", "shard-empty", "shard-cut-in-magic")
        series = S("w", "float1" if code == "unknown_dtype" else "float32", (20,))
        rest = code if is_all or code == "unknown_dtype" else None
        writer.save(series, [0], [first], shard=shard, code=rest)
        inline = None if name.startswith("inline") else shard
        bad = writer.save(series, [1], [first + 1], shard=inline, code=code)[0]
        if code == "unknown_codec":
            bad["codec"] = 77
        if name.startswith("inline"):
            bad["inline"] = flip(bad["inline"], 5)
        writer.publish(is_closed=True)
        path, data = f"shards/{shard.name}", shard.sealed()
        if name == "payload-damaged":
            run.files[path] = flip(data, bad["offset"] + 17)
        elif name == "shard-missing":
            run.files[path] = None
        elif name.startswith("shard"):
            end = {"in-payload": bad["offset"] + 79, "before-payload": bad["offset"],
                   "in-magic": 4}.get(name.removeprefix("shard-cut-"), 0)  # fmt: skip
            run.files[path] = data[:end]
        yield run, code, "read"

    run = RunCase("chunk-missing", "A saved tensor lacks the entry of one of its chunks.")
    writer = run.writer()
    writer.save(S("w", shape=(6,), grid=(2,)), [0], [smooth((6,), 1)], code="malformed")
    del writer.pending[1]
    writer.publish(is_closed=True)
    yield run, "malformed", "read"


def _parts() -> Iterator[tuple[RunCase, str, str]]:
    for name, about, boxes in (
        ("parts-hole", "Parts that leave a hole.", [((0,), 3), ((4,), 4)]),
        ("parts-overlap", "Parts that overlap.", [((0,), 5), ((4,), 4)]),
        ("parts-global-shapes", "Parts of different global shapes.", [((0,), 4), ((4,), 5)]),
        ("parts-dtypes", "Parts of different dtypes.", [((0,), 4), ((4,), 4)]),
    ):
        run = RunCase(name, f"{about} Each alone can be read.")
        for worker, (origin, length) in enumerate(boxes):
            writer = run.writer(worker, num_workers=2)
            size = 9 if name == "parts-global-shapes" and worker else 8
            dtype = "int32" if name == "parts-dtypes" and worker else "float32"
            value = np.arange(length, dtype="<i4" if dtype == "int32" else "<f4") + 10 * worker
            series = S("w", dtype, (length,), global_shape=(size,), origin=origin)
            writer.save(series, [0], [value])
            writer.publish(is_closed=True)
            run.ask("w", 0, value, dtype=dtype, worker=worker)
        run.fail("w", 0, "parts")
        if name == "parts-hole":
            run.ask("w", 0, f32(1, 2), index=[(1, 3, None)])
        yield run, "parts", "read"

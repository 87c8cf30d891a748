"""H1-H4: runs made to hurt, from a table: sizes, overlaps, names, wraps; all with right checksums.

Each case is a run in memory. Whatever is asked of it gives a value or a typed error, soon and
without much memory (the address space is limited while the cases run, in a process of their own).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from robustness.fuzz_corpus import by_hand, codecs
from robustness.fuzz_format import limit_memory, use
from support.build_run import Put, RunBuilder
from support.editing import (
    NUMBERS_OF_HEADER,
    NUMBERS_OF_ROOT,
    SegmentEditor,
    mended_bundle,
    run_json,
)
from support.goals import record
from support.memory import peak_kib
from support.mutate import Files, load

from tensorstore_fmt.format import layout

TESTS = Path(__file__).resolve().parents[1]

LIMIT_MIB = 512
SIZES = (0, 2**31, 2**32, 2**63 - 1, -1, -2)
NAMES = (
    "../../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "C:\\Windows\\x", "~root/x",
    "nul\0byte", "\0", "\n", "\r\nSet-Cookie: x", "\x1b[2J\x1b[1;1H", "\x1b]0;title\x07", "\x9b31m",
    "\u202egpj.exe", "\u2066x\u2069", "\u200b", "\ufeffx", "\u2028", "\U000e0041", "a" * 1024,
    "é" * 512, "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'; DROP TABLE x; --",
    "{0.__class__}", "%s%n", "$(reboot)", "`reboot`", "con", "*", "[", "**/*", "?" * 500,
    "a" * 1025,
)  # fmt: skip

Case = tuple[str, Callable[[], Files]]


def _base() -> tuple[Files, str, SegmentEditor]:
    files = by_hand()[0]
    path = [p for p in files if p.startswith("index/")][1]
    return files, path, SegmentEditor(files[path])


def _with(change: Callable[[SegmentEditor], object]) -> Callable[[], Files]:
    def make() -> Files:
        files, path, editor = _base()
        change(editor)
        return {**files, path: editor.encode()}

    return make


def _set(place: dict[Any, Any], key: Any, value: Any) -> None:
    place[key] = value


def header_cases() -> Iterator[Case]:
    """Of the newest segment and of another one."""
    for field in NUMBERS_OF_HEADER:
        for size in SIZES:
            yield (
                f"header {field} {size}",
                _with(lambda e, f=field, s=size: _set(e.header, f, s)),
            )
            yield (f"newest header {field} {size}", lambda f=field, s=size: _newest(f, s))


def _newest(field: str, size: int) -> Files:
    files = codecs(closed=False)[0]
    path = max(p for p in files if p.startswith("index/"))
    editor = SegmentEditor(files[path])
    editor.header[field] = size
    return {**files, path: editor.encode()}


def root_cases() -> Iterator[Case]:
    for field in NUMBERS_OF_ROOT:
        for size in SIZES:
            for row in (0, -1):
                yield (
                    f"root {row} {field} {size}",
                    _with(lambda e, r=row, f=field, s=size: _set(e.root, (r % len(e.rows), f), s)),
                )


def _fits(kind: pa.DataType, value: int) -> int:
    wide = 2**kind.bit_width
    value %= wide
    return value - wide if pa.types.is_signed_integer(kind) and value >= wide // 2 else value


def _cell(editor: SegmentEditor, page: int, name: str, row: int, value: Any) -> None:
    batch = editor.batch(page)
    values = batch.column(name).to_pylist()
    values[row] = value
    editor.set_columns(page, {name: values})


def cell_cases() -> Iterator[Case]:
    _, _, editor = _base()
    for page in range(len(editor.rows)):
        for field in editor.batch(page).schema:
            if not pa.types.is_integer(field.type):
                continue
            for size in sorted({_fits(field.type, s) for s in SIZES}):
                yield (
                    f"page {page} {field.name} {size}",
                    _with(lambda e, p=page, f=field.name, s=size: _cell(e, p, f, 0, s)),
                )


def list_cases() -> Iterator[Case]:
    lists: list[list[int]] = [
        [], [0], [1] * 33, [2**48] * 32, [2**48 + 1], [-1] * 3, [-2], [2**63 - 1], [2**32, 2**32],
        [2**31] * 3, [65536] * 4, [0] * 32, [2**48, 0],
    ]  # fmt: skip
    for column in ("shape", "grid", "global_shape", "origin"):
        for values in lists:
            yield (
                f"catalog {column} {str(values)[:30]}",
                _with(lambda e, c=column, v=values: _cell(e, 0, c, -1, v)),
            )
    for values in lists:
        yield (
            f"catalog shape and grid {str(values)[:30]}",
            _with(lambda e, v=values: (_cell(e, 0, "shape", -1, v), _cell(e, 0, "grid", -1, v))),
        )


def name_cases() -> Iterator[Case]:
    for column in ("name", "dtype"):
        for name in NAMES:
            yield (
                f"{column} {name[:20]!r}",
                _with(lambda e, c=column, n=name: _cell(e, 0, c, -1, n)),
            )


def overlap_cases() -> Iterator[Case]:
    """Payloads that share bytes, wrap around, or lie in the shard's head."""
    places = (0, 8, 64, 4096, 2**31 - 8, 2**32 - 8, 2**62, 2**63 - 8)
    for offset in places:
        for nbytes in (0, 8, 400, 2**27, 2**32 - 8):
            yield (
                f"overlap at {offset} of {nbytes}",
                _with(lambda e, o=offset, n=nbytes: _overlap(e, o, n)),
            )


def _overlap(editor: SegmentEditor, offset: int, nbytes: int) -> None:
    (shards,) = editor.pages(layout.PAGE_SHARDS)
    (page,) = editor.pages(layout.PAGE_ENTRIES)
    _cell(editor, shards, "nbytes", 0, 2**63 - 1)
    batch = editor.batch(page)
    where = batch.column("shard").to_pylist()
    stored = [i for i, s in enumerate(where) if s != layout.INLINE_SHARD]
    offsets, sizes = batch.column("offset").to_pylist(), batch.column("nbytes").to_pylist()
    for i in stored:
        offsets[i], sizes[i] = offset, nbytes
    editor.set_columns(page, {"offset": offsets, "nbytes": sizes})


def run_json_cases() -> Iterator[Case]:
    body = (
        b'{"format":"tensorstore_fmt","format_version":[1,0],'
        b'"run_id":"000102030405060708090a0b0c0d0e0f","created_us":%s,"required":%s,"attrs":%s'
    )
    attrs = [
        b"{}", b"[]", b"null", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b'{"b":' * 100_000 + b"1" + b"}" * 100_001, b'{"a":1e999}', b'{"a":NaN}',
        b'{"a":' + b"9" * 10_000 + b"}", b'{"\\ud800":1}', b'{"a":"\\ud800"}', b'{"__class__":1}',
        b'{"a":1,"a":2}', b'{"\x1b[2J":"\x1b[2J"}', '{"\u202e":"<script>"}'.encode(),
        b'{"a":[' + b"0," * 200_000 + b"0]}", b'{"a":"' + b"x" * (17 << 20) + b'"}',
    ]  # fmt: skip
    for value in attrs:
        yield (f"attrs {value[:20]!r} {len(value)}", _json(body % (b"1", b"[]", value)))
    for created in (b"-1", b"1" + b"0" * 30, b"1" + b"0" * 400, b"1e5", b"true", b'"1"', b"[]"):
        yield (f"created {created[:10]!r}", _json(body % (created, b"[]", b"{}")))
    for required in (
        b'["x"]',
        b"[1]",
        b"[[]]",
        b"{}",
        b"null",
        b'["\x1b[2J"]',
        b'["' + b"y" * 10**6 + b'"]',
    ):
        yield (f"required {required[:10]!r}", _json(body % (b"1", required, b"{}")))


def _json(body: bytes) -> Callable[[], Files]:
    return lambda: {**by_hand()[0], layout.RUN_JSON: run_json(body)}


def bundle_cases() -> Iterator[Case]:
    data = codecs()[0][layout.BUNDLE]
    for at in range(0, 64, 8):
        for size in SIZES:
            new = (size % 2**64).to_bytes(8, "little")
            yield (f"bundle row {at} {size}", _bundle(data, {}, {at: new}))
            if at + 8 < 60 and at:
                yield (f"bundle header {at} {size}", _bundle(data, {at: new}, {}))


def _bundle(data: bytes, head: dict[int, bytes], table: dict[int, bytes]) -> Callable[[], Files]:
    return lambda: {
        **codecs()[0], layout.BUNDLE: mended_bundle(data, header=head, table=table)
    }  # fmt: skip


@cache
def _halves() -> Files:
    """Give a run of two workers, each with half of a tensor of 4 × 6."""
    with tempfile.TemporaryDirectory() as place:
        builder = RunBuilder(Path(place) / "run", attrs={})
        for worker in (0, 1):
            writer = builder.writer(worker=worker, num_workers=2)
            writer.flush(
                Put(name="w", value=np.ones((2, 6)), global_shape=(4, 6), origin=(2 * worker, 0))
            )
        return load(Path(place) / "run")


def part_cases() -> Iterator[Case]:
    """Parts that leave a hole, overlap, lie outside, wrap, or belong to other tensors."""
    origins = ([0, 0], [1, 0], [3, 0], [4, 0], [2, 1], [2**48, 0], [2**48, 2**48])
    for origin in origins:
        yield (f"part at {origin}", _part({"origin": [origin]}))
    for shape in ([4, 7], [5, 6], [2**48, 6], [0, 0], [4, 0], [2**48, 2**48]):
        yield (f"part of {shape}", _part({"global_shape": [shape]}))
        yield (f"part of {shape} at its end", _part({"global_shape": [shape], "origin": [shape]}))
    for shape in ([4, 6], [2, 2**48], [0, 6], [-1, 6]):
        yield (f"part with shape {shape}", _part({"shape": [shape]}))


def _part(columns: dict[str, Any]) -> Callable[[], Files]:
    def make() -> Files:
        files = _halves()
        path = max(p for p in files if p.startswith("index/"))
        editor = SegmentEditor(files[path])
        editor.set_columns(0, columns)
        return {**files, path: editor.encode()}

    return make


def loop_cases() -> Iterator[Case]:
    """Writers that recover themselves or each other, segments that cover each other in part."""
    files, path, editor = _base()
    writer = int(editor.first["writer"][0])
    for recovers in (writer, writer + 1, 2**64 - 1):
        yield (f"recovers {recovers}", _with(lambda e, r=recovers: _set(e.header, "recovers", r)))
    for first, last in ((0, 1), (1, 2), (0, 2), (0, 3), (2, 3), (0, 10**12 - 1), (5, 5)):
        yield (f"flushes {first} to {last}", lambda a=first, b=last: _covering(a, b))

    def each_other() -> Files:
        changed = dict(files)
        for one, other in ((writer, 7), (7, writer)):
            head = SegmentEditor(files[path])
            head.header |= {"writer": one, "recovers": other, "flags": 1}
            changed[path.replace(f"{writer:016x}", f"{one:016x}")] = head.encode()
        return changed

    yield ("writers that recover each other", each_other)


def _covering(first: int, last: int) -> Files:
    files, path, editor = _base()
    editor.header |= {"first_flush": first, "last_flush": last}
    name = f"{path[: path.index('.')][:-26]}-{last:012d}-{last - first + 1:012d}.seg"
    return {**files, name: editor.encode()}


def file_name_cases() -> Iterator[Case]:
    files, path, _ = _base()
    names = [
        "index/x.seg", "index/../run.seg", "index/" + "9" * 300, path + ".tmp", path.upper(),
        path.replace("000000-", "00000٠-", 1), path.replace("0-", "0 ", 1), "index/\n.seg",
        path.replace("000000000001.seg", "000000000000.seg"), "index/" + "\x1b[2J",
        path.replace("000000000001.seg", "000000000009.seg"), path + "/" + path,
        path.replace("000000-", "999999-", 2), path[:-20] + "999999999999.seg",
    ]  # fmt: skip
    for name in names:
        yield (f"file {name[:30]!r}", lambda n=name: {**files, n: files[path]})


def all_cases() -> list[Case]:
    makers = (
        header_cases, root_cases, cell_cases, list_cases, name_cases, overlap_cases,
        run_json_cases, bundle_cases, part_cases, loop_cases, file_name_cases,
    )  # fmt: skip
    return [case for make in makers for case in make()]


def try_all() -> dict[str, Any]:
    """Try all cases; in a process with little memory."""
    import traceback
    import warnings

    cases = all_cases()
    use(by_hand()[0])
    _halves()
    limit_memory(LIMIT_MIB)
    failures, slowest = [], (0.0, "")
    before = peak_kib()
    for label, make in cases:
        begin = time.perf_counter()
        try:
            files = make()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                use(files)
        except Exception as error:  # noqa: BLE001 - any is what the test looks for
            kind = type(error).__name__
            last = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"{label}: {kind}: {error!s:.200} in {last.filename}:{last.lineno}")
        slowest = max(slowest, (time.perf_counter() - begin, label))
    return {
        "cases": len(cases), "failures": failures, "slowest": slowest,
        "grew_mib": (peak_kib() - before) >> 10,
        "is_limited": resource.getrlimit(resource.RLIMIT_AS)[1] != resource.RLIM_INFINITY,
    }  # fmt: skip


def test_hostile_runs_give_values_or_typed_errors() -> None:
    code = (
        "import json; from robustness.test_hostile_cases import try_all; "
        "print(json.dumps(try_all()))"
    )
    places = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    facts = {key: value for key, value in report.items() if key not in ("cases", "failures")}
    record("H1-H4", report["cases"], wrong=len(report["failures"]), **facts)
    assert report["cases"] >= 300
    assert not report["failures"], "\n".join(report["failures"][:20])
    assert report["is_limited"]
    assert report["grew_mib"] < LIMIT_MIB // 2

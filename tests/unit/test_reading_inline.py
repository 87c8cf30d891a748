"""Inline values, shared payloads, and the caches."""

from __future__ import annotations

from pathlib import Path

import crc32c
import numpy as np
import pytest
from support.build_run import Put, RunBuilder

from tensorstore_fmt.errors import ChecksumError, FormatError
from tensorstore_fmt.format import codec, layout
from tensorstore_fmt.reading.cache import Cache
from tensorstore_fmt.reading.inline import _crc_of_rows
from tensorstore_fmt.reading.run import open_run


@pytest.fixture
def build(tmp_path: Path) -> RunBuilder:
    return RunBuilder(tmp_path / "run")


def test_checksums_of_many_rows_at_once() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (50, 9), np.uint8)
    assert _crc_of_rows(rows).tolist() == [crc32c.crc32c(row.tobytes()) for row in rows]


@pytest.mark.parametrize("n", [3, 200])
@pytest.mark.parametrize("length", [2, 50])
def test_a_wrong_checksum_of_an_inline_value(build: RunBuilder, n: int, length: int) -> None:
    build.writer().flush(
        *(
            Put(
                step=3 * i,
                value=np.full(length, i, np.int32),
                inline=True,
                change={"crc32c": 5} if i == n - 1 else None,
            )
            for i in range(n)
        )
    )
    t = open_run(build.url)["x"]
    assert t.read(step=0, index=0) == 0
    with pytest.raises(ChecksumError) as caught:
        t.read()
    assert caught.value.facts["step"] == 3 * (n - 1)


def test_a_constant_of_several_elements_is_refused(build: RunBuilder) -> None:
    change = {"codec": layout.CODEC_CONSTANT}
    build.writer().flush(Put(value=np.arange(4.0), inline=True, change=change))
    with pytest.raises(FormatError):
        open_run(build.url)["x"].read(step=0)


def test_inline_payloads_of_all_codecs_together(build: RunBuilder) -> None:
    a = np.arange(12, dtype=np.int64).reshape(6, 2)
    build.writer().flush(
        Put(step=0, count=3, value=a[:3], inline=True, codec=layout.CODEC_DELTA),
        Put(step=3, count=2, value=a[3:5], inline=True),
        Put(step=5, value=a[5], inline=True, codec=layout.CODEC_DELTA),
        Put(step=6, value=np.full(2, 9), inline=True, codec=layout.CODEC_CONSTANT),
        Put(step=7, count=2, repeat=True, value=a[1], inline=True, codec=layout.CODEC_DELTA),
    )
    t = open_run(build.url)["x"]
    expected = [*a.tolist(), [9, 9], a[1].tolist(), a[1].tolist()]
    assert t.read().tolist() == expected
    assert t.read(steps=[8, 4, 1], index=1).tolist() == [3, 9, 3]


def test_a_raw_inline_payload_of_the_wrong_length(build: RunBuilder) -> None:
    build.writer().flush(
        Put(step=0, value=np.zeros(2), inline=True, change={"raw_nbytes": 8}),
    )
    with pytest.raises(FormatError):
        open_run(build.url)["x"].read()


def test_a_payload_that_many_steps_share_is_decoded_once(
    build: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = np.random.default_rng(0).random((4, 8))
    probe = RunBuilder(build.root / "probe")
    probe.writer().flush(Put(step=0, value=value), Put(step=9, value=value + 1))
    (shard,) = (probe.root / "shards").iterdir()
    shared = {"offset": shard.read_bytes().find(value.tobytes())}
    build.writer().flush(
        *(Put(step=s, value=value, change=shared if s else None) for s in range(6)),
        Put(step=9, value=value + 1),
    )
    calls = []
    original = codec.decode

    def spy(*args: object, **kwargs: object) -> None:
        calls.append(kwargs)
        original(*args, **kwargs)

    monkeypatch.setattr(codec, "decode", spy)
    t = open_run(build.url)["x"]
    np.testing.assert_array_equal(t.read(steps=slice(1, 6)), np.stack([value] * 5))
    assert len(calls) == 1


def test_strides_that_interlace(build: RunBuilder) -> None:
    values = np.arange(8.0)
    build.writer().flush(
        Put(step=0, stride=2, count=4, value=values[::2].copy()),
        Put(step=1, stride=2, count=4, value=values[1::2].copy()),
    )
    t = open_run(build.url)["x"]
    assert t.read().tolist() == values.tolist()
    assert t.read(steps=slice(3, 6)).tolist() == [3, 4, 5]


def test_a_cache_forgets_what_was_used_longest_ago() -> None:
    cache: Cache[str, int] = Cache(10)
    for i, key in enumerate("abc"):
        cache.put(key, i, 4)
        cache.get("a")
    assert [cache.get(key) for key in "abc"] == [0, None, 2]
    assert cache.nbytes == 8
    cache.put("a", 7, 4)
    assert cache.get("a") == 0
    cache.put("d", 3, 100)
    assert cache.get("d") == 3
    assert len(cache) == 1
    cache.clear()
    assert len(cache) == cache.nbytes == 0

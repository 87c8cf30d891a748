"""What reading costs in rounds, requests and bytes: part of the contract, counted here."""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import Storage, open_storage
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.storage import CountingStorage
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing.segments import FANOUT

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((1024, 1024)).astype("f4")


def memory() -> str:
    return f"memory://{uuid.uuid4()}/run"


def opened(storage: Storage) -> tuple[tsf.Run, CountingStorage]:
    counting = CountingStorage(storage)
    session = Session(storage.url, None, storage=counting)
    session.view  # noqa: B018 - looks at the run
    return tsf.Run(session), counting


def build(url: str, kind: str, **options: object) -> None:
    run = create_test_run(url, stats=False, **options)
    run.log({"weight": WEIGHT}, step=3)
    if kind == "long":  # more index than fits the first read, but few names
        for step in range(100_000):
            run.log({"loss": float(RNG.standard_normal())}, step=step)
    if kind == "wide":  # even the catalog does not fit
        names = [RNG.bytes(40).hex() for _ in range(16_000)]
        run.log(dict.fromkeys(names, 1.0), step=0)
    run.close()


@pytest.mark.parametrize(("kind", "rounds"), [("small", 2), ("long", 3), ("wide", 4)])
def test_rounds_to_the_first_slice_of_a_closed_run(kind: str, rounds: int) -> None:
    url = memory()
    build(url, kind)
    run, counting = opened(open_storage(url, writable=False))
    assert (run["weight"].read(step=3, index=np.s_[10:20, 5]) == WEIGHT[10:20, 5]).all()
    assert counting.rounds == rounds, counting.operations


def test_rounds_and_requests_on_s3(s3: S3Server) -> None:
    url = s3.url(f"requests/{uuid.uuid4()}")
    build(url, "small", storage_options=s3.storage_options)
    before = len(s3.requests())
    run = tsf.open_run(url, storage_options=s3.storage_options)
    opening = s3.requests()[before:]
    assert len(opening) == 3, opening  # run.json, bundle, LIST: at the same time
    before = len(s3.requests())
    run["weight"].read(step=3, index=np.s_[10:20, 5])
    assert len(s3.requests()) - before == 1
    before = len(s3.requests())
    assert not run.refresh()
    polled = s3.requests()[before:]
    assert len(polled) == 1, polled
    assert "list-type=2" in polled[0]


def test_a_poll_is_one_listing_per_thousand_objects(s3: S3Server) -> None:
    prefix = f"requests/{uuid.uuid4()}"
    url = s3.url(prefix)
    build(url, "small", storage_options=s3.storage_options)
    run = tsf.open_run(url, storage_options=s3.storage_options)
    for i in range(2000):
        s3.ask("PUT", f"/{s3.bucket}/{prefix}/index/{i:05d}.other")
    before = len(s3.requests())
    assert not run.refresh()
    assert len(s3.requests()) - before == 3


def test_a_live_run_costs_one_round_more() -> None:
    url = memory()
    writer = create_test_run(url, stats=False)
    for step in range(5):
        writer.log({"weight": WEIGHT + np.float32(step)}, step=step)
        writer.flush()
    run, counting = opened(open_storage(url, writable=False))
    run["weight"].read(step=3, index=np.s_[0, 0])
    assert counting.rounds == 3
    counting.reset()
    assert not run.refresh()
    assert [o.op for o in counting.operations] == ["listing"]
    writer.log({"loss": 1.0}, step=9)
    writer.flush()
    counting.reset()
    assert run.refresh()
    assert [o.op for o in counting.operations] == ["listing", "prefix"]
    writer.close()


SELECTIONS = [
    np.s_[:],
    np.s_[0, 0],
    np.s_[:, 5],
    np.s_[7],
    np.s_[10:20, ::100],
    np.s_[::300, ::300],
    np.s_[-1, -1],
    np.s_[500:500],
    np.s_[100:900, 100:900],
    np.s_[..., -3:],
]


@pytest.mark.parametrize("index", SELECTIONS, ids=str)
@pytest.mark.parametrize("chunk", [(64, 64), (1, 1024), (1024, 16), (300, 300)], ids=str)
def test_reads_and_bytes_of_a_slice(tmp_path: Path, index: object, chunk: tuple[int, int]) -> None:
    with create_test_run(tmp_path / "run", chunks={"w": chunk}, stats=False) as writer:
        writer.log({"other": WEIGHT[:300, :300], "w": WEIGHT}, step=0)
        writer.log({"w": WEIGHT * 2}, step=1)
    run, counting = opened(open_storage(tmp_path / "run", writable=False))
    run["w"].read(step=0, index=np.s_[0, 0])
    counting.reset()
    assert (run["w"].read(step=1, index=index) == (WEIGHT * 2)[index]).all()
    touched = chunks_touched(index, chunk)
    stored = stored_nbytes(tmp_path / "run")
    needed = sum(stored[1, number] for number in touched)
    ranges = [o for o in counting.requests if o.op == "range"]
    assert len(ranges) == len(counting.requests) <= max(len(touched), 0)
    assert needed <= counting.nbytes <= 1.2 * needed
    assert not touched or ranges


def chunks_touched(index: object, chunk: tuple[int, int]) -> set[int]:
    """Find the chunks by trying each element."""
    across = -(-1024 // chunk[1])
    numbers = np.add.outer(np.arange(1024) // chunk[0] * across, np.arange(1024) // chunk[1])
    return set(np.unique(numbers[index]).tolist())


def stored_nbytes(run: Path) -> dict[tuple[int, int], int]:
    """Read the lengths of payloads from the shards, as any Arrow reader would."""
    found = {}
    for shard in (run / "shards").iterdir():
        with pa.memory_map(str(shard)) as source:
            for row in (
                pa.ipc.open_file(source)
                .read_all()
                .select(["name", "step", "chunk", "nbytes"])
                .to_pylist()
            ):
                if row["name"] == "w":
                    found[row["step"], row["chunk"]] = row["nbytes"]
    return found


def test_a_batch_is_one_round_and_fetches_nothing_twice() -> None:
    url = memory()
    with create_test_run(url, stats=False) as writer:
        for step in range(4):
            writer.log({f"w{i}": WEIGHT[:300] + step for i in range(5)}, step=step)
    run, counting = opened(open_storage(url, writable=False))
    items = [(f"w{i}", step, np.s_[i : i + 10, 3]) for i in range(5) for step in range(4)]
    run.read(items)
    counting.reset()
    results = run.read([*items, *items])
    for (name, step, index), result in zip([*items, *items], results, strict=True):
        assert (result == (WEIGHT[:300] + step)[index]).all(), name
    assert counting.rounds == 1
    spans = sorted((o.path, o.start, o.stop) for o in counting.requests)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))


def test_steps_of_a_name_are_neighbours_in_a_bucket() -> None:
    url = memory()
    with create_test_run(url, stats=False, compression="none") as writer:
        for step in range(30):
            writer.log({f"w{i}": WEIGHT[i : i + 16] + step for i in range(5)}, step=step)
    run, counting = opened(open_storage(url, writable=False))
    counting.reset()
    result = run["w3"].read(index=np.s_[2, :3])
    assert (result == WEIGHT[5, :3] + np.arange(30, dtype="f4")[:, None]).all()
    assert counting.rounds == 1
    assert len(counting.requests) == 1  # of one object, which holds all that was saved
    assert sum(o.stop - o.start for o in counting.requests) < 1.01 * 30 * 16 * 1024 * 4


def test_statistics_and_small_series_read_no_shard(tmp_path: Path) -> None:
    with create_test_run(tmp_path / "run") as writer:
        for step in range(50):
            writer.log({"w": WEIGHT * step, "loss": float(step)}, step=step)
    run, counting = opened(open_storage(tmp_path / "run", writable=False))
    counting.reset()
    assert run["w"].stats()["count"].tolist() == [WEIGHT.size] * 50
    assert run["loss"].read().tolist() == list(range(50))
    assert run.scalars(["loss"]).num_rows == 50
    assert not [o for o in counting.operations if o.path.startswith(layout.SHARDS_DIR)]


def test_a_merge_in_a_bucket_reads_all_its_segments_in_one_round() -> None:
    counting = CountingStorage(open_storage(memory(), writable=True))
    with create_test_run(counting) as writer:
        for step in range(FANOUT + 1):
            writer.log({"loss": float(step)}, step=step)
            writer.flush()
    begun = [o for o in counting.requests if o.op == "prefix" and o.path.endswith(".seg")]
    merged = {o.path for o in begun}
    assert len(merged) == len(begun)
    assert max(Counter(o.round for o in begun).values()) >= FANOUT
    assert not [o for o in counting.requests if o.op == "range" and o.path in merged]

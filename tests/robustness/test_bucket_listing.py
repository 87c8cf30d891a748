"""Listings that are cut into pages, or come late, while segments merge (goals N4 and S7)."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from support.buckets import Patience, new_key, reader_of, storage_of
from support.crash_scripts import settle
from support.goals import COUNT, SEED, record, trials

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.storage import BytesLike, open_storage
from tensorstore_fmt.storage.remote import RemoteStorage
from tensorstore_fmt.testing import s3_faults as faults
from tensorstore_fmt.testing.s3_proxy import S3Proxy, S3Request, serve_s3_proxy
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.storage import WrappedStorage
from tensorstore_fmt.testing.writers import create_test_run

FLUSHES = 18  # two merges, and what is left of a third


@dataclass(frozen=True, slots=True)
class Change:
    """A file that appears, or (without data) disappears."""

    path: str
    data: bytes | None


class Recording(WrappedStorage):
    """Remember what a writer did to its files, one after the other."""

    def __init__(self, url: str) -> None:
        super().__init__(open_storage(url, writable=True))
        self.changes: list[Change] = []

    def publish(self, path: str, buffers: Sequence[BytesLike], **options: bool) -> None:
        super().publish(path, buffers, **options)
        self.changes.append(Change(path, b"".join(buffers)))

    def delete(self, paths: Sequence[str]) -> None:  # type: ignore[override] # lists, here
        super().delete(paths)
        self.changes += [Change(path, None) for path in paths]


@pytest.fixture(scope="module")
def changes() -> list[Change]:
    """All that a writer did: one step a flush, merged eight at a time, closed."""
    storage = Recording(f"memory://{new_key('recorded')}")
    run = create_test_run(storage)
    for step in range(FLUSHES):
        run.log({"loss": float(step)}, step=step)
        run.flush()
        settle(run)
    run.close()
    assert any(change.data is None for change in storage.changes)
    return storage.changes


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with serve_s3_proxy(s3, seed=SEED) as running:
        yield running


def steps_after(changes: Sequence[Change]) -> int:
    """Say how many steps are published."""
    names = [layout.parse_segment_name(c.path.rpartition("/")[2]) for c in changes if c.data]
    return min(max((name.last for name in names if name), default=0), FLUSHES)


class Bucket:
    """A run in a bucket at any moment of its life."""

    def __init__(self, s3: S3Server, key: str, changes: Sequence[Change]) -> None:
        self.storage: RemoteStorage = storage_of(s3, key)
        self.changes = changes
        self.at = 0
        self._there: dict[str, bytes] = {}

    def go_to(self, at: int) -> None:
        """Let the run be as it was after so many changes, earlier or later ones."""
        if at > self.at:
            for change in self.changes[self.at : at]:
                self._apply(change)
        elif at < self.at:
            wanted = {c.path: c.data for c in self.changes[:at]}
            for path in [*self._there, *wanted]:
                if wanted.get(path) != self._there.get(path):
                    self._apply(Change(path, wanted.get(path)))
        self.at = at

    def _apply(self, change: Change) -> None:
        if change.data is None:
            if self._there.pop(change.path, None) is not None:
                self.storage.delete([change.path])
        else:
            self.storage.publish(change.path, [change.data])
            self._there[change.path] = change.data


def look(run: tsf.Run, least: int, most: int) -> int:
    """Check that a run shows a prefix between two lengths."""
    assert not run.damage
    shown = len(run.steps())
    assert least <= shown <= most, f"{shown} steps, not {least} to {most}"
    assert run.steps().tolist() == list(range(shown))
    if shown:
        assert run["loss"].read().tolist() == [float(step) for step in range(shown)]
    return shown


def between_pages(
    proxy: S3Proxy, bucket: Bucket, pages: int, page: int, until: int
) -> list[faults.Act]:
    """Let the run go on to another moment before a page of the next listing."""
    asked = iter(range(10**9))

    def go_on(request: S3Request) -> None:
        if next(asked) == page:
            bucket.go_to(until)

    return [faults.pages(pages), faults.before(go_on)]


def try_cut(
    proxy: S3Proxy, bucket: Bucket, reading: RemoteStorage, cut: tuple[int, int, int, int]
) -> None:
    """Open and refresh while the listing is cut there and the run goes on meanwhile."""
    begin, end, pages, page = cut
    least, most = steps_after(bucket.changes[:begin]), steps_after(bucket.changes[:end])
    bucket.go_to(begin)
    old = reader_of(reading)
    assert look(old, least, least) == least
    for is_refresh in (False, True):
        bucket.go_to(begin)
        acts = between_pages(proxy, bucket, pages, page, end)
        rules = [proxy.add(act, ops=["LIST"]) for act in acts]
        try:
            if is_refresh:
                old.refresh()
            run = old if is_refresh else reader_of(reading)
            look(run, least, most)
        finally:
            proxy.remove(*rules)
        bucket.go_to(end)
        run.refresh()
        look(run, most, most)


def merge_of(changes: Sequence[Change]) -> tuple[int, int]:
    """Give where the first merge begins, and where all that it covers is deleted."""
    first = next(i for i, c in enumerate(changes) if c.data is None and "index/" in c.path)
    after = next(i for i in range(first, len(changes)) if changes[i].data is not None)
    return first - 1, after


def test_a_listing_cut_at_every_key_while_segments_merge(
    s3: S3Server, proxy: S3Proxy, changes: list[Change]
) -> None:
    key = new_key("pages")
    begin, end = merge_of(changes)
    cuts = [
        (begin, until, 1, page)
        for until in range(begin + 1, end + 1)
        for page in range(1, end - begin + 1)
    ]
    if COUNT < 3:  # all cuts of the whole merge, and some of each part of it
        rng = random.Random(SEED)
        whole = [cut for cut in cuts if cut[1] == end]
        cuts = whole + rng.sample([cut for cut in cuts if cut[1] < end], 6)
    wrong = []
    reading = storage_of(proxy, key, writable=False)
    bucket = Bucket(s3, key, changes)
    for cut in cuts:
        try:
            try_cut(proxy, bucket, reading, cut)
        except (AssertionError, OSError, tsf.TensorStoreError) as error:
            wrong.append(f"{cut}: {error!r}")
    record("N4 LIST cut at every key during a merge", 2 * len(cuts), wrong=len(wrong))
    assert not wrong, "\n".join(wrong[:5])


def test_listings_in_pages_of_any_length_at_any_time(
    s3: S3Server, proxy: S3Proxy, changes: list[Change]
) -> None:
    key = new_key("pages")
    rng = random.Random(SEED)
    count = trials(8)
    reading = storage_of(proxy, key, writable=False)
    bucket = Bucket(s3, key, changes)
    wrong = []
    for _ in range(count):
        begin = rng.randrange(2, len(changes) - 1)
        end = rng.randrange(begin + 1, min(len(changes), begin + 25) + 1)
        cut = (begin, end, rng.randrange(1, 12), rng.randrange(6))
        try:
            try_cut(proxy, bucket, reading, cut)
        except (AssertionError, OSError, tsf.TensorStoreError) as error:
            wrong.append(f"{cut}: {error!r}")
    record("N4 LIST in pages", 2 * count, wrong=len(wrong))
    assert not wrong, "\n".join(wrong[:5])


# --- S7: listings that come late -----------------------------------------------------------------


def follow(
    proxy: S3Proxy, s3: S3Server, key: str, changes: Sequence[Change], met: Counter[str]
) -> None:
    """Look after each change; what is shown is a prefix that grows, or it says that it is not."""
    bucket = Bucket(s3, key, changes)
    bucket.go_to(3)
    storage = storage_of(proxy, key, Patience(1), writable=False)
    run = None
    shown = 0
    with warnings.catch_warnings():
        # A listing that leaves files out in the middle looks like damage, and is called so.
        warnings.simplefilter("ignore", RuntimeWarning)
        for at in range(4, len(changes) + 1):
            bucket.go_to(at)
            try:
                if run is None:
                    run = reader_of(storage)
                else:
                    run.refresh()
            except tsf.MissingFileError as error:  # of what is listed all is deleted, each time
                if error.code != "missing_segment":
                    raise
                met["failed"] += 1
                continue
            if run.damage:
                assert {problem.code for problem in run.damage} == {"missing_segment"}
                with pytest.raises(tsf.FormatError):
                    run["loss"].read()
                met["said to be incomplete"] += 1
            else:
                shown = look(run, shown, steps_after(changes[:at]))
                met["right"] += 1
    proxy.remove()
    assert run is not None
    run.refresh()
    assert look(run, FLUSHES, FLUSHES) == FLUSHES


def test_listings_that_are_old(s3: S3Server, proxy: S3Proxy, changes: list[Change]) -> None:
    met: Counter[str] = Counter()
    rng = random.Random(SEED)
    for _ in range(trials(1)):
        proxy.add(faults.stale(lambda: rng.choice([0, 0, 1, 2, 5])))
        follow(proxy, s3, new_key("late"), changes, met)
    record("S7 listings of earlier", met.total(), **met)
    assert met["right"] > 10


def test_listings_that_lack_what_is_new(
    s3: S3Server, proxy: S3Proxy, changes: list[Change]
) -> None:
    met: Counter[str] = Counter()
    rng = random.Random(SEED)
    for _ in range(trials(1)):
        left: dict[str, int] = {}

        def is_hidden(key: str, left: dict[str, int] = left) -> bool:
            left[key] = left.setdefault(key, rng.choice([0, 0, 0, 3, 9])) - 1
            return left[key] >= 0

        proxy.add(faults.hiding(is_hidden))
        follow(proxy, s3, new_key("late"), changes, met)
    record("S7 listings without the newest", met.total(), **met)
    assert met["right"] > 10

"""Which attempt a writer joins, whatever is left of those before it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import Listing, Request, Storage, open_storage
from tensorstore_fmt.testing.storage import WrappedStorage
from tensorstore_fmt.testing.writers import create_test_run


def write(url: str, value: float, first: int, stop: int, **options: object) -> int:
    with create_test_run(url, new_id=itertools.count(int(value) + 1).__next__, **options) as run:
        for step in range(first, stop):
            run.log({"loss": value + step}, step=step)
        return run.attempt


def break_headers(folder: Path, attempt: int) -> None:
    paths = list(folder.glob(f"index/??????-{attempt:06}-*.seg"))
    assert paths
    for path in paths:
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("last", [0, 1])
def test_resuming_takes_no_number_of_a_damaged_attempt(tmp_path: Path, last: int) -> None:
    url = str(tmp_path / "run")
    write(url, 0.0, 0, 5)
    if last:
        assert write(url, 100.0, 3, 8, resume_from=3) == 1
    break_headers(tmp_path / "run", last)
    assert write(url, 200.0, 6, 7, resume_from=6) == last + 1


def test_a_damaged_attempt_cannot_be_joined(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    write(url, 0.0, 0, 5)
    write(url, 100.0, 3, 8, resume_from=3)
    break_headers(tmp_path / "run", 1)
    with pytest.raises(tsf.FormatError) as caught:
        write(url, 200.0, 6, 7)
    assert caught.value.code == "missing_segment"
    assert caught.value.facts["attempt"] == 1


class StaleListing(WrappedStorage):
    """List once more what was merged away since."""

    def __init__(self, inner: Storage, stale: list[object]) -> None:
        super().__init__(inner)
        self.stale = stale

    def fetch_settled(self, requests: list[Request[object]]) -> list[object]:  # type: ignore[override]
        found = super().fetch_settled(requests)
        for i, request in enumerate(requests):
            if isinstance(request, Listing) and request.directory == "index" and self.stale:
                found[i], self.stale = self.stale, []
        return found


def test_what_is_merged_while_it_is_listed_still_counts(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with create_test_run(url, grace_s=0.0) as run:
        for step in range(3):
            run.log({"loss": 0.0}, step=step)
            run.flush()
        stale = open_storage(url, writable=False).fetch([Listing("index")])[0]
        for step in range(3, 12):
            run.log({"loss": 0.0}, step=step)
            run.flush()
    storage = StaleListing(open_storage(url, writable=True), stale)
    with create_test_run(storage, resume_from=12) as run:
        assert run.attempt == 1
    assert not storage.stale

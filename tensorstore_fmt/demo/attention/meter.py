"""A reader that counts the bytes it gets, of the index and of the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import tensorstore_fmt as tsf
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.storage.base import Prefix, Range, Request, Storage
from tensorstore_fmt.testing.storage import WrappedStorage

__all__ = ["Meter", "metered"]

T = TypeVar("T")

_SHARDS = "shards/"


class Meter(WrappedStorage):
    """Counts what comes through.

    Attributes
    ----------
    requests
        For bytes of files.
    tensor_nbytes
        Of shards, where the chunks of tensors lie.
    index_nbytes
        Of everything else.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.requests = 0
        self.tensor_nbytes = 0
        self.index_nbytes = 0

    @property
    def nbytes(self) -> int:
        """All of them."""
        return self.tensor_nbytes + self.index_nbytes

    def fetch_settled(self, requests: Sequence[Request[T]]) -> list[T | Exception]:
        """Fetch and count."""
        results = super().fetch_settled(requests)
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Exception) or not isinstance(request, Range | Prefix):
                continue
            nbytes = (
                request.stop - request.start
                if isinstance(request, Range)
                else len(cast("tuple[bytes, int | None]", result)[0])
            )
            self.requests += 1
            if request.path.startswith(_SHARDS):
                self.tensor_nbytes += nbytes
            else:
                self.index_nbytes += nbytes
        return results


@contextmanager
def metered(
    url: str, *, storage_options: Mapping[str, object] | None
) -> Iterator[tuple[tsf.Run, Meter]]:
    """Open a run as `open_run` does, count what it fetches, and close it."""
    meter = Meter(open_storage(url, storage_options=storage_options, writable=False))
    with tsf.Run(Session(url, storage_options, storage=meter)) as run:
        yield run, meter

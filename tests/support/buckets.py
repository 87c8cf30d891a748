"""Storages behind a proxy that fails as told, with patience that a test can afford."""

from __future__ import annotations

import itertools
from typing import Any

import tensorstore_fmt as tsf
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.storage import Storage
from tensorstore_fmt.storage.remote import RemoteStorage, open_remote
from tensorstore_fmt.storage.retry import RetryPolicy
from tensorstore_fmt.testing.s3_proxy import S3Proxy
from tensorstore_fmt.testing.servers import S3Server

_NUMBERS = itertools.count()


class Patience:
    """A retry policy whose pauses take no time, and what they came to.

    Attributes
    ----------
    slept_s
        Pauses so far, of all requests together.
    """

    def __init__(self, budget_s: float, attempt_s: float = 20.0, **changes: Any) -> None:
        self.slept_s = 0.0
        self.policy = RetryPolicy(
            budget_s=budget_s, attempt_s=attempt_s, sleep=self._sleep, **changes
        )

    async def _sleep(self, delay_s: float) -> None:
        self.slept_s += delay_s


def new_key(what: str) -> str:
    """Give a key that no other test uses."""
    return f"{what}/{next(_NUMBERS)}"


def storage_of(
    server: S3Proxy | S3Server,
    key: str,
    patience: Patience | None = None,
    *,
    writable: bool = True,
    timeout_s: float | None = None,
) -> RemoteStorage:
    """Open the place of a run; `timeout_s`: how long the client waits for each answer."""
    options = dict(server.storage_options)
    if timeout_s is not None:
        options["config_kwargs"] = {"read_timeout": timeout_s, "connect_timeout": 5}
    retry = None if patience is None else patience.policy
    return open_remote(server.url(key), options, writable=writable, retry=retry)


def reader_of(storage: Storage) -> tsf.Run:
    """Open the run at a storage."""
    session = Session(storage.url, None, storage=storage)
    session.view  # noqa: B018 - looks at the run
    return tsf.Run(session)

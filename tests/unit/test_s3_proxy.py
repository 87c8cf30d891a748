"""The proxy that lets an S3 server fail as told: it counts, waits, and does what rules say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.buckets import Patience, new_key, storage_of

from tensorstore_fmt.storage import Listing, Prefix, Range
from tensorstore_fmt.storage.remote import RemoteStorage
from tensorstore_fmt.testing import s3_faults as faults
from tensorstore_fmt.testing.s3_proxy import S3Proxy, serve_s3_proxy
from tensorstore_fmt.testing.servers import S3Server


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with serve_s3_proxy(s3, seed=7) as running:
        yield running


@pytest.fixture
def storage(proxy: S3Proxy) -> Iterator[RemoteStorage]:
    with storage_of(proxy, new_key("proxy"), Patience(30)) as opened:
        yield opened


def test_it_counts(proxy: S3Proxy, storage: RemoteStorage) -> None:
    storage.publish("index/a", [bytes(1000)])
    storage.fetch([Range("index/a", 0, 300), Prefix("index/a", 50), Listing("index")])
    assert proxy.count() == 4
    assert (proxy.count("PUT"), proxy.count("GET"), proxy.count("LIST")) == (1, 2, 1)
    assert proxy.nbytes("GET") == (350, 0)
    assert proxy.nbytes("PUT")[1] == 1000
    assert {each.status for each in proxy.log} == {200, 206}


def test_rules_choose_by_kind_key_and_number(proxy: S3Proxy, storage: RemoteStorage) -> None:
    rule = proxy.add(faults.status(503, "SlowDown"), ops=["GET"], key="*/a", skip=1, times=2)
    for name in ("a", "b"):
        storage.publish(name, [b"0123456789"])
    for _ in range(3):
        assert storage.fetch([Range(name, 2, 5) for name in ("a", "b")]) == [b"234", b"234"]
    assert (rule.met, rule.done) == (5, 2)
    statuses = [each.status for each in proxy.log if each.op == "GET" and each.key.endswith("/a")]
    assert statuses == [206, 503, 503, 206, 206]


def test_rules_may_happen_with_a_probability(proxy: S3Proxy, storage: RemoteStorage) -> None:
    storage.publish("a", [b"0123456789"])
    with proxy.during(faults.status(500, "InternalError"), ops=["GET"], probability=0.3) as rule:
        for _ in range(40):
            storage.fetch([Range("a", 0, 1)])
    assert rule.met == 40 + rule.done
    assert 5 < rule.done < 40
    assert proxy.rules == []


def test_acts_add_up(proxy: S3Proxy, storage: RemoteStorage) -> None:
    for name in "abcde":
        storage.publish(name, [b"x"])
    proxy.add(faults.late(0.01))
    proxy.add(faults.pages(2))
    proxy.add(faults.hiding(lambda key: key.endswith("/c")))
    assert [info.base for info in storage.fetch([Listing("")])[0]] == ["a", "b", "d", "e"]
    assert proxy.count("LIST") == 3


def test_old_listings(proxy: S3Proxy, storage: RemoteStorage) -> None:
    proxy.add(faults.stale(lambda: 1))
    found = []
    for name in "abc":
        storage.publish(name, [b"x"])
        found.append(len(storage.fetch([Listing("")])[0]))
    assert found == [1, 1, 2]

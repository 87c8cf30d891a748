"""A bucket that fails, is slow, or refuses, while a run is written and read (goals S1, S3, S7)."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from support.buckets import Patience, new_key, reader_of, storage_of
from support.goals import SEED, record, trials

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import Listing, Prefix, Range, Storage
from tensorstore_fmt.testing import s3_faults as faults
from tensorstore_fmt.testing.oracle import Event, Oracle, bits, check_run
from tensorstore_fmt.testing.s3_proxy import S3Proxy, serve_s3_proxy
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.writers import create_test_run
from tensorstore_fmt.writing.run import RunWriter

BUDGET_S = 1.5  # about five attempts
STEPS = 40  # of one run
RATES = (0.01, 0.1, 0.5)
OPERATIONS = {"write": 40, "refresh": 20, "read": 25, "open": 10, "not yet": 5}

# A writer that could not store something warns; here this is what is wanted. One that could not be
# opened may have left its first flush, whose answer was lost: then the next one warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.* already has a writer:UserWarning"),
]


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with serve_s3_proxy(s3, seed=SEED) as running:
        yield running


def values(step: int) -> dict[str, Any]:
    """Give what is logged at a step: a scalar in the index, a tensor in a shard."""
    weight = np.random.default_rng(step).standard_normal(700, "f4")
    return {"loss": float(step), "weight": weight}


@dataclass
class Story:
    """A run in a failing bucket: what was logged, and who looks on."""

    proxy: S3Proxy
    rng: random.Random
    met: Counter[str]
    patience: Patience = field(default_factory=lambda: Patience(BUDGET_S))
    key: str = field(default_factory=lambda: new_key("failing"))
    oracle: Oracle = field(default_factory=Oracle)
    storage: Storage = field(init=False)
    writer: RunWriter | None = None
    reader: tsf.Run | None = None
    seen: int = 0

    def __post_init__(self) -> None:
        # One for writer and readers: a client of its own for each would cost more than all else.
        self.storage = storage_of(self.proxy, self.key, self.patience, timeout_s=0.5)

    def operate(self, kind: str) -> None:
        """Do something; failures of the storage are fine if they are called so."""
        before = self.patience.slept_s
        try:
            {
                "write": self.write,
                "open": self.open,
                "refresh": self.refresh,
                "read": self.read,
                "not yet": self.not_yet,
            }[kind]()
            self.met[kind] += 1
        except FileNotFoundError as error:
            raise AssertionError(f"{kind}: a failure was taken for absence") from error
        except OSError:
            self.met[f"{kind} failed"] += 1
        # A merge may go on beside; no request waits longer than its budget.
        assert self.patience.slept_s - before <= 40 * BUDGET_S

    def write(self) -> None:
        if self.writer is None:
            self.writer = create_test_run(self.storage, on_error="warn", attrs={"rate": 1})
        step = len(self.oracle.events)
        self.oracle.events.append(Event(step, values(step)))
        self.writer.log(self.oracle.events[-1].values, step=step)
        if self.rng.random() < 0.2:
            return
        if self.writer.flush():
            self.oracle.acknowledged = len(self.oracle.events)
        else:
            self.met["not acknowledged"] += 1

    def open(self) -> None:
        if self.writer is None:
            return
        acknowledged = self.oracle.acknowledged
        reader = reader_of(self.storage)
        assert reader.attrs == {"rate": 1}
        self.reader, self.seen = reader, 0
        self.look(acknowledged)

    def refresh(self) -> None:
        if self.reader is None:
            return
        acknowledged = self.oracle.acknowledged
        self.reader.refresh()
        self.look(acknowledged)

    def look(self, acknowledged: int) -> None:
        """What is shown is a prefix that has all that is safe and all that was shown before."""
        assert self.reader is not None
        assert not self.reader.damage
        steps = self.reader["loss"].steps.tolist() if "loss" in self.reader.names() else []
        assert steps == list(range(len(steps)))
        assert max(acknowledged, self.seen) <= len(steps) <= len(self.oracle.events)
        self.seen = len(steps)

    def read(self) -> None:
        if self.reader is None or not self.seen:
            return
        step = self.rng.randrange(self.seen)
        name = self.rng.choice(["loss", "weight"])
        wanted = self.oracle.events[step].values[name]
        try:
            found = self.reader[name].read(step=step)
        except tsf.StepDroppedError:
            self.met["dropped"] += 1
            return
        assert bits(found) == bits(wanted)

    def not_yet(self) -> None:
        if self.reader is None or not self.seen:
            return
        with pytest.raises(tsf.StepNotYetWrittenError):
            self.reader["loss"].read(step=len(self.oracle.events) + 5)

    def end(self) -> None:
        """Close the writer, and check everything once the bucket is well."""
        if self.writer is None:
            return
        report = self.writer.close()
        if report.failures == 0:
            self.oracle.acknowledged = len(self.oracle.events)
            assert report.dropped == 0
        rules, self.proxy.rules = self.proxy.rules, []
        with reader_of(self.storage) as reader:
            seen = check_run(reader, self.oracle, may_drop=report.failures > 0)
        assert seen.dropped <= report.dropped
        self.met["checked values"] += seen.values
        self.met["values dropped at last"] += seen.dropped
        self.proxy.rules = rules


def mixture(rng: random.Random) -> faults.Act:
    return faults.one_of(
        rng,
        {
            faults.status(503, "SlowDown"): 6,
            faults.status(500, "InternalError"): 6,
            faults.status(409, "ConditionalRequestConflict"): 2,
            faults.done_but(500): 5,
            faults.reset(): 6,
            faults.reset(after=0): 2,
            faults.reset(after=9): 3,
            faults.reset(is_done=True): 5,
            faults.cut(30): 4,
            faults.hang(): 0.6,
        },
    )


@pytest.mark.parametrize("rate", RATES)
def test_failures_are_neither_absence_nor_loss(proxy: S3Proxy, rate: float) -> None:
    rng = random.Random(SEED)
    met: Counter[str] = Counter()
    rule = proxy.add(mixture(random.Random(SEED)), probability=rate)
    story = Story(proxy, rng, met)
    count = trials(300)
    kinds, weights = list(OPERATIONS), list(OPERATIONS.values())
    for _ in range(count):
        story.operate(rng.choices(kinds, weights)[0])
        if len(story.oracle.events) >= STEPS:
            story.end()
            story = Story(proxy, rng, met)
    story.end()
    record(f"S1 failures, {rate:.0%} of requests", count, faults=rule.done, **met)
    assert rule.done > 0
    assert met["checked values"] > 0


# --- S3: slow ------------------------------------------------------------------------------

SLOW = {
    "one byte a second": faults.slowly(1),
    "first byte after a minute": faults.late(60),
    "never": faults.hang(),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_request_that_takes_for_ever_is_given_up(proxy: S3Proxy, name: str) -> None:
    impatient = Patience(0, attempt_s=0.3, least_bytes_per_s=1e6)
    with storage_of(proxy, new_key("slow")) as storage:
        storage.publish("a", [bytes(1000)])
        storage.retry = impatient.policy
        with proxy.during(SLOW[name]):
            for request in (Range("a", 5, 905), Prefix("a", 2000), Listing("")):
                (result,) = storage.fetch_settled([request])
                assert isinstance(result, TimeoutError), result
            if name != "one byte a second":  # the answer to a PUT has no body
                with pytest.raises(TimeoutError):
                    storage.publish("b", [bytes(100)])
        storage.retry = Patience(5).policy
        assert storage.fetch([Range("a", 5, 905)]) == [bytes(900)]
    record(f"S3 slow, {name}", 3)


def test_one_slow_answer_does_not_block_others(proxy: S3Proxy) -> None:
    may_go = threading.Event()
    with storage_of(proxy, new_key("slow")) as storage:
        for name in ("slow", "quick"):
            storage.publish(name, [name.encode()])
        with proxy.during(faults.before(lambda _: may_go.wait(60)), key="*/slow") as rule:
            got: list[bytes] = []
            thread = threading.Thread(
                target=lambda: got.extend(storage.fetch([Range("slow", 0, 4)]))
            )
            thread.start()
            while not rule.done:
                time.sleep(0.001)
            for _ in range(20):
                assert storage.fetch([Range("quick", 0, 5)]) == [b"quick"]
            assert got == []
            may_go.set()
            thread.join()
    assert got == [b"slow"]
    record("S3 one slow, others quick", 20)


# --- S7: credentials that expire -------------------------------------------------------------


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId"])
def test_credentials_that_expire_in_the_middle(proxy: S3Proxy, code: str) -> None:
    key = new_key("expired")
    oracle = Oracle()
    writer = create_test_run(storage_of(proxy, key), on_error="warn")
    reader = reader_of(storage_of(proxy, key, writable=False))

    def log() -> bool:
        step = len(oracle.events)
        oracle.events.append(Event(step, values(step)))
        writer.log(oracle.events[-1].values, step=step)
        return writer.flush()

    assert log()
    assert log()
    oracle.acknowledged = 2
    assert reader.refresh()
    assert reader["loss"].read().tolist() == [0.0, 1.0]
    with proxy.during(faults.status(403, code)):
        proxy.log.clear()
        for ask in (reader.refresh, lambda: reader["weight"].read(step=1)):
            with pytest.raises(PermissionError, match=code):
                ask()
        assert proxy.count() == 2, proxy.log  # asking again would not help
        assert not log()
        assert not log()
        assert 2 < proxy.count() < 20
        assert reader["loss"].read().tolist() == [0.0, 1.0]  # it has this already
        with pytest.raises(PermissionError):
            reader_of(storage_of(proxy, key, writable=False))
    assert log()  # the credentials were renewed
    oracle.acknowledged = len(oracle.events)
    assert reader.refresh()
    assert reader["loss"].read().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert reader["weight"].read(step=1).tolist() == values(1)["weight"].tolist()
    report = writer.close()
    reader.refresh()
    seen = check_run(reader, oracle, may_drop=True)
    assert seen.dropped == report.dropped
    assert report.failures
    record(f"S7 credentials, {code}", 1, dropped=report.dropped, failures=report.failures)

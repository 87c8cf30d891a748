"""PUTs whose outcome is unknown, and stores without conditional ones (goals S4 and S5)."""

from __future__ import annotations

import random
import threading
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
from support.buckets import Patience, new_key, reader_of, storage_of
from support.crash_scripts import OPTIONS, events_of, fixed_script, play
from support.goals import SEED, record, trials

import tensorstore_fmt as tsf
from tensorstore_fmt.format import layout
from tensorstore_fmt.storage import Prefix
from tensorstore_fmt.testing import s3_faults as faults
from tensorstore_fmt.testing.oracle import Oracle, check_run
from tensorstore_fmt.testing.s3_proxy import Act, Exchange, S3Proxy, serve_s3_proxy
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.writers import create_test_run


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with serve_s3_proxy(s3, seed=SEED) as running:
        yield running


def write_script(proxy: S3Proxy, key: str, budget_s: float = 5) -> tuple[Oracle, tsf.CloseReport]:
    """Write the fixed script of the crash tests."""
    script = fixed_script()
    run = create_test_run(storage_of(proxy, key, Patience(budget_s)), **OPTIONS)
    play(run, script, lambda *_: None)
    events = events_of(script)
    return Oracle(events, len(events)), run.close()


def check(proxy: S3Proxy, key: str, oracle: Oracle, report: tsf.CloseReport) -> None:
    assert (report.failures, report.dropped) == (0, 0)
    with reader_of(storage_of(proxy, key, writable=False)) as run:
        assert run.is_closed
        assert not run.damage
        assert check_run(run, oracle).prefix == len(oracle.events)


def first_of_each_key(act: Act) -> Act:
    """Let something happen to the first request for each key."""
    seen: set[str] = set()
    lock = threading.Lock()

    def once(exchange: Exchange) -> None:
        with lock:
            is_new = exchange.request.key not in seen
            seen.add(exchange.request.key)
        if is_new:
            act(exchange)

    return once


UNKNOWN = {
    "answered 500": faults.done_but(500),
    "answered 503": faults.done_but(503, "SlowDown"),
    "reset": faults.reset(is_done=True),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_every_put_succeeds_but_says_that_it_failed(proxy: S3Proxy, name: str) -> None:
    key = new_key("unknown")
    with proxy.during(first_of_each_key(UNKNOWN[name]), ops=["PUT"]):
        oracle, report = write_script(proxy, key)
    puts = Counter(each.key for each in proxy.log if each.op == "PUT")
    files = {each.removeprefix(f"{key}/") for each in puts}
    record(f"S4 every PUT {name}", len(puts), puts=puts.total())
    assert files >= {layout.RUN_JSON, layout.BUNDLE}
    assert {layout.INDEX_DIR, layout.SHARDS_DIR} <= {each.partition("/")[0] for each in files}
    assert min(puts.values()) >= 2
    check(proxy, key, oracle, report)


def test_puts_of_which_some_are_unknown_several_times(proxy: S3Proxy) -> None:
    count = trials(2)
    rng = random.Random(SEED)
    done = 0
    for _ in range(count):
        key = new_key("unknown")
        act = faults.one_of(rng, dict.fromkeys(UNKNOWN.values(), 1))
        with proxy.during(act, ops=["PUT"], probability=0.4) as rule:
            # One in a hundred is answered so five times in a row: that must not be too often.
            oracle, report = write_script(proxy, key, budget_s=600)
        done += rule.done
        check(proxy, key, oracle, report)
    record("S4 some PUTs unknown", count, faults=done)
    assert done


def test_a_conflict_is_no_other_owner(proxy: S3Proxy) -> None:
    with storage_of(proxy, new_key("conflict"), Patience(30)) as storage:
        with proxy.during(faults.status(409, "ConditionalRequestConflict"), ops=["PUT"], times=5):
            storage.publish("run.json", [b"mine"], if_absent=True)
        assert storage.fetch([Prefix("run.json", 9)]) == [(b"mine", 4)]
        with pytest.raises(FileExistsError):
            storage.publish("run.json", [b"other"], if_absent=True)
        with (
            proxy.during(faults.status(409, "ConditionalRequestConflict"), ops=["PUT"], times=3),
            pytest.raises(FileExistsError),
        ):
            storage.publish("run.json", [b"other"], if_absent=True)
        assert storage.fetch([Prefix("run.json", 9)]) == [(b"mine", 4)]
    record("S5 409 and 412 told apart", 3)


# --- stores without conditional writes ---------------------------------------------------------


def refused(exchange: Exchange) -> None:
    """Answer as stores do that know the header, and that they cannot do it."""
    if "if-none-match" in exchange.request.headers:
        faults.status(501, "NotImplemented")(exchange)


WITHOUT = {"ignored": faults.unconditional(), "refused": refused}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_store_without_conditional_writes_is_noticed(proxy: S3Proxy, name: str) -> None:
    key = new_key("unconditional")
    proxy.add(WITHOUT[name])
    with pytest.warns(RuntimeWarning, match="conditional writes") as told:
        oracle, report = write_script(proxy, key)
    assert len(told) == 1
    check(proxy, key, oracle, report)
    # Nothing is put conditionally by those who find the run.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = create_test_run(
            storage_of(proxy, key), resume_from=2, new_id=iter(range(99, 999)).__next__
        )
        again.log({"loss": 7.0}, step=2)
        again.close()
    with reader_of(storage_of(proxy, key, writable=False)) as run:
        assert run["loss"].read(step=2) == 7.0
    record(f"S5 conditions {name}", 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_there_is_not_replaced_once_it_is_known(proxy: S3Proxy, name: str) -> None:
    proxy.add(WITHOUT[name])
    with storage_of(proxy, new_key("unconditional"), Patience(5)) as storage:
        storage.publish("a", [b"mine"], if_absent=True)
        storage.publish("b", [b"theirs"])
        with pytest.raises(FileExistsError):
            storage.publish("b", [b"mine"], if_absent=True)
        assert storage.fetch([Prefix("a", 9), Prefix("b", 9)]) == [(b"mine", 4), (b"theirs", 6)]
        for number, act in enumerate(UNKNOWN.values()):
            with proxy.during(act, ops=["PUT"], times=1):
                storage.publish(f"c{number}", [b"mine"], if_absent=True)
            assert storage.fetch([Prefix(f"c{number}", 9)]) == [(b"mine", 4)]

"""Processes that race for the same run and the same worker in a bucket (goal N1)."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from support.bucket_scripts import MODULE, STEPS, race_value
from support.buckets import Patience, new_key, reader_of, storage_of
from support.goals import SEED, record, trials

from tensorstore_fmt.storage import Prefix
from tensorstore_fmt.testing import s3_faults as faults
from tensorstore_fmt.testing.forks import ForkServer
from tensorstore_fmt.testing.s3_proxy import S3Proxy, serve_s3_proxy
from tensorstore_fmt.testing.servers import S3Server
from tensorstore_fmt.testing.writers import create_test_run

RACERS = 3
APART_S = 0.6


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:
    with serve_s3_proxy(s3, seed=SEED) as running:
        yield running


def run_races(
    proxy: S3Proxy, urls: list[str], resume_from: int | None
) -> list[list[dict[str, Any]]]:
    """Let several processes race, once for each place; give what they say, by race."""
    begin = time.time() + 1.0
    races = [(url, begin + APART_S * number) for number, url in enumerate(urls)]
    said: list[list[dict[str, Any]]] = [[] for _ in urls]
    with ForkServer([MODULE]) as server:
        children = [
            server.start(
                MODULE,
                "race",
                racer,
                races,
                resume_from,
                proxy.storage_options,
                timeout_s=60 + 5 * len(races),
            )
            for racer in range(RACERS)
        ]
        for child in children:
            for message in child.messages():
                if message[0] == "error":
                    raise AssertionError(message[1])
                if message[0] != "result":
                    said[message[0]].append(message[1])
            assert child.finish() == 0
    return said


def check_race(proxy: S3Proxy, key: str, said: list[dict[str, Any]], first: int) -> list[str]:
    """Say what is wrong after a race."""
    wrong = [each["error"] for each in said if "error" in each]
    if wrong or len(said) != RACERS:
        return wrong or [f"{len(said)} racers have an answer"]
    winners = [each["racer"] for each in said if each["has_name"]]
    with storage_of(proxy, key, Patience(5), writable=False) as storage:
        ((name, _),) = storage.fetch([Prefix("one-name.tmp", 9)])
        if [int(name)] != winners:
            wrong.append(f"{winners} put the name, and it says {name!r}")
        with reader_of(storage) as run:
            joined = [each for each in said if "run_id" in each]
            if {each["run_id"] for each in joined} != {run.run_id}:
                wrong.append(f"not all in one run: {joined}")
            if run.damage:
                wrong.append(f"damage: {run.damage}")
            for each in joined:
                found = run[f"of/{each['racer']}"].read(attempt=each["attempt"])
                steps = range(first, first + STEPS)
                if found.tolist() != [race_value(each["racer"], step) for step in steps]:
                    wrong.append(f"{each}: {found!r}")
    return wrong


@pytest.mark.parametrize("kind", ["new", "resumed"])
def test_processes_race_for_one_run(proxy: S3Proxy, kind: str) -> None:
    count = trials(10 if kind == "new" else 5)
    keys = [new_key("race") for _ in range(count)]
    resume_from = None if kind == "new" else 2
    if kind == "resumed":
        for number, key in enumerate(keys):
            run = create_test_run(
                storage_of(proxy, key), new_id=iter(range(1000 * number + 1, 10**9)).__next__
            )
            for step in range(4):
                run.log({"of/nobody": 1.0}, step=step)
            run.close()
    proxy.add(faults.done_but(500), ops=["PUT"], probability=0.1)
    proxy.add(faults.late(0.01), ops=["PUT"], probability=0.5)
    said = run_races(proxy, [proxy.url(key) for key in keys], resume_from)
    proxy.remove()
    wrong = []
    met: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key, each in zip(keys, said, strict=True):
            wrong += [f"{key}: {text}" for text in check_race(proxy, key, each, resume_from or 0)]
            met.update("joined" if "run_id" in one else "refused" for one in each)
    record(f"N1 races on S3, {kind}", count, **met, wrong=len(wrong))
    assert not wrong, "\n".join(wrong[:5])
    assert met["joined"] >= count

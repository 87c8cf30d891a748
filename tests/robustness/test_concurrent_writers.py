"""Writers that begin at the same moment, and jobs that go on with other numbers of workers (N1).

Each writer owns its files, so two that believe to be the same worker take nothing from each
other: all that was acknowledged of both is there, under the names and attempts of each.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.concurrent_scripts import MODULE, NAMES, Task, attempt_in
from support.crash_running import quick_folder, run_trials
from support.goals import SEED, record, trials

import tensorstore_fmt as tsf
from tensorstore_fmt.testing.forks import Child, ChildFailedError, ForkServer

SIZES = (2, 1, 4, 3)
MOST_RACERS = 3


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as place:
        yield place


def together(server: ForkServer, what: str, tasks: Sequence[Task]) -> list[Any]:
    """Run tasks that begin at the same moment; give the results."""
    children = [server.start(MODULE, what, task) for task in tasks]
    streams = [child.messages() for child in children]
    for stream in streams:
        assert next(stream)[0] == "ready"
    Path(tasks[0].start).touch()
    return [_result(child, list(stream)) for child, stream in zip(children, streams, strict=True)]


def _result(child: Child, messages: list[Any]) -> Any:
    child.finish()
    kind, what = messages[-1] if messages else ("error", "it said nothing")
    if kind != "result":
        raise ChildFailedError(what)
    return what


def check_racers(url: str, results: list[Any], met: Counter[str]) -> None:
    """All that is safe of anybody is there, of their own attempt."""
    writers = [(n, *result) for n, result in enumerate(results) if result[0] >= 0]
    met["refused"] += len(results) - len(writers)
    assert writers, "somebody wins"
    assert len({run_id for _, _, run_id, _, _ in writers}) == 1, "one run"
    with tsf.open_run(url) as run:
        assert not run.damage
        assert run.run_id == writers[0][2]
        assert run.attempts == sorted({attempt for _, attempt, *_ in writers} | set(run.attempts))
        met["shared attempts"] += len(writers) - len({attempt for _, attempt, *_ in writers})
        for number, attempt, _, safe, _ in writers:
            for name in [f"racer{number}/{each}" for each in NAMES[:3]] if safe else []:
                tensor = run[name].select(attempt=attempt)
                assert set(safe) <= set(tensor.steps.tolist()), (name, safe, tensor.steps)
                for step, value in zip(safe, tensor.read(steps=safe), strict=True):
                    assert attempt_in(name, step, value) == attempt
                    met["values"] += 1
        assert set(run["shared"].read().tolist()) <= set(range(MOST_RACERS))


def one_race(server: ForkServer, url: str, seed: int, met: Counter[str]) -> None:
    """Let two or three create a run at once, then as many resume it."""
    rng = random.Random(seed)
    for resume in (None, rng.randrange(5)):
        n = rng.choice([2, 2, MOST_RACERS])
        task = Task(url=url, start=f"{url}-start-{resume}", number=0, resume=resume)
        tasks = [replace(task, number=i, seed=rng.randrange(1 << 30)) for i in range(n)]
        results = together(server, "race", tasks)
        check_racers(url, results, met)
        met["races"] += 1


def test_races_for_the_same_worker(folder: Path) -> None:
    rng = random.Random(SEED)
    met: Counter[str] = Counter()
    jobs = [(f"{folder}/run-{i}", rng.randrange(2**32)) for i in range(trials(25))]
    wrong = run_trials([MODULE], jobs, lambda server, job: one_race(server, *job, met))
    record("N1", met["races"], kind="same worker", **met, wrong=len(wrong))
    assert not wrong, "\n".join(wrong[:3])
    assert met["races"] == 2 * len(jobs)
    assert met["shared attempts"], "some did meet"
    assert met["values"] > 10 * met["races"]


def one_job(server: ForkServer, url: str, seed: int, met: Counter[str]) -> None:
    """Start a job with ever other numbers of workers, each time from an earlier step."""
    rng = random.Random(seed)
    resume: int | None = None
    ended: list[tuple[int, list[int]]] = []  # of each attempt: where it began and its workers ended
    for attempt, size in enumerate(SIZES):
        start = f"{url}-start-{attempt}"
        task = Task(url=url, start=start, number=0, resume=resume, num_workers=size)
        results = together(server, "work_for", [replace(task, number=i) for i in range(size)])
        assert [found for found, _ in results] == [attempt] * size, results
        ended.append((resume or 0, [end for _, end in results]))
        check_job(url, ended, met)
        resume = rng.randrange(max(1, (resume or 0) - 2), min(e for _, e in results) + 1)
        met["starts"] += size
    met["jobs"] += 1


def check_job(url: str, ended: list[tuple[int, list[int]]], met: Counter[str]) -> None:
    """Each attempt shows what later ones do not hide; by its number all of it is there."""
    with tsf.open_run(url) as run:
        assert not run.damage
        assert not run.is_closed
        assert run.num_workers == len(ended[-1][1])
        visible: dict[str, dict[int, int]] = {}
        for attempt, (first, ends) in enumerate(ended):
            for steps in visible.values():
                for step in [step for step in steps if step >= first]:
                    del steps[step]
            for worker, end in enumerate(ends):
                name = f"worker{worker}/middle"
                steps = list(range(first, end))
                rewound = run[name].select(attempt=attempt)
                assert rewound.steps.tolist() == steps
                for step, value in zip(steps, rewound.read(steps=steps), strict=True):
                    assert attempt_in(name, step, value) == attempt
                    visible.setdefault(name, {})[step] = attempt
                    met["values"] += 1
        for name, attempts in visible.items():
            assert run[name].steps.tolist() == sorted(attempts)
            for step in attempts:
                assert attempt_in(name, step, run[name].read(step=step)) == attempts[step]


def test_jobs_go_on_with_other_numbers_of_workers(folder: Path) -> None:
    rng = random.Random(SEED)
    met: Counter[str] = Counter()
    jobs = [(f"{folder}/run-{i}", rng.randrange(2**32)) for i in range(trials(3))]
    wrong = run_trials([MODULE], jobs, lambda server, job: one_job(server, *job, met))
    record("N1", met["starts"], kind="2, 1, 4, 3 workers", **met, wrong=len(wrong))
    assert not wrong, "\n".join(wrong[:3])
    assert met["starts"] >= 10 * met["jobs"] > 0

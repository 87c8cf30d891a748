"""A run in a bucket of a real S3 server: written, followed, resumed; and what goes wrong there."""

from __future__ import annotations

import pickle
import threading
import uuid

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import StoreNotFoundError
from tensorstore_fmt.testing.servers import Asked, Reply, S3Server, serve, serve_http

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((400, 300)).astype("f4")


@pytest.fixture
def place(s3: S3Server) -> tuple[str, dict[str, object]]:
    return s3.url(f"runs/{uuid.uuid4()}"), s3.storage_options


def test_written_followed_and_read(place: tuple[str, dict[str, object]]) -> None:
    url, options = place
    writer = tsf.create_run(url, storage_options=options, flush_interval_s=0.2, attrs={"lr": 0.1})
    seen: list[int] = []

    def follow() -> None:
        run = tsf.open_run(url, storage_options=options)
        seen.extend(run.follow(poll_s=0.05, timeout_s=60))

    follower = threading.Thread(target=follow)
    follower.start()
    for step in range(30):
        writer.log({"loss": 1 / (step + 1), "w": WEIGHT + step, "frozen": WEIGHT}, step=step)
    report = writer.close()
    follower.join(timeout=60)
    assert seen == list(range(30))
    assert report.failures == report.dropped == 0
    run = tsf.open_run(url, storage_options=options)
    assert run.is_closed
    assert run.attrs == {"lr": 0.1}
    assert (run["w"].read(step=17, index=np.s_[5:9, ::7]) == (WEIGHT + 17)[5:9, ::7]).all()
    assert (run["frozen"].read(index=np.s_[3]) == WEIGHT[3]).all()
    assert run["loss"].read().tolist() == [1 / (s + 1) for s in range(30)]
    again = pickle.loads(pickle.dumps(run))
    assert (again["w"].read(step=3) == WEIGHT + 3).all()


def test_workers_and_a_resumed_attempt(place: tuple[str, dict[str, object]]) -> None:
    url, options = place
    writers = [
        tsf.create_run(url, storage_options=options, worker=w, num_workers=2) for w in range(2)
    ]
    for w, writer in enumerate(writers):
        for step in range(5):
            writer.log({"loss": float(step), f"w{w}": WEIGHT * step}, step=step)
    for writer in writers:
        writer.close()
    with tsf.create_run(url, storage_options=options, resume_from=3) as writer:
        writer.log({"loss": 30.0}, step=3)
    run = tsf.open_run(url, storage_options=options)
    assert run.attempts == [0, 1]
    assert run["loss"].read(steps=[0, 1, 2], worker=1).tolist() == [0, 1, 2]
    assert run["loss"].read(step=3) == 30.0
    assert (run["w1"].read(step=4, attempt=0) == WEIGHT * 4).all()
    with pytest.raises(tsf.StepNotFoundError):
        run["w1"].read(step=4)


def test_no_such_bucket(s3: S3Server) -> None:
    for use in (tsf.create_run, tsf.open_run):
        with pytest.raises(StoreNotFoundError) as caught:
            use("s3://no-such-bucket-here/run", storage_options=s3.storage_options)
        assert "no-such-bucket-here" in str(caught.value)


def test_no_such_run(s3: S3Server) -> None:
    with pytest.raises(tsf.NotARunError) as caught:
        tsf.open_run(s3.url("nothing/here"), storage_options=s3.storage_options)
    assert "nothing/here" in str(caught.value)


def test_wrong_credentials() -> None:
    def refuse(asked: Asked) -> Reply:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>"
        return Reply(403, body, {"Content-Type": "application/xml"})

    with serve(refuse) as server:
        options = {"key": "a", "secret": "b", "client_kwargs": {"endpoint_url": server.url}}
        for use in (tsf.create_run, tsf.open_run):
            with pytest.raises(PermissionError) as caught:
                use("s3://bucket/run", storage_options=options)
            assert "bucket" in str(caught.value)


def test_a_closed_run_over_plain_http(tmp_path: object) -> None:
    folder = f"{tmp_path}/run"
    with tsf.create_run(folder) as writer:
        for step in range(10):
            writer.log({"loss": float(step), "w": WEIGHT * step}, step=step)
    with serve_http(str(tmp_path)) as server:
        run = tsf.open_run(f"{server.url}/run")
        assert run["loss"].read().tolist() == [float(s) for s in range(10)]
        assert (run["w"].read(step=4, index=np.s_[:, 7]) == WEIGHT[:, 7] * 4).all()
        with pytest.raises(tsf.ArgumentError):
            tsf.create_run(f"{server.url}/other")

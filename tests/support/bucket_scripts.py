"""What runs in child processes of the bucket tests: races for one run and one name."""

from __future__ import annotations

import time
import traceback
import warnings
from typing import Any

# What each fork would have to import otherwise.
import aiobotocore.session  # noqa: F401 - see above
import s3fs  # noqa: F401 - see above

import tensorstore_fmt as tsf
from tensorstore_fmt.storage import open_storage
from tensorstore_fmt.storage import s3 as _s3  # noqa: F401 - see above
from tensorstore_fmt.testing.forks import Channel
from tensorstore_fmt.writing.run import create_run

MODULE = __name__
STEPS = 3


def race_value(racer: int, step: int) -> float:
    """Give what a racer logs."""
    return float(racer * 1000 + step)


def race(
    channel: Channel,
    racer: int,
    races: list[tuple[str, float]],
    resume_from: int | None,
    storage_options: dict[str, Any],
) -> None:
    """Take part in races for runs, each of which starts at a time of the clock."""
    warnings.simplefilter("ignore")
    for number, (url, start) in enumerate(races):
        try:
            channel.send((number, _race_once(racer, url, start, resume_from, storage_options)))
        except Exception:  # noqa: BLE001 - the parent is told
            channel.send((number, {"error": traceback.format_exc()}))


def _race_once(
    racer: int, url: str, start: float, resume_from: int | None, storage_options: dict[str, Any]
) -> dict[str, Any]:
    storage = open_storage(url, storage_options=storage_options, writable=True)
    storage.fetch_settled([])
    time.sleep(max(0.0, start - time.time()))
    result: dict[str, Any] = {"racer": racer, "has_name": True}
    try:
        storage.publish("one-name.tmp", [b"%d" % racer], if_absent=True)
    except FileExistsError:
        result["has_name"] = False
    try:
        run = create_run(
            url,
            storage_options=storage_options,
            attrs={"creator": racer},
            resume_from=resume_from,
            on_error="raise",
        )
    except tsf.StateError as error:
        return result | {"refused": error.code}
    result |= {"run_id": run.run_id, "attempt": run.attempt}
    first = resume_from or 0
    for step in range(first, first + STEPS):
        run.log({f"of/{racer}": race_value(racer, step)}, step=step)
    run.flush()
    run.close()
    storage.close()
    return result

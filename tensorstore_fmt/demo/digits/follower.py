"""The second process of the demo: it follows a run while another process writes it.

Works on its own too, in another terminal: ``python -m tensorstore_fmt.demo.digits.follower URL``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import tensorstore_fmt as tsf
from tensorstore_fmt.demo.digits.observation import (
    OPTIONS_VARIABLE,
    READY,
    Observation,
    check_gradients,
)
from tensorstore_fmt.errors import NotARunError

__all__ = ["main", "observe"]

_POLL_S = 0.1
_SILENCE_S = 600.0  # then the writer is taken for dead: nobody is left to close the run


def observe(
    url: str, *, storage_options: Mapping[str, object] | None = None, wait_s: float = 60.0
) -> Iterator[Observation]:
    """Follow the run at `url` until it is closed, one observation per step with gradients.

    Reads of tensors nothing but their statistics; only ``loss`` and ``accuracy`` are values.

    Parameters
    ----------
    wait_s
        How long to wait for the run to appear.

    Raises
    ------
    NotARunError
        There is still no run at `url` after `wait_s`.
    TimeoutError
        Nothing new came for ten minutes.
    """
    with _open_when_there(url, storage_options=storage_options, wait_s=wait_s) as run:
        unchecked = 0
        for step in run.follow(mode="TRAIN", timeout_s=_SILENCE_S):
            statistics = {
                name: run[name].stats(steps=slice(unchecked, step + 1))
                for name in run.names("gradient/*")
            }
            if not any(len(columns["step"]) for columns in statistics.values()):
                continue  # a step that logged only loss and accuracy
            unchecked = step + 1
            smallest_l2, smallest_name, not_finite, problems = check_gradients(statistics)
            yield Observation(
                step=step,
                loss=float(run["loss"].read(step=step, mode="TRAIN")),
                accuracy=float(run["accuracy"].read(step=step, mode="TRAIN")),
                smallest_l2=smallest_l2,
                smallest_name=smallest_name,
                not_finite=not_finite,
                problems=problems,
                is_closed=run.is_closed,
            )


def _open_when_there(
    url: str, *, storage_options: Mapping[str, object] | None, wait_s: float
) -> tsf.Run:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return tsf.open_run(url, storage_options=storage_options)
        except NotARunError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what `observe` sees; give 0, or 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tensorstore_fmt.demo.digits.follower",
        description="Follow a run of the demo while it trains, and check its gradients.",
        epilog=f"Storage options are read as JSON from the environment: {OPTIONS_VARIABLE}.",
    )
    parser.add_argument("url", help="folder or URL of the run")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(arguments)
    storage_options = json.loads(os.environ.get(OPTIONS_VARIABLE, "null"))

    if options.json:
        print(READY, flush=True)
    has_failed = False
    for observation in observe(options.url, storage_options=storage_options):
        has_failed |= bool(observation.problems)
        print(observation.to_json() if options.json else observation, flush=True)
    return int(has_failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # Ctrl-C reaches both processes of the demo; the parent is the one that says something.
        sys.exit(130)

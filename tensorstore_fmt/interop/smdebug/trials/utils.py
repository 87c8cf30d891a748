"""Opening trials."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tensorstore_fmt.interop.smdebug.trials.trial import Trial

__all__ = ["create_trial"]


def create_trial(
    path: str | os.PathLike[str],
    name: str | None = None,
    profiler: bool = False,  # noqa: FBT001, FBT002, ARG001 - smdebug's signature
    output_dir: str = "/opt/ml/processing/outputs/.sagemaker-ignore",  # noqa: ARG001 - the same
    *,
    range_steps: tuple[int | None, int | None] | None = None,
    cache: bool = False,  # noqa: ARG001 - rules read everything once anyway
    check: bool = False,  # noqa: ARG001 - everything is checked anyway
    storage_options: Mapping[str, object] | None = None,
    timeout_s: float | None = 600.0,
) -> Trial:
    """Open a run as a trial; wait until it is there and all of its workers have joined.

    Parameters
    ----------
    path
        A folder, or any fsspec URL, with a run of this library. One that smdebug wrote has to be
        imported first.
    name
        Of the trial; by default the last part of the path.
    range_steps
        Only global steps from the first up to, not including the second; None: no bound.
    storage_options
        For the fsspec file system.
    timeout_s
        How long to wait at most; None: for ever, as smdebug does.
    profiler, output_dir, cache, check
        Taken, and not needed.

    Raises
    ------
    MissingCollectionFiles
        The run, or a worker of it, did not come in time, or never will.
    NotARunError
        Code ``unknown_format``: smdebug wrote what is there.
    """
    text = os.fspath(path)
    return Trial(
        name or text.rstrip("/").rpartition("/")[2] or text,
        text,
        range_steps=range_steps,
        storage_options=storage_options,
        timeout_s=timeout_s,
    )

"""What a writer did, as `close` tells it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CloseReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReport:
    """What a writer did, as `RunWriter.close` gives it.

    Attributes
    ----------
    steps
        Steps logged, over all modes.
    raw_nbytes, stored_nbytes
        Bytes logged, and bytes written for them into shards and segments.
    dropped
        Tensors that had to be dropped; each is recorded as dropped in the run.
    failures
        Storage failures met, also those that a retry mended.
    stalled_s, log_s
        Time `log` waited because the queue was full, and all time spent in `log`.
    """

    steps: int
    raw_nbytes: int
    stored_nbytes: int
    dropped: int
    failures: int
    stalled_s: float
    log_s: float

    def __str__(self) -> str:
        ratio = self.raw_nbytes / self.stored_nbytes if self.stored_nbytes else 1.0
        text = (
            f"{self.steps:,} steps, {self.raw_nbytes / 1e6:,.1f} MB logged, "
            f"{self.stored_nbytes / 1e6:,.1f} MB stored (ratio {ratio:.2f}), "
            f"{self.log_s:.2f} s spent in log"
        )
        if self.stalled_s >= 0.01:
            text += f", {self.stalled_s:.2f} s of it waiting for the storage"
        if self.dropped or self.failures:
            text += f"; {self.dropped:,} tensors DROPPED, {self.failures:,} storage failures"
        return text

"""The near end of `shard_check`: a child process that opens shards with Arrow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.format import layout
from tensorstore_fmt.upkeep.arrow_file import ArrowFrame, Block
from tensorstore_fmt.upkeep.shard_check import FRAME

__all__ = ["ChildDiedError", "ShardChild"]

_MODULE: Final = "tensorstore_fmt.upkeep.shard_check"
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])
_TIMEOUT_S: Final = 60.0
_SLOWEST_NBYTES_PER_S: Final = 20e6


class ChildDiedError(Exception):
    """Arrow did not survive what it was given, or took too long."""


class ShardChild(Closeable):
    """A child process, started when first needed and again after it died.

    Parameters
    ----------
    timeout_s
        For one answer, beside the time that its bytes take.
    """

    def __init__(self, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._schema: tuple[dict[str, object], bytes] | None = None

    # --- one shard ----------------------------------------------------------------------

    def schema(self, run_id: bytes, name: layout.ShardName, data: bytes) -> dict[str, Any]:
        """Check the first message of a shard, to which all further requests belong."""
        request: dict[str, object] = {
            "op": "schema",
            "run_id": run_id.hex(),
            "worker": name.key.worker,
            "attempt": name.key.attempt,
            "writer": name.key.writer,
            "number": name.number,
        }
        self._schema = None
        answer, _ = self._exchange(request, data)
        self._schema = (request, data)
        return answer

    def batch(
        self, block: Block, data: bytes, flushes: Sequence[tuple[int, int]] = ()
    ) -> dict[str, Any]:
        """Check a record batch and all its rows.

        The answer has ``rows``, ``places`` (offsets and lengths of the payloads), ``bad`` (row,
        code, sentence, offset, name, steps), and of rows of these `flushes` that are proven
        ``found``; or ``what`` if it is no such batch.
        """
        request = {"op": "batch", "payload_at": block.payload_at, "flushes": list(flushes)}
        return self._exchange(request, data)[0]

    def footer(self, frame: ArrowFrame, tail: bytes) -> dict[str, Any]:
        """Check the footer (`tail` is the file from its footer on); ``what`` if it is not good."""
        request = {"op": "footer", "nbytes": frame.nbytes, "batches": len(frame.batches)}
        return self._exchange(request, tail)[0]

    def seal(self, frame: ArrowFrame, schema: bytes) -> tuple[dict[str, Any], bytes]:
        """Make what a file without footer needs behind its last batch."""
        return self._exchange({"op": "seal", "blocks": [b.place for b in frame.batches]}, schema)

    def open(self, path: str, nbytes: int) -> dict[str, Any]:
        """Open a sealed local file as anybody would; ``what`` if that is not possible."""
        return self._exchange({"op": "open", "path": path, "nbytes": nbytes}, b"")[0]

    # --- the process --------------------------------------------------------------------

    def _exchange(self, request: dict[str, object], data: bytes) -> tuple[dict[str, Any], bytes]:
        if self._process is None:
            self._start()
            if self._schema is not None:
                self._send(*self._schema)
        return self._send(request, data)

    def _start(self) -> None:
        paths = [_PACKAGES, os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "ARROW_DEFAULT_MEMORY_POOL": "system",  # others reserve address space in advance
            "OMP_NUM_THREADS": "1",
        }
        # -P: never import what lies in the working directory, which may be the run's.
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, a module of ours
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )

    def _send(self, request: dict[str, object], data: bytes) -> tuple[dict[str, Any], bytes]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        text = json.dumps(request).encode()
        limit = self._timeout_s + len(data) / _SLOWEST_NBYTES_PER_S
        timer = threading.Timer(limit, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(FRAME.pack(len(text), len(data)) + text)
            process.stdin.write(data)
            process.stdin.flush()
            head = process.stdout.read(FRAME.size)
            if len(head) == FRAME.size:
                text_nbytes, made_nbytes = FRAME.unpack(head)
                answer = process.stdout.read(text_nbytes)
                made = process.stdout.read(made_nbytes)
                if len(answer) == text_nbytes and len(made) == made_nbytes:
                    return json.loads(answer), made
        except OSError:
            pass  # it died while it was written to
        finally:
            timer.cancel()
        status = self._stop()
        raise ChildDiedError(f"Arrow did not survive it: the child process ended with {status}")

    def _stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not written yet
                pipe.close()
        return process.wait()

    def close(self) -> None:
        """End the process; more than once is fine."""
        self._stop()

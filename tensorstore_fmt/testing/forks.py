"""Child processes that start in milliseconds: forked from one that has everything imported.

`ForkServer` runs a second Python, which imports what is needed and never starts a thread. Each
task is a function that runs in a fork of it, and tells the parent things over a pipe.
"""

from __future__ import annotations

import array
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorstore_fmt.closeable import Closeable

__all__ = ["Channel", "Child", "ChildFailedError", "ForkServer"]

_HEADER_NBYTES: Final = 4
_START: Final = "import sys; from tensorstore_fmt.testing import forks; forks._serve(*sys.argv[1:])"


class ChildFailedError(Exception):
    """A task raised something, or took too long."""


class Channel:
    """The child's end of the pipe; what was sent survives the death of the child."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, message: object) -> None:
        """Tell the parent something."""
        data = pickle.dumps(message)
        rest = memoryview(len(data).to_bytes(_HEADER_NBYTES, "little") + data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


@dataclass(slots=True)
class Child:
    """A task that runs; use it up with `finish`, or `kill` it first."""

    server: ForkServer
    pid: int
    fd: int
    deadline: float

    def messages(self) -> Iterator[Any]:
        """Iterate over what the child sends, until it ends.

        Raises
        ------
        ChildFailedError
            It takes longer than it may; it was killed then.
        """
        data = b""
        while (part := self._read()) is not None:
            data += part
            while len(data) >= _HEADER_NBYTES:
                end = _HEADER_NBYTES + int.from_bytes(data[:_HEADER_NBYTES], "little")
                if len(data) < end:
                    break
                yield pickle.loads(data[_HEADER_NBYTES:end])  # noqa: S301 - from our own child
                data = data[end:]

    def _read(self) -> bytes | None:
        left = max(0.0, self.deadline - time.monotonic())
        if not select.select([self.fd], [], [], left)[0]:
            self.kill()
            self.finish()
            raise ChildFailedError("the child hangs: killed at its time limit")
        return os.read(self.fd, 1 << 20) or None

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        os.kill(self.pid, signal.SIGKILL)

    def finish(self) -> int:
        """Wait for its end; give its exit status, negative for a signal."""
        os.close(self.fd)
        status = self.server._ask(("wait", self.pid))
        return os.waitstatus_to_exitcode(status)


class ForkServer(Closeable):
    """Forks tasks; one thread at a time uses it.

    Parameters
    ----------
    modules
        Imported before the first fork; those in which the tasks are must be among them. If one
        has a function `warm_up`, it is called: what it leaves in caches need not be made again
        in each fork. Threads that it starts must have ended when it returns.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-c", _START, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._ask(("hello", 0))

    def start(self, module: str, task: str, *arguments: object, timeout_s: float = 60.0) -> Child:
        """Run ``task(channel, *arguments)`` in a fork."""
        ours, theirs = os.pipe()
        pid = self._ask(("fork", (module, task, arguments)), theirs)
        os.close(theirs)
        return Child(self, pid, ours, time.monotonic() + timeout_s)

    def call(self, module: str, task: str, *arguments: object, timeout_s: float = 60.0) -> Any:  # noqa: ANN401 - the task's
        """Run a task to its end and give its result.

        Raises
        ------
        ChildFailedError
            With the traceback of what the task raised.
        """
        child = self.start(module, task, *arguments, timeout_s=timeout_s)
        messages = list(child.messages())
        status = child.finish()
        if not messages or messages[-1][0] != "result":
            said = messages[-1][1] if messages else f"ended with {status}"
            raise ChildFailedError(f"{task}: {said}")
        return messages[-1][1]

    def _ask(self, request: object, fd: int | None = None) -> int:
        data = pickle.dumps(request)
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        with self._lock:
            self._socket.sendmsg([len(data).to_bytes(_HEADER_NBYTES, "little")], ancillary)
            self._socket.sendall(data)
            answer = _receive(self._socket, 8)
        return int.from_bytes(answer, "little", signed=True)

    def close(self) -> None:
        """End it, and with it nothing that it forked."""
        self._socket.close()
        self._process.wait(timeout=20)


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = connection.recv(nbytes - len(data))
        if not part:
            raise EOFError("the fork server ended")
        data += part
    return data


# --- in the second process -------------------------------------------------------------


def _serve(fd: str, *modules: str) -> None:
    warnings.simplefilter("ignore")  # also of forks beside threads that libraries have started
    for module in modules:
        getattr(importlib.import_module(module), "warm_up", lambda: None)()
    with socket.socket(fileno=int(fd)) as connection:
        while True:
            header, fds, _, _ = socket.recv_fds(connection, _HEADER_NBYTES, 1)
            if not header:
                return
            header += _receive(connection, _HEADER_NBYTES - len(header))
            request = _receive(connection, int.from_bytes(header, "little"))
            kind, what = pickle.loads(request)  # noqa: S301 - from our own parent
            answer = 0
            if kind == "fork":
                answer = os.fork()
                if answer == 0:
                    connection.close()
                    _work(Channel(fds[0]), *what)
                os.close(fds[0])
            elif kind == "wait":
                _, answer = os.waitpid(what, 0)
            connection.sendall(answer.to_bytes(8, "little", signed=True))


def _work(channel: Channel, module: str, task: str, arguments: tuple[object, ...]) -> None:
    try:
        result = getattr(sys.modules[module], task)(channel, *arguments)
        channel.send(("result", result))
    except BaseException:  # noqa: BLE001 - the parent is told, whatever it is
        channel.send(("error", traceback.format_exc()))
    finally:
        os._exit(0)

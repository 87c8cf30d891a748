"""How writers end: programs of their own for the tests of signals, forks and exits.

Each prints a line for what it has logged and what is acknowledged.
"""

from __future__ import annotations

import linecache
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from support import crash_scripts
from support.crash_scripts import derived

from tensorstore_fmt.errors import ClosedError
from tensorstore_fmt.testing.forks import Channel
from tensorstore_fmt.testing.oracle import Event
from tensorstore_fmt.writing import run as writing_run
from tensorstore_fmt.writing.run import RunWriter, create_run

MODULE = __name__
warm_up = crash_scripts.warm_up  # for the fork server
FOREVER = 10**9


def event(step: int) -> Event:
    """Give what is logged at a step."""
    middle, large = derived("middle", step, 0, 300), derived("large", step, 0, 24_000)
    return Event(step, {"loss": step * 0.5, "middle": middle, "large": large})


def say(kind: str, count: int) -> None:
    """Tell the test; one write, so that a signal does not cut it in two."""
    os.write(1, f"{kind} {count}\n".encode())


def log_steps(run: RunWriter, stop: int, *, every: int = 5, start: int = 0) -> None:
    """Log steps and flush now and then."""
    for step in range(start, stop):
        say("logging", step + 1)
        run.log(event(step).values, step=step)
        say("logged", step + 1)
        if step % every == every - 1:
            run.flush()
            say("acknowledged", step + 1)


def opened(url: str) -> RunWriter:
    """Begin to write."""
    run = create_run(url, flush_interval_s=0.05, on_error="raise", chunks={"large": (5000,)})
    say("open", 0)
    return run


def loop(url: str) -> None:
    """Log until something happens from outside."""
    with opened(url) as run:
        log_steps(run, FOREVER)


def loop_without_close(url: str) -> None:
    """Do the same, without anything that closes the run."""
    log_steps(opened(url), FOREVER)


def exit_on_sigterm(url: str) -> None:
    """End as job schedulers ask for it."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(3)

    signal.signal(signal.SIGTERM, end)
    loop_without_close(url)


def exception_in_loop(url: str) -> None:
    """End the loop with an exception."""
    with opened(url) as run:
        log_steps(run, 23)
        raise ValueError("of the loop")


def no_close(url: str) -> None:
    """End the program without closing."""
    log_steps(opened(url), 23)


def no_close_while_logging(url: str) -> None:
    """End the program while a thread that nobody waits for goes on logging."""
    run = opened(url)
    threading.Thread(target=log_steps, args=(run, FOREVER), daemon=True).start()
    time.sleep(0.3)


def fork_after_open(url: str) -> None:
    """Fork while another thread logs; the children end as programs do, and try to log."""
    run = opened(url)
    thread = threading.Thread(target=log_steps, args=(run, 200))
    thread.start()
    for number in range(15):
        pid = os.fork()
        if pid == 0:
            _in_fork(run, number)
        _, status = os.waitpid(pid, 0)
        if status:
            say("child", status)
    thread.join()
    log_steps(run, 210, start=200)
    run.close()
    say("closed", 210)


def _in_fork(run: RunWriter, number: int) -> None:
    status = 1
    signal.alarm(10)  # a child that hangs ends with this signal
    try:
        for action in (lambda: run.log({"x": 1.0}, step=0), run.flush):
            try:
                action()
            except ClosedError:
                status = 0
            else:
                status = 2
                break
        if number % 3:
            run.close()
        writing_run._close_all()  # as the exit of the interpreter does
    finally:
        os._exit(status)


def close_while_logging(url: str) -> None:
    """Close while another thread logs: what `log` took is there, the rest is refused."""
    run = opened(url)
    ended = threading.Event()

    def log_until_closed() -> None:
        try:
            log_steps(run, FOREVER)
        except ClosedError:
            ended.set()

    thread = threading.Thread(target=log_until_closed)
    thread.start()
    time.sleep(0.2)
    run.close()
    thread.join(20)
    say("closed" if ended.is_set() else "hung", 0)


# --- an exception at any line ----------------------------------------------------------


def interrupt_at(channel: Channel, url: str, line: int, where: str) -> dict[str, Any]:
    """Raise KeyboardInterrupt at the k-th line that `log`, `flush` or `close` executes.

    It is what Ctrl-C does, at each place at which it can come.
    """
    run = create_run(url, flush_interval_s=3600, on_error="raise", chunks={"large": (5000,)})
    for step in range(3):
        run.log(event(step).values, step=step)
    run.flush()
    channel.send(("acknowledged", 3))
    run.log(event(3).values, step=3)
    action: Callable[[], object] = {
        "log": lambda: run.log(event(4).values, step=4),
        "flush": run.flush,
        "close": run.close,
    }[where]
    lines, place = _interrupted(action, line)
    channel.send(("place", place))
    if where != "close":
        run.log({"loss": 2.5}, step=5)
        channel.send(("flushed", run.flush()))
    run.close()
    return {"lines": lines, "reached": lines >= line}


def _interrupted(action: Callable[[], object], line: int) -> tuple[int, str]:
    """Give the number of lines, and the one at which it was interrupted."""
    lines, place = 0, ""

    def trace(frame: FrameType, kind: str, argument: object) -> Any:
        nonlocal lines, place
        file = frame.f_code.co_filename
        if "tensorstore_fmt/writing/" not in file:
            return None
        # No signal is handled between the last call of a `with` block and the block's exit; a
        # trace function that raised there would leave the lock taken.
        if kind == "line" and not _is_with(file, frame.f_lineno):
            lines += 1
            if lines == line:
                sys.settrace(None)
                place = f"{file.rpartition('/')[2]}:{frame.f_lineno} in {frame.f_code.co_name}"
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines, place


def _is_with(file: str, line: int) -> bool:
    return linecache.getline(file, line).lstrip().startswith("with ")


if __name__ == "__main__":
    # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    globals()[sys.argv[1]](sys.argv[2])

"""The verb ``info``."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from tensorstore_fmt.cli.failures import EXIT_PROBLEM, UsageError, describe
from tensorstore_fmt.cli.output import Output, json_text
from tensorstore_fmt.cli.session import open_run
from tensorstore_fmt.cli.text import bytes_text, steps_text, time_text
from tensorstore_fmt.errors import LimitError

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run

__all__ = ["info"]


def info(arguments: Namespace, output: Output) -> int:
    """Describe a run; 1 if its index is damaged. Or this installation."""
    if arguments.build:
        from tensorstore_fmt.cli.build import show_build  # rarely needed

        return show_build(output)
    if arguments.url is None:
        raise UsageError(
            "info needs the URL of a run, or --build; see: tensorstore-fmt info --help"
        )
    with open_run(arguments, output) as run:
        facts, steps = _facts(run)
    if output.is_json:
        output.json(facts)
    else:
        _show(facts, steps, output)
    return EXIT_PROBLEM if facts["damage"] else 0


def _facts(run: Run) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Give all that is known from the index; steps by mode apart, as they may be many."""
    table = run.table()
    every = {mode: run.steps(mode).tolist() for mode in ("NONE", "TRAIN", "EVAL", "PREDICT")}
    steps = {mode: found for mode, found in every.items() if found}
    raw = sum(table["raw_nbytes"].to_pylist())
    stored = sum(table["stored_nbytes"].to_pylist())
    companions, alerts = _alerts(run)
    facts = {
        "run": run.describe(),
        "run_id": run.run_id,
        "format_version": ".".join(map(str, run.format_version)),
        "created": time_text(run.created_us),
        "created_us": run.created_us,
        "is_closed": run.is_closed,
        "num_workers": run.num_workers,
        "workers": run.workers,
        "attempts": run.attempts,
        "attrs": run.attrs,
        "names": len(run),
        "steps": {
            mode: {"count": len(found), "first": found[0], "last": found[-1]}
            for mode, found in steps.items()
        },
        "raw_nbytes": raw,
        "stored_nbytes": stored,
        "ratio": raw / stored if stored else None,
        "companions": companions,
        "alerts": alerts,
        "damage": [describe(problem) for problem in run.damage],
    }
    return facts, steps


def _alerts(run: Run) -> tuple[int, int]:
    """Count the companion runs of rules, and what they found; one LIST if there are none."""
    from tensorstore_fmt.rules.records import alerts_by_companion  # NumPy and Arrow

    found = alerts_by_companion(run)
    return len(found), sum(found)


def _show(facts: dict[str, Any], steps: dict[str, list[int]], output: Output) -> None:
    rows = [
        ("run", facts["run"]),
        ("id", facts["run_id"]),
        ("format", facts["format_version"]),
        ("created", _time(facts)),
        ("state", "closed" if facts["is_closed"] else "live, or its writer died (see recover)"),
        ("workers", _workers(facts)),
        ("attempts", _list(facts["attempts"]) if facts["attempts"] != [0] else None),
        ("names", f"{facts['names']:,}"),
        *((_label(mode), f"{len(s):,}: {steps_text(s)}") for mode, s in steps.items()),
        ("steps", None if steps else "none yet"),
        ("size", _size(facts)),
        ("alerts", _alerts_text(facts)),
    ]
    width = max(len(label) for label, text in rows if text is not None)
    for label, text in rows:
        if text is not None:
            output.line(f"{label.ljust(width)}  {text}")
    for key, value in facts["attrs"].items():
        output.line(f"attr  {key} = {_attribute(value)}")
    for problem in facts["damage"]:
        output.line(f"DAMAGE  {problem['message']} ({problem['code']})")


def _alerts_text(facts: dict[str, Any]) -> str | None:
    if not facts["companions"]:
        return None
    found = facts["alerts"]
    return f"{found:,} (see watch --alerts)" if found else "none: rules were evaluated"


def _time(facts: dict[str, Any]) -> str:
    created = facts["created"]
    if created is None:
        return f"{facts['created_us']} us after 1970, which is no year"
    return f"{created[:19].replace('T', ' ')} UTC"


def _attribute(value: object) -> str:
    try:
        return json_text(value)
    except LimitError as error:  # the rest can be shown
        return f"({error})"


def _label(mode: str) -> str:
    return "steps" if mode == "NONE" else f"steps {mode}"


def _workers(facts: dict[str, Any]) -> str:
    have, every = facts["workers"], facts["num_workers"]
    if len(have) == every:
        return f"{every}"
    return f"{every}, of which {_list(have) or 'none'} have written"


def _list(numbers: list[int]) -> str:
    more = f" … ({len(numbers)})" if len(numbers) > 8 else ""
    return ", ".join(map(str, numbers[:8])) + more


def _size(facts: dict[str, Any]) -> str:
    ratio = f" (ratio {facts['ratio']:.2f})" if facts["ratio"] else ""
    raw, stored = bytes_text(facts["raw_nbytes"]), bytes_text(facts["stored_nbytes"])
    return f"{raw} raw, {stored} stored{ratio}"

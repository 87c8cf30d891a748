"""The verb ``watch``: rules on a run, live or finished, and what they found before."""

from __future__ import annotations

import inspect
import math
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from tensorstore_fmt.cli.failures import EXIT_PROBLEM, UsageError, describe
from tensorstore_fmt.cli.output import Output, json_text
from tensorstore_fmt.cli.session import open_quietly, open_run, open_url, storage_options
from tensorstore_fmt.errors import NotARunError, TensorStoreError

if TYPE_CHECKING:
    from tensorstore_fmt.reading.run import Run
    from tensorstore_fmt.rules import Action, Finding, Report, Rule
    from tensorstore_fmt.rules.runner import Ending

__all__ = ["watch"]

_LOOK_S: Final = (0.1, 2.0)  # on a disk, elsewhere: between looks for a run that is not there yet


def watch(arguments: Namespace, output: Output) -> int:
    """Evaluate rules until the run is closed; 1 if one fired or failed, or the writer died.

    With ``--json`` one JSON object a line, as things happen.
    """
    if arguments.list:
        return _list(output)
    if arguments.url is None:
        raise UsageError("watch needs the URL of a run, or --list")
    _check_seconds(arguments)
    if arguments.alerts:
        with open_run(arguments, output) as run:
            return _show_alerts(run, output)
    # Made first: a mistake in them is said at once, not after a long wait.
    made, actions = _rules(arguments.rule or ()), _actions(arguments)
    # Once: `@FILE` may be a pipe.
    options = storage_options(arguments)
    with _open_when_there(arguments, options, output) as run:
        return _watch(run, arguments, output, made=made, actions=actions, options=options)


def _check_seconds(arguments: Namespace) -> None:
    for option in ("wait", "timeout", "idle_timeout", "poll"):
        seconds = getattr(arguments, option)
        if seconds is not None and not (0 <= seconds < math.inf):
            words = option.replace("_", "-")
            raise UsageError(f"--{words} is {seconds:g}; it is a number of seconds, at least 0")


def _open_when_there(
    arguments: Namespace, options: Mapping[str, object] | None, output: Output
) -> Run:
    """Open the run; with ``--wait`` it may yet be created.

    Raises
    ------
    NotARunError
        It is not there, and was not for so long.
    """
    deadline = time.monotonic() + (arguments.wait or 0)
    is_told = False
    while True:
        try:
            return open_quietly(arguments.url, options, output)
        except NotARunError as error:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                if is_told:
                    error.add_note(f"waited {arguments.wait:g} s for it (--wait)")
                raise
            if not is_told:
                is_told = True
                output.note(f"{error}; waiting up to {arguments.wait:g} s for a run there")
        time.sleep(min(_LOOK_S["://" in arguments.url], left_s))


def _watch(
    run: Run,
    arguments: Namespace,
    output: Output,
    *,
    made: Sequence[Rule],
    actions: Sequence[Action],
    options: Mapping[str, object] | None,
) -> int:
    from tensorstore_fmt.rules import Runner  # NumPy and Arrow, which help needs not

    ending: Ending | None = None
    others = [open_url(url, options) for url in arguments.other or ()]
    try:
        with Runner(
            run,
            made,
            others=others,
            actions=actions,
            record=not arguments.no_record,
            found=lambda finding: _say(finding, output),
        ) as runner:
            if arguments.once:
                runner.evaluate_new()
                runner.look_at_clock()
            else:
                ending = runner.follow(
                    timeout_s=arguments.timeout,
                    idle_timeout_s=arguments.idle_timeout,
                    poll_s=arguments.poll,
                )
            report = runner.report
        code = _conclude(run, ending, arguments, output)
    finally:
        for other in others:
            other.close()
    _summarise(report, made, ending, output)
    return code if report.ok else EXIT_PROBLEM


def _conclude(run: Run, ending: Ending | None, arguments: Namespace, output: Output) -> int:
    """Say why it ended if the run was not closed; 1 if it will not be."""
    from tensorstore_fmt.rules.presence import lost_writers

    if ending not in ("idle", "writer_died"):
        return 0
    lost = lost_writers(run)
    if lost:
        what = f"the writer {', '.join(lost)} died and did not close the run; what it saved is kept"
        advice = f"tensorstore-fmt recover {run.describe()} closes it"
    elif run.is_closed:  # a run to compare with was not
        what, advice = "nothing more came", "a run of --other is not closed"
    else:
        what = "nothing more came, and the run is not closed"
        advice = "its writer may be alive: look for it, or watch again"
    silent = f" for {arguments.idle_timeout:g} s" if ending == "idle" else ""
    output.note(f"{run.describe()}: left after silence{silent}: {what}; {advice}")
    return EXIT_PROBLEM


def _rules(texts: Sequence[str]) -> list[Rule]:
    """Make the rules; their errors are the command line's.

    Raises
    ------
    UsageError
    """
    from tensorstore_fmt.rules import make_rule

    if not texts:
        raise UsageError("watch needs --rule NAME (see --list), or --alerts")
    try:
        return [make_rule(text) for text in texts]
    except TensorStoreError as error:
        raise UsageError(error.message, code=error.code, **error.facts) from error


def _actions(arguments: Namespace) -> list[Action]:
    from tensorstore_fmt.rules import AlertLog, StopTraining, Webhook

    actions: list[Action] = []
    if arguments.stop:
        actions.append(StopTraining())
    if arguments.log:
        actions.append(AlertLog(arguments.log))
    if arguments.webhook:
        actions.append(Webhook(arguments.webhook))
    return actions


def _say(finding: Finding, output: Output) -> None:
    if output.is_json:
        _line({"alert": finding.as_dict()})
    else:
        output.line(str(finding))
        sys.stdout.flush()


def _summarise(report: Report, made: Sequence[Rule], ending: Ending | None, output: Output) -> None:
    rows = [
        {
            "rule": rule.name,
            "parameters": rule.settings,
            "steps": report.steps[rule.name],
            "found": report.found[rule.name],
            "failure": _failure(report.failures.get(rule.name)),
        }
        for rule in made
    ]
    if output.is_json:
        _line({"summary": rows, "ended": ending or "once"})
        return
    for row in rows:
        said = f"{row['steps']:,} steps, {row['found']:,} found"
        if row["failure"] is not None:
            said += f", FAILED: {row['failure']['message']}"
        output.note(f"{row['rule']}: {said}")


def _failure(error: Exception | None) -> Any:  # noqa: ANN401 - for JSON
    if error is None:
        return None
    if isinstance(error, TensorStoreError | OSError):
        return describe(error)
    return {"code": "rule_failed", "message": f"{type(error).__name__}: {error}", "facts": {}}


def _show_alerts(run: Run, output: Output) -> int:
    """Give what was found before; 1 if there is anything."""
    from tensorstore_fmt.rules import alerts

    found = alerts(run)
    if output.is_json:
        output.json({"run": run.describe(), "alerts": [each.as_dict() for each in found]})
    else:
        for each in found:
            output.line(str(each))
    return EXIT_PROBLEM if found else 0


def _list(output: Output) -> int:
    """Give the rules that are known, with their parameters."""
    from tensorstore_fmt.rules import BUILT_IN, rule_names

    names = rule_names()
    if output.is_json:
        output.json({"rules": [_described(name, text) for name, text in names.items()]})
        return 0
    for name, text in names.items():
        if name not in BUILT_IN:
            output.line(f"{name}  {text}")
            continue
        cls = BUILT_IN[name]
        output.line(name)
        for line in (inspect.getdoc(cls) or "").splitlines():
            output.line(f"    {line}" if line else "")
        said = [
            each.name if each.is_required else f"{each.name}={each.default}"
            for each in cls.parameters.values()
        ]
        output.line(f"    Parameters: {', '.join(said)}")
        output.line()
    return 0


def _described(name: str, text: str) -> dict[str, Any]:
    from tensorstore_fmt.rules import BUILT_IN

    row: dict[str, Any] = {"rule": name, "summary": text}
    if name in BUILT_IN:
        row["parameters"] = {
            each.name: {"type": each.text, "default": each.default}
            for each in BUILT_IN[name].parameters.values()
        }
    return row


def _line(document: Mapping[str, object]) -> None:
    """Print one object on one line, at once: somebody may wait for it."""
    print(json_text(document))
    sys.stdout.flush()

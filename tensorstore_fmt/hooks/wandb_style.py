"""`init`, `log` and `finish` as users of Weights & Biases know them, into a run; no account.

::

    from tensorstore_fmt.hooks import wandb_style as wandb

    wandb.init(project="digits", name="first", config={"lr": 0.1})
    wandb.log({"loss": 0.5})
    wandb.finish()

That is the run ``runs/digits/first``. Steps may go back: what was logged there before is replaced,
not refused.
"""

from __future__ import annotations

import enum
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from tensorstore_fmt.errors import ArgumentError, NotARunError, StateError
from tensorstore_fmt.hooks.buckets import as_numpy, buckets
from tensorstore_fmt.hooks.late_run import LateRun
from tensorstore_fmt.reading.run import open_run
from tensorstore_fmt.rules.records import Recorder
from tensorstore_fmt.rules.rule import Finding

__all__ = [
    "AlertLevel", "Config", "Histogram", "Image", "Run", "Table", "alert", "config", "finish",
    "init", "log", "run", "unwatch", "watch",
]  # fmt: skip

_logger = logging.getLogger("tensorstore_fmt")

_UNUSED = frozenset(
    {"anonymous", "entity", "force", "monitor_gym", "reinit", "save_code", "settings",
     "sync_tensorboard"}
)  # fmt: skip


class AlertLevel(enum.Enum):
    """How grave an alert is."""

    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


# --- values -------------------------------------------------------------------------------


class Histogram:
    """Counts in buckets; logged as rows of left end, right end and count.

    Parameters
    ----------
    sequence, num_bins
        What to count, in how many buckets; or
    np_histogram
        what `numpy.histogram` gave.
    """

    def __init__(
        self,
        sequence: Any = None,
        np_histogram: tuple[Any, Any] | None = None,
        num_bins: int = 64,
    ) -> None:
        if np_histogram is None:
            self.value = buckets("a histogram", sequence, num_bins)
        else:
            counts, ends = (np.asarray(each, np.float64) for each in np_histogram)
            self.value = np.stack([ends[:-1], ends[1:], counts], axis=1)


class Image:
    """A picture; logged as its pixels, and ``NAME/caption``."""

    def __init__(
        self, data_or_path: Any, mode: str | None = None, caption: str | None = None
    ) -> None:
        if isinstance(data_or_path, str | os.PathLike):
            raise ArgumentError("an image is an array or a picture of PIL, not a path; open it")
        is_array = hasattr(data_or_path, "shape")
        self.value = as_numpy("an image", data_or_path if is_array else np.asarray(data_or_path))
        self.caption = caption


class Table:
    """Rows with named columns; logged as ``NAME/COLUMN``, each as numbers or as texts."""

    def __init__(
        self,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
    ) -> None:
        if dataframe is not None:
            columns, data = list(dataframe.columns), dataframe.values.tolist()
        self.columns = [str(column) for column in columns or ()]
        self.data: list[list[Any]] = []
        for row in data or ():
            self.add_data(*row)

    def add_data(self, *row: Any) -> None:
        """Add a row."""
        if len(row) != len(self.columns):
            raise ArgumentError(f"the row has {len(row)} values, for columns {self.columns}")
        self.data.append(list(row))

    @property
    def value(self) -> dict[str, object]:
        """Columns by name."""
        named = zip(self.columns, zip(*self.data, strict=True), strict=True) if self.data else ()
        return {
            name: list(column)
            if all(isinstance(each, int | float) for each in column)
            else [str(each) for each in column]
            for name, column in named
        }


def _stored(values: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[name] = _stored(value)
        elif isinstance(value, Image):
            found[name] = value.value
            if value.caption is not None:
                found[f"{name}/caption"] = value.caption
        elif isinstance(value, list | tuple) and any(isinstance(v, Image) for v in value):
            found |= _stored({f"{name}/{number}": each for number, each in enumerate(value)})
        else:
            found[name] = value.value if isinstance(value, Histogram | Table) else value
    return found


# --- a run ----------------------------------------------------------------------------------


class Config(MutableMapping[str, Any]):
    """Settings of a run: items, also as attributes; what is changed later is logged."""

    def __init__(self, run: LateRun, values: Mapping[str, Any]) -> None:
        self.__dict__["_run"] = run
        self.__dict__["_values"] = {}
        if values:
            self.update(values)

    def update(self, *given: Any, allow_val_change: bool = True, **named: Any) -> None:
        """Set several items; `allow_val_change` is not needed."""
        values = {k: v for each in given for k, v in dict(each).items()} | named
        self._values.update(values)
        self._run.set_hparams(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        raise ArgumentError(f"the setting {key!r} is part of what happened; set it to None")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, key: str) -> Any:
        try:
            return self._values[key]
        except KeyError:
            raise AttributeError(f"there is no setting {key!r}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self.update({key: value})


class Run:
    """What `init` gives; finish it, or use it in a ``with`` statement."""

    def __init__(
        self,
        late: LateRun,
        *,
        project: str,
        name: str,
        settings: Mapping[str, Any],
        first: int | None,
        is_disabled: bool,
    ) -> None:
        self.project, self.name, self.id = project, name, name
        self.resumed = bool(first)
        self.step = first or 0
        self.summary: dict[str, object] = {}
        self._late = late
        self._is_disabled = is_disabled
        self._hooks: dict[int, tuple[Any, Any]] = {}
        self._alerts: Recorder | None = None
        self._alerted: dict[str, float] = {}
        self.config = Config(late, settings)
        if not is_disabled:
            late.open(self.step, **({} if first is None else {"resume_from": first}))

    @property
    def url(self) -> str:
        """Where the run is."""
        return self._late.url

    @property
    def dir(self) -> str:
        """Where the run is."""
        return self._late.url

    def log(
        self,
        data: Mapping[str, Any],
        step: int | None = None,
        commit: bool | None = None,
        sync: bool | None = None,
    ) -> None:
        """Log values, at once.

        Parameters
        ----------
        step
            The step from now on, also a lower one than before; None: the present one.
        commit
            Whether the next call is of the next step; by default if no `step` is given.
        sync
            Not needed.
        """
        if step is not None:
            self.step = int(step)
        stored = _stored(data)
        self.summary |= stored
        if not self._is_disabled:
            self._late.log(stored, self.step)
        if commit or (commit is None and step is None):
            self.step += 1

    def watch(
        self,
        models: Any,
        criterion: Any = None,
        log: Literal["gradients", "parameters", "all"] | None = "gradients",
        log_freq: int = 1000,
        idx: int | None = None,
        log_graph: bool = False,
    ) -> None:
        """Save gradients and parameters of PyTorch modules, whole, at every `log_freq`-th step.

        Parameters
        ----------
        criterion, log_graph
            Not needed.
        idx
            Number of the first of several modules, which are ``1/`` … before their names.
        """
        from tensorstore_fmt.hooks.torch import attach

        collections = {
            "gradients": ("gradients",),
            "parameters": ("weights", "biases"),
            "all": ("gradients", "weights", "biases"),
            None: (),
        }.get(log)
        if collections is None:
            raise ArgumentError(f"log is {log!r}; it is 'gradients', 'parameters', 'all' or None")
        if self._is_disabled or not collections:
            return
        several = models if isinstance(models, list | tuple) else [models]
        for number, model in enumerate(several, idx or 0):
            self.unwatch(model)
            prefix = f"{number}/" if len(several) > 1 or idx is not None else ""
            hook = attach(
                model, self._late.open(self.step), collections=collections, every=log_freq,
                prefix=prefix,
            )  # fmt: skip
            handle = model.register_forward_pre_hook(_Teller(self, hook), prepend=True)
            self._hooks[id(model)] = (hook, handle)

    def unwatch(self, models: Any = None) -> None:
        """Undo `watch`, of some modules or of all."""
        several = models if isinstance(models, list | tuple) else [models]
        keys = list(self._hooks) if models is None else [id(model) for model in several]
        for key in keys:
            for each in self._hooks.pop(key, ()):
                each.remove()

    def alert(
        self,
        title: str,
        text: str,
        level: AlertLevel | str = AlertLevel.WARN,
        wait_duration: float = 300,
    ) -> None:
        """Store an alert with the run, where those of rules are (`tensorstore_fmt.rules.alerts`).

        Parameters
        ----------
        wait_duration
            Seconds in which the same title is not stored again.
        """
        levels = {each.value: each for each in AlertLevel}
        level = levels.get(level.upper()) or level if isinstance(level, str) else level
        if not isinstance(level, AlertLevel):
            raise ArgumentError(f"level is {level!r}; it is one of {', '.join(levels)}")
        now = time.monotonic()
        if self._is_disabled or now - self._alerted.get(title, -np.inf) < wait_duration:
            return
        self._alerted[title] = now
        _logger.log(logging.getLevelName(level.value.replace("WARN", "WARNING")), "%s", title)
        writer = self._late.open(self.step)
        if self._alerts is None:
            self._alerts = Recorder(writer._storage, writer.run_id, [])
        rule = f"alert/{level.value.lower()}"
        self._alerts.found(Finding(rule=rule, step=self.step, message=f"{title}: {text}"))
        self._alerts.flush()

    def define_metric(self, *_args: Any, **_kwargs: Any) -> None:
        """Take what says how a page shows curves, which is not kept."""

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        """Close the run; more than once is fine."""
        global run, config  # noqa: PLW0603 - the names users know
        self.unwatch()
        if self._alerts is not None:
            self._alerts.close()
            self._alerts = None
        self._late.close()
        if run is self:
            run = config = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish()


class _Teller:
    """Tells a hook, at a forward of training, at which step its run is."""

    def __init__(self, of: Run, hook: Any) -> None:
        self._of, self._hook = of, hook
        self._told: int | None = None

    def __call__(self, model: Any, _args: object) -> None:
        if not model.training:
            self._hook.skip()
            self._told = None
        elif self._told != self._of.step:
            self._told = self._of.step
            self._hook.set_step(self._of.step)


# --- the module as users call it --------------------------------------------------------------

run: Run | None = None
"""The run of this process, between `init` and `finish`."""

config: Config | None = None
"""Its settings."""


def init(
    project: str | None = None,
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    dir: str | os.PathLike[str] | None = None,
    id: str | None = None,
    resume: bool | Literal["allow", "must", "never", "auto"] | None = None,
    mode: Literal["online", "offline", "disabled", "shared"] | None = None,
    url: str | os.PathLike[str] | None = None,
    group: str | None = None,
    job_type: str | None = None,
    notes: str | None = None,
    tags: Sequence[str] | None = None,
    **options: Any,
) -> Run:
    """Create a run, or go on in one; it is `run` until it is finished.

    Parameters
    ----------
    project, name, dir, id
        The run is ``DIR/PROJECT/ID``: by default ``runs``, ``uncategorized`` and `name`, or the
        time.
    url
        Where the run is, instead.
    config
        Settings: the attribute ``hparams`` of the run.
    resume
        ``"allow"``, ``"auto"`` or True: go on after the last step of a run that is there;
        ``"must"``: it has to be there. Else a finished run is an error, and what another one
        holds is hidden (``attempt=0`` reads it).
    mode
        ``"disabled"``: nothing is stored. All else is the same.
    group, job_type, notes, tags
        Attributes of the run.
    options
        Of `create_run`. What else `wandb.init` takes and a run does not need is left aside.
    """
    options = {key: value for key, value in options.items() if key not in _UNUSED}
    if run is not None:
        run.finish()
    name = id or name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    project = project or "uncategorized"
    where = os.fspath(url) if url is not None else f"{os.fspath(dir or 'runs')}/{project}/{name}"
    if resume not in (None, True, False, "allow", "must", "never", "auto"):
        raise ArgumentError(f"resume is {resume!r}; it is 'allow', 'must', 'never' or 'auto'")
    facts = {"group": group, "job_type": job_type, "notes": notes, "tags": list(tags or ()) or None}
    attrs: dict[str, object] = {"project": project, "name": name}
    attrs |= {key: value for key, value in facts.items() if value is not None}
    is_disabled = mode == "disabled"
    goes_on = resume not in (None, False, "never") and not is_disabled
    first = _next_step(where, options.get("storage_options")) if goes_on else None
    if resume == "must" and first is None and not is_disabled:
        raise NotARunError(f"{where} holds no run to go on in, and resume is 'must'", url=where)
    begun = Run(
        LateRun(where, attrs=attrs, **options),
        project=project,
        name=name,
        settings=config or {},
        first=first,
        is_disabled=is_disabled,
    )
    globals().update(run=begun, config=begun.config)
    return begun


def _next_step(where: str, storage_options: Mapping[str, object] | None) -> int | None:
    try:
        with open_run(where, storage_options=storage_options) as found:
            steps = found.steps()
    except NotARunError:
        return None
    return int(steps[-1]) + 1 if len(steps) else 0


def _current() -> Run:
    if run is None:
        raise StateError("there is no run; call init(...) first")
    return run


def log(
    data: Mapping[str, Any],
    step: int | None = None,
    commit: bool | None = None,
    sync: bool | None = None,
) -> None:
    """Log values to the present run; see `Run.log`."""
    _current().log(data, step, commit, sync)


def watch(
    models: Any,
    criterion: Any = None,
    log: Literal["gradients", "parameters", "all"] | None = "gradients",
    log_freq: int = 1000,
    idx: int | None = None,
    log_graph: bool = False,
) -> None:
    """Save gradients and parameters; see `Run.watch`."""
    _current().watch(models, criterion, log, log_freq, idx, log_graph)


def unwatch(models: Any = None) -> None:
    """Undo `watch`."""
    _current().unwatch(models)


def alert(
    title: str, text: str, level: AlertLevel | str = AlertLevel.WARN, wait_duration: float = 300
) -> None:
    """Store an alert; see `Run.alert`."""
    _current().alert(title, text, level, wait_duration)


def finish(exit_code: int | None = None, quiet: bool | None = None) -> None:
    """Close the present run, if there is one."""
    if run is not None:
        run.finish(exit_code, quiet)

"""Hook: saving from a training script that was written for smdebug.

It counts steps and saves what it is handed; with `Hook.register_module` also what goes through
modules of PyTorch (names: `tensorstore_fmt.interop.smdebug.modules`).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from tensorstore_fmt import dtypes
from tensorstore_fmt.closeable import Closeable
from tensorstore_fmt.errors import TensorStoreError
from tensorstore_fmt.interop.importing.smdebug_names import (
    COLLECTIONS_NAME,
    reduction_name,
    shape_name,
)
from tensorstore_fmt.interop.smdebug.collections import Collection, CollectionKeys, built_in
from tensorstore_fmt.interop.smdebug.configs import ReductionConfig, SaveConfig, reduce
from tensorstore_fmt.interop.smdebug.exceptions import SMDebugValueError
from tensorstore_fmt.interop.smdebug.hook_json import read_configuration
from tensorstore_fmt.interop.smdebug.mode_keys import ModeKeys, name_of
from tensorstore_fmt.writing.convert import check_name, snapshot
from tensorstore_fmt.writing.report import CloseReport
from tensorstore_fmt.writing.run import create_run

if TYPE_CHECKING:
    from tensorstore_fmt.interop.smdebug.modules import Modules

__all__ = ["Hook", "del_hook", "get_hook", "set_hook"]

_SCALARS: Final = "scalar/"
_NO_GRADIENTS: Final = (ModeKeys.EVAL, ModeKeys.PREDICT)

# What values, devices and storages may raise; training must not learn of it.
_FAILURES: Final = (
    TensorStoreError, OSError, RuntimeError, TypeError, ValueError, ArithmeticError, MemoryError,
)  # fmt: skip


class Hook(Closeable):
    """Saves tensors and scalars at the step at which it is handed them.

    A step begins with a forward of a registered module, with `step`, or with the first value after
    `set_mode` (and that forward, if it comes later, goes on in it); all of it becomes visible at
    once, when the next one begins or the hook is closed. Nothing but wrong arguments of the hook
    itself raises: what cannot be saved is left out with a warning.

    Parameters
    ----------
    out_dir
        Where to make the run; any URL.
    dry_run
        Save nothing.
    reduction_config, save_config
        In what form and when to save, where a collection says nothing itself.
    include_regex, include_collections, save_all
        Which collections also count for tensors whose names they fit.
    include_workers
        ``"one"``: only rank 0 saves. ``"all"``: every rank.
    worker, num_workers
        Rank and number of ranks; None: as torch.distributed says, if it is in use.
    attrs, storage_options, resume_from
        As in `create_run`.
    export_tensorboard, tensorboard_dir
        Taken, and not carried out; a warning says so.
    """

    def __init__(  # noqa: PLR0917 - smdebug's signature
        self,
        out_dir: str | os.PathLike[str],
        export_tensorboard: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
        tensorboard_dir: str | None = None,  # noqa: ARG002 - the same
        dry_run: bool = False,  # noqa: FBT001, FBT002 - the same
        reduction_config: ReductionConfig | None = None,
        save_config: SaveConfig | Mapping[Any, Any] | None = None,
        include_regex: str | Sequence[str] | None = None,
        include_collections: Sequence[str] | None = None,
        save_all: bool = False,  # noqa: FBT001, FBT002 - the same
        include_workers: Literal["one", "all"] = "one",
        *,
        worker: int | None = None,
        num_workers: int | None = None,
        attrs: Mapping[str, object] | None = None,
        storage_options: Mapping[str, object] | None = None,
        resume_from: int | None = None,
    ) -> None:
        if include_workers not in ("one", "all"):
            raise SMDebugValueError(f"include_workers is {include_workers!r}; it is 'one' or 'all'")
        if export_tensorboard:
            warnings.warn("export_tensorboard is not carried out", stacklevel=2)
        self.out_dir = os.fspath(out_dir)
        self.save_config = SaveConfig.parse(save_config)
        self.reduction_config = reduction_config
        self.mode = ModeKeys.GLOBAL
        self._global_step = -1
        self._mode_steps: dict[ModeKeys, int] = {}
        self._is_in_step = False
        self._is_begun_by_value = False
        self._is_due_now: bool | None = None  # not known yet
        self._modules: Modules | None = None
        self._values: dict[str, object] = {}
        self._warned: set[str] = set()
        self._collections = built_in()
        self._saved_collections: object = None
        self._included = {CollectionKeys.LOSSES}
        self._include(include_regex, include_collections or (), save_all=save_all)
        rank, ranks = _ranks(worker, num_workers)
        is_writing = not dry_run and (include_workers == "all" or rank == 0)
        self._run = None
        if is_writing:
            self._run = create_run(
                out_dir,
                attrs=attrs,
                worker=rank if include_workers == "all" else 0,
                num_workers=ranks if include_workers == "all" else 1,
                storage_options=storage_options,
                resume_from=resume_from,
            )
        if resume_from is not None:
            self._global_step = resume_from - 1
        _open_hooks.append(self)
        set_hook(self)

    def _include(
        self, regex: str | Sequence[str] | None, names: Sequence[str], *, save_all: bool
    ) -> None:
        """Let collections count for all names that they fit."""
        for name in names:
            self._collection(name)
        self._included |= set(names)
        if regex is not None:
            self._collections[CollectionKeys.DEFAULT].include(regex)
            self._included.add(CollectionKeys.DEFAULT)
        if save_all:
            self._included.add(CollectionKeys.ALL)

    # --- steps --------------------------------------------------------------------
    @property
    def step_num(self) -> int:
        """Global number of the present step; −1 before the first."""
        return self._global_step

    @property
    def mode_step(self) -> int:
        """Number of the present step within its mode; −1 before the first."""
        return self._mode_steps.get(self.mode, -1)

    def step(self) -> int:
        """Begin the next step, end the one before, and give its global number."""
        self._end_step()
        self._global_step += 1
        self._mode_steps[self.mode] = self._mode_steps.get(self.mode, -1) + 1
        self._is_in_step = True
        self._is_begun_by_value = False
        self._is_due_now = None
        return self._global_step

    @property
    def failures(self) -> Mapping[str, int]:
        """How many failures the modules' hooks kept from the training, by place."""
        return {} if self._modules is None else dict(self._modules.guard.failures)

    def begin_forward(self) -> None:
        """Begin the step of a forward, unless a value has begun it already. For `Modules`."""
        if not (self._is_in_step and self._is_begun_by_value):
            self.step()
        self._is_begun_by_value = False

    def _begin_by_value(self) -> None:
        if not self._is_in_step:
            self.step()
            self._is_begun_by_value = True

    @property
    def is_due(self) -> bool:
        """Whether any collection that counts is saved at the present step."""
        if self._is_due_now is None:
            self._is_due_now = self._run is not None and any(
                self._is_due(collection)
                for name, collection in self._collections.items()
                if name in self._included or collection.tensor_names
            )
        return self._is_due_now

    def set_mode(self, mode: ModeKeys) -> None:
        """Go over to a mode; the step before ends, if the mode is another."""
        if not isinstance(mode, ModeKeys):
            raise SMDebugValueError(f"{mode!r} is no mode; use modes.TRAIN, EVAL or PREDICT")
        if mode is not self.mode:
            self._end_step()
            self.mode = mode

    def _end_step(self) -> None:
        if self._is_in_step and self._values and self._run is not None:
            values = self._values
            state = self._state_of_collections()
            if state != self._saved_collections:
                held = {name: c.to_json_dict() for name, c in self._collections.items()}
                values = {**values, COLLECTIONS_NAME: json.dumps(held)}
            mode = name_of(self.mode)
            now = time.time_ns() // 1000
            try:
                count = self._mode_steps[self.mode]
                self._run.stamp(self._global_step, mode, mode_step=count, wall_time_us=now)
                self._run.log(values, step=self._global_step, mode=mode)
                self._saved_collections = state
            except _FAILURES as error:
                self._warn(f"step {self._global_step}", error)
        self._values = {}
        self._is_in_step = False

    def _state_of_collections(self) -> object:
        """Give what is equal as long as no collection changes; names are only ever added."""
        return tuple(
            (
                name,
                len(c.tensor_names),
                len(c.include_regex),
                id(c.save_config),
                id(c.reduction_config),
            )
            for name, c in self._collections.items()
        )

    # --- saving -------------------------------------------------------------------
    def save_scalar(
        self,
        name: str,
        value: object,
        sm_metric: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
        timestamp: float | None = None,  # noqa: ARG002 - the step has one
    ) -> None:
        """Save a number at the present step, whatever the save config; as ``scalar/NAME``."""
        try:
            array = snapshot(name, value).array
            if array.size != 1:
                raise SMDebugValueError(f"{name!r} has {array.size} elements; a scalar has one")
            self._put(_SCALARS + name, array.reshape(()))
            if sm_metric:
                self._collection(CollectionKeys.SM_METRICS).add_tensor_name(_SCALARS + name)
        except _FAILURES as error:
            self._warn(name, error)

    def save_tensor(
        self,
        tensor_name: str,
        tensor_value: object,
        collections_to_write: str | Iterable[str] = CollectionKeys.DEFAULT,
    ) -> None:
        """Save a tensor at the present step, if one of its collections is due at it.

        Parameters
        ----------
        tensor_value
            Anything that `RunWriter.log` takes; copied at once.
        collections_to_write
            Collections it belongs to; made, if there are none of these names.
        """
        try:
            named = collections_to_write
            for name in [named] if isinstance(named, str) else named:
                self._collection(name).add_tensor_name(tensor_name)
            self.save_if_due(tensor_name, tensor_value)
        except _FAILURES as error:
            self._warn(tensor_name, error)

    def record_tensor_value(self, tensor_name: str, tensor_value: object) -> None:
        """Save what a function gave (``F.nll_loss``), as if it were a module of this name.

        It is called ``NAME_output_0``, and belongs to the collections whose patterns fit that.
        """
        try:
            self._watched().record(tensor_name, tensor_value)
        except _FAILURES as error:
            self._warn(tensor_name, error)

    def save_if_due(self, tensor_name: str, tensor_value: object) -> None:
        """Save a tensor, if one of the collections that it belongs to is due. For `Modules`."""
        self._begin_by_value()
        due = [c for c in self._of(tensor_name) if self._is_due(c)]
        if due and self._run is not None:
            for collection in due:
                collection.add_tensor_name(tensor_name)
            self._reduce(check_name(tensor_name), tensor_value, due)

    def _of(self, tensor: str) -> list[Collection]:
        return [
            collection
            for name, collection in self._collections.items()
            if tensor in collection.tensor_names
            or (name in self._included and collection.has_tensor(tensor))
        ]

    def _is_due(self, collection: Collection) -> bool:
        if collection.name == CollectionKeys.GRADIENTS and self.mode in _NO_GRADIENTS:
            return False
        own = collection.save_config
        config = None if own is None else own.mode_save_configs.get(self.mode)
        if config is None:
            config = self.save_config.get_save_config(self.mode)
        return config.should_save_step(self.mode_step)

    def _reduce(self, name: str, value: object, due: Sequence[Collection]) -> None:
        shot = snapshot(name, value)
        array = shot.array
        forms = [c.reduction_config or self.reduction_config for c in due]
        if any(f is None or f.save_raw_tensor or not (f.wanted or f.save_shape) for f in forms):
            self._put(name, array)
        for form in filter(None, forms):
            if form.save_shape:
                self._put(shape_name(name), list(array.shape))
            if shot.dtype == dtypes.STRING or array.size == 0:
                continue
            for reduction, is_abs in form.wanted:
                reduced = reduce(array, reduction, is_abs=is_abs)
                self._put(reduction_name(reduction, name, is_abs=is_abs), reduced)

    def _put(self, name: str, value: object) -> None:
        check_name(name)
        self._begin_by_value()
        self._values[name] = value

    def _warn(self, what: str, error: BaseException) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{what} was not saved: {error}", RuntimeWarning, stacklevel=3)

    @classmethod
    def create_from_json_file(cls, json_file_path: str | None = None) -> Self:
        """Make a hook of a configuration file; by default the one that a variable names.

        Raises
        ------
        SMDebugValueError
            There is none, or it cannot be used; see `hook_json`.
        """
        arguments, collections = read_configuration(json_file_path)
        hook = cls(**arguments)
        for collection in collections:
            hook.add_collection(collection)
        return hook

    # --- collections --------------------------------------------------------------
    def _collection(self, name: str) -> Collection:
        return self._collections.setdefault(name, Collection(name))

    def add_collection(self, collection: Collection) -> None:
        """Add a collection, and let it count for names that it fits."""
        if not isinstance(collection, Collection):
            raise SMDebugValueError(f"{collection!r} is no Collection")
        self._collections[collection.name] = collection
        self._included.add(collection.name)

    def get_collection(self, name: str) -> Collection:
        """Give a collection; a new one, if there is none of this name."""
        return self._collection(name)

    def get_collections(self) -> dict[str, Collection]:
        """Give all collections, by name."""
        return dict(self._collections)

    # --- modules ------------------------------------------------------------------
    def register_module(self, module: object) -> None:
        """Save inputs, outputs, parameters and gradients of a module of PyTorch from now on.

        Each of its forwards begins a step. Of one that DistributedDataParallel or `torch.compile`
        is around, the module inside is meant.

        Raises
        ------
        SMDebugValueError
            It is no module.
        """
        self._watched(module).register(module)

    register_hook = register_module

    def register_loss(self, loss_module: object) -> None:
        """Save inputs and outputs of a loss module.

        Raises
        ------
        SMDebugValueError
            It is no module.
        """
        self._watched(loss_module).register_loss(loss_module)

    def _watched(self, module: object = None) -> Modules:
        if self._modules is None:
            if "torch" not in sys.modules:  # nobody can have a module or tensor of it
                raise SMDebugValueError(
                    f"{type(module).__qualname__} is nothing of PyTorch, which is not imported; "
                    "hand values to save_tensor"
                )
            # PyTorch is no dependency.
            from tensorstore_fmt.interop.smdebug.modules import Modules

            self._modules = Modules(self)
        return self._modules

    # --- closing ------------------------------------------------------------------
    def close(self) -> CloseReport | None:
        """End the present step, leave the modules, close the run; more than once is fine."""
        self._end_step()
        if self._modules is not None:
            self._modules.remove()
        if self in _open_hooks:
            _open_hooks.remove(self)
        return None if self._run is None else self._run.close()


def _ranks(worker: int | None, num_workers: int | None) -> tuple[int, int]:
    distributed: Any = sys.modules.get("torch.distributed")  # who has not imported it has no ranks
    is_used = distributed is not None and distributed.is_available()
    if worker is None and is_used and distributed.is_initialized():
        return int(distributed.get_rank()), int(distributed.get_world_size())
    return worker or 0, num_workers or (worker or 0) + 1


_open_hooks: list[Hook] = []  # held here, so that what was saved last is not lost
_latest: Hook | None = None


def get_hook(
    json_config_path: str | None = None,
    create_if_not_exists: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
) -> Hook | None:
    """Give the hook that was made last; None if there is none.

    Parameters
    ----------
    json_config_path
        Of which file to make one (`Hook.create_from_json_file`), …
    create_if_not_exists
        … if there is none and this is wanted.
    """
    if _latest is None and create_if_not_exists:
        return Hook.create_from_json_file(json_config_path)
    return _latest


def set_hook(custom_hook: Hook) -> None:
    """Let `get_hook` give this one."""
    global _latest  # noqa: PLW0603 - smdebug's hook is a singleton
    _latest = custom_hook


def del_hook() -> None:
    """Let `get_hook` give none."""
    global _latest  # noqa: PLW0603 - the same
    _latest = None


def _close_all() -> None:
    for hook in _open_hooks.copy():
        hook.close()


# Writers close themselves before what `atexit` calls; what is registered after theirs, before them.
threading._register_atexit(_close_all)  # type: ignore[attr-defined] # no public way

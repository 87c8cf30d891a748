"""What is saved: `Collection`, and the choice among all tensors of a training step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.hooks.reductions import Reduction, Reductions
from tensorstore_fmt.hooks.schedule import SaveConfig

__all__ = ["BUILT_IN", "Chooser", "Collection", "Kind", "Wanted", "check_collections"]

Kind: TypeAlias = Literal[
    "parameter", "buffer", "gradient", "input", "output", "output_gradient", "optimizer", "loss"
]
"""What a tensor is to the training step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """Tensors that are saved at the same steps and in the same form.

    Attributes
    ----------
    name
        A built-in name (see `BUILT_IN`) changes how that one is saved; any other needs `include`
        or `modules`.
    include
        Regular expressions (`re.search`) on the names tensors are saved under; one that matches
        is enough.
    modules
        Modules, or their paths: what goes out of them (with `inputs`, also what goes in).
    inputs, outputs, output_gradients
        What of `modules` is meant.
    save, reductions
        When and in what form; None: as the hook was told.
    """

    name: str
    include: str | Sequence[str] = ()
    modules: Sequence[object] = ()
    inputs: bool = False
    outputs: bool = True
    output_gradients: bool = False
    save: SaveConfig | None = None
    reductions: Reductions | None = None
    patterns: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise ArgumentError(f"a collection needs a name, not {self.name!r}", argument="name")
        include = (self.include,) if isinstance(self.include, str) else tuple(self.include)
        patterns = []
        for pattern in include:
            try:
                patterns.append(re.compile(pattern))
            except re.error as error:
                raise ArgumentError(
                    f"collection {self.name!r}: {pattern!r} is no regular expression: {error}",
                    argument="include",
                ) from None
        if not patterns and not self.modules and self.name not in BUILT_IN:
            raise ArgumentError(
                f"collection {self.name!r} is empty: give include= or modules=, or one of the "
                f"built-in names {', '.join(BUILT_IN)}",
                argument="name",
            )
        object.__setattr__(self, "patterns", tuple(patterns))


def _is_bias(name: str) -> bool:
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[-1] == "bias"


_Belongs = Callable[[Kind, str, bool], bool]

BUILT_IN: Final[Mapping[str, _Belongs]] = {
    "weights": lambda kind, name, _: kind == "parameter" and not _is_bias(name),
    "biases": lambda kind, name, _: kind == "parameter" and _is_bias(name),
    "gradients": lambda kind, _name, _leaf: kind == "gradient",
    "losses": lambda kind, _name, _leaf: kind == "loss",
    "activations": lambda kind, _name, is_leaf: kind == "output" and is_leaf,
    "inputs": lambda kind, _name, is_leaf: kind == "input" and is_leaf,
    "output_gradients": lambda kind, _name, is_leaf: kind == "output_gradient" and is_leaf,
    "buffers": lambda kind, _name, _leaf: kind == "buffer",
    "optimizer": lambda kind, _name, _leaf: kind == "optimizer",
    "all": lambda _kind, _name, _leaf: True,
}
"""Collections with a meaning of their own: (kind, name, whether it is of a module without
submodules) → belongs. ``activations``, ``inputs`` and ``output_gradients`` are those of modules
without submodules; choose others by `Collection`."""

_OF_MODULES: Final = {"input": "inputs", "output": "outputs", "output_gradient": "output_gradients"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to save of one tensor at one step."""

    raw: bool
    stats_only: bool
    reductions: tuple[Reduction, ...]
    quantiles: tuple[float, ...]


def check_collections(
    given: Iterable[str | Collection], save: SaveConfig, reductions: Reductions
) -> tuple[Collection, ...]:
    """Give collections with all their settings; names stand for built-in ones.

    Raises
    ------
    ArgumentError
        A name is unknown, or there twice.
    """
    made: dict[str, Collection] = {}
    for each in given:
        collection = Collection(name=each) if isinstance(each, str) else each
        if not isinstance(collection, Collection):
            raise ArgumentError(
                f"collections are names and Collection objects, not {each!r}",
                argument="collections",
            )
        if collection.name in made:
            raise ArgumentError(f"collection {collection.name!r} is given twice", argument="name")
        made[collection.name] = Collection(
            name=collection.name,
            include=[pattern.pattern for pattern in collection.patterns],
            modules=collection.modules,
            inputs=collection.inputs,
            outputs=collection.outputs,
            output_gradients=collection.output_gradients,
            save=collection.save or save,
            reductions=collection.reductions or reductions,
        )
    return tuple(made.values())


class Chooser:
    """Says what is to be saved of a tensor now; asked for every tensor of every step.

    Parameters
    ----------
    collections
        With all settings filled in (`check_collections`).
    paths
        Path of each module that collections may name, by its identity (``id``) or path.
    """

    def __init__(self, collections: Sequence[Collection], paths: Mapping[object, str]) -> None:
        self._collections = collections
        self._modules = [
            frozenset(self._path(c, module, paths) for module in c.modules) for c in collections
        ]
        self._of: dict[tuple[Kind, str], tuple[int, ...]] = {}
        self._due: frozenset[int] = frozenset()
        self._wanted: dict[tuple[tuple[int, ...], frozenset[int]], Wanted | None] = {}

    @staticmethod
    def _path(collection: Collection, module: object, paths: Mapping[object, str]) -> str:
        path = paths.get(module if isinstance(module, str) else id(module))
        if path is None:
            shown = repr(module) if isinstance(module, str) else type(module).__name__
            raise ArgumentError(
                f"collection {collection.name!r}: {shown} is no module of what the hook is "
                "attached to",
                argument="modules",
            )
        return path

    def begin(self, step: int, mode: str | None) -> bool:
        """Go to a step of a mode, counted by the mode; say whether anything is saved at it."""
        self._due = frozenset(
            i
            for i, collection in enumerate(self._collections)
            if collection.save is not None and collection.save.wants(step, mode)
        )
        return bool(self._due)

    def may_want(self, kind: Kind) -> bool:
        """Say whether tensors of this kind can be in any collection."""
        return any(
            collection.patterns
            or collection.name == "all"
            or (collection.modules and getattr(collection, _OF_MODULES.get(kind, ""), False))
            or (collection.name in BUILT_IN and _may_belong(collection.name, kind))
            for collection in self._collections
        )

    def wanted(
        self, kind: Kind, name: str, path: str = "", *, is_leaf: bool = False
    ) -> Wanted | None:
        """Give what to save of a tensor at the present step; None: nothing.

        Parameters
        ----------
        kind, name
            What it is, and the name it is saved under.
        path, is_leaf
            For what goes through a module: its path, and whether it has no submodules.
        """
        of = self._of.get((kind, name))
        if of is None:
            of = self._of[kind, name] = tuple(
                i
                for i in range(len(self._collections))
                if self._belongs(i, kind, name, path, is_leaf=is_leaf)
            )
        if not of:
            return None
        key = (of, self._due)
        if key not in self._wanted:
            self._wanted[key] = self._merge([i for i in of if i in self._due])
        return self._wanted[key]

    def _belongs(self, number: int, kind: Kind, name: str, path: str, *, is_leaf: bool) -> bool:
        collection = self._collections[number]
        built_in = BUILT_IN.get(collection.name)
        if built_in is not None and built_in(kind, name, is_leaf):
            return True
        if path in self._modules[number] and getattr(collection, _OF_MODULES.get(kind, ""), False):
            return True
        return any(pattern.search(name) for pattern in collection.patterns)

    def _merge(self, numbers: Sequence[int]) -> Wanted | None:
        if not numbers:
            return None
        forms = [c.reductions for c in map(self._collections.__getitem__, numbers)]
        chosen = [form for form in forms if form is not None]
        raw = any(form.raw is True for form in chosen)
        return Wanted(
            raw=raw,
            stats_only=not raw and any(form.raw == "stats" for form in chosen),
            reductions=tuple(dict.fromkeys(r for form in chosen for r in form.all)),
            quantiles=tuple(sorted({q for form in chosen for q in form.quantiles})),
        )


def _may_belong(name: str, kind: Kind) -> bool:
    return any(
        BUILT_IN[name](kind, text, is_leaf) for text in ("x", "bias") for is_leaf in (True, False)
    )

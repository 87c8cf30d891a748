"""Collections: tensors chosen by name, with settings of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Self

from tensorstore_fmt.interop.smdebug.configs import ReductionConfig, SaveConfig
from tensorstore_fmt.interop.smdebug.exceptions import InvalidCollectionConfiguration

__all__ = ["BUILT_IN", "Collection", "CollectionKeys", "built_in"]


class CollectionKeys:
    """Names of collections that are always there."""

    ALL = "all"
    DEFAULT = "default"
    WEIGHTS = "weights"
    BIASES = "biases"
    GRADIENTS = "gradients"
    LOSSES = "losses"
    METRICS = "metrics"
    INPUTS = "inputs"
    OUTPUTS = "outputs"
    LABELS = "labels"
    PREDICTIONS = "predictions"
    SM_METRICS = "sm_metrics"


BUILT_IN: Final[Mapping[str, str | None]] = {
    CollectionKeys.ALL: ".*",
    CollectionKeys.DEFAULT: None,
    CollectionKeys.WEIGHTS: "^(?!gradient).*weight",
    CollectionKeys.BIASES: "^(?!gradient).*bias",
    CollectionKeys.GRADIENTS: "^gradient",
    # Of smdebug's PyTorch hook, and of this library's, whose losses have "loss" as last word.
    CollectionKeys.LOSSES: r"[Ll]oss_(?!input).*output|(^|/)loss(es)?$",
}
"""Patterns of the collections that a run has if nothing is said of any."""


class Collection:
    """Names of tensors: those it lists, and those that fit a pattern (`re.search`).

    Parameters
    ----------
    name
        Its name.
    include_regex
        One pattern or several; one that fits is enough.
    tensor_names
        Names that belong to it anyway.
    reduction_config, save_config
        In what form and when to save; None: as the hook was told.
    save_histogram
        Kept, and not used.
    """

    def __init__(  # noqa: PLR0917 - smdebug's signature
        self,
        name: str,
        include_regex: str | Sequence[str] | None = None,
        tensor_names: Iterable[str] | None = None,
        reduction_config: ReductionConfig | None = None,
        save_config: SaveConfig | None = None,
        save_histogram: bool = True,  # noqa: FBT001, FBT002 - smdebug's signature
    ) -> None:
        self.name = name
        self.include_regex: list[str] = []
        self.tensor_names: set[str] = set(tensor_names or ())
        self.reduction_config = reduction_config
        self.save_config = save_config
        self.save_histogram = save_histogram
        self.modules: dict[object, tuple[bool, bool]] = {}
        """Modules whose inputs, outputs belong to it; a hook makes patterns of them."""
        if include_regex is not None:
            self.include(include_regex)

    def include(self, include_regex: str | Iterable[str]) -> None:
        """Add patterns."""
        more = [include_regex] if isinstance(include_regex, str) else list(include_regex)
        for pattern in more:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise InvalidCollectionConfiguration(
                    f"collection {self.name!r}: {pattern!r} is no pattern: {error}"
                ) from None
        self.include_regex += more

    def add_tensor_name(self, tname: str) -> None:
        """Add a name."""
        self.tensor_names.add(tname)

    def add_module_tensors(
        self,
        module: object,
        inputs: bool = False,  # noqa: FBT001, FBT002 - smdebug's signature
        outputs: bool = True,  # noqa: FBT001, FBT002 - the same
    ) -> None:
        """Add what goes into, or comes out of, a module that the hook is registered for."""
        self.modules[module] = (inputs, outputs)

    def has_tensor(self, tname: str) -> bool:
        """Say whether it lists a name, or a pattern of it fits."""
        return tname in self.tensor_names or any(re.search(p, tname) for p in self.include_regex)

    def to_json_dict(self) -> dict[str, Any]:
        """Give it as JSON would say it."""
        reductions, save = self.reduction_config, self.save_config
        return {
            "name": self.name,
            "include_regex": list(self.include_regex),
            "tensor_names": sorted(self.tensor_names),
            "reduction_config": None if reductions is None else reductions.to_json_dict(),
            "save_config": None if save is None else save.to_json_dict(),
            "save_histogram": self.save_histogram,
        }

    def to_json(self) -> str:
        """Give it as JSON."""
        return json.dumps(self.to_json_dict())

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Self:
        """Make it of what `to_json_dict` gave, or smdebug wrote."""
        reductions, save = params.get("reduction_config"), params.get("save_config")
        return cls(
            str(params.get("name", "")),
            include_regex=params.get("include_regex") or (),
            tensor_names=params.get("tensor_names") or (),
            reduction_config=None if reductions is None else ReductionConfig.from_dict(reductions),
            save_config=None if save is None else SaveConfig.from_dict(save),
            save_histogram=bool(params.get("save_histogram", True)),
        )

    @classmethod
    def from_json(cls, json_str: str) -> Self:
        """Make it of JSON."""
        return cls.from_dict(json.loads(json_str))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Collection) and self.to_json_dict() == other.to_json_dict()

    __hash__ = None  # type: ignore[assignment] # it can be changed

    def __repr__(self) -> str:
        return f"Collection({self.name!r}, {len(self.tensor_names)} names, {self.include_regex})"


def built_in() -> dict[str, Collection]:
    """Make the collections that are always there."""
    return {name: Collection(name, pattern) for name, pattern in BUILT_IN.items()}

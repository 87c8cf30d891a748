"""The rules that come with the library, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tensorstore_fmt.rules.builtin.activations import DeadRelu, SaturatedActivation
from tensorstore_fmt.rules.builtin.classes import ClassImbalance, Confusion
from tensorstore_fmt.rules.builtin.inputs import CheckInput, NlpSequenceRatio
from tensorstore_fmt.rules.builtin.losses import (
    AccuracyDrop,
    LossNotDecreasing,
    Overfit,
    Overtraining,
)
from tensorstore_fmt.rules.builtin.runs import SimilarAcrossRuns, StalledTraining
from tensorstore_fmt.rules.builtin.statistics import (
    AllZero,
    ExplodingTensor,
    TensorVariance,
    VanishingGradient,
)
from tensorstore_fmt.rules.builtin.weights import (
    PoorInitialisation,
    UnchangedTensor,
    WeightUpdateRatio,
)
from tensorstore_fmt.rules.rule import Rule

__all__ = [
    "BUILT_IN",
    "AccuracyDrop",
    "AllZero",
    "CheckInput",
    "ClassImbalance",
    "Confusion",
    "DeadRelu",
    "ExplodingTensor",
    "LossNotDecreasing",
    "NlpSequenceRatio",
    "Overfit",
    "Overtraining",
    "PoorInitialisation",
    "SaturatedActivation",
    "SimilarAcrossRuns",
    "StalledTraining",
    "TensorVariance",
    "UnchangedTensor",
    "VanishingGradient",
    "WeightUpdateRatio",
]

BUILT_IN: Final[Mapping[str, type[Rule]]] = {
    rule.name: rule
    for rule in (
        AccuracyDrop,
        AllZero,
        CheckInput,
        ClassImbalance,
        Confusion,
        DeadRelu,
        ExplodingTensor,
        LossNotDecreasing,
        NlpSequenceRatio,
        Overfit,
        Overtraining,
        PoorInitialisation,
        SaturatedActivation,
        SimilarAcrossRuns,
        StalledTraining,
        TensorVariance,
        UnchangedTensor,
        VanishingGradient,
        WeightUpdateRatio,
    )
}
"""All of them: ``rules.make_rule("vanishing_gradient:threshold=1e-9")`` finds them here."""

"""The handwritten digits that ship with scikit-learn, split for training and testing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["CLASSES", "IMAGE_SHAPE", "Digits", "load_digits"]

CLASSES = 10
IMAGE_SHAPE = (8, 8)

_BRIGHTEST = 16.0  # scikit-learn's digits count the ink in 4x4 blocks of bits
_TEST_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images as rows of 64 float32 between 0 and 1, labels as int64 between 0 and 9."""

    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]


def load_digits(*, seed: int) -> Digits:
    """Load the 1797 digits, shuffled by `seed`, one fifth set aside for testing.

    Nothing is downloaded: the data are a file of scikit-learn.

    Raises
    ------
    ModuleNotFoundError
        scikit-learn is not installed.
    """
    # Imported late: only the demo needs scikit-learn, and its import takes a second.
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = np.asarray(bunch.data / _BRIGHTEST, dtype=np.float32)
    labels = np.asarray(bunch.target, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = np.split(order, [int(len(images) * _TEST_SHARE)])
    return Digits(
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )

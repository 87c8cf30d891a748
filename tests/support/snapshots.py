"""What tests ask of snapshots: their bits, that nobody else owns them, and why one is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.writing.convert import snapshot
from tensorstore_fmt.writing.snapshots import Snapshot

__all__ = ["bits", "check_owned", "refusal"]


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


def check_owned(shot: Snapshot) -> None:
    array = shot.array
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.flags.aligned
    assert array.dtype == dtypes.numpy_dtype(shot.dtype)
    assert type(array) is np.ndarray


def refusal(value: object) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        snapshot("some/name", value)
    assert caught.value.facts["name"] == "some/name"
    assert "some/name" in str(caught.value)
    assert str(caught.value.facts["type"]).rpartition(".")[2] == type(value).__qualname__
    assert caught.value.code == "bad_argument"
    return caught.value

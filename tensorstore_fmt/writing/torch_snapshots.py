"""PyTorch's tensors as arrays that the writer owns."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import numpy as np

from tensorstore_fmt import dtypes
from tensorstore_fmt.writing.snapshots import POOLED_NBYTES, Empty, Snapshot, from_array, refusal

__all__ = ["copy_with_torch_threads", "from_torch", "is_torch"]

_TORCH_PLAIN: Final = frozenset(
    f"torch.{name}" for name in dtypes.NAMES[: dtypes.NAMES.index("bfloat16")]
)
# NumPy does not know these: the bits go over as integers of the same size.
_TORCH_BITS: Final = {
    "torch.bfloat16": ("int16", "bfloat16"),
    "torch.float8_e4m3fn": ("uint8", "float8_e4m3fn"),
    "torch.float8_e4m3fnuz": ("uint8", "float8_e4m3fnuz"),
    "torch.float8_e5m2": ("uint8", "float8_e5m2"),
    "torch.float8_e5m2fnuz": ("uint8", "float8_e5m2fnuz"),
    "torch.float8_e8m0fnu": ("uint8", "float8_e8m0fnu"),
}
_TORCH_HINTS: Final = {
    "torch.complex32": "log value.to(torch.complex64)",
    "torch.float4_e2m1fn_x2": "two elements share a byte: log value.view(torch.uint8)",
}


def is_torch(value: object) -> bool:
    """Say whether it is a tensor of PyTorch, which is not imported for that."""
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor_type is not None and isinstance(value, tensor_type)


def _check_torch(name: str, value: Any) -> None:  # noqa: ANN401 - torch may not be installed here
    """Refuse tensors that have no elements to copy, or more than one way to read them."""
    dtype = str(value.dtype)
    # A DTensor would give this rank's piece where the caller reads the whole.
    if type(value).__name__ == "DTensor":
        hint = "log value.to_local() as a part, or value.full_tensor()"
        raise refusal(name, value, "is spread over several processes", hint, dtype=dtype)
    if value.is_quantized:
        hint = "log value.int_repr(), or value.dequantize()"
        raise refusal(name, value, f"is quantized ({dtype})", hint, dtype=dtype)
    if value.is_nested:
        hint = "log value.values() and value.offsets(), or each of value.unbind()"
        raise refusal(name, value, "is nested", hint, dtype=dtype)
    if str(value.layout) != "torch.strided":
        hint = "log value.to_dense(), or its indices and values under names of their own"
        raise refusal(name, value, f"has the layout {value.layout}", hint, dtype=dtype)
    if value.device.type == "meta":
        raise refusal(name, value, "is on the meta device", "it has no elements", dtype=dtype)
    if dtype not in _TORCH_PLAIN and dtype not in _TORCH_BITS:
        hint = _TORCH_HINTS.get(dtype, "convert it first, for instance .float()")
        raise refusal(name, value, f"has the dtype {dtype}", hint, dtype=dtype)


class _Threads:
    """Whether PyTorch's threads may copy: not in a process forked from the one that said so.

    They do not live on in it, and whoever gives them work there waits for ever.
    """

    pid = 0

    def may_be_used(self) -> bool:
        return self.pid == os.getpid()


_threads: Final = _Threads()


def copy_with_torch_threads() -> None:
    """Let PyTorch copy what is logged in this process, which trains with the same threads."""
    _threads.pid = os.getpid()


def from_torch(name: str, value: object, empty: Empty | None) -> Snapshot:
    """Copy a tensor of any device; refuses one without elements to copy."""
    _check_torch(name, value)
    torch: Any = sys.modules["torch"]
    tensor: Any = value
    tensor = tensor.detach()
    is_ours = False
    if tensor.device.type != "cpu":
        # Not .cpu(): that keeps the order of the axes in memory, and C order would be a second
        # copy. A failure of the device is not the caller's argument: it passes through.
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)
        is_ours = True
    if tensor.is_conj() or tensor.is_neg():  # bits that say "conjugate me", "negate me" later
        tensor = tensor.resolve_conj().resolve_neg()
        is_ours = True
    bits, stored = _TORCH_BITS.get(str(tensor.dtype), (None, None))
    try:
        if bits is not None:
            tensor = tensor.view(getattr(torch, bits))
        array = tensor.numpy()
    except MemoryError:
        raise
    except Exception as error:
        problem = f"cannot be read ({error})"
        raise refusal(name, value, problem, "log a plain torch.Tensor") from error
    plain = array.dtype
    copy = None
    if array.nbytes >= POOLED_NBYTES and _threads.may_be_used():

        def copy(out: np.ndarray) -> object:
            return torch.from_numpy(out.view(plain)).copy_(tensor)

    if stored is not None:
        array = array.view(dtypes.numpy_dtype(stored))
    return from_array(name, array, value=value, is_ours=is_ours, empty=empty, copy=copy)

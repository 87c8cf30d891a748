"""Tensors of PyTorch as the writer takes them: nested outputs, reductions, parts of DTensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from tensorstore_fmt.hooks.reductions import Reduction
from tensorstore_fmt.writing.staging import Part

__all__ = ["as_value", "quantiles", "reduce", "walk"]

_MOST_DEEP: Final = 8
_MOST_FOR_QUANTILE: Final = 1 << 24
"""`torch.quantile` refuses more elements."""


def walk(value: object, name: str, *, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors in a nested value, each with its name.

    A tensor is `name`; items of tuples and lists are ``name/0``, of dicts (also ModelOutput)
    and dataclasses ``name/key``. What is None or no tensor is left out.
    """
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth >= _MOST_DEEP:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, f"{name}/{key}", depth=depth + 1)
    elif isinstance(value, list | tuple):
        keys: Sequence[object] = getattr(value, "_fields", None) or range(len(value))
        for key, item in zip(keys, value, strict=True):
            yield from walk(item, f"{name}/{key}", depth=depth + 1)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from walk(getattr(value, field.name), f"{name}/{field.name}", depth=depth + 1)


# --- reductions ----------------------------------------------------------------


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Give it in a dtype in which sums make sense."""
    if tensor.is_complex():
        return tensor.abs()
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    is_wide = not tensor.is_floating_point() and tensor.dtype.itemsize > 2
    return tensor.to(torch.float64 if is_wide else torch.float32)


def reduce(tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Give a reduction known by name.

    Raises
    ------
    ValueError
        The tensor is empty, and the reduction has no value for nothing.
    """
    axis = reduction.axis
    dims = tuple(range(tensor.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    dims = tuple(sorted(d % max(tensor.ndim, 1) for d in dims))
    x = _wide(tensor)
    if not dims:
        x, dims = x.reshape(1), (0,)
    name = reduction.name
    if name in ("sum", "l1", "l2"):
        if name == "sum":
            return x.sum(dims)
        return torch.linalg.vector_norm(x, 1 if name == "l1" else 2, dims)
    if name == "prod":
        for d in reversed(dims):
            x = x.prod(d)
        return x
    if x.numel() == 0:
        raise ValueError(f"{name} of an empty tensor of shape {tuple(tensor.shape)}")
    if name == "median":
        kept = [d for d in range(x.ndim) if d not in dims]
        return x.permute(*kept, *dims).flatten(len(kept)).median(-1).values
    if name in ("std", "var"):
        return getattr(torch, name)(x, dims, correction=0)
    if name in ("absmax", "absmean"):
        return x.abs().amax(dims) if name == "absmax" else x.abs().mean(dims)
    return {"min": torch.amin, "max": torch.amax, "mean": torch.mean}[name](x, dims)


def quantiles(tensor: torch.Tensor, at: Sequence[float]) -> torch.Tensor:
    """Give quantiles of all elements, of at most 2^24 evenly spaced ones of a larger tensor."""
    x = _wide(tensor).flatten()
    if x.numel() == 0:
        raise ValueError(f"quantiles of an empty tensor of shape {tuple(tensor.shape)}")
    if x.numel() > _MOST_FOR_QUANTILE:
        x = x[:: -(-x.numel() // _MOST_FOR_QUANTILE)]
    return torch.quantile(x, torch.tensor(at, dtype=x.dtype, device=x.device))


# --- parts ----------------------------------------------------------------------


def as_value(tensor: torch.Tensor) -> torch.Tensor | Part | None:
    """Give a tensor as `RunWriter.log` takes it.

    A DTensor becomes the part of the global tensor that this rank holds; None if another rank
    logs the same part (replicas), or if this rank's part is empty.
    """
    if type(tensor).__name__ != "DTensor":
        return tensor
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        tensor = tensor.redistribute(
            placements=[_replicated(placement) for placement in placements]
        )
        placements = tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    for place, placement in zip(coordinate, placements, strict=True):
        if placement.is_replicate() and place != 0:
            return None
    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(shape) != tuple(local.shape):
        raise ValueError(
            f"a DTensor of shape {tuple(tensor.shape)} with placements {placements} holds "
            f"{tuple(local.shape)} here, expected {tuple(shape)}; log it as a Part"
        )
    if tensor.ndim == 0 or tuple(local.shape) == tuple(tensor.shape):
        return local
    if local.numel() == 0:
        return None
    return Part(value=local, global_shape=tuple(tensor.shape), origin=tuple(offset))


def _replicated(placement: Any) -> Any:  # noqa: ANN401 - torch's types are not installed here
    from torch.distributed.tensor import Replicate

    return Replicate() if placement.is_partial() else placement

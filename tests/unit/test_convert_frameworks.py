"""Snapshots of what torch and JAX hold: right bits, one copy, and a clear refusal of the rest."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.snapshots import bits, check_owned, refusal

from tensorstore_fmt import dtypes
from tensorstore_fmt.errors import ArgumentError
from tensorstore_fmt.writing import torch_snapshots
from tensorstore_fmt.writing.convert import (
    check_step,
    snapshot,
)

# --- torch -------------------------------------------------------------------------

TORCH_DTYPES = [
    *dtypes.NAMES[: dtypes.NAMES.index("bfloat16")],
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.parametrize("name", TORCH_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (3, 0)])
def test_torch_dtypes_keep_every_bit(torch: Any, name: str, shape: tuple[int, ...]) -> None:
    size = dtypes.itemsize(name)
    raw = np.random.default_rng(0).integers(0, 256, (*shape, size), dtype=np.uint8)
    if name == "bool":
        raw &= 1
    tensor = torch.empty(shape, dtype=getattr(torch, name))
    tensor.untyped_storage().copy_(torch.from_numpy(raw.ravel()).untyped_storage())
    shot = snapshot("x", tensor)
    check_owned(shot)
    assert (shot.dtype, shot.array.shape) == (name, shape)
    assert bits(shot.array) == raw.tobytes()
    assert not np.shares_memory(shot.array, raw)


@pytest.fixture
def threads(torch: Any) -> Iterator[None]:
    """Let two threads of torch copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch_snapshots.copy_with_torch_threads()
    yield
    torch_snapshots._threads.pid = 0
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_torch_copies_every_bit(torch: Any, name: str) -> None:
    size = dtypes.itemsize(name)
    raw = np.random.default_rng(0).integers(0, 256, (300, 700, size), dtype=np.uint8)
    if name == "bool":
        raw &= 1
    tensor = torch.empty((300, 700), dtype=getattr(torch, name))
    tensor.untyped_storage().copy_(torch.from_numpy(raw.ravel()).untyped_storage())
    for view, expected in [
        (tensor, raw),
        (tensor.T, raw.transpose(1, 0, 2)),
        (tensor[::2, 100:], raw[::2, 100:]),
    ]:
        shot = snapshot("x", view, empty=np.empty)
        check_owned(shot)
        assert (shot.dtype, shot.array.shape) == (name, tuple(view.shape))
        assert bits(shot.array) == expected.tobytes()


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_copies_without_torchs_threads(torch: Any) -> None:
    tensor = torch.ones(1 << 22)
    assert float(snapshot("x", tensor + 1, empty=np.empty).array[-1]) == 2.0  # the threads work
    child = os.fork()
    if child == 0:
        threading.Timer(30, os._exit, [2]).start()
        shot = snapshot("x", tensor, empty=np.empty)
        os._exit(int(shot.array.sum() != 1 << 22))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_torch_views_and_gradients(torch: Any) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    parameter = torch.nn.Parameter(base.clone())
    attached = parameter * 2
    for tensor in (
        base.permute(2, 0, 1),
        base[:, ::2, 1:],
        base[0, 0].expand(5, 4),
        base.to(torch.bfloat16).permute(2, 1, 0),
        parameter,
        attached,
        base.to_dense(),
        base.contiguous(memory_format=torch.contiguous_format),
    ):
        shot = snapshot("x", tensor)
        check_owned(shot)
        assert shot.array.shape == tuple(tensor.shape)
        assert shot.array.astype(np.float32).tolist() == tensor.tolist()
    before = snapshot("x", parameter).array.copy()
    shot = snapshot("x", parameter)
    with torch.no_grad():
        parameter.add_(1)
    assert bits(shot.array) == bits(before)


def test_torch_lazy_conjugate_and_negative(torch: Any) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    for tensor in (z.conj(), z.conj().imag, z.conj()[::2], z.flip(0).conj()):
        shot = snapshot("x", tensor)
        check_owned(shot)
        assert shot.array.tolist() == tensor.tolist()
        shot.array[...] = 0
    assert z.tolist() == [1 + 2j, 3 - 4j]


# torch 2.13 warns that some of these are in beta.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_tensors_without_plain_elements_are_refused(torch: Any) -> None:
    cases = {
        "to_dense": torch.eye(2).to_sparse(),
        "to_dense()": torch.eye(2).to_sparse_csr(),
        "meta": torch.empty(2, device="meta"),
        "complex64": torch.zeros(2, dtype=torch.complex32),
        "unbind": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    }
    for hint, tensor in cases.items():
        assert hint in str(refusal(tensor))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torch_quantized_is_refused(torch: Any) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "int_repr" in str(refusal(tensor))


def test_torch_fake_tensors_are_refused(torch: Any) -> None:
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode():
        refusal(torch.empty(2))


def test_torch_lists_of_scalars(torch: Any) -> None:
    assert snapshot("x", [torch.tensor(1.0), torch.tensor(2.0)]).array.tolist() == [1, 2]


@pytest.mark.hardware
def test_torch_on_a_device(torch: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    base = torch.arange(24, dtype=torch.float32, device="cuda").reshape(2, 3, 4)
    for tensor in (base, base.permute(2, 0, 1), base.bfloat16(), base[0, 0, 0]):
        shot = snapshot("x", tensor)
        check_owned(shot)
        assert shot.array.astype(np.float32).tolist() == tensor.tolist()


# --- JAX ---------------------------------------------------------------------------


def test_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    for name in ("float32", "bfloat16", "float16", "int32", "bool", "complex64", "float8_e5m2"):
        value = jax.numpy.ones((2, 3), name)
        shot = snapshot("x", value)
        check_owned(shot)
        assert (shot.dtype, shot.array.shape) == (name, (2, 3))
        assert bits(shot.array) == np.asarray(value).tobytes()
        assert not np.shares_memory(shot.array, np.asarray(value))
    assert snapshot("x", jax.numpy.array([-1, 7], "int4")).array.view(np.int8).tolist() == [-1, 7]


def test_jax_tracers_and_keys_are_refused() -> None:
    jax = pytest.importorskip("jax")
    with pytest.raises(ArgumentError, match="outside jit"):
        jax.jit(lambda x: snapshot("x", x))(1.0)
    with pytest.raises(ArgumentError):
        snapshot("x", jax.random.key(0))


def test_steps_from_torch(torch: Any) -> None:
    assert check_step(torch.tensor(5)) == 5
    for step in (torch.tensor(True), torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(ArgumentError):
            check_step(step)

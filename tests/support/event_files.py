"""Writes event files, as smdebug and TensorBoard do, so that tests can have any of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import crc32c
import numpy as np

TF = {
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "complex64": 8,
    "int64": 9, "bool": 10, "bfloat16": 14, "uint16": 17, "complex128": 18, "float16": 19,
    "uint32": 22, "uint64": 23, "float8_e5m2": 24, "float8_e4m3fn": 25,
}  # fmt: skip
MODES = {"TRAIN": "1", "EVAL": "2", "PREDICT": "3", "GLOBAL": "4"}


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def blob(number: int, data: bytes | str) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def integer(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def double(number: int, value: float) -> bytes:
    return varint(number << 3 | 1) + struct.pack("<d", value)


def single(number: int, value: float) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<f", value)


def mask(data: bytes) -> int:
    crc = crc32c.crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def record(payload: bytes, *, is_checked: bool = True) -> bytes:
    head = struct.pack("<Q", len(payload))
    foot = mask(payload if is_checked else b"0x12345678")
    return head + struct.pack("<I", mask(head)) + payload + struct.pack("<I", foot)


def shape_proto(shape: Sequence[int]) -> bytes:
    return b"".join(blob(2, integer(1, n) if n else b"") for n in shape)


def tensor_proto(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        number = integer(1, TF[value.dtype.name])
        return number + blob(2, shape_proto(value.shape)) + blob(4, value.tobytes())
    assert isinstance(value, list)
    return blob(2, shape_proto([len(value)])) + b"".join(blob(8, text) for text in value)


def event(value: bytes, *, step: int, wall_time: float = 1.7e9) -> bytes:
    return double(1, wall_time) + integer(2, step) + blob(5, blob(1, value))


def smdebug_value(tag: str, tensor: object, *, mode: str = "TRAIN", mode_step: int = 0) -> bytes:
    plugins = [blob(1, blob(1, "mode_step") + blob(2, str(mode_step)))]
    plugins.append(blob(1, blob(1, "mode") + blob(2, MODES[mode])))
    return blob(1, tag) + blob(8, tensor_proto(tensor)) + blob(9, b"".join(plugins))


def smdebug_step(
    root: Path,
    step: int,
    tensors: dict[str, object],
    *,
    worker: str = "worker_0",
    mode: str = "TRAIN",
    mode_step: int | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    wall_time: float = 1.7e9,
) -> Path:
    """Write one step of one worker; give the file of its values."""
    count = step if mode_step is None else mode_step
    values, payload = b"", []
    for name, tensor in tensors.items():
        tag = smdebug_value(name, tensor, mode=mode, mode_step=count)
        data = record(event(tag, step=step, wall_time=wall_time), is_checked=False)
        payload.append({"tensorname": name, "start_idx": len(values), "length": len(data)})
        values += data
    path = root / f"events/{step:012d}/{step:012d}_{worker}.tfevents"
    path.parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        path.write_bytes(values)
    index = root / f"index/{step // 1000:09d}/{step:012d}_{worker}.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"tensorname": n, "originalname": n, "shape": list(s)} for n, s in (shapes or {}).items()
    ]
    meta = {"mode": mode, "mode_step": count, "event_file_name": str(path.relative_to(root))}
    document = {"meta": meta, "tensor_payload": payload, "shape_payload": rows}
    index.write_text(json.dumps(document))
    return path


def smdebug_collections(
    root: Path,
    collections: dict[str, dict[str, object]],
    *,
    worker: str = "worker_0",
    num_workers: int = 1,
) -> None:
    path = root / f"collections/000000000/{worker}_collections.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"collections": collections, "_meta": {"num_workers": num_workers}}
    path.write_text(json.dumps(document))

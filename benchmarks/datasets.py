"""Tensors from real training, made once, kept in a cache, read with NumPy alone.

    python benchmarks/datasets.py [--quick] [--list]

`load` and `load_stream` need NumPy and nothing else, and run on Python 3.10, so that every
contestant reads the same bytes. `make` trains: the full set in `datasets_torch`, which needs the
environment of the peers, the quick one in `datasets_digits`, which needs NumPy and scikit-learn.

The cache is the folder that ``TSF_BENCH_CACHE`` names, else
``~/.cache/tensorstore_fmt/benchmarks``.
Each kind is one ``.npy`` file, which is mapped, not read; what it holds is said in
``manifest.json``. A dtype that NumPy lacks (``bfloat16``) is stored as unsigned integers of the
same size, with its name in the manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["KINDS", "Kind", "Piece", "cache", "load", "load_stream", "make", "manifest"]

VERSION = 1  # part of the folder's name: data of another version are made anew
SEED = 7
QUICK_NBYTES = 3 << 19  # 1.5 MiB
QUICK_PIECES = 6
ALIGNMENT = 64


class Kind(NamedTuple):
    """One sort of tensor: the first axis of its array counts tensors of one shape."""

    name: str
    dtype: str
    what: str


class Piece(NamedTuple):
    """One tensor of a stream, in the order of training."""

    step: int
    name: str
    dtype: str
    array: np.ndarray[Any, Any]


KINDS = (
    Kind("weights_f32", "float32", "a trained linear layer, at several steps"),
    Kind("gradients_f32", "float32", "its gradients at the same steps"),
    Kind("adam_m_f32", "float32", "first moments that Adam keeps of them"),
    Kind("adam_v_f32", "float32", "second moments"),
    Kind("relu_f32", "float32", "what a ReLU gives out"),
    Kind("transformer_weights_f32", "float32", "linear layers of a trained transformer"),
    Kind("transformer_weights_f16", "float16", "the same, rounded to half precision"),
    Kind("transformer_weights_bf16", "bfloat16", "the same, rounded to bfloat16"),
    Kind("gradients_bf16", "bfloat16", "gradients of a transformer's linear layers"),
    Kind("hidden_f32", "float32", "hidden states, a row a token"),
    Kind("hidden_bf16", "bfloat16", "the same, computed in bfloat16"),
    Kind("attention_f32", "float32", "softmax over the keys: layer, head, query, key"),
    Kind("attention_f16", "float16", "the same in half precision, an odd number of tokens"),
    Kind("gelu_f32", "float32", "what a GELU gives out"),
    Kind("mask_bool", "bool", "where a ReLU let its input pass"),
    Kind("tokens_i64", "int64", "token ids of a text"),
    Kind("tokens_i32", "int32", "the same, as 32-bit integers"),
    Kind("losses_f32", "float32", "the loss of each example, step by step"),
    Kind("features_f64", "float64", "principal components of images"),
    Kind("images_u8", "uint8", "grey images"),
    Kind("noise_f32", "float32", "random bits: nothing can be saved"),
)
STREAMS = {"f32": "float32", "bf16": "bfloat16"}


def cache() -> Path:
    """Give the folder that the data are kept in; it may not be there yet."""
    named = os.environ.get("TSF_BENCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "tensorstore_fmt" / "benchmarks"


def manifest(*, quick: bool = False) -> dict[str, Any]:
    """Read what the data are: by kind the dtype, shape, bytes, CRC-32 and where it comes from.

    Raises
    ------
    FileNotFoundError
        The data were not made yet; the message says how to.
    """
    path = _folder(quick=quick) / "manifest.json"
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        command = "python benchmarks/datasets.py" + (" --quick" if quick else "")
        message = f"{path}: no data yet; make them with `{command}`"
        raise FileNotFoundError(message) from None


def load(kind: str, *, quick: bool = False) -> np.ndarray[Any, Any]:
    """Map one kind of tensor: read-only, first axis counts the tensors.

    `bfloat16` comes as uint16; `manifest` has its name.

    Raises
    ------
    FileNotFoundError
        The data were not made yet.
    KeyError
        There is no such kind.
    """
    known = manifest(quick=quick)["kinds"]
    if kind not in known:
        message = f"no kind {kind!r}; there are {', '.join(sorted(known))}"
        raise KeyError(message)
    array: np.ndarray[Any, Any] = np.load(_folder(quick=quick) / f"{kind}.npy", mmap_mode="r")
    return array


def load_stream(dtype: str, *, quick: bool = False) -> list[Piece]:
    """Map the tensors of a training run in their order, of 1 to 16 MB each (quick: 1 to 2 MB).

    Parameters
    ----------
    dtype
        ``f32`` or ``bf16``.
    """
    facts = manifest(quick=quick)["streams"][dtype]
    flat: np.ndarray[Any, Any] = np.load(
        _folder(quick=quick) / f"stream_{dtype}.npy", mmap_mode="r"
    )
    pieces = []
    for step, name, start, shape in facts["pieces"]:
        array = flat[start : start + int(np.prod(shape))].reshape(shape)
        pieces.append(Piece(step, name, facts["dtype"], array))
    return pieces


def make(*, quick: bool = False) -> dict[str, Any]:
    """Make the data if they are not there, and give their manifest.

    The quick set is cut from the full one where that is there, else it is made with NumPy.

    Raises
    ------
    ModuleNotFoundError
        A package that training needs is not installed (`environments` installs them).
    """
    folder = _folder(quick=quick)
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            store = Store(scratch)
            _fill(store, quick=quick)
            store.finish()
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return manifest(quick=quick)


class Store:
    """Writes a new set of data; its manifest comes last, when all else is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: dict[str, Any] = {}
        self.streams: dict[str, Any] = {}
        self._names = {kind.name: kind for kind in KINDS}

    def finish(self) -> None:
        """Write the manifest.

        Raises
        ------
        RuntimeError
            A kind or a stream was not made.
        """
        due = {kind.name for kind in KINDS} | set(STREAMS)
        missing = sorted(due - set(self.kinds) - set(self.streams))
        if missing:
            message = f"{self.folder}: not made: {', '.join(missing)}"
            raise RuntimeError(message)
        facts = {"version": VERSION, "seed": SEED, "numpy": np.__version__}
        text = json.dumps({**facts, "kinds": self.kinds, "streams": self.streams}, indent=1)
        (self.folder / "manifest.json").write_text(text + "\n")

    def add(self, name: str, array: np.ndarray[Any, Any], source: str) -> None:
        """Keep one kind; `array` has uint16 where the kind is bfloat16."""
        kind = self._names[name]
        stored = "uint16" if kind.dtype == "bfloat16" else kind.dtype
        if array.dtype != stored or array.ndim < 2:
            message = f"{name}: {array.dtype} of {array.ndim} axes; {stored} of 2 or more is due"
            raise TypeError(message)
        array = np.ascontiguousarray(array)
        np.save(self.folder / f"{name}.npy", array)
        self.kinds[name] = {
            "dtype": kind.dtype,
            "shape": list(array.shape),
            "nbytes": array.nbytes,
            "crc32": zlib.crc32(array.reshape(-1).view(np.uint8)),
            "what": kind.what,
            "source": source,
        }
        _say(f"{name}: {kind.dtype} {array.shape}, {array.nbytes / 1e6:.1f} MB")

    def add_stream(
        self, key: str, pieces: list[tuple[int, str, np.ndarray[Any, Any]]], source: str
    ) -> None:
        """Keep a stream of tensors; no two may have the same bytes."""
        stored = np.dtype("uint16" if STREAMS[key] == "bfloat16" else STREAMS[key])
        unit = ALIGNMENT // stored.itemsize
        listing, start, digests = [], 0, set()
        for step, name, array in pieces:
            listing.append([step, name, start, list(array.shape)])
            start += -(-array.size // unit) * unit
            digests.add((zlib.crc32(np.ascontiguousarray(array).view(np.uint8)), array.shape))
        if len(digests) != len(pieces):
            message = f"stream {key}: {len(pieces) - len(digests)} tensors are there twice"
            raise RuntimeError(message)
        path = self.folder / f"stream_{key}.npy"
        flat = np.lib.format.open_memmap(path, mode="w+", dtype=stored, shape=(start,))
        for (_, _, offset, _), (_, _, array) in zip(listing, pieces, strict=True):
            flat[offset : offset + array.size] = array.reshape(-1)
        flat.flush()
        nbytes = sum(array.nbytes for _, _, array in pieces)
        facts = {"dtype": STREAMS[key], "nbytes": nbytes, "source": source}
        self.streams[key] = {**facts, "pieces": listing}
        _say(f"stream {key}: {len(pieces)} tensors, {nbytes / 1e6:.0f} MB")


def _folder(*, quick: bool) -> Path:
    return cache() / f"{'quick' if quick else 'full'}-{VERSION}"


def _fill(store: Store, *, quick: bool) -> None:
    # Imported late: a contestant that only loads has neither torch nor scikit-learn.
    if not quick:
        import datasets_torch

        datasets_torch.fill(store)
    elif (_folder(quick=False) / "manifest.json").exists():
        _cut(store)
    else:
        import datasets_digits

        datasets_digits.fill(store)


def _cut(store: Store) -> None:
    """Take the first tensors, or the first rows of the first one, of each kind of the full set."""
    whole = manifest()
    for name, facts in whole["kinds"].items():
        array = load(name)
        each = array.nbytes // len(array)
        if each <= QUICK_NBYTES:
            part = array[: max(1, QUICK_NBYTES // each)]
        else:
            rows = max(1, array.shape[1] * QUICK_NBYTES // each)
            part = array[:1, :rows]
        store.add(name, part, facts["source"] + "; the first part")
    for key, facts in whole["streams"].items():
        pieces = [
            (piece.step, piece.name, piece.array)
            for piece in load_stream(key)
            if piece.array.nbytes < 5 << 20
        ][:QUICK_PIECES]
        store.add_stream(key, pieces, facts["source"] + "; the first small ones")


def _publish(scratch: Path, folder: Path) -> None:
    """Give the folder its name; whoever made the same data first has won."""
    try:
        scratch.rename(folder)
    except OSError:
        if not (folder / "manifest.json").exists():
            raise


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Make the data, or list what is there."""
    parser = argparse.ArgumentParser(description="Make the data of the benchmarks, once.")
    parser.add_argument("--quick", action="store_true", help="1 to 2 MB of each kind, in seconds")
    parser.add_argument("--list", action="store_true", help="print what is there, as Markdown")
    options = parser.parse_args()
    facts = manifest(quick=options.quick) if options.list else make(quick=options.quick)
    if not options.list:
        _say(f"in {_folder(quick=options.quick)}")
        return
    print("| kind | dtype | shape | MB | from |\n|---|---|---|---|---|")
    for name, kind in facts["kinds"].items():
        shape = "×".join(map(str, kind["shape"]))
        size = f"{kind['nbytes'] / 1e6:.1f}"
        print(f"| `{name}` | {kind['dtype']} | {shape} | {size} | {kind['source']} |")
    for key, stream in facts["streams"].items():
        count = f"{len(stream['pieces'])} tensors"
        size = f"{stream['nbytes'] / 1e6:.0f}"
        print(f"| stream `{key}` | {stream['dtype']} | {count} | {size} | {stream['source']} |")


if __name__ == "__main__":
    # Under its own name, so that the makers and this script mean the same module.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import datasets

    datasets.main()

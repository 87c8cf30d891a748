from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.kernels import GIVEN, ROOT, builder, compiled, load, using

from tensorstore_fmt import dtypes
from tensorstore_fmt.cli import main
from tensorstore_fmt.format import kernel, planes, statistics

BIT_KINDS = {"e": 2, "E": 2, "f": 4, "d": 8, "h": 2, "H": 2, "i": 4, "I": 4, "q": 8, "Q": 8, "B": 1}
VALUES = np.zeros(256)


def vectors(k: int = 1) -> np.ndarray:
    return np.empty((k, 10))


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


# --- planes, against the plainest words for them ------------------------------------


@pytest.mark.parametrize("w", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 3, 1023, 1024, 1025, 50_000])
def test_cut_and_joined(w: int, n: int, implementation: str) -> None:
    raw = np.random.default_rng(n).integers(0, 256, n * w, np.uint8)
    words = raw.view(f"<u{w}")
    turned = (words << 1 | words >> (8 * w - 1)).astype(words.dtype)
    for rotated, source in ((False, words), (True, turned)):
        expected = np.ascontiguousarray(source).view(np.uint8).reshape(n, w).T
        cut = zeros(w, n)
        planes.split(raw, list(cut), rotated=rotated)
        np.testing.assert_array_equal(cut, expected, err_msg=implementation)
        out = zeros(n * w)
        planes.join(list(cut), out, rotated=rotated)
        np.testing.assert_array_equal(out, raw, err_msg=implementation)


def test_a_plane_of_one_byte_repeated(implementation: str) -> None:
    out = np.ones(40_000, np.uint8)
    single = np.full(1, 7, np.uint8)
    planes.join([single, zeros(10_000), single, zeros(1)], out, rotated=False)
    assert (out.reshape(-1, 4) == (7, 0, 7, 0)).all(), implementation
    for n in (1, 0):
        planes.join([single, zeros(n)], out[: 2 * n], rotated=True)
    assert out[:4].tolist() == [0x03, 0x80, 7, 0]


def test_any_buffer_will_do() -> None:
    raw, cut = bytes(range(64)), [bytearray(16) for _ in range(4)]
    compiled().split(memoryview(raw), tuple(cut), False)
    assert [plane[0] for plane in cut] == [0, 1, 2, 3]
    out = bytearray(64)
    compiled().join([bytes(plane) for plane in cut], out, False)
    assert out == raw


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="None is immortal")
def test_none_is_not_used_up() -> None:
    # A kernel that was built with the headers of a later Python may take None for immortal.
    built, raw = compiled(), zeros(64)
    planes_of = [zeros(16) for _ in range(4)]
    before = sys.getrefcount(None)
    for _ in range(500):
        built.split(raw, planes_of, False)
        built.join(planes_of, raw, False)
        built.statistics(raw, "f", VALUES, vectors())
    assert abs(sys.getrefcount(None) - before) < 200  # other threads and the tracer take some


# --- what the kernel refuses, whoever calls it ------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [
        (16, []),
        (18, [(6,), (6,), (6,)]),
        (16, [(1,)] * 16),
        (16, [(4,), (4,), (4,), (3,)]),
        (16, [(4,), (4,), (4,), (5,)]),
        (17, [(4,), (4,), (4,), (4,)]),
        (0, [(4,), (4,)]),
        (16, [(2,), (2,)]),
        (16, [(0,), (0,)]),
    ],
)
def test_planes_of_wrong_sizes(shapes: tuple[int, list[tuple[int, ...]]]) -> None:
    nbytes, cut = shapes
    for call in (
        lambda: compiled().split(zeros(nbytes), [zeros(*s) for s in cut], False),
        lambda: compiled().join([zeros(*s) for s in cut], zeros(nbytes), False),
    ):
        with pytest.raises(ValueError):
            call()


def test_planes_that_are_no_bytes_in_a_row() -> None:
    four = [zeros(4) for _ in range(4)]
    fixed = zeros(4)
    fixed.setflags(write=False)
    join: list[tuple[Any, ...]] = [
        ([np.zeros(1, np.uint64), *four[1:]], zeros(16), False),
        (four, fixed.repeat(4)[::2].repeat(2)[::2], False),  # strided and too small
        (four, zeros(32)[::2], False),
        (four, bytes(16), False),
        (four, None, False),
        (7, zeros(16), False),
        ([*four[:3], None], zeros(16), False),
        (four, zeros(16)),
    ]
    split: list[tuple[Any, ...]] = [
        (zeros(16), [fixed, *four[1:]], False),
        (zeros(16), [zeros(8)[::2], *four[1:]], False),
        (zeros(32)[::2], four, False),
        ("0123456789abcdef", four, False),
        (zeros(16), [*four[:3], None], False),
        (zeros(16), four),
    ]
    for call, calls in ((compiled().join, join), (compiled().split, split)):
        for arguments in calls:
            with pytest.raises((TypeError, ValueError, BufferError)):
                call(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (zeros(8), "x", VALUES, vectors()),
        (zeros(8), "", VALUES, vectors()),
        (zeros(8), 3, VALUES, vectors()),
        (zeros(7), "f", VALUES, vectors()),
        (zeros(8), "f", VALUES, np.empty(9)),
        (zeros(8), "f", VALUES, np.empty(11)),
        (zeros(8), "f", VALUES, vectors(0)),
        (zeros(12), "f", VALUES, vectors(2)),  # 6 bytes a row
        (zeros(9), "d", VALUES, vectors(2)),
        (zeros(8), "B", VALUES[:255], vectors()),
        (zeros(8), "B", np.empty(0), vectors()),
        (zeros(8), "B", zeros(2049)[1:], vectors()),  # not aligned
        (zeros(8), "f", VALUES, zeros(81)[1:]),
        (zeros(8), "f", VALUES, bytes(80)),
        (zeros(16)[::2], "f", VALUES, vectors()),
        (zeros(8), "f", None, vectors()),
        (None, "f", VALUES, vectors()),
        (zeros(8), "f", VALUES),
    ],
)
def test_statistics_of_what_does_not_fit(arguments: tuple[Any, ...]) -> None:
    with pytest.raises((TypeError, ValueError, BufferError, IndexError)):
        compiled().statistics(*arguments)


@pytest.mark.parametrize(("kind", "size"), BIT_KINDS.items())
def test_statistics_write_what_they_should(kind: str, size: int) -> None:
    for k, n in ((0, 0), (1, 0), (3, 0), (1, 5), (3, 7), (2, 5000)):
        guarded = np.full((k + 2, 10), 7.5)
        compiled().statistics(zeros(k * n * size), kind, VALUES, guarded[1 : 1 + k])
        assert (guarded[1 : 1 + k, 0] == n).all()
        assert (guarded[[0, -1]] == 7.5).all()


# --- statistics ------------------------------------------------------------------------


def test_statistics_where_training_flushes_denormals_to_zero() -> None:
    """What the processor is told to do with tiny numbers is not what was logged."""
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        pytest.skip("sets the MXCSR register through glibc's fenv_t")
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    array = np.full(5000, 1e-310)
    tiny = np.array([1e-40, -1e-41] * 2500, np.float32)
    plain, flushing = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    libm.fegetenv(plain)
    libm.fegetenv(flushing)
    flushing[7] |= 0x8040  # FZ and DAZ
    with using(compiled()):
        try:
            libm.fesetenv(flushing)
            found = statistics.compute(array, dtype="float64")
            found32 = statistics.compute(tiny, dtype="float32")
            libm.fegetenv(flushing)
        finally:
            libm.fesetenv(plain)
        assert flushing[7] & 0x8040 == 0x8040, "the caller's setting is left alone"
        np.testing.assert_array_equal(found, statistics.compute(array, dtype="float64"))
        np.testing.assert_array_equal(found32, statistics.compute(tiny, dtype="float32"))
    assert found[4] == found32[4] == 0
    assert found[5] == found[6] == 1e-310


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_infinities_of_both_signs_in_different_blocks(dtype: str, implementation: str) -> None:
    array = np.ones(5000, dtypes.numpy_dtype(dtype))
    array[7], array[-7] = np.inf, -np.inf
    found = statistics.compute(array, dtype=dtype)
    assert implementation
    assert found.tolist() == [5000, 0, 1, 1, 0, -np.inf, np.inf, 4998, 4998, 4998]


def test_sums_that_overflow_between_blocks() -> None:
    top = np.finfo(np.float64).max
    array = np.concatenate([np.full(5000, top), np.full(5000, -top), [3.0]])
    with using(compiled()):
        found = statistics.compute(array, dtype="float64")
    assert abs(found[7]) <= 2.0**-20 * top
    assert np.isposinf(found[8:]).all()


# --- threads ---------------------------------------------------------------------------


def ticks_during(nbytes: int) -> int:
    """Count what a thread of Python code does during one call."""
    raw, cut = zeros(nbytes), list(zeros(8, nbytes // 8))
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # nobody has to give up the GIL: only calls that release it do
    try:
        thread.start()
        while ticks == 0:
            time.sleep(0)
        before = ticks
        compiled().split(raw, cut, True)
        return ticks - before
    finally:
        done.set()
        sys.setswitchinterval(interval)
        thread.join()


def test_other_threads_run_during_long_calls_only() -> None:
    assert ticks_during(4096) == 0
    # A busy machine may not run the thread in time, but hardly ever.
    assert any(ticks_during(32 << 20) for _ in range(20))


# --- whether it is there ------------------------------------------------------------


def described(**environment: str) -> dict[str, Any]:
    """Say what a new process uses."""
    code = (
        "import json; from tensorstore_fmt.format import kernel;"
        "print(json.dumps([kernel.describe(), kernel.active is None]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found, is_absent = json.loads(done.stdout)
    assert (found["uses"] == "numpy") == is_absent
    return dict(found)


def test_turned_off() -> None:
    found = described(TENSORSTORE_FMT_KERNEL="0")
    assert found["uses"] == "numpy"
    assert kernel.SWITCH in found["why"]


def test_in_use_or_a_reason() -> None:
    found = described(TENSORSTORE_FMT_KERNEL="1")
    if found["uses"] == "compiled":
        assert found["version"] == 1
        assert found["compiler"]
    else:
        assert found["why"]


def stand_in(monkeypatch: pytest.MonkeyPatch, result: Any) -> tuple[Any, str]:
    def give(_: str) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.delenv(kernel.SWITCH, raising=False)
    monkeypatch.setattr(kernel.importlib, "import_module", give)
    return kernel._load()


def test_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    active, why = stand_in(monkeypatch, ModuleNotFoundError("no module"))
    assert active is None
    assert "not built" in why


def test_built_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    active, why = stand_in(monkeypatch, ImportError("wrong ELF class"))
    assert active is None
    assert "wrong ELF class" in why


def test_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        VERSION = 0
        COMPILER = "gcc 1"

    active, why = stand_in(monkeypatch, Old)
    assert active is None
    assert "version 0" in why


def test_of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    active, why = stand_in(monkeypatch, compiled())
    assert active is compiled()
    assert not why
    monkeypatch.setattr(kernel, "active", active)
    assert kernel.describe()["compiler"] == compiled().COMPILER


def test_the_command_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel, "active", None)
    assert main(["info", "--build"]) == 0
    assert "NumPy does its work: " in capsys.readouterr().out
    monkeypatch.setattr(kernel, "active", compiled())
    assert main(["info", "--build"]) == 0
    assert compiled().COMPILER in capsys.readouterr().out
    assert main(["info", "--build", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernel"]
    assert (found["uses"], found["version"], found["why"]) == ("compiled", 1, None)
    assert main(["info"]) == 2


# --- how it is built ----------------------------------------------------------------


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = builder()
    for name in ("/bin/false", "no-such-compiler-anywhere"):
        monkeypatch.setenv("CC", name)
        with pytest.raises(module.BuildError, match=re.escape(name)):
            module.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def run_hook(version: str) -> tuple[dict[str, Any], list[str], bool]:
    """Do what an install does; give what it tells hatchling, and whether files were as told."""
    said: list[str] = []

    class Hook(builder().KernelBuildHook):
        app = SimpleNamespace(display_warning=said.append)

        def __init__(self) -> None:
            """Needs nothing of hatchling, which is not installed here."""

    hook = Hook()
    data: dict[str, Any] = {"force_include": {}}
    hook.initialize(version, data)
    were_there = all(Path(path).is_file() for path in data["force_include"])
    hook.finalize()
    return data, said, were_there and not any(map(os.path.exists, data["force_include"]))


def test_a_wheel_holds_the_kernel() -> None:
    compiled()  # skips where there is no compiler
    data, said, is_right = run_hook("standard")
    assert said == []
    assert is_right
    assert list(data["force_include"].values()) == ["tensorstore_fmt/format/_kernel.abi3.so"]
    assert data["tag"].startswith("cp311-abi3-")
    assert data["pure_python"] is False


def test_a_wheel_without_a_compiler_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    data, said, _ = run_hook("standard")
    assert data == {"force_include": {}}
    assert len(said) == 1
    assert "NumPy does its work" in said[0]


def test_a_kernel_in_use_is_replaced(tmp_path: Path) -> None:
    compiled()  # skips where there is no compiler
    module = builder()
    (tmp_path / module.NAME).write_bytes(b"an old one")
    with (tmp_path / module.NAME).open("rb") as old:
        path = module.build(tmp_path)
        assert old.read() == b"an old one"
    assert load(path).VERSION == 1
    assert [f.name for f in tmp_path.iterdir()] == [module.NAME]


@pytest.mark.slow
@pytest.mark.skipif(GIVEN in os.environ, reason="runs within itself")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """These tests and the properties again, with AddressSanitizer and UBSan in the kernel."""
    compiled()  # skips where there is no compiler
    module = builder()
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    try:
        path = module.build(tmp_path, flags=flags)
    except module.BuildError as error:
        pytest.skip(f"no sanitizers here: {str(error).splitlines()[-1]}")
    runtime = sanitizer_runtime()
    here = Path(__file__).resolve()
    properties = here.parent.parent / "property"
    environment = os.environ | {
        GIVEN: str(path),
        "LD_PRELOAD": runtime,
        # Python itself leaks at exit.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that every Python object has its borders watched
    }
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-n0", "-q", "-s", "-p", "no:cacheprovider",
            f"--basetemp={tmp_path / 'inner'}", "-k", "not numpy",
            str(here), str(here.parent / "test_statistics.py"),
            str(properties / "test_kernel_property.py"), str(properties / "test_codec_property.py"),
        ],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def sanitizer_runtime() -> str:
    """Give the library that has to be loaded before all others; skip the test if there is none."""
    compiler = os.environ.get("CC", "cc").split()[0]
    for name in ("libasan.so", "libclang_rt.asan-x86_64.so"):
        found = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if Path(found).is_absolute():
            return str(Path(found).resolve())
    pytest.skip("the compiler has no shared library of AddressSanitizer")

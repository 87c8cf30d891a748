"""The tables of `spec/format.md` against the code, and against the vectors."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conformance.independent_reader import limits as second_limits
from conformance.independent_reader.arrow_page import SCHEMAS as SECOND_SCHEMAS
from robustness.fuzz_corpus import RUNS
from support.mutate import irrelevant, unnoticed_places

import tensorstore_fmt as tsf
from tensorstore_fmt import dtypes, errors, rules
from tensorstore_fmt import format as formats
from tensorstore_fmt.format import layout

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "spec" / "vectors"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, VECTORS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = _load("spec_tables")

# What stands in the column "type", as a struct format and as NumPy has it.
_STRUCT = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q", "4 × i64": "4q"}
_ARROW = {
    "utf8": pa.utf8(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "list\\<int64\\>": pa.list_(pa.int64()),
    **{f"{u}int{n}": getattr(pa, f"{u}int{n}")() for u in ("", "u") for n in (8, 16, 32, 64)},
}


def test_all_tables_are_checked() -> None:
    """A new table needs a test here."""
    assert tables.names() == [
        "segment header", "root row", "catalog", "shards", "entries", "dtypes", "codecs",
        "statistics", "shard", "bundle header", "bundle row", "unnoticed", "limits", "codes",
        "companion",
    ]  # fmt: skip


def test_bytes_that_may_go_unnoticed() -> None:
    """`test_corrupt_flips` damages all bytes of these runs, and allows what the table allows."""
    met = {
        place
        for make in RUNS.values()
        for places in irrelevant(make()[0]).values()
        for _, _, place in places
    }
    others = {"covered segment", "other file", "unnamed payload"}  # these runs have none
    assert {row["place"] for row in tables.table("unnoticed")} == unnoticed_places()
    assert met | others == unnoticed_places()
    assert not met & others


def _struct_format(name: str) -> tuple[str, int]:
    """Give the struct format of a table of fields that follow each other, and their bytes."""
    fields, at = "<", 0
    for row in tables.table(name):
        nbytes = int(row["bytes"])
        assert int(row["offset"]) == at, f"{name}: a gap before {row['field']}"
        if row["field"] == "reserved":
            fields += f"{nbytes}x"
        else:
            fields += f"{nbytes}s" if row["type"] == "bytes" else _STRUCT[row["type"]]
        assert struct.calcsize(fields) == at + nbytes, f"{name}: {row['field']} has another size"
        at += nbytes
    return fields, at


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("segment header", layout.SEGMENT_HEADER),
        ("bundle header", layout.BUNDLE_HEADER),
        ("bundle row", layout.BUNDLE_ROW),
    ],
)
def test_records(name: str, found: struct.Struct) -> None:
    assert _struct_format(name) == (found.format, found.size)


def test_root_row() -> None:
    at = 0
    for row in tables.table("root row"):
        kind, offset = (layout.ROOT_ROW.fields or {})[row["field"]][:2]
        assert (offset, kind.itemsize) == (int(row["offset"]), int(row["bytes"]))
        if row["type"] != "bytes":
            assert kind == np.dtype("<" + row["type"][0] + str(int(row["type"][1:]) // 8))
        at += int(row["bytes"])
    assert at == layout.ROOT_ROW.itemsize
    assert tuple(row["field"] for row in tables.table("root row")) == layout.ROOT_ROW.names


@pytest.mark.parametrize(
    ("name", "magic"),
    [("segment header", layout.SEGMENT_MAGIC), ("bundle header", layout.BUNDLE_MAGIC)],
)
def test_magics(name: str, magic: bytes) -> None:
    meaning = tables.table(name)[0]["meaning"]
    (digits, text) = re.findall(r"`([^`]*)`", meaning)
    assert bytes.fromhex(digits) == magic
    assert text.encode().decode("unicode_escape").encode("latin-1") == magic


def _schemas() -> list[list[tuple[str, pa.DataType]]]:
    """Give the columns of all Arrow schemas that `tensorstore_fmt.format` has."""
    names = [module.name for module in pkgutil.iter_modules(formats.__path__)]
    modules = [importlib.import_module(f"{formats.__name__}.{name}") for name in names]
    found = [value for module in modules for value in vars(module).values()]
    schemas = [value for value in found if isinstance(value, pa.Schema)]
    return [[(field.name, field.type) for field in schema] for schema in schemas]


@pytest.mark.parametrize("name", ["catalog", "shards", "entries", "shard"])
def test_columns(name: str) -> None:
    wanted = [(row["column"], _ARROW[row["Arrow type"]]) for row in tables.table(name)]
    assert wanted in _schemas()


@pytest.mark.parametrize(("name", "kind"), [("catalog", 1), ("shards", 2), ("entries", 3)])
def test_columns_of_the_second_reader(name: str, kind: int) -> None:
    wanted = [(row["column"], _ARROW[row["Arrow type"]]) for row in tables.table(name)]
    assert SECOND_SCHEMAS[kind] == wanted


def _dtype_table() -> dict[str, int]:
    found = {}
    for row in tables.table("dtypes"):
        names, sizes = row["dtype"].split(), row["bytes"].split()
        if len(sizes) == 1:
            sizes *= len(names)
        for name, size in zip(names, sizes, strict=True):
            found[name] = 0 if size == "–" else int(size)
    return found


def test_dtypes() -> None:
    wanted = _dtype_table()
    assert set(wanted) == set(dtypes.NAMES)
    assert {name: dtypes.itemsize(name) for name in dtypes.NAMES} == wanted
    for name in set(wanted) - {dtypes.STRING}:
        assert dtypes.numpy_dtype(name).byteorder in "<=|"


def test_dtypes_of_the_second_reader() -> None:
    found = {name: dtype.itemsize for name, dtype in second_limits.DTYPES.items()}
    assert found | {"string": 0} == _dtype_table()


def test_codecs() -> None:
    wanted = {
        int(row["codec"]): row["name"].replace("–", "dropped") for row in tables.table("codecs")
    }
    assert wanted == layout.CODEC_NAMES


def test_statistics() -> None:
    rows = tables.table("statistics")
    assert [int(row["element"]) for row in rows] == list(range(layout.STATS_LEN))
    assert tuple(row["field"] for row in rows) == layout.STATS_FIELDS


def test_limits() -> None:
    for row in tables.table("limits"):
        assert getattr(layout, row["limit"]) == int(row["value"]), row["limit"]
        assert getattr(second_limits, row["limit"]) == int(row["value"]), row["limit"]
    named = {row["limit"] for row in tables.table("limits")}
    assert {name for name in vars(layout) if name.startswith("MAX_")} <= named


def _codes() -> set[str]:
    return {row["code"] for row in tables.table("codes")}


def _format_errors(cls: type[errors.FormatError]) -> set[str]:
    return {cls.default_code}.union(*map(_format_errors, cls.__subclasses__()))


def test_companion_runs_have_the_series_of_the_table() -> None:
    class Failing(rules.Rule):
        def invoke_at_step(self, step: int, view: rules.View) -> bool:
            raise ValueError("mine")

    url = "memory://spec/companion"
    with tsf.create_run(url) as run:
        run.log({"w": np.nan}, step=0)
    rules.evaluate(url, [rules.ExplodingTensor(), Failing()], on_error="warn")
    said = {
        name.replace("{rule}", "failing")
        for row in tables.table("companion")
        for name in re.findall(r"`([^`]+)`", row["name"])
    }
    with tsf.open_run(url) as run:
        for companion in rules.companions(run):
            assert set(companion.names()) == said
            assert companion.attrs["companion_of"] == run.run_id
            assert companion.attrs["kind"] == "rules"
        assert len(rules.alerts(run)) == 1


def test_codes_are_those_of_the_errors() -> None:
    assert _format_errors(errors.FormatError) <= _codes()
    sources = "\n".join(
        path.read_text("utf-8") for path in (ROOT / "tensorstore_fmt").rglob("*.py")
    )
    for code in _codes():
        assert f'"{code}"' in sources, f"the library never says {code}"


def test_every_code_has_a_vector() -> None:
    found: set[str] = set()
    for path in (VECTORS / "invalid").glob("*.json"):
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        found.add(document["code"])
    assert found == _codes()


def test_walkthrough_speaks_of_its_vector() -> None:
    text = (ROOT / "spec" / "walkthrough.md").read_text("utf-8")
    files = [path for path in (VECTORS / "valid" / "walkthrough").rglob("*") if path.is_file()]
    assert len(files) == 3
    for path in files:
        name = path.relative_to(VECTORS / "valid" / "walkthrough").as_posix()
        assert f"| `{name}` | {path.stat().st_size} |" in text

"""Write the vectors and the walkthrough; with ``--check``, prove that they are what this writes.

Documents (what a reader must give) do not depend on any library and are compared as they are. The
bytes of compressed pages and of Arrow messages may change with the versions of zstd and pyarrow,
so they are compared only where the versions in ``VERSIONS.json`` are installed. In every case the
committed bytes, and those made anew, are read by the independent reader and have to give what the
documents say.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cases_content
import cases_damage
import cases_file
import cases_index
import cases_segment
import conformance
import pyarrow as pa
import walkthrough
import zstandard

HERE = Path(__file__).resolve().parent
SECOND_READER = HERE.parents[1] / "tests" / "conformance"  # the folder it lies in
WALKTHROUGH = HERE.parent / "walkthrough.md"


def versions() -> dict[str, str]:
    """Give the versions on which bytes depend."""
    libzstd = ".".join(map(str, zstandard.ZSTD_VERSION))
    return {"pyarrow": pa.__version__, "zstandard": zstandard.__version__, "libzstd": libzstd}


def as_text(document: dict[str, Any]) -> bytes:
    """Give a document as JSON: one line for each member, and for each row of a list."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(map(json.dumps, value))
            lines.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def files() -> Iterator[tuple[str, bytes]]:
    """Give all files below this folder that are generated, with their paths."""
    yield "VERSIONS.json", as_text(versions())
    valid = (
        cases_content.cases(),
        cases_index.cases(),
        cases_damage.valid_cases(),
        [walkthrough.case()],
    )
    for run in (run for cases in valid for run in cases):
        for path, data in run.bytes().items():
            yield f"valid/{run.name}/{path}", data
        yield f"valid/{run.name}.json", as_text(run.document())
    for run, code, operation in cases_damage.invalid_cases():
        for path, data in run.bytes().items():
            yield f"invalid/{run.name}/{path}", data
        run.is_code_only |= operation == "open"
        facts = {"code": code, "operation": operation}
        document = run.document()
        about = {key: document.pop(key) for key in ("about", "type")}
        yield f"invalid/{run.name}.json", as_text(about | facts | document)
    for cases in (cases_segment.cases(), cases_file.cases()):
        for case in cases:
            yield f"invalid/{case.name}{case.extension}", case.data
            yield f"invalid/{case.name}.json", as_text(case.document())


def collect() -> dict[str, bytes]:
    """Give all generated files; no two cases may have one name."""
    made: dict[str, bytes] = {}
    for path, data in files():
        if path in made:
            raise ValueError(f"two cases write {path}")
        made[path] = data
    return made


def write(made: dict[str, bytes], folder: Path) -> None:
    """Write generated files in place of those of before."""
    for kind in ("valid", "invalid"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    for path, data in made.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def is_document(path: str) -> bool:
    """Say whether a file says what a reader must give; such a file depends on no library."""
    return path.count("/") == 1 and path.endswith(".json")


def differences(made: dict[str, bytes]) -> Iterator[str]:
    """Compare the committed files with those made anew."""
    committed = {"VERSIONS.json": HERE / "VERSIONS.json"}
    for kind in ("valid", "invalid"):
        for path in (HERE / kind).rglob("*"):
            if path.is_file():
                committed[path.relative_to(HERE).as_posix()] = path
    recorded = json.loads((HERE / "VERSIONS.json").read_text("utf-8"))
    same_versions = recorded == versions()
    for path in sorted(committed.keys() | made.keys()):
        if path not in made:
            yield f"{path}: no case writes it"
        elif path not in committed:
            yield f"{path}: is missing; run generate.py"
        elif (same_versions or is_document(path)) and committed[path].read_bytes() != made[path]:
            yield f"{path}: differs from what generate.py writes"
    if same_versions and WALKTHROUGH.read_text("utf-8") != walkthrough.text():
        yield f"{WALKTHROUGH.name}: differs from what generate.py writes"


def content_problems(folder: Path) -> Iterator[str]:
    """Read all vectors below a folder with the independent reader."""
    sys.path.insert(0, str(SECOND_READER))  # it is no part of what writes the vectors
    from independent_reader.adapter import Adapter

    reader = Adapter(conformance)
    for kind in ("valid", "invalid"):
        for path in sorted((folder / kind).glob("*.json")):
            for problem in conformance.problems(path, reader):
                yield f"{kind}/{path.name}: {problem}"


def check() -> int:
    """Prove that the committed files are those of this generator; give the exit status."""
    made = collect()
    found = list(differences(made))
    found += content_problems(HERE)
    with tempfile.TemporaryDirectory() as folder:
        write(made, Path(folder))
        found += (f"made anew, {problem}" for problem in content_problems(Path(folder)))
    for problem in found:
        print(problem)
    return 1 if found else 0


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if they differ")
    if parser.parse_args().check:
        return check()
    made = collect()
    write(made, HERE)
    WALKTHROUGH.write_text(walkthrough.text(), "utf-8")
    print(f"{len(made)} files, {sum(map(len, made.values())):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What `verify` has to find in a damaged run, and what `recover` has to bring back."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from support.damage import fingerprint
from support.goals import COUNT
from support.mutate import (
    Files,
    MemoryStorage,
    Oracle,
    WrongError,
    load,
    opened,
    payload_ranges,
    same,
)

from tensorstore_fmt.errors import (
    NotARunError,
    NotThereError,
    StepDroppedError,
    TensorStoreError,
)
from tensorstore_fmt.format import layout
from tensorstore_fmt.reading.run import Run
from tensorstore_fmt.reading.session import Session
from tensorstore_fmt.reading.view import View
from tensorstore_fmt.upkeep import recover, verify
from tensorstore_fmt.upkeep.report import RecoverReport, VerifyReport
from tensorstore_fmt.upkeep.shard_child import ShardChild

TWICE_EVERY = 1 if COUNT <= 1 else 8  # trials of a long run, which recovering twice doubles

Asked = tuple[int, int]
"""Number of an answer of the oracle, and a step."""


class LastingChild(ShardChild):
    """A child process that serves many calls of `verify` and `recover`; `end` ends it."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def close(self) -> None:
        pass

    def end(self) -> None:
        super().close()


def readable(files: Files, oracle: Oracle) -> set[Asked]:
    """Give what a reader gives; all of it is right, and nothing that was logged is denied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the index is damaged: it is
        run = Run(Session("memory://run", None, storage=MemoryStorage(files)))
        try:
            damage = run.damage
        except TensorStoreError:
            return set()
    found = set()
    for i, answer in enumerate(oracle.answers):
        for step, value in answer.values.items():
            try:
                given = run[answer.name].select(**answer.select).read(step=step)
            except StepDroppedError:
                continue
            except NotThereError as error:
                raise WrongError(
                    f"{answer.name} {answer.select} {step}: denied: {error}"
                ) from error
            except TensorStoreError:
                continue
            if same(given, value):
                found.add((i, step))
            elif not (damage and step in answer.older and same(given, answer.older[step])):
                raise WrongError(f"{answer.name} {answer.select} {step}: other data")
    return found


@dataclass
class Saving:
    """Damages a run in a folder, verifies and recovers it, and compares with what must be.

    Parameters
    ----------
    files, oracle
        The run.
    folder
        Where it is put, again and again.
    """

    files: Files
    oracle: Oracle
    folder: Path
    view: View = field(init=False)
    trials: int = 0

    def __post_init__(self) -> None:
        self.view = opened(self.files)._session.view
        self._owned = {p: _coverage(r, len(self.files[p])) for p, r in self._owned_ranges().items()}
        self._entries = list(self._all_entries())

    def _owned_ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Give the bytes of shards that checksums cover: `verify` must notice each."""
        return payload_ranges(self.files)

    def _all_entries(self) -> Iterator[tuple[str, int, str, int]]:
        """Give (segment, root row, name, step)."""
        for each in self.view.segments:
            data = self.files[each.name.path]
            for number in each.head.entry_pages().tolist():
                row = each.head.root[number]
                page = data[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
                for entry in each.head.decode_entries(number, page).rows:
                    name = each.head.catalog.names[int(entry["series"])]
                    if each.head.catalog.kind[int(entry["series"])] != layout.KIND_DATA:
                        continue
                    for k in range(int(entry["count"])):
                        step = int(entry["step"]) + k * int(entry["stride"])
                        yield each.name.path, number, name, step

    def damaged_pages(self, changed: Files) -> dict[str, set[int]]:
        """Give the pages (root rows) of segments whose bytes are other ones, or gone."""
        found: dict[str, set[int]] = {}
        for each in self.view.segments:
            path, header = each.name.path, each.head.header
            old, new = self.files[path], changed.get(path, b"")
            begin = 256 + header.root_nbytes
            ends = (slice(0, begin), slice(len(old) - begin, len(old)))
            is_lost = path not in changed or all(
                old[part] != new[part] for part in _copies(ends, len(old), len(new))
            )
            pages = {
                i
                for i, row in enumerate(each.head.root)
                if old[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
                != new[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])]
            }
            found[path] = set(range(len(each.head.root))) if is_lost else pages
        return found

    def may_be_lost(self, changed: Files) -> set[tuple[str, int]]:
        """Give (name, step) of which something that is needed is damaged itself."""
        lost: set[tuple[str, int]] = set()
        pages = self.damaged_pages(changed)
        heads = {s.name.path: s.head for s in self.view.segments}
        for path, number, name, step in self._entries:
            kinds = heads[path].root["kind"]
            if any(kinds[n] == layout.PAGE_CATALOG for n in pages[path]) or number in pages[path]:
                lost.add((name, step))
        return lost

    def must_be_found(self, path: str, changed: Files) -> bool:
        """Say whether `verify` has to name this file."""
        old, new = self.files.get(path, b""), changed.get(path, b"")
        if old == new or path.startswith(layout.LOCKS_DIR):
            return False
        if path not in self.files and layout.parse_segment_name(Path(path).name) is None:
            return False
        if not path.startswith(layout.SHARDS_DIR):
            return True
        length = min(len(old), len(new))
        differs = np.frombuffer(old[:length], np.uint8) != np.frombuffer(new[:length], np.uint8)
        owned = self._owned.get(path, np.zeros(len(old), np.bool_))
        return bool((differs & owned[:length]).any() or owned[length:].any())

    # --- one trial --------------------------------------------------------------------------

    def trial(self, changed: Files) -> RecoverReport | None:
        """Damage the run, verify, recover twice; `WrongError` for whatever is not as it must be."""
        self.trials += 1
        shutil.rmtree(self.folder, ignore_errors=True)
        for path, data in changed.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)
        before = readable(changed, self.oracle)
        try:
            found = verify(self.folder)
        except NotARunError:
            return None  # nothing of it is left that says which run it was
        self._check_found(found, changed, before)
        if load(self.folder) != changed:
            raise WrongError("verify changed something")
        report = recover(self.folder)
        saved = load(self.folder)
        self._check_saved(report, found, changed, before, saved)
        if self.trials % TWICE_EVERY:
            return report
        marks = fingerprint(self.folder)
        again = recover(self.folder)
        if again.actions or fingerprint(self.folder) != marks:
            raise WrongError(f"recovering twice does something: {again}")
        return report

    def _check_found(self, found: VerifyReport, changed: Files, before: set[Asked]) -> None:
        named = {p.file for p in found.damage}
        for path in {*self.files, *changed}:
            gone = path not in changed and path.startswith(layout.INDEX_DIR + "/")
            if self.must_be_found(path, changed) and not (gone or path in named):
                raise WrongError(f"verify does not name {path}: {found}")
        hit = {(name, step) for p in found.damage for name, steps in p.names for step in steps}
        some = {name for p in found.damage for name, steps in p.names if not steps}
        is_vague = any(not p.names for p in found.damage)
        for i, step in self._everything() - before:
            name = self.oracle.answers[i].name
            if (name, step) not in hit and name not in some and not is_vague:
                raise WrongError(f"verify does not say that {name} {step} is hit: {found}")

    def _everything(self) -> set[Asked]:
        return {(i, step) for i, a in enumerate(self.oracle.answers) for step in a.values}

    def _check_saved(
        self,
        report: RecoverReport,
        found: VerifyReport,
        changed: Files,
        before: set[Asked],
        saved: Files,
    ) -> None:
        after = readable(saved, self.oracle)
        worse = [self._text(asked) for asked in sorted(before - after)]
        if worse:
            raise WrongError(f"recover made it worse: {worse}; {report}")
        if all(changed.get(p) == d for p, d in self.files.items() if p.startswith("shards/")):
            lost = self.may_be_lost(changed)
            kept = [a for a in sorted(self._everything() - after) if self._key(a) not in lost]
            if kept:
                raise WrongError(f"not brought back: {[*map(self._text, kept)]}; {report}")
        told = {(x.name, step) for x in report.lost for step in x.steps}
        told |= {(name, step) for p in found.damage for name, steps in p.names for step in steps}
        some = {x.name for x in report.lost if not x.steps}
        silent = [a for a in sorted(self._everything() - after) if self._key(a) not in told]
        silent = [a for a in silent if self.oracle.answers[a[0]].name not in some]
        if silent and None not in some:
            raise WrongError(f"gone without a word: {[*map(self._text, silent)]}; {report}")

    def _key(self, asked: Asked) -> tuple[str, int]:
        return self.oracle.answers[asked[0]].name, asked[1]

    def _text(self, asked: Asked) -> str:
        answer = self.oracle.answers[asked[0]]
        return f"{answer.name} {answer.select or ''} {asked[1]}"


def _copies(ends: tuple[slice, slice], old: int, new: int) -> tuple[slice, ...]:
    """Give where header and root stand: twice, but in a file of another length once."""
    return ends if old == new else ends[:1]


def _coverage(ranges: list[tuple[int, int]], nbytes: int) -> np.ndarray:
    covered = np.zeros(nbytes, np.bool_)
    for begin, end in ranges:
        covered[begin:end] = True
    return covered


def flip(files: Files, path: str, offset: int, bit: int) -> Files:
    """Flip one bit."""
    data = bytearray(files[path])
    data[offset] ^= 1 << bit
    return {**files, path: bytes(data)}

"""One shard of a run: every chunk that entries name in it, and the Arrow file that it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import crc32c
import numpy as np

from tensorstore_fmt.errors import FormatError
from tensorstore_fmt.format import layout
from tensorstore_fmt.storage import Range, Storage
from tensorstore_fmt.upkeep import arrow_file
from tensorstore_fmt.upkeep.arrow_file import ArrowFrame, Block
from tensorstore_fmt.upkeep.claims import Claims
from tensorstore_fmt.upkeep.entry_check import check_payload
from tensorstore_fmt.upkeep.report import Names, Problem
from tensorstore_fmt.upkeep.shard_child import ChildDiedError, ShardChild

__all__ = ["ShardCheck", "read_frame"]

_PIECE_NBYTES: Final = 8 * 1024 * 1024
_LARGEST_BLOCK_NBYTES: Final = 512 * 1024 * 1024

Flushes = Sequence[tuple[int, int]]


def read_frame(storage: Storage, name: layout.ShardName, nbytes: int) -> ArrowFrame:
    """Find the messages and the footer of a shard; reads a few KB per batch."""

    def read(start: int, stop: int) -> bytes:
        (data,) = storage.fetch([Range(name.path, start, stop)])
        return data

    return arrow_file.walk(read, nbytes)


@dataclass(slots=True)
class ShardCheck:
    """Checks one shard, in pieces of some MB (record batches as a whole).

    Attributes
    ----------
    is_closed
        Whether its writer is closed: then it should have its footer.
    flushes
        Rows of these flushes are wanted: they go to `found`.
    """

    storage: Storage
    run_id: bytes
    name: layout.ShardName
    nbytes: int
    claims: Claims
    child: ShardChild
    is_closed: bool = False
    flushes: Flushes = ()
    problems: list[Problem] = field(default_factory=list)
    chunks: int = 0
    checked_nbytes: int = 0
    unreferenced_nbytes: int = 0
    found: list[dict[str, Any]] = field(default_factory=list)
    _table: np.ndarray = field(default_factory=lambda: np.empty(0))
    _bad_offsets: set[int] = field(default_factory=set)

    def problem(
        self, code: str, what: str, offset: int | None, names: Names = (), *, is_note: bool = False
    ) -> None:
        """Add a problem."""
        self.problems.append(
            Problem(
                code=code,
                severity="note" if is_note else "damage",
                file=self.name.path,
                offset=offset,
                what=what,
                names=names,
            )
        )

    def run(self) -> None:
        """Check everything."""
        self._table = self.claims.of(self.name)
        frame = read_frame(self.storage, self.name, self.nbytes)
        self._check_frame(frame)
        is_schema_good = self._check_schema(frame)
        for begin, end, block in self._pieces(frame):
            (data,) = self.storage.fetch([Range(self.name.path, begin, end)])
            view = memoryview(data)
            self._check_claims(view, begin, end)
            if block is not None and is_schema_good:
                self._check_block(block, data)
        self.checked_nbytes = self.nbytes

    def _claims_in(self, begin: int, end: int) -> np.ndarray:
        offsets = self._table["offset"]
        return self._table[np.searchsorted(offsets, begin) : np.searchsorted(offsets, end)]

    # --- the file -------------------------------------------------------------------------

    def _check_frame(self, frame: ArrowFrame) -> None:
        ends = self._table["offset"] + self._table["nbytes"]
        behind = self._table[ends > self.nbytes]
        if len(behind):
            self.problem(
                "truncated",
                f"{self.nbytes:,} bytes, entries name chunks up to {int(ends.max()):,}",
                self.nbytes,
                self.claims.names(behind),
            )
        if frame.is_sealed:
            if frame.problem:
                self.problem("malformed", f"damaged Arrow file: {frame.problem}", frame.end)
            elif [b.place for b in frame.batches] != [b.place for b in frame.footer or ()]:
                self.problem("malformed", "the footer lists other record batches", frame.footer_at)
            return
        torn = frame.torn_nbytes
        is_named = bool((ends > frame.end).any() and self.nbytes > frame.end)
        if frame.problem and (is_named or (frame.schema is None and self.nbytes)):
            what = f"damaged Arrow file: {frame.problem}"
            self.problem("malformed", what, frame.end, is_note=not is_named and not self.is_closed)
        elif frame.is_ended and self.is_closed:
            what = "the footer is cut off or damaged; `recover` seals it again"
            self.problem("truncated", what, frame.end)
        elif torn:
            what = f"{torn:,} bytes behind the last whole batch, which nothing names"
            self.problem("torn", what, frame.end, is_note=True)
            self.unreferenced_nbytes += torn
        if not frame.is_ended or not self.is_closed:
            what = "no footer: its writer was killed, or has not come to it"
            self.problem("unsealed", what, frame.end, is_note=True)

    def _check_schema(self, frame: ArrowFrame) -> bool:
        if frame.schema is None:
            return False
        place = frame.schema
        (data,) = self.storage.fetch([Range(self.name.path, place.offset, place.end)])
        try:
            answer = self.child.schema(self.run_id, self.name, data)
        except ChildDiedError as error:
            self.problem("malformed", f"the schema: {error}", place.offset)
            return False
        if answer:
            self.problem(answer["code"], f"the schema: {answer['what']}", place.offset)
            return "columns" not in answer["what"] and answer["code"] == "wrong_run"
        if frame.is_sealed:
            (tail,) = self.storage.fetch([Range(self.name.path, frame.footer_at, self.nbytes)])
            try:
                answer = self.child.footer(frame, tail)
            except ChildDiedError as error:
                answer = {"what": str(error)}
            if answer and not (frame.problem and "lists" in answer["what"]):
                self.problem("malformed", f"the footer: {answer['what']}", frame.footer_at)
        return True

    # --- its parts ------------------------------------------------------------------------

    def _pieces(self, frame: ArrowFrame) -> Iterator[tuple[int, int, Block | None]]:
        """Give what to read: whole record batches, then chunks that lie in none."""
        blocks = [b for b in frame.batches if b.end - b.offset <= _LARGEST_BLOCK_NBYTES]
        for block in blocks:
            yield block.offset, block.end, block
        begins = np.array([b.offset for b in blocks] or [0], np.int64)
        ends = np.array([b.end for b in blocks] or [0], np.int64)
        begin = end = 0
        for claim in self._table:
            start, stop = int(claim["offset"]), int(claim["offset"]) + int(claim["nbytes"])
            which = int(np.searchsorted(begins, start, side="right")) - 1
            if stop > self.nbytes or (which >= 0 and stop <= ends[which]):
                continue
            if end and (start > end + _PIECE_NBYTES // 8 or stop > begin + _PIECE_NBYTES):
                yield begin, end, None
                end = 0
            if not end:
                begin = start
            end = max(end, stop)
        if end:
            yield begin, end, None

    def _check_claims(self, data: memoryview, begin: int, end: int) -> None:
        """Check each chunk that entries name in these bytes, once."""
        claims = self._claims_in(begin, end)
        seen: dict[bytes, tuple[str, str] | None] = {}
        bad: dict[tuple[int, str, str], list[int]] = {}
        what_counts = ["offset", "nbytes", "raw_nbytes", "crc32c", "codec", "flags", "digest"]
        for i, claim in enumerate(claims):
            start = int(claim["offset"]) - begin
            stop = start + int(claim["nbytes"])
            if stop > len(data):
                continue  # cut off: reported; or it spans two pieces: then one of its own
            key = claim[what_counts].tobytes()
            if key not in seen:
                seen[key] = self._check_chunk(data[start:stop], claim)
                self.chunks += 1
            reason = seen[key]
            if reason is not None:
                bad.setdefault((int(claim["offset"]), *reason), []).append(i)
        for (offset, code, what), found in bad.items():
            self._bad_offsets.add(offset)
            names = self.claims.names(claims[found])
            self.problem(code, what, offset, names, is_note=code == "unknown_codec")

    def _check_chunk(self, payload: memoryview, claim: np.void) -> tuple[str, str] | None:
        found = crc32c.crc32c(payload)
        if found != claim["crc32c"]:
            return "checksum", f"checksum of a chunk is {found:08x}, not {claim['crc32c']:08x}"
        dtype = self.claims.series[claim["series"]][1]
        try:
            check_payload(payload, claim, dtype, int(claim["elements"]))
        except FormatError as error:
            return error.code, f"a chunk: {error.message}"
        return None

    def _check_block(self, block: Block, data: bytes) -> None:
        """Let the child open a record batch."""
        try:
            answer = self.child.batch(block, data, self.flushes)
        except ChildDiedError as error:
            answer = {"what": str(error)}
        claims = self._claims_in(block.offset, block.end)
        if "what" in answer:
            names = self.claims.names(claims) if self._bad_offsets else ()
            what = f"a record batch that Arrow cannot read: {answer['what']}"
            self.problem("malformed", what, block.offset, names)
            return
        if answer["rows"] != block.rows:
            self.problem("malformed", "a record batch has other rows than it says", block.offset)
        self.found += answer["found"]
        for _, code, what, offset, _, _ in answer["bad"]:
            if offset not in self._bad_offsets:
                here = claims[claims["offset"] == offset]
                names = self.claims.names(here)
                self.problem(code, what, offset, names, is_note=not len(here))
        places, lengths = (np.array(v, np.int64) for v in answer["places"])
        self.unreferenced_nbytes += int(lengths[~np.isin(places, claims["offset"])].sum())

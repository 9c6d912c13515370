"""Texts that a model samples by itself: how many, how long, and what a row that ends early leaves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.save import save
from iv3jax.cli import main
from iv3jax.conversion.calibration import read_calibration
from iv3jax.data.tokenizer import TINY_FOLDER, plain_tokenizer
from iv3jax.errors import UserError
from iv3jax.generate import own_text
from iv3jax.generate.generate import Generation

pytestmark = pytest.mark.medium

LENGTH = 9

TOKENIZER = plain_tokenizer(TINY_FOLDER)
SPECIAL = [i for i, t in TOKENIZER.get_added_tokens_decoder().items() if t.special]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return replace(load("tiny_gqa", random_weights=True), folder=TINY_FOLDER)


def spoken(monkeypatch: pytest.MonkeyPatch, model: LoadedModel, *batches: list[list[int]], tokens: int = 20):
    """The texts where `generate` gives these rows, batch by batch; and what it was called with."""
    waiting, calls = iter(batches), []

    def given(model, params, prompt, **how):
        calls.append({"prompt": prompt, **how})
        rows = next(waiting)
        return Generation(rows, [False] * len(rows), 1, 1, 1, 1.0, 1.0)

    monkeypatch.setattr(own_text, "generate", given)
    return list(own_text.own_texts(model, tokens=tokens, length=LENGTH, seed=3)), calls


def test_until_there_are_enough_of_them(model: LoadedModel, monkeypatch):
    ids = TOKENIZER.encode("some words", add_special_tokens=False).ids
    found, calls = spoken(monkeypatch, model, [ids, [], ids], [ids], [ids] * 9, tokens=3 * len(ids) + 1)
    assert found == [("some words", len(ids))] * 12
    assert len({call["seed"] for call in calls}) == len(calls) == 3
    for call in calls:
        assert set(call["stop_ids"]) == set(SPECIAL)
        assert call["max_new_tokens"] == LENGTH and call["sampling"].temperature == 1
        assert set(call["prompt"].input_ids.ravel()) == {TOKENIZER.token_to_id("<|endoftext|>")}


def test_no_half_characters_and_no_empty_texts(model: LoadedModel, monkeypatch):
    ids = TOKENIZER.encode("né", add_special_tokens=False).ids
    blank = TOKENIZER.encode(" \n", add_special_tokens=False).ids
    assert len(ids) == 3
    found, _ = spoken(monkeypatch, model, [blank, ids[:2], ids], tokens=2)
    assert found == [("n", 2), ("né", 3)]


def test_a_model_that_says_nothing_is_refused(model: LoadedModel, monkeypatch):
    with pytest.raises(UserError, match="ends each of 32 texts before it begins"):
        spoken(monkeypatch, model, [[], []])


def test_a_tokenizer_without_a_start_is_refused(model: LoadedModel, monkeypatch):
    monkeypatch.setattr(own_text, "STARTS", ("<nothing>",))
    with pytest.raises(UserError, match="no token <nothing>, after which a text would start"):
        spoken(monkeypatch, model, [[5]])
    with pytest.raises(UserError, match="no folder, so no tokenizer"):
        spoken(monkeypatch, replace(model, folder=None), [[5]])


def test_samples_are_the_models_and_calibrate_its_conversion(model: LoadedModel, tmp_path: Path, capsys):
    folder = save(model, tmp_path / "model")
    files = [tmp_path / "deep" / name for name in ("a.jsonl", "b.jsonl", "other.jsonl")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        how = ["--tokens", "200", "--length", str(LENGTH), "--seed", str(seed), "--json"]
        assert main(["sample", str(folder), str(file), *how]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    a, b, other = (file.read_text(encoding="utf-8") for file in files)
    assert a == b != other
    assert done == {"file": str(files[2]), "texts": other.count("\n"), "tokens": done["tokens"]}
    assert 200 <= done["tokens"] <= 200 + 32 * LENGTH
    read = read_calibration(files[:1], folder, model.config, tokens=1 << 20, length=4 * LENGTH, rows=2)
    assert read.text_tokens >= 200 and read.vision_tokens == 0
    # A random model finds all tokens likely.
    assert len({i for batch in read.batches for i in np.unique(batch.input_ids)}) > 50


@pytest.mark.parametrize(
    ("out", "how", "says"),
    [
        ("own.txt", [], "own.txt: the texts are lines of a .jsonl"),
        ("there.jsonl", [], "there.jsonl: there already; name a new file"),
        ("new.jsonl", ["--tokens", "0"], "tokens is 0; it must be at least 1"),
        ("new.jsonl", ["--length", "0"], "max_new_tokens is 0"),
        ("new.jsonl", ["--seed", "-1"], "seed is -1; it must be 0 or more"),
        ("there.jsonl/new.jsonl", [], "new.jsonl: no file can be written there"),
    ],
)
def test_what_cannot_be_written(
    model: LoadedModel, tmp_path: Path, capsys, out: str, how: list[str], says: str
):
    (tmp_path / "there.jsonl").write_text("kept")
    folder = save(model, tmp_path / "model")
    assert main(["sample", str(folder), str(tmp_path / out), *how]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "kept"

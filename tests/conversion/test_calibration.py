"""Calibration: files become packed rows of one shape, in an order that only the seed decides."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from data.media import write_video
from models.peers import conversation
from PIL import Image
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from iv3jax.conversion.calibration import Calibration, from_samples, read_calibration, text_sample
from iv3jax.data.collate import collate
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig
from iv3jax.models.presets import preset

CONFIG = preset("tiny_gqa")
TEXT_ONLY = ModelConfig("llama", replace(CONFIG.text_config, mrope_section=None, use_qk_norm=False))
BOOK = " ".join(f"Line {i} of a book about the number {i * i}." for i in range(200))
ENCODED = Tokenizer.from_dir(TINY_FOLDER).encode(BOOK)


def read(*files: Path, config: ModelConfig = CONFIG, folder: Path = TINY_FOLDER, **how) -> Calibration:
    return read_calibration(files, folder, config, **{"tokens": 1 << 20, "length": 128, "rows": 2} | how)


def refusal(*files: Path, **how) -> str:
    with pytest.raises(UserError) as caught:
        read(*files, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def video(tmp_path) -> Path:
    return write_video(tmp_path / "clip.mp4", 40, rate=10)


def lines(path: Path, *data) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in data) + "\n")
    return path


def rows_of(calibration: Calibration) -> list[list[int]]:
    """The tokens of each segment of each row."""
    found = []
    for batch in calibration.batches:
        for ids, segments in zip(batch.input_ids, batch.segment_ids, strict=True):
            found += [ids[segments == k].tolist() for k in range(1, segments.max() + 1)]
    return found


def test_a_text_is_cut_into_windows_and_shuffled(book):
    found = read(book)
    windows = [ENCODED[i : i + 128] for i in range(0, len(ENCODED), 128)]
    assert rows_of(found) != windows and sorted(rows_of(found)) == sorted(windows)
    assert (found.text_tokens, found.vision_tokens, found.dropped) == (len(ENCODED), 0, ())
    for batch in found.batches:
        assert batch.input_ids.shape == (2, 128) and batch.labels is None and batch.patches is None
    assert read(book).fingerprint == found.fingerprint
    assert read(book, seed=1).fingerprint != found.fingerprint
    limited = read(book, tokens=3 * 128 + 10)
    assert limited.tokens == 3 * 128 and len(limited.batches) == 2
    assert not limited.batches[1].segment_ids[1].any()


def test_lines_of_text_are_the_same_text(book, tmp_path):
    one = lines(tmp_path / "book.jsonl", {"text": BOOK}, "", {"text": ""})
    assert read(one).fingerprint == read(book).fingerprint
    two = lines(tmp_path / "two.jsonl", {"text": "Short."}, {"text": "Two.", "id": 7})
    packed = read(two)
    assert len(packed.batches) == 1 and packed.batches[0].segment_ids[0].max() == 2
    # JSON may hold it as it is.
    separated = lines(tmp_path / "separated.jsonl", '{"text": "One\u2028two."}')
    assert rows_of(read(separated)) == [Tokenizer.from_dir(TINY_FOLDER).encode("One\u2028two.")]


def test_media_and_conversations(book, picture, video, tmp_path):
    """Vision and text take turns; rows with vision lie apart and have one shape."""
    (tmp_path / "talks").mkdir()
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "../picture.png"}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "Noise."},
    ]
    plain = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello!"}]
    talks = lines(tmp_path / "talks" / "talks.jsonl", {"messages": messages}, {"messages": plain})
    found = read(book, picture, video, talks)
    kinds = [batch.patches is not None for batch in found.batches]
    assert kinds == sorted(kinds) and True in kinds
    seen = [batch for batch in found.batches if batch.patches is not None]
    assert len({batch.patches.shape for batch in seen}) == 1
    pads = [(b.visual_index >= 0).sum() for b in seen]
    assert found.vision_tokens == sum(pads) and found.text_tokens == sum(map(len, rows_of(found))) - sum(pads)
    found.require_both()
    # A limit is shared: without turns the book would fill it.
    few = read(book, picture, video, talks, tokens=512)
    assert few.vision_tokens and few.tokens <= 512


def test_packing_of_samples_in_memory():
    """Against the collator, row by row; samples of several grids share one chunk shape."""
    items = [[3, ("video", 2, 2, 4), 2], [2, ("image", 1, 4, 4)], [4, ("image", 1, 2, 2), 1], [9]]
    samples = [conversation(CONFIG, item, seed) for seed, item in enumerate(items)]
    found = from_samples(samples, CONFIG, length=24, rows=1)
    assert [batch.patches is None for batch in found.batches] == [True, False, False]
    expected = collate([samples[1:3]], CONFIG, length=24, chunks=2, chunk_patches=16)
    for name, value in expected._replace(labels=None)._asdict().items():
        if value is not None:
            np.testing.assert_array_equal(getattr(found.batches[2], name), value, err_msg=name)
    assert found.vision_tokens == 4 + 4 + 1 and found.tokens == sum(map(len, samples))
    with pytest.raises(UserError, match="does not fit a row"):
        from_samples([text_sample(range(25))], CONFIG, length=24, rows=1)


def test_a_tokenizer_without_chat_tokens(book, tmp_path, picture):
    folder = tmp_path / "plain"
    folder.mkdir()
    inner = tokenizers.Tokenizer(BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    # What a trainer leaves in such files must not cut a book.
    inner.enable_truncation(5)
    inner.save(str(folder / "tokenizer.json"))
    found = read(book, config=TEXT_ONLY, folder=folder)
    assert found.text_tokens == len(BOOK)
    talk = lines(tmp_path / "talk.jsonl", {"messages": [{"role": "user", "content": "Hello."}]})
    assert "talk.jsonl:1: a conversation, but" in refusal(talk, config=TEXT_ONLY, folder=folder)
    assert "this model has no vision tower" in refusal(picture, config=TEXT_ONLY)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a valid" in refusal(book, config=TEXT_ONLY, folder=folder)
    (folder / "tokenizer.json").unlink()
    assert "so no text can be read or written" in refusal(book, config=TEXT_ONLY, folder=folder)


def test_adapters_need_both_kinds(book, picture):
    with pytest.raises(
        UserError, match=r"holds no vision tokens, .* add pictures or videos or give --adapters off"
    ):
        read(book).require_both()
    read(book, picture).require_both()


def test_samples_that_are_too_long_are_named(book, tmp_path):
    long = [{"role": "user", "content": BOOK}]
    short = [{"role": "user", "content": "Hello."}]
    path = lines(tmp_path / "talks.jsonl", {"messages": long}, {"messages": short})
    found = read(path)
    assert len(rows_of(found)) == 1
    (dropped,) = found.dropped
    assert dropped.startswith(f"{path}:1 (") and dropped.endswith(" tokens)")
    only = lines(tmp_path / "only.jsonl", {"messages": long})
    assert f"no sample that fits 1048576 tokens; too long for 128 tokens: {only}:1" in refusal(only)
    assert "no sample that fits 16 tokens" in refusal(book, tokens=16)


def test_refusals(book, tmp_path, picture):
    assert "no file given; name texts" in refusal()
    assert f"{tmp_path / 'none.txt'}: no such file" in refusal(tmp_path / "none.txt")
    assert "is a folder; name the files in it" in refusal(tmp_path)
    odd = tmp_path / "odd.pdf"
    odd.write_text("x")
    assert "a calibration file of an unknown kind; known are .txt" in refusal(book, odd)
    odd = tmp_path / "latin.txt"
    odd.write_bytes(b"na\xefve")
    assert "latin.txt: not UTF-8 text" in refusal(odd)
    odd = tmp_path / "torn.png"
    odd.write_bytes(picture.read_bytes()[:60])
    assert "torn.png" in refusal(odd)
    for line, words in (
        ("{", "odd.jsonl:2: not valid JSON"),
        ("[1]", "odd.jsonl:2: a line must be"),
        ({"messages": [{"role": "user"}]}, 'odd.jsonl:2: message 0: must be an object with "role"'),
        ({"messages": []}, "odd.jsonl:2: messages: the list is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "lost.png"}]}]},
            "lost.png: no such file",
        ),
    ):
        assert words in refusal(lines(tmp_path / "odd.jsonl", {"text": "Good."}, line))

"""Tokenizer: exact round trips, no forged special tokens, streaming, and errors a user can act on."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iv3jax.data.tiny import build
from iv3jax.data.tokenizer import TINY_FOLDER, StreamDecoder, Tokenizer
from iv3jax.errors import UserError
from iv3jax.models.presets import preset

TINY = Tokenizer.from_dir(TINY_FOLDER, preset("tiny"))
# Surrogates are no characters: no encoding can write them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def pieces(text: str) -> list[str]:
    return [TINY.decode([i]) for i in TINY.encode(text)]


def test_committed_file_is_what_the_script_makes():
    assert (TINY_FOLDER / "tokenizer.json").read_text(encoding="utf-8") == build.build()


def test_special_tokens_have_the_presets_ids():
    config = preset("tiny")
    assert TINY.vocab_size == config.text_config.vocab_size == 512
    assert [TINY.token_id(t) for t in build.SPECIAL_TOKENS] == list(range(505, 512))
    assert TINY.stop_ids == (507, 505)
    assert TINY.end_id == 507


def test_demo_sentences_are_short():
    words = ["Which", " number", " is", " shown", " at", " ", "1", "2", ".", "5", " seconds", "?"]
    assert pieces("Which number is shown at 12.5 seconds?") == words
    assert pieces("<12.5 seconds>") == ["<", "1", "2", ".", "5", " seconds>"]
    for word in ("system", "user", "assistant", "\n", "Video", " the", "List", "When", "Number", "No"):
        assert pieces(word) == [word]
    for sentence in build.DEMO[:5]:
        assert len(pieces(sentence)) <= len(sentence.split()) + 2 * sum(c in "0123456789.?" for c in sentence)


@given(TEXT)
def test_round_trip_is_exact(text):
    ids = TINY.encode(text)
    assert TINY.decode(ids) == text
    assert all(i < 505 for i in ids)


@given(st.lists(st.sampled_from([*build.SPECIAL_TOKENS, "a", " seconds>", "\n"])).map("".join))
def test_special_strings_in_text_stay_text(text):
    ids = TINY.encode(text)
    assert all(i < 505 for i in ids)
    assert TINY.decode(ids) == text


def test_decode_skips_special_tokens_or_shows_them():
    ids = [506, *TINY.encode("user"), 507, 9999]
    assert TINY.decode(ids) == "user"
    assert TINY.decode(ids, skip_special=False) == "<|im_start|>user<|im_end|>"


@given(st.lists(st.integers(0, 511)), st.booleans())
def test_decode_equals_the_library(ids, skip):
    assert TINY.decode(ids, skip) == TINY._inner.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.integers(0, 511)), st.lists(st.integers(1, 4)))
def test_stream_gives_the_same_text_in_any_steps(ids, steps):
    stream, text, rest = StreamDecoder(TINY), "", ids
    for step in steps:
        text += stream.push(rest[:step])
        rest = rest[step:]
    assert text + stream.push(rest) + stream.flush() == TINY.decode(ids)


def test_stream_holds_back_half_a_character():
    ids = TINY.encode("ü")
    stream = StreamDecoder(TINY)
    assert len(ids) == 2
    assert [stream.push([i]) for i in ids] == ["", "ü"]
    assert stream.push(ids[:1]) == ""
    assert stream.flush() == "\ufffd"


def test_long_texts_are_encoded_as_short_ones():
    text = "Which number is shown at 12.5 seconds? " * 4
    assert TINY.encode(text) == TINY._inner.encode(text).ids


def test_cached_ids_cannot_be_spoiled_by_the_caller():
    first = TINY.encode("user")
    first.append(0)
    assert TINY.encode("user") == first[:-1]


def test_pickle_keeps_special_strings_text():
    again = pickle.loads(pickle.dumps(TINY))
    assert again.encode("<|im_end|>") == TINY.encode("<|im_end|>")


def test_unpaired_surrogate_is_a_user_error():
    with pytest.raises(UserError, match="surrogate"):
        TINY.encode("a\ud800")


def changed(tmp_path, change) -> str:
    data = json.loads((TINY_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return str(tmp_path)


def test_a_trainers_truncation_is_not_applied(tmp_path):
    cut = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    folder = changed(tmp_path, lambda data: data.update(truncation=cut))
    assert len(Tokenizer.from_dir(folder).encode("user system user system")) > 2


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_corrupt_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"not a valid tokenizer\.json") as error:
        Tokenizer.from_dir(tmp_path)
    assert "\n" not in str(error.value)


def test_not_byte_level(tmp_path):
    with pytest.raises(UserError, match="not byte-level"):
        Tokenizer.from_dir(changed(tmp_path, lambda data: data.update(decoder={"type": "Fuse"})))


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>", "<|video_pad|>"])
def test_missing_special_token(tmp_path, token):
    def drop(data):
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != token]

    with pytest.raises(UserError, match=rf"no token {token}".replace("|", r"\|")):
        Tokenizer.from_dir(changed(tmp_path, drop), preset("tiny"))


def test_special_token_that_text_could_forge(tmp_path):
    def unmark(data):
        next(t for t in data["added_tokens"] if t["content"] == "<|im_end|>")["special"] = False

    with pytest.raises(UserError, match="not marked special"):
        Tokenizer.from_dir(changed(tmp_path, unmark))


def test_vision_id_other_than_the_configs():
    config = dataclasses.replace(preset("tiny"), video_token_id=7)
    with pytest.raises(UserError, match=r"<\|video_pad\|> is 509, but config.json's video_token_id is 7"):
        Tokenizer.from_dir(TINY_FOLDER, config)


def test_more_tokens_than_embeddings():
    config = preset("tiny")
    text = dataclasses.replace(config.text_config, vocab_size=300)
    with pytest.raises(UserError, match=r"512 tokens, but config\.json's vocab_size is 300"):
        Tokenizer.from_dir(TINY_FOLDER, dataclasses.replace(config, text_config=text))

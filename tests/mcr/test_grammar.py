"""The grammar's tables: what may follow and what must, how long a step gets, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spoken import CONFIG, JOINING, QWEN_VOCABULARY, TINY, VOCABULARY, joining, qwen

from iv3jax.data.tokenizer import VISION_TOKENS, Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.grammar import (
    LAST,
    REFUSED,
    START,
    GrammarConfig,
    advance,
    build,
    longest_forced,
    longest_step,
    mask,
    walk,
)
from iv3jax.mcr.language import ANSWER, Spoken, parse, write


def check_forbidden(tokenizer: Tokenizer, vocab_size: int) -> None:
    """No state allows an added or unknown token; `<|im_end|>` only where a call may end."""
    grammar = build(CONFIG, tokenizer, vocab_size)
    added = [entry["id"] for entry in json.loads(tokenizer.to_json())["added_tokens"]]
    end = tokenizer.end_id
    forbidden = np.array([*added, *range(tokenizer.vocab_size, vocab_size)])
    assert {tokenizer.token_id(token) for token in VISION_TOKENS} < set(forbidden.tolist())
    legal = np.asarray(jax.jit(mask)(grammar, np.arange(len(grammar.ended))))
    assert not legal[:, forbidden[forbidden != end]].any()
    assert (grammar.token_class[forbidden[forbidden != end]] == 0).all()
    assert legal[:-1].any(axis=1).all() and not legal[REFUSED].any()
    after = grammar.following[legal[:, end], grammar.token_class[end]]
    assert (grammar.ended[after] >= 0).all()
    # What is allowed and what comes after agree, token by token.
    np.testing.assert_array_equal(legal, (grammar.following != REFUSED)[:, grammar.token_class])


def test_vision_special_and_unknown_tokens_are_never_allowed():
    check_forbidden(TINY, VOCABULARY)


@pytest.mark.slow
def test_vision_special_and_unknown_tokens_of_qwen_are_never_allowed():
    check_forbidden(qwen(), QWEN_VOCABULARY)


def test_numbers_take_exactly_the_tokens_that_lead_to_a_call():
    """A token is allowed after a piece of a call iff some end makes a call of the two that parses."""
    grammar = build(CONFIG, TINY, VOCABULARY)
    calls = ["zoom 0.5 1234.5", "zoom 12.5 9.0", "crop 105.5 1 2 3 4"]
    tails = {call[cut:] for call in ["zoom 1234.5 1234.5", calls[2]] for cut in range(4, len(call) + 1)}

    def viable(text: str) -> bool:
        for tail in tails:
            try:
                parse(f"\n{text}{tail}")
            except UserError:
                continue
            return True
        return False

    for call in calls:
        for cut in range(4, len(call) + 1):
            tokens = TINY.encode(f"\n{call[:cut]}")
            state = START
            for token in tokens:
                state = int(grammar.following[state, grammar.token_class[token]])
            legal = (grammar.following[state] != REFUSED)[grammar.token_class]
            assert legal[TINY.end_id] == (cut == len(call))
            for token in range(300):  # every byte and some words
                assert legal[token] == viable(call[:cut] + TINY.decode([token])), (call[:cut], token)


def test_bounds():
    """The most tokens of thought, text and answer pass; one more does not. A lone space is one of them."""
    grammar = build(CONFIG, TINY, VOCABULARY)
    for step, more in [
        (Spoken("recall", thought="a" * 9), Spoken("recall", thought="a" * 10)),
        (Spoken("note", text="1234"), Spoken("note", text="12345")),
        (Spoken("ground", text="a1234"), Spoken("ground", text="a12345")),
        (Spoken("answer", text="123456"), Spoken("answer", text="1234567")),
    ]:
        walk(grammar, np.array([*TINY.encode(write(step)), TINY.end_id]))
        with pytest.raises(UserError, match=r"step: token \d+ at place \d+ may not stand there"):
            walk(grammar, np.array([*TINY.encode(write(more)), TINY.end_id]))
    with pytest.raises(UserError, match="step: its call is not complete after 1 tokens"):
        walk(grammar, np.array(TINY.encode("\n")))
    with pytest.raises(UserError, match="may not stand there"):
        walk(grammar, np.array([*TINY.encode("\nrecall"), TINY.end_id, TINY.end_id]))
    with pytest.raises(UserError, match="may not stand there"):
        walk(grammar, np.array([*TINY.encode("\nrecall"), TINY.end_id]), LAST)
    # A single token of text has no room for a lone space.
    narrow = build(GrammarConfig(1, 1, 1), TINY, VOCABULARY)
    walk(narrow, np.array([*TINY.encode("\nnote the"), TINY.end_id]))
    with pytest.raises(UserError, match="may not stand there"):
        walk(narrow, np.array([*TINY.encode("\nnote 1"), TINY.end_id]))


def test_longest_step_is_thought_line_break_call_and_end():
    grammar = build(CONFIG, TINY, VOCABULARY)
    answer = 9 + 1 + len(TINY.encode(ANSWER)) + 7 + 1
    assert longest_step(grammar, LAST) == answer
    crop = 9 + 1 + len(TINY.encode("crop 1234.5 1 2 3 4")) + 1
    assert longest_step(grammar) == crop > answer
    zoom = build(GrammarConfig(1, 1, 1, ("zoom", ANSWER)), TINY, VOCABULARY)
    assert longest_step(zoom) == 1 + 1 + len(TINY.encode("zoom 1234.5 1234.5")) + 1
    assert longest_step(zoom, LAST) == 1 + 1 + len(TINY.encode(ANSWER)) + 1 + 1


@pytest.mark.parametrize("tokenizer", [TINY, JOINING], ids=["tiny", "joining"])
def test_forced_tokens_are_those_without_an_alternative(tokenizer):
    grammar = build(CONFIG, tokenizer, VOCABULARY)
    legal = np.asarray(jax.jit(mask)(grammar, np.arange(len(grammar.ended))))
    alone = (legal.sum(axis=1) == 1) & (grammar.ended < 0)
    np.testing.assert_array_equal(grammar.forced, np.where(alone, legal.argmax(axis=1), -1))
    assert (grammar.forced[grammar.ended >= 0] == -1).all()
    # "segments" shares its first token with "search"; the rest and the end follow of themselves.
    tokens = [*tokenizer.encode("\nsegments"), tokenizer.end_id]
    states = walk(grammar, np.array(tokens))
    assert tokens[3:] == grammar.forced[states[3:]].tolist()
    assert (grammar.forced[states[:3]] == -1).all()
    assert longest_forced(grammar) == len(tokens[3:])
    # At the bound of the thought the line break is forced, if it is the only token that ends in one.
    full = int(walk(grammar, np.array([*tokenizer.encode("a" * 9 + "\nrecall"), tokenizer.end_id]))[9])
    assert grammar.forced[full] == (tokenizer.encode("\n")[0] if tokenizer is TINY else -1)


def test_refused_tokens_lead_nowhere():
    grammar = build(CONFIG, TINY, VOCABULARY)
    pad = TINY.token_id("<|video_pad|>")
    state = jax.jit(advance)(grammar, jnp.array([START, LAST, REFUSED]), jnp.array([pad, TINY.end_id, 0]))
    assert state.tolist() == [REFUSED] * 3


def test_a_config_without_tools_has_no_call_for_them():
    grammar = build(GrammarConfig(tools=("answer", "search")), TINY, VOCABULARY)
    walk(grammar, np.array([*TINY.encode("x\nsearch y"), TINY.end_id]))
    with pytest.raises(UserError, match="may not stand there"):
        walk(grammar, np.array([*TINY.encode("x\nrecall"), TINY.end_id]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tools=("answer", "sarch")), "tools: unknown tool 'sarch'; did you mean 'search'?"),
        (dict(tools=("answer", "zoom", "zoom")), "tools: 'zoom' is named twice"),
        (dict(tools=("zoom",)), "tools: 'answer' is missing; without it no rollout can end"),
        (dict(tools=()), "tools: 'answer' is missing"),
        (dict(thought_tokens=0), "thought_tokens is 0; it must be at least 1"),
        (dict(text_tokens=-1), "text_tokens is -1; it must be at least 1"),
        (dict(answer_tokens=0), "answer_tokens is 0; it must be at least 1"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        GrammarConfig(**fields)
    assert "\n" not in str(error.value)


def test_tokenizers_that_are_refused():
    with pytest.raises(UserError, match="tokenizer: 512 tokens, but the model has only 500"):
        build(CONFIG, TINY, 500)
    joined = joining(TINY, ("9", "0"), (r"\p{N}|", r"\p{N}{1,3}|"))
    with pytest.raises(UserError, match=r"tokenizer: 'zoom 9012.3 .*' is not one token a digit"):
        build(CONFIG, joined, 512)

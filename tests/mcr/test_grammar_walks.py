"""Random walks through the grammar, each read back from its text; and texts that the grammar takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from spoken import CONFIG, JOINING, QWEN_VOCABULARY, TINY, VOCABULARY, qwen, steps

from iv3jax.data.chat import render
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.mcr.grammar import (
    LAST,
    START,
    Grammar,
    GrammarConfig,
    advance,
    build,
    longest_step,
    mask,
    read_token,
    start_call,
    walk,
)
from iv3jax.mcr.language import ANSWER, ARGUMENTS, TOOLS, Spoken, parse, write

WIDE = GrammarConfig(thought_tokens=100, text_tokens=100, answer_tokens=100)


@partial(jax.jit, static_argnames=("rows", "steps", "longest_text"))
def random_walks(grammar: Grammar, key, start, rows: int, steps: int, longest_text: int):
    """Random steps → tokens (rows, steps), −1 after the end, last states and calls; and whether every token
    was in its mask (looked at for one row in 64).

    Even rows draw the next state and then one of the tokens that lead there, odd rows draw tokens evenly: so
    some walks end early and others reach the bounds.
    """
    token_class, following = jnp.asarray(grammar.token_class), jnp.asarray(grammar.following)
    order = jnp.argsort(token_class)
    size = jnp.bincount(token_class, length=following.shape[1])
    offset = jnp.cumsum(size) - size
    weight = jnp.where(jnp.asarray(grammar.allowed), size, 0).astype(jnp.float32)
    alike = following[:, :, None] == following[:, None, :]
    even = jnp.cumsum(weight / jnp.maximum(weight.sum(1, keepdims=True), 1), axis=1)
    ways = weight / jnp.maximum((alike * weight[:, None, :]).sum(-1), 1)
    branch = jnp.cumsum(ways / jnp.maximum(ways.sum(1, keepdims=True), 1), axis=1)
    odd = jnp.arange(rows) % 2 == 1
    looked = jnp.arange(0, rows, 64)

    def one(carry, key):
        state, call, inside = carry
        u, within = jax.random.uniform(key, (2, rows))
        upto = jnp.where(odd[:, None], even[state], branch[state])
        # The last class that is allowed at all, where rounding leaves u above every sum.
        top = following.shape[1] - 1 - jnp.argmax(jnp.asarray(grammar.allowed)[state][:, ::-1], axis=1)
        drawn = jnp.minimum((u[:, None] >= upto).sum(1), top)
        token = order[offset[drawn] + jnp.minimum((within * size[drawn]).astype(jnp.int32), size[drawn] - 1)]
        over = jnp.asarray(grammar.ended)[state] >= 0
        legal = jnp.take_along_axis(mask(grammar, state[looked]), token[looked, None], axis=1).all()
        after = jnp.where(over, state, advance(grammar, state, token))
        read = read_token(grammar, call, after, token)
        call = jax.tree.map(lambda a, b: jnp.where(over.reshape(-1, *[1] * (a.ndim - 1)), a, b), call, read)
        return (after, call, inside & legal), jnp.where(over, -1, token)

    state = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (rows,))
    carry = state, start_call(rows, longest_text), jnp.asarray(True)
    (state, call, inside), tokens = jax.lax.scan(one, carry, jax.random.split(key, steps))
    return tokens.T, state, call, inside


def check_walks(
    tokenizer: Tokenizer, grammar: Grammar, config: GrammarConfig, start: int, rows: int, seed: int
):
    """Walks, and reads each back from its text → the names that came up, and the tokens of the longest."""
    walked = random_walks(
        grammar, jax.random.key(seed), start, rows, longest_step(grammar, start), config.longest_text
    )
    tokens, state, call, inside = jax.tree.map(np.asarray, walked)
    ended = grammar.ended[state]
    assert inside and (ended >= 0).all()
    lengths = (tokens >= 0).sum(axis=1)
    assert (tokens[np.arange(rows), lengths - 1] == tokenizer.end_id).all()
    said = call.text.tolist(), call.length.tolist()
    for row, length, tool, numbers, text, count in zip(
        tokens.tolist(), lengths.tolist(), ended.tolist(), call.numbers.tolist(), *said, strict=True
    ):
        written = tokenizer.decode(row[: length - 1])
        step = parse(written)
        assert step.name == TOOLS[tool]
        units = [10 if kind == "time" else 1 for kind in ARGUMENTS[step.name] if kind != "text"]
        read = [round(number * unit) for number, unit in zip(step.numbers, units, strict=True)]
        assert numbers == read + [0] * (5 - len(read))
        assert tokenizer.decode(text[:count]) == (step.text and f" {step.text}")
        assert text[count:] == [0] * (len(text) - count)
        assert write(step) == written
    return {TOOLS[tool] for tool in ended}, int(lengths.max())


@pytest.mark.parametrize("tokenizer", [TINY, JOINING], ids=["tiny", "joining"])
def test_random_walks_never_leave_and_parse_back(tokenizer):
    grammar = build(CONFIG, tokenizer, VOCABULARY)
    names, longest = check_walks(tokenizer, grammar, CONFIG, START, 9_216, 0)
    assert names == set(TOOLS)
    assert longest == longest_step(grammar)
    names, longest = check_walks(tokenizer, grammar, CONFIG, LAST, 1024, 1)
    assert names == {ANSWER}
    assert longest == longest_step(grammar, LAST)


@pytest.mark.slow
def test_a_million_random_walks():
    grammar, config = build(GrammarConfig(), TINY, VOCABULARY), GrammarConfig()
    for seed in range(25):
        check_walks(TINY, grammar, config, START, 38_000, seed)
        check_walks(TINY, grammar, config, LAST, 2_000, seed)


@pytest.mark.slow
def test_random_walks_with_qwens_tokenizer():
    grammar = build(CONFIG, qwen(), QWEN_VOCABULARY)
    names, longest = check_walks(qwen(), grammar, CONFIG, START, 20_000, 0)
    assert names == set(TOOLS)
    assert longest == longest_step(grammar)


def same_tokens_as_render(tokenizer: Tokenizer, grammar: Grammar, step: Spoken) -> None:
    """A written step has the tokens of a rendered chat, and the grammar reads from them what it says."""
    text = write(step)
    tokens = np.array([*tokenizer.encode(text), tokenizer.end_id])
    chat = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}]
    rendered = render(tokenizer, chat)
    np.testing.assert_array_equal(rendered.input_ids[rendered.loss_mask], tokens)
    before = walk(grammar, tokens)
    after = np.append(before[1:], grammar.following[before[-1], grammar.token_class[tokens[-1]]])
    assert TOOLS[grammar.ended[after[-1]]] == step.name
    assert parse(tokenizer.decode(tokens[:-1])).numbers == step.numbers
    assert tokenizer.decode(tokens[grammar.in_text[after]]) == tokenizer.decode(
        tokenizer.encode(step.text and f" {step.text}")
    )


@pytest.mark.parametrize("tokenizer", [TINY, JOINING], ids=["tiny", "joining"])
def test_text_has_the_tokens_of_a_rendered_chat(tokenizer):
    grammar = build(WIDE, tokenizer, VOCABULARY)
    check = settings(max_examples=300, deadline=None)(
        given(steps())(lambda step: same_tokens_as_render(tokenizer, grammar, step))
    )
    check()


@pytest.mark.slow
def test_text_has_the_tokens_of_a_rendered_chat_with_qwens_tokenizer():
    grammar = build(WIDE, qwen(), QWEN_VOCABULARY)
    assert ".\n" in [qwen().decode([token]) for token in qwen().encode("near 12.\nzoom 1.0 2.0")]
    settings(max_examples=2000, deadline=None)(
        given(steps())(lambda step: same_tokens_as_render(qwen(), grammar, step))
    )()

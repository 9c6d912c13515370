"""Generation against a loop that runs the whole sequence anew for every token, and sampling against NumPy."""

from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models.peers import (
    ATTENTIONS,
    conversation,
    even_config,
    forward,
    random_model,
    shapes_in,
    tiny_config,
)

from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.generate import generate as module
from iv3jax.generate.generate import DECODE_BLOCK, generate
from iv3jax.generate.sampling import Sampling, choose, filtered
from iv3jax.models.batch import Batch
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import boxed_params
from iv3jax.sharding import make_mesh, param_shardings

NEVER = [96]
"""A stop token that the greedy texts below do not contain."""

NEW = 21
"""Not a multiple of DECODE_BLOCK."""


@pytest.fixture(scope="module", params=ATTENTIONS)
def tiny(request):
    return random_model(tiny_config(request.param), seed=1)


def prompts(config):
    """Three prompts of different length: a video, text, an image; positions end below and above the count."""
    items = [[2, ("video", 2, 4, 6), 4], [9], [1, ("image", 1, 4, 4), 2]]
    return [conversation(config, item, seed) for seed, item in enumerate(items)]


def batch_of(config, samples, length: int | None = None) -> Batch:
    return collate([[s] for s in samples], config, length=length or max(map(len, samples)))


def step_by_step(model, params, sample, steps: int) -> tuple[list[int], float]:
    """Greedy tokens without a cache, and the smallest lead of a chosen logit over the next best."""
    batch = batch_of(model.config, [sample], len(sample) + steps)
    end, position = len(sample), int(sample.positions.max()) + 1
    tokens, lead = [], np.inf
    for step in range(steps):
        logits = np.asarray(forward(model, params, batch)["logits"])[0, end + step - 1]
        best, second = np.argsort(-logits)[:2]
        lead = min(lead, float(logits[best] - logits[second]))
        tokens.append(int(best))
        batch.input_ids[0, end + step] = best
        batch.positions[:, 0, end + step] = position + step
        batch.segment_ids[0, end + step] = 1
    return tokens, lead


@pytest.fixture(scope="module")
def greedy(tiny):
    """The prompts and their continuations by the step-by-step loop."""
    model, params = tiny
    samples = prompts(model.config)
    texts, leads = zip(*(step_by_step(model, params, s, NEW) for s in samples), strict=True)
    # Float noise, about 1e-6, must not decide any token; another seed if it does.
    assert min(leads) > 1e-4
    assert not set(NEVER) & {t for text in texts for t in text}
    return samples, list(texts)


def joined(streamed: list[list[list[int]]]) -> list[list[int]]:
    """What `on_tokens` was called with, put together row by row."""
    return [list(chain.from_iterable(row)) for row in zip(*streamed, strict=True)]


@pytest.mark.medium
@pytest.mark.parametrize("prefill", [1024, 7], ids=["whole prefill", "prefill in sevens"])
def test_greedy_is_the_step_by_step_loop(tiny, greedy, prefill, monkeypatch):
    """Rows of different length in one batch, with their videos in chunks of the prompt or not."""
    model, params = tiny
    samples, texts = greedy
    monkeypatch.setattr(module, "PREFILL_CHUNK", prefill)
    out = generate(model, params, batch_of(model.config, samples), max_new_tokens=NEW, stop_ids=NEVER)
    assert out.tokens == texts
    assert out.stopped == [False] * 3
    assert out.prompt_tokens == sum(map(len, samples)) and out.new_tokens == 3 * NEW
    capacity = max(map(len, samples)) + NEW
    assert out.cache_bytes == 3 * capacity * 3 * 4 * model.config.text_config.cache_width


@pytest.mark.medium
def test_rows_alone_are_rows_together(tiny, greedy):
    model, params = tiny
    samples, texts = greedy
    for sample, text in zip(samples, texts, strict=True):
        batch = batch_of(model.config, [sample], len(sample) + 3)
        assert generate(model, params, batch, max_new_tokens=NEW, stop_ids=NEVER).tokens == [text]


@pytest.mark.medium
@pytest.mark.parametrize("limit", [1, 3, DECODE_BLOCK, DECODE_BLOCK + 1])
def test_limits(tiny, greedy, limit):
    model, params = tiny
    samples, texts = greedy
    streamed = []
    out = generate(
        model,
        params,
        batch_of(model.config, samples),
        max_new_tokens=limit,
        stop_ids=NEVER,
        on_tokens=streamed.append,
    )
    assert out.tokens == [text[:limit] for text in texts]
    assert out.new_tokens == 3 * limit
    # Streamed as it comes, a block at a time.
    assert [len(fresh[0]) for fresh in streamed] == [min(DECODE_BLOCK, limit), limit - DECODE_BLOCK][
        : len(streamed)
    ]
    assert len(streamed) == -(-limit // DECODE_BLOCK)
    assert joined(streamed) == out.tokens


@pytest.mark.medium
def test_stop_tokens(tiny, greedy, monkeypatch):
    """Each row ends before its first stop token, the others go on; it then streams and writes nothing."""
    model, params = tiny
    samples, texts = greedy
    stop_ids = [texts[0][4], texts[2][18]]
    ends = [next((i for i, t in enumerate(text) if t in stop_ids), None) for text in texts]
    assert ends[0] is not None and ends[2] is not None
    streamed, states, decode = [], [], module.decode_block

    def spy(*arguments):
        state, block = decode(*arguments)
        states.append(jax.device_get(state.cache.length))
        return state, block

    monkeypatch.setattr(module, "decode_block", spy)
    out = generate(
        model,
        params,
        batch_of(model.config, samples),
        max_new_tokens=NEW,
        stop_ids=stop_ids,
        on_tokens=streamed.append,
    )
    assert out.tokens == [text[:end] for text, end in zip(texts, ends, strict=True)]
    assert out.stopped == [end is not None for end in ends]
    assert out.new_tokens == sum(NEW if end is None else end + 1 for end in ends)
    written = [len(s) + len(tokens) for s, tokens in zip(samples, out.tokens, strict=True)]
    assert states[-1].tolist() == written
    assert joined(streamed) == out.tokens


@pytest.mark.medium
def test_all_rows_stopped_ends_the_loop(tiny, greedy):
    model, params = tiny
    samples, texts = greedy
    streamed = []
    out = generate(
        model,
        params,
        batch_of(model.config, samples),
        max_new_tokens=3 * DECODE_BLOCK,
        stop_ids=[text[0] for text in texts],
        on_tokens=streamed.append,
    )
    assert out.tokens == [[], [], []] and out.stopped == [True] * 3
    assert out.new_tokens == 3 and len(streamed) == 1


@pytest.mark.medium
def test_seeds(tiny):
    """Same seed, same tokens, whatever the other rows are and however the prompt is padded."""
    model, params = tiny
    samples = prompts(model.config)

    def sampled(samples, seed, length=None):
        batch = batch_of(model.config, samples, length)
        sampling = Sampling(temperature=2.0, top_p=0.95)
        return generate(
            model, params, batch, max_new_tokens=NEW, stop_ids=NEVER, sampling=sampling, seed=seed
        ).tokens

    three = sampled(samples, 5)
    assert sampled(samples, 5) == three
    assert sampled(samples, 6) != three
    assert sampled(samples[:1], 5, len(samples[0]) + 3) == three[:1]
    twins = sampled([samples[1]] * 3, 5)
    assert twins[1] == three[1] and twins[0] != twins[1] != twins[2]


@pytest.mark.medium
def test_every_step_and_row_draws_anew(tiny):
    """With a head of zeros every token is drawn from the same uniform distribution over 97."""
    model, params = tiny
    flat = params | {"lm_head": {"kernel": jnp.zeros((97, 20))}}
    batch = batch_of(model.config, [prompts(model.config)[1]] * 3)
    out = generate(
        model, flat, batch, max_new_tokens=NEW, stop_ids=[], sampling=Sampling(temperature=1.0), seed=3
    )
    assert [len(set(row)) > NEW // 2 for row in out.tokens] == [True] * 3
    assert len(set(map(tuple, out.tokens))) == 3


def test_more_than_fits_is_refused_before_anything_runs(tiny):
    """No parameters are given, so computing anything would fail with another error."""
    model, _ = tiny
    batch = batch_of(model.config, prompts(model.config))
    longest = batch.input_ids.shape[1]
    with pytest.raises(UserError) as caught:
        generate(model, None, batch, max_new_tokens=10, stop_ids=[], capacity=longest + 9)
    assert str(caught.value) == (
        f"{longest} prompt tokens and 10 new ones are more than the cache's capacity, {longest + 9}; "
        "use fewer frames, a lower fps or fewer new tokens"
    )
    new = 257 - longest
    with pytest.raises(
        UserError, match=f"{new} new ones are more than the model's max_position_embeddings, 256"
    ):
        generate(model, None, batch, max_new_tokens=new, stop_ids=[])
    with pytest.raises(UserError, match="row 1 of the prompts is empty"):
        empty = collate([[prompts(model.config)[1]], []], model.config, length=12)
        generate(model, None, empty, max_new_tokens=1, stop_ids=[])


@pytest.mark.medium
def test_logits_of_the_last_token_only(tiny):
    """Prefill makes no array with a vocabulary axis at all, decoding none larger than (rows, vocab)."""
    model, params = tiny
    rows, length, width, vocab = 2, 31, 20, 97
    batch = batch_of(model.config, prompts(model.config)[:2], length)
    cache = init_cache(model.config.text_config, rows, 64, jnp.float32)
    visual = model.apply({"params": params}, batch, method="encode")
    part = module._columns(batch, 0, length)
    hidden, ends = jnp.zeros((rows, width)), jnp.full(rows, length - 1)
    prefill = jax.make_jaxpr(partial(module._prefill_chunk, model))(params, part, visual, cache, hidden, ends)
    assert (rows, length, width) in shapes_in(prefill.jaxpr)
    assert not {s for s in shapes_in(prefill.jaxpr) if vocab in s}

    state = module.DecodeState(
        cache, jnp.zeros((rows, vocab)), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), jnp.int32(0)
    )
    for sampling in (Sampling(), Sampling(1.0, top_p=0.9, top_k=5)):
        decode = partial(module.decode_block, model, sampling, DECODE_BLOCK)
        jaxpr = jax.make_jaxpr(decode)(params, state, jnp.array([1]), jax.random.key(0), 40).jaxpr
        made = {s for s in shapes_in(jaxpr) if vocab in s}
        assert (rows, vocab) in made
        assert max(np.prod(s) for s in made) == rows * vocab


def plain_probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> tuple[np.ndarray, float]:
    """Probabilities after temperature, then top-k, then top-p, in float64: sorted, cut, renormalised.

    Also how near top_p came to a border between two tokens, where float32 may decide otherwise.
    """
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    kept = order[: top_k or len(order)]
    p = np.exp(scaled[kept] - scaled[kept[0]])
    p /= p.sum()
    before = np.cumsum(p) - p
    margin = float(np.abs(before - top_p).min())
    kept, p = kept[before < top_p], p[before < top_p]
    out = np.zeros(len(logits))
    out[kept] = p / p.sum()
    return out, margin


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 2, 5, 30, 31, 500]),
    st.floats(0.01, 1.0),
)
def test_filtered(seed, temperature, top_k, top_p):
    logits = 3 * np.random.default_rng(seed).standard_normal((2, 31)).astype(np.float32)
    got = jax.nn.softmax(filtered(jnp.asarray(logits), Sampling(temperature, top_p, top_k)), axis=-1)
    for row in range(2):
        expected, margin = plain_probabilities(logits[row], temperature, top_k, top_p)
        assume(margin > 1e-5)
        np.testing.assert_array_equal(np.asarray(got[row]) > 0, expected > 0)
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 4, 1.0), (1.5, 0, 0.8), (1.0, 6, 0.7)]
)
def test_chosen_frequencies(temperature, top_k, top_p):
    """20 000 draws: each token within five standard deviations of its probability, the others never."""
    draws = 20_000
    logits = 2 * np.random.default_rng(1).standard_normal(12).astype(np.float32)
    expected, _ = plain_probabilities(logits, temperature, top_k, top_p)
    keys = jax.random.split(jax.random.key(0), draws)
    many = jnp.broadcast_to(jnp.asarray(logits), (draws, 12))
    tokens = np.asarray(choose(many, keys, Sampling(temperature, top_p, top_k)))
    shares = np.bincount(tokens, minlength=12) / draws
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_greedy_choice_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [5.0, -1.0, 3.0]])
    assert choose(logits, jax.random.split(jax.random.key(0), 2), Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (dict(temperature=-0.1), "temperature is -0.1; it must be 0 .greedy. or more"),
        (dict(top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(top_k=-1), "top_k is -1; it must be 0 .all. or more"),
    ],
)
def test_sampling_refuses(settings_, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings_)


@pytest.mark.medium
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_mesh_generates_the_same(attention):
    """Prefill in blocks and decode, with batch, heads and weights split over eight devices."""
    model, params = random_model(even_config(attention))
    parts = [[60, ("video", 4, 6, 6), 3], [30, ("image", 1, 4, 4), 50]]
    rows = [[conversation(model.config, items, seed)] for seed, items in enumerate(parts)]
    batch = collate(rows, model.config, length=128)
    expected = generate(model, params, batch, max_new_tokens=12, stop_ids=[]).tokens
    mesh = make_mesh(fsdp=2, tensor=2, context=2)
    placed = jax.device_put(params, param_shardings(boxed_params(model), mesh))
    with jax.set_mesh(mesh):
        assert generate(model, placed, batch, max_new_tokens=12, stop_ids=[]).tokens == expected

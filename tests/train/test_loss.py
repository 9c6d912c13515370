"""The supervised loss against plain NumPy loops, and that no array of all logits is ever made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.peers import (
    conversation,
    difference,
    even_config,
    random_model,
    shapes_in,
    tiny_config,
    tree_difference,
)

from iv3jax.data.collate import collate
from iv3jax.models.batch import IGNORE_LABEL, Batch, fake_batch
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import unbox
from iv3jax.train import loss as loss_module
from iv3jax.train.loss import cross_entropy, reduced, token_weights


def plain_losses(hidden, head, labels) -> np.ndarray:
    """−log softmax(hidden · headᵀ)[label] in float64, token by token."""
    losses = np.zeros(labels.shape)
    for at in np.ndindex(labels.shape):
        if labels[at] != IGNORE_LABEL:
            logits = hidden[at].astype(np.float64) @ head.astype(np.float64).T
            losses[at] = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[labels[at]]
    return losses


def plain_reduction(losses, labels, segment_ids, reduction: str) -> float:
    """SPEC §5 as a loop over samples: Σ w·CE / Σ w with w = 1, 1/n or 1/sqrt(n)."""
    total = weights = 0.0
    for row in range(len(labels)):
        for segment in set(segment_ids[row].tolist()) - {0}:
            trained = (segment_ids[row] == segment) & (labels[row] != IGNORE_LABEL)
            n = trained.sum()
            if n:
                weight = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[reduction]
                total += weight * losses[row][trained].sum()
                weights += weight * n
    return total / weights


@pytest.fixture(scope="module")
def case():
    """A model, hidden states of two rows of 37 tokens, and labels of which a third is ignored."""
    model, params = random_model(tiny_config("m2la"))
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 37, 20)).astype(np.float32)
    labels = rng.integers(0, 97, (2, 37)).astype(np.int32)
    labels[rng.random((2, 37)) < 0.3] = IGNORE_LABEL
    return model, params, hidden, labels


@pytest.mark.parametrize("chunk", [1, 10, 37, 512])
def test_cross_entropy(case, chunk, monkeypatch):
    """Any chunk, also one that does not divide the length or is longer: tolerance 1e-5."""
    model, params, hidden, labels = case
    monkeypatch.setattr(loss_module, "LOGIT_CHUNK", chunk)
    got = cross_entropy(model, params, hidden, labels)
    expected = plain_losses(hidden, np.asarray(params["lm_head"]["kernel"]), labels)
    assert (np.asarray(got)[labels == IGNORE_LABEL] == 0).all() and got.dtype == jnp.float32
    assert difference(got, expected) <= 1e-5


def test_gradients_of_chunks(case, monkeypatch):
    """Gradients for hidden states and head are those of one chunk, and zero where nothing is trained."""
    model, params, hidden, labels = case

    def gradients(chunk):
        monkeypatch.setattr(loss_module, "LOGIT_CHUNK", chunk)

        def total(params, hidden):
            return jnp.sum(cross_entropy(model, params, hidden, labels))

        by_params, by_hidden = jax.jit(jax.grad(total, argnums=(0, 1)))(params, hidden)
        return by_params["lm_head"]["kernel"], by_hidden

    plain, chunked = gradients(37), gradients(10)
    assert tree_difference(chunked, plain) <= 1e-5
    assert (np.asarray(plain[1])[labels == IGNORE_LABEL] == 0).all()
    assert (np.abs(plain[1]).max(axis=-1)[labels != IGNORE_LABEL] > 0).all()


def test_tied_head():
    """With tied embeddings the head is the embedding, and its gradient comes from both ends."""
    model, params = random_model(tiny_config("gqa", tie_word_embeddings=True))
    batch = collate([[conversation(model.config, [12])]], model.config, length=12)
    hidden = np.random.default_rng(0).standard_normal((1, 12, 20)).astype(np.float32)
    expected = plain_losses(hidden, np.asarray(params["embed_tokens"]["embedding"]), batch.labels)
    assert difference(cross_entropy(model, params, hidden, batch.labels), expected) <= 1e-5


PACKS = st.lists(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None)
@given(PACKS, st.integers(0, 1000))
def test_reductions(packs, seed):
    """Packs of samples of any length, each with any number of trained tokens, also none: 1e-6 relative."""
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((len(packs), 24), np.int32)
    labels = np.full((len(packs), 24), IGNORE_LABEL, np.int32)
    for row, samples in enumerate(packs):
        start = 0
        for segment, (length, trained) in enumerate(samples, 1):
            segment_ids[row, start : start + length] = segment
            labels[row, start : start + min(trained, length)] = 1
            start += length
    losses = rng.random(labels.shape).astype(np.float32)
    for reduction in ("token", "sample", "square"):
        weights = token_weights(jnp.asarray(labels), jnp.asarray(segment_ids), reduction)
        assert (np.asarray(weights)[labels == IGNORE_LABEL] == 0).all()
        got = float(reduced(jnp.asarray(losses), weights))
        if (labels == IGNORE_LABEL).all():
            assert got == 0
        else:
            assert got == pytest.approx(plain_reduction(losses, labels, segment_ids, reduction), rel=1e-6)


def test_reductions_differ_where_they_should():
    """One sample of one token with loss 1, one of four with loss 0: 1/5, 1/2 and 1/3."""
    segment_ids, labels = jnp.array([[1, 2, 2, 2, 2]]), jnp.ones((1, 5), jnp.int32)
    losses = jnp.array([[1.0, 0, 0, 0, 0]])
    got = [
        float(reduced(losses, token_weights(labels, segment_ids, r))) for r in ("token", "sample", "square")
    ]
    assert got == pytest.approx([1 / 5, 1 / 2, 1 / 3], rel=1e-6)


@pytest.mark.medium
def test_a_packs_loss_is_its_samples_loss():
    """From tokens to loss through the model: packed and one by one, all three reductions, 1e-5."""
    model, params = random_model(tiny_config("m2la"))
    parts = [conversation(model.config, [n, ("image", 1, 4, 4), n], n) for n in (3, 5, 2)]
    packed = collate([parts[:2], parts[2:]], model.config, length=40)
    step = jax.jit(lambda p, b: cross_entropy(model, p, model.apply({"params": p}, b).hidden, b.labels))
    total = {"token": [0.0, 0.0], "sample": [0.0, 0.0], "square": [0.0, 0.0]}
    for part in parts:
        alone = collate([[part]], model.config, length=40, chunks=2)
        n = int((alone.labels != IGNORE_LABEL).sum())
        for name, weight in (("token", 1.0), ("sample", 1 / n), ("square", n**-0.5)):
            total[name][0] += weight * float(step(params, alone).sum())
            total[name][1] += weight * n
    together = step(params, packed)
    for name, (top, bottom) in total.items():
        weights = token_weights(packed.labels, packed.segment_ids, name)
        assert abs(float(reduced(together, weights)) - top / bottom) <= 1e-5


def whole_logits(shapes: set[tuple[int, ...]], length: int, vocab: int) -> set[tuple[int, ...]]:
    """Shapes with a vocabulary axis and as many numbers as all tokens have logits."""
    return {s for s in shapes if vocab in s and np.prod(s) >= length * vocab}


@pytest.mark.parametrize("attention", ["m2la", "gqa"])
def test_no_array_of_all_logits(attention):
    """Loss and gradients of 4096 tokens over a vocabulary of 512, traced only: no T × vocab array."""
    length, vocab = 4096, 512
    config = even_config(attention, vocab_size=vocab)
    model = InternVideo3(config)
    params = unbox(boxed_params(model))
    batch = fake_batch(config, rows=1, length=length, chunks=1)

    def loss(params, batch: Batch, head):
        hidden = model.apply({"params": params}, batch).hidden
        weights = token_weights(batch.labels, batch.segment_ids, "square")
        return reduced(head(params, hidden, batch.labels), weights)

    def naive(params, hidden, labels):
        logits = jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))
        return -jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]

    def shapes(head):
        traced = jax.make_jaxpr(jax.value_and_grad(lambda p, b: loss(p, b, head)))(params, batch)
        return shapes_in(traced.jaxpr)

    ours = shapes(lambda p, h, labels: cross_entropy(model, p, h, labels))
    assert (1, loss_module.LOGIT_CHUNK, vocab) in ours
    assert not whole_logits(ours, length, vocab)
    assert (1, length, vocab) in whole_logits(shapes(naive), length, vocab)

"""Log-probabilities of the trainer against whole logits in float64, and against how the sampler chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import difference, even_config, random_model, shapes_in, tiny_config, tree_difference
from train.small_grammar import random_table, random_targets

from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling, filtered
from iv3jax.models.batch import IGNORE_LABEL, Batch, fake_batch
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import make_mesh, unbox
from iv3jax.train.policy import Reading, Rules, chosen, importance, token_logprobs
from iv3jax.train.policy_batch import POLICY_AXES, PolicyBatch, policy_batch

SAMPLINGS = [Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.3, top_p=0.5, top_k=9), Sampling(1.0, 0.01)]


def plain_logprobs(logits, targets, states, table, sampling: Sampling):
    """Log-probability and entropy of each target in float64, token by token."""
    logprob, entropy = np.zeros(targets.shape), np.zeros(targets.shape)
    for at in np.ndindex(targets.shape):
        if targets[at] == IGNORE_LABEL:
            continue
        ids = np.flatnonzero(table.allowed[states[at]][table.token_class])
        scaled = logits[at].astype(np.float64)[ids] / sampling.temperature
        order = np.argsort(-scaled)
        if sampling.top_k:
            order = order[: sampling.top_k]
        share = np.exp(scaled[order] - scaled.max())
        share /= share.sum()
        before = np.cumsum(share) - share
        keep = set(ids[order[before < sampling.top_p]].tolist()) | {int(targets[at])}
        left = logits[at].astype(np.float64)[sorted(keep)] / sampling.temperature
        log_share = left - left.max() - np.log(np.exp(left - left.max()).sum())
        logprob[at] = log_share[sorted(keep).index(int(targets[at]))]
        entropy[at] = -(np.exp(log_share) * log_share).sum()
    return logprob, entropy


@pytest.fixture(scope="module")
def case():
    """A model, hidden states of two rows of 37 tokens, and targets of most of them."""
    model, params = random_model(tiny_config("m2la"))
    rng = np.random.default_rng(0)
    table = random_table(97)
    hidden = rng.standard_normal((2, 37, 20)).astype(np.float32) * 2
    return model, params["lm_head"]["kernel"], table, hidden, *random_targets(table, (2, 37), rng)


def made(case, sampling, chunk, kernel=None, hidden=None, targets=None, states=None):
    model, head, table, own, own_targets, own_states = case
    reading = Reading(model, {"lm_head": {"kernel": head if kernel is None else kernel}}, own)
    if hidden is not None:
        reading = Reading(model, reading.head, hidden)
    targets = own_targets if targets is None else targets
    return chosen(reading, targets, own_states if states is None else states, Rules(table, sampling), chunk)


@pytest.mark.parametrize(
    "sampling",
    [*SAMPLINGS[:2], *(pytest.param(s, marks=pytest.mark.medium) for s in SAMPLINGS[2:])],
    ids=str,
)
def test_equals_whole_logits(case, sampling):
    """Chunks that divide the length, do not, and are longer: 2e-5 in log-probability and entropy."""
    _, head, table, hidden, targets, states = case
    logits = hidden.astype(np.float64) @ np.asarray(head, np.float64).T
    expected = plain_logprobs(logits, targets, states, table, sampling)
    for chunk in (1, 10, 512):
        got = jax.jit(lambda h, chunk=chunk: made(case, sampling, chunk, hidden=h))(hidden)
        assert got.logprob.dtype == jnp.float32
        assert (np.asarray(got.logprob)[targets == IGNORE_LABEL] == 0).all()
        assert difference(got.logprob, expected[0]) <= 2e-5
        assert difference(got.entropy, expected[1]) <= 2e-5


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=str)
def test_gradients_equal_those_of_whole_logits(case, sampling):
    """By hidden states and head: 2e-5; zero where nothing was chosen freely."""
    _, head, table, hidden, targets, states = case
    weight = np.random.default_rng(1).standard_normal(targets.shape).astype(np.float32)
    free = targets != IGNORE_LABEL
    # What is kept, from the plain reference's point of view: all that has a share.
    logits = np.asarray(hidden @ np.asarray(head).T)
    allowed = table.allowed[states][..., table.token_class]
    kept = np.asarray(filtered(jnp.where(allowed, logits, -jnp.inf), sampling)) > -np.inf
    kept |= np.arange(97) == targets[..., None]

    def plain(head, hidden):
        scaled = jnp.where(kept, hidden @ head.T / sampling.temperature, -1e30)
        every = jax.nn.log_softmax(scaled)
        logprob = jnp.take_along_axis(every, np.maximum(targets, 0)[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(free, weight * logprob, 0))

    def ours(head, hidden):
        return jnp.sum(weight * made(case, sampling, 10, head, hidden).logprob)

    got = jax.jit(jax.grad(ours, argnums=(0, 1)))(head, hidden)
    assert tree_difference(got, jax.jit(jax.grad(plain, argnums=(0, 1)))(head, hidden)) <= 2e-5
    assert (np.asarray(got[1])[~free] == 0).all()
    assert (np.abs(got[1]).max(axis=-1)[free] > 0).any()


@pytest.mark.medium
def test_agrees_with_the_sampler(case):
    """10 000 tokens chosen as a rollout chooses them, by mask and filter: the same log-probability, 1e-5."""
    _, head, table, hidden, _, states = case
    sampling = Sampling(0.8, top_p=0.8)

    @jax.jit
    def sampled(key):
        logits = hidden @ head.T
        left = filtered(jnp.where(table.allowed[states][..., table.token_class], logits, -jnp.inf), sampling)
        token = jax.random.categorical(key, left)
        return token, jnp.take_along_axis(jax.nn.log_softmax(left), token[..., None], -1)[..., 0]

    both = jax.jit(lambda targets: made(case, sampling, 16, targets=targets).logprob)
    for seed in range(10_000 // states.size):
        token, logprob = sampled(jax.random.key(seed))
        assert difference(both(token.astype(jnp.int32)), logprob) <= 1e-5


def test_what_was_not_chosen_does_not_matter(case):
    """States out of range and hidden states of any size beside ignored targets: the same to the last bit."""
    _, _, _, hidden, targets, states = case
    ignored = targets == IGNORE_LABEL
    value = jax.jit(
        jax.value_and_grad(lambda h, s: made(case, SAMPLINGS[1], 10, hidden=h, states=s).logprob.sum()),
    )
    plain = value(hidden, states)
    other = value(
        np.where(ignored[..., None], 1e4 * hidden, hidden).astype(np.float32),
        np.where(ignored, -1, states).astype(np.int32),
    )
    np.testing.assert_array_equal(plain[0], other[0])
    np.testing.assert_array_equal(plain[1], other[1])


def test_a_chunk_without_targets_is_not_computed(case):
    """NaN in the hidden states of such chunks, a prompt's, reaches neither values nor the head's gradient."""
    _, head, _, hidden, targets, _ = case
    late = np.where(np.arange(37) < 20, IGNORE_LABEL, targets)
    broken = np.where(np.arange(37)[:, None] < 20, np.nan, hidden).astype(np.float32)

    def total(head, hidden):
        return made(case, SAMPLINGS[1], 10, head, hidden, late).logprob.sum()

    value = jax.jit(jax.value_and_grad(total))
    got, expected = value(head, broken), value(head, hidden)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


def test_no_array_of_all_logits():
    """Values and gradients of 4096 tokens over a vocabulary of 512, traced only: no T × vocab array."""
    length, vocab, chunk = 4096, 512, 256
    config = even_config("m2la", vocab_size=vocab)
    model = InternVideo3(config)
    batch = fake_batch(config, rows=1, length=length, chunks=1)
    states = np.zeros((1, length), np.int32)
    rules = Rules(random_table(vocab), Sampling(0.9, top_p=0.9))

    def loss(params, batch: Batch):
        return token_logprobs(model, params, batch, batch.labels, states, rules, chunk).logprob.sum()

    traced = jax.make_jaxpr(jax.value_and_grad(loss))(unbox(boxed_params(model)), batch)
    shapes = shapes_in(traced.jaxpr)
    assert (1, chunk, vocab) in shapes
    assert max(np.prod(s) for s in shapes if vocab in s) <= chunk * vocab


@pytest.mark.medium
def test_a_mesh_gives_the_same(case):
    """Rows, sequence and vocabulary split over eight devices: values and gradients, 2e-5."""
    model, params = random_model(even_config("m2la"))
    rng = np.random.default_rng(3)
    table = random_table(96)
    hidden = rng.standard_normal((2, 38, 24)).astype(np.float32)
    targets, states = random_targets(table, (2, 38), rng)

    def total(kernel, hidden):
        reading = Reading(model, {"lm_head": {"kernel": kernel}}, hidden)
        found = chosen(reading, targets, states, Rules(table, Sampling(0.9, top_p=0.9)), 8)
        return found.logprob.sum(), found

    given = (params["lm_head"]["kernel"], jnp.asarray(hidden))
    value = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    expected = jax.jit(value)(*given)
    for sizes in ({"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "tensor": 4}):
        with jax.set_mesh(make_mesh(**sizes)):
            assert tree_difference(jax.jit(value)(*given), expected) <= 2e-5


def test_a_batch_is_aligned_like_labels():
    """What is known of token t + 1 stands at t, and of tokens that were not chosen nothing is left."""
    ids = np.array([[5, 6, 7, 8, 9]], np.int32)
    free = np.array([[False, False, True, False, True]])
    batch = Batch(ids, np.zeros((3, 1, 5), np.int32), np.ones((1, 5), np.int32))
    got = policy_batch(batch, free, 10 * ids, -ids.astype(np.float32), np.ones(1, np.float32))
    assert got.batch.labels.tolist() == [[IGNORE_LABEL, 7, IGNORE_LABEL, 9, IGNORE_LABEL]]
    assert got.states.tolist() == [[0, 70, 0, 90, 0]] and got.sampler.tolist() == [[0, -7, 0, -9, 0]]
    assert got.free.tolist() == [[False, True, False, True, False]]
    assert got.old is got.sampler


def test_every_field_has_its_axes():
    for name in PolicyBatch._fields:
        assert getattr(POLICY_AXES, name) is not None, name


def test_importance_is_cut_and_has_no_gradient():
    new, free = jnp.log(jnp.array([[0.5, 4.0, jnp.nan]])), jnp.array([[True, True, False]])
    got = importance(new, jnp.zeros((1, 3)), free, 2.0)
    np.testing.assert_allclose(got, [[0.5, 2.0, 1.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: importance(x, jnp.zeros((1, 3)), free, 2.0).sum())(new)
    np.testing.assert_array_equal(gradient, 0)


def test_greedy_is_refused():
    with pytest.raises(UserError, match="temperature is 0"):
        Rules(random_table(9), Sampling())

"""The terms of reinforcement learning against slow NumPy in float64 and against gradients by enumeration."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.peers import difference, random_model, tiny_config, tree_difference
from train.small_grammar import random_table, random_targets

from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling
from iv3jax.models.batch import IGNORE_LABEL, Batch, fake_batch
from iv3jax.sharding import make_mesh
from iv3jax.train.distill import TEACHER, Teacher
from iv3jax.train.policy import Rules, token_logprobs
from iv3jax.train.policy_batch import PolicyBatch
from iv3jax.train.rl import (
    KINDS,
    RLConfig,
    advantages,
    k2,
    policy_losses,
    policy_weights,
    reinforcement,
)
from iv3jax.train.state import new_state
from iv3jax.train.step import make_step

ROWS, LENGTH = 6, 11


def config_of(kind: str, **more) -> RLConfig:
    return RLConfig(kind, constant=9 if kind == "dr_grpo" else 0, **more)


def random_rollouts(seed: int, spread: float, mismatch: float = 0.3):
    """Log-probabilities now, and rollouts of two groups: one row has no free token, one has a single one."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random((ROWS, LENGTH)) < 0.6, 1, IGNORE_LABEL)
    labels[1], labels[2] = IGNORE_LABEL, IGNORE_LABEL
    labels[2, 3] = 1

    def near(x, by):
        return (x + by * rng.standard_normal(x.shape)).astype(np.float32)

    old = near(np.full((ROWS, LENGTH), -1.5), 0.5)
    rollouts = PolicyBatch(
        Batch(labels, labels, labels, labels.astype(np.int32)),
        np.zeros((ROWS, LENGTH), np.int32),
        sampler=near(old, mismatch),
        old=old,
        advantages=rng.standard_normal(ROWS).astype(np.float32),
        reference=near(old, 0.4),
    )
    return near(old, spread), rollouts


def total(config, logprob, rollouts, kl=None):
    """What the loop makes of the terms: Σ weights · losses / Σ weights."""
    weights = policy_weights(config, rollouts.free)
    return jnp.sum(weights * policy_losses(config, logprob, rollouts, kl).losses) / jnp.sum(weights)


def plain_total(config, logprob, rollouts, weigh=None, kl=None) -> float:
    """SPEC §6 as loops over rows and tokens, float64. `weigh`: the log-probabilities of the weights of k2."""
    logprob, weigh = np.float64(logprob), np.float64(logprob if weigh is None else weigh)
    old, sampler, reference = (np.float64(x) for x in (rollouts.old, rollouts.sampler, rollouts.reference))
    kind, rows = config.kind, []
    low, high = {"gspo": (3e-4, 4e-4), "dapo": (0.2, 0.28)}.get(kind, (0.2, 0.2))
    for row in range(ROWS):
        free = np.flatnonzero(np.asarray(rollouts.batch.labels)[row] != IGNORE_LABEL)
        if not len(free):
            continue
        advantage, losses = float(rollouts.advantages[row]), []
        for t in free:
            if kind == "gspo":
                ratio = np.exp(np.mean([logprob[row, i] - old[row, i] for i in free]))
            else:
                ratio = np.exp(logprob[row, t] - old[row, t])
            gain = min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
            loss = -min(np.exp(old[row, t] - sampler[row, t]), config.truncation) * gain
            if config.kl == "k2":
                weight = min(np.exp(weigh[row, t] - sampler[row, t]), config.truncation)
                loss += config.beta * weight * (logprob[row, t] - reference[row, t]) ** 2 / 2
            elif config.kl == "exact":
                loss += config.beta * float(kl[row, t])
            losses.append(loss)
        rows.append(losses)
    if kind == "dapo":
        return float(np.mean(np.concatenate(rows)))
    if kind == "dr_grpo":
        return sum(map(sum, rows)) / (len(rows) * config.constant)
    if kind == "rloo":
        return sum(map(sum, rows)) / len(rows)
    return float(np.mean([np.mean(losses) for losses in rows]))


@pytest.mark.parametrize("kl", ["none", "k2", "exact"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_value_equals_the_plain_one(kind, kl):
    """Ratios inside and outside the clip, corrections cut and not: 1e-5 relative to a loss of about 1."""
    config = config_of(kind, kl=kl, beta=0.3, truncation=1.2)
    value = jax.jit(partial(total, config))
    given = np.random.default_rng(9).random((ROWS, LENGTH)).astype(np.float32) if kl == "exact" else None
    for seed in range(5):
        for spread in (1e-4, 0.4):
            logprob, rollouts = random_rollouts(seed, spread)
            expected = plain_total(config, logprob, rollouts, kl=given)
            assert float(value(logprob, rollouts, given)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradient_equals_the_plain_ones_differences(kind):
    """Central differences in float64: 1e-6. GSPO's tokens are corrected one by one (tested below), so here
    its sampler is the trainer.
    """
    config = config_of(kind, beta=0.3, truncation=1.2)
    gradient = jax.jit(jax.grad(partial(total, config)))
    for seed, spread in ((0, 1e-4), (1, 0.2)):
        logprob, rollouts = random_rollouts(seed, spread, 0.0 if kind == "gspo" else 0.3)
        got = gradient(logprob, rollouts)
        expected, step = np.zeros((ROWS, LENGTH)), 1e-6
        for at in np.ndindex(ROWS, LENGTH):
            nudge = np.zeros((ROWS, LENGTH))
            nudge[at] = step
            up, down = (
                plain_total(config, logprob + sign * nudge, rollouts, weigh=logprob) for sign in (1, -1)
            )
            expected[at] = (up - down) / (2 * step)
        assert difference(got, expected) <= 1e-6
        assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("kl", ["none", "k2", "exact"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_other_tokens_change_nothing(kind, kl):
    """Prompt, observation, forced and post-stop tokens: any log-probability, also none, and no gradient."""
    config = config_of(kind, kl=kl)
    logprob, rollouts = random_rollouts(0, 0.2)
    given = np.abs(logprob) if kl == "exact" else None
    other = np.asarray(rollouts.batch.labels) == IGNORE_LABEL
    value = jax.jit(jax.value_and_grad(partial(total, config)))
    plain = value(logprob, rollouts, given)
    assert (np.asarray(plain[1])[other] == 0).all() and np.abs(plain[1]).max() > 0
    rng = np.random.default_rng(1)
    for noise in (rng.standard_normal(logprob.shape) * 50, np.full(logprob.shape, np.nan), -np.inf):

        def perturbed(x, noise=noise):
            return None if x is None else np.where(other, noise, x).astype(np.float32)

        changed = {name: perturbed(getattr(rollouts, name)) for name in ("sampler", "old", "reference")}
        got = value(perturbed(logprob), rollouts._replace(**changed), perturbed(given))
        jax.tree.map(np.testing.assert_array_equal, got, plain)


def one_row(change: float, advantage: float) -> tuple[np.ndarray, PolicyBatch]:
    """A rollout of eight free tokens whose mean log-ratio is `change`."""
    zeros, labels = np.zeros((1, 8), np.float32), np.ones((1, 8), np.int32)
    spread = np.linspace(-0.3, 0.3, 8)[None]
    old = np.full((1, 8), -1.0, np.float32)
    batch = Batch(labels, labels, labels, labels)
    rollouts = PolicyBatch(batch, labels, old, old, np.array([advantage], np.float32), zeros)
    return (old + change + spread).astype(np.float32), rollouts


@pytest.mark.parametrize(
    ("change", "advantage", "clips"),
    [
        (5e-4, 1, True),
        (3.5e-4, 1, False),
        (-1e-2, 1, False),
        (-3.5e-4, -1, True),
        (-2.5e-4, -1, False),
        (1e-2, -1, False),
    ],
)
def test_gspo_clips_where_it_should(change, advantage, clips):
    """A sequence's ratio at 3e-4 below and 4e-4 above 1, however far its tokens' own ratios are."""
    gradient = jax.jit(jax.grad(partial(total, RLConfig(kl="none"))))(*one_row(change, advantage))
    if clips:
        assert (np.asarray(gradient) == 0).all()
    else:
        np.testing.assert_allclose(gradient, -advantage * np.exp(change) / 8, rtol=1e-5)
    terms = policy_losses(RLConfig(kl="none"), *one_row(change, advantage))
    assert (np.asarray(terms.clipped) == clips).all()
    np.testing.assert_allclose(terms.ratio, np.exp(change), rtol=1e-6)
    # A clip of 0.2 would never act on it.
    wide = RLConfig(kl="none", clip_low=0.2, clip_high=0.2)
    assert np.asarray(jax.grad(partial(total, wide))(*one_row(change, advantage))).all()


def test_gspo_corrects_token_by_token():
    """Each token's part of the gradient is weighted by what its own sampler's probability was off by."""
    logprob, rollouts = one_row(0.0, 1.0)
    off = np.linspace(-1, 1, 8)[None].astype(np.float32)
    gradient = jax.grad(partial(total, RLConfig(kl="none")))(
        logprob, rollouts._replace(sampler=rollouts.old - off)
    )
    np.testing.assert_allclose(gradient, -np.minimum(np.exp(off), 2) / 8, rtol=1e-5)


def test_terms_are_zero_where_nothing_was_chosen():
    logprob, rollouts = random_rollouts(0, 0.4)
    terms, free = policy_losses(config_of("grpo"), logprob, rollouts), np.asarray(rollouts.free)
    for term in terms:
        assert not np.asarray(term)[~free].any()
    np.testing.assert_allclose(terms.ratio[free], np.exp(logprob - rollouts.old)[free], rtol=1e-5)
    assert 0 < float(terms.clipped[free].mean()) < 1


V = 7
"""A vocabulary small enough to enumerate."""


@pytest.fixture(scope="module")
def small():
    """Logits of a policy, log-probabilities of a reference, and those of a policy of some steps ago."""
    rng = np.random.default_rng(0)
    reference, before = (jax.nn.log_softmax(jnp.asarray(rng.standard_normal(V))) for _ in range(2))
    return jnp.asarray(2 * rng.standard_normal(V)), reference, before


def expected_gradient(estimate, logits, weights):
    """Σ_a weights(a) · ∇ estimate(log π(a), a): the gradient of an estimator over all samples."""

    def summed(logits):
        logprob = jax.nn.log_softmax(logits)[:, None]
        return jnp.sum(weights[:, None] * estimate(logprob))

    return jax.jit(jax.grad(summed))(logits)


def kl_gradient(logits, reference, forward: bool = False):
    """∇ KL(π‖q), or of KL(q‖π), over the whole vocabulary."""

    def kl(logits):
        logprob = jax.nn.log_softmax(logits)
        if forward:
            return jnp.sum(jnp.exp(reference) * (reference - logprob))
        return jnp.sum(jnp.exp(logprob) * (logprob - reference))

    return jax.jit(jax.grad(kl))(logits)


def test_k2_has_the_gradient_of_the_kl(small):
    """On samples of π, and on those of an older policy with weights that are not cut: 1e-6."""
    logits, reference, before = small
    free = jnp.ones((V, 1), bool)
    exact = kl_gradient(logits, reference)
    for sampler in (jax.nn.log_softmax(logits), before):

        def estimate(logprob, sampler=sampler):
            return k2(logprob, reference[:, None], sampler[:, None], free, 1e9)

        assert difference(expected_gradient(estimate, logits, jnp.exp(sampler)), exact) <= 1e-6
    # Without the weights, an older policy's samples are not enough.
    unweighted = expected_gradient(
        lambda logprob: jnp.square(logprob - reference[:, None]) / 2, logits, jnp.exp(before)
    )
    assert difference(unweighted, exact) > 0.1


def test_k1_and_k3_do_not(small):
    """k1's expected gradient is zero; k3's is that of KL(q‖π), the other direction."""
    logits, reference, _ = small
    shares = jax.nn.softmax(logits)
    exact, other = kl_gradient(logits, reference), kl_gradient(logits, reference, forward=True)
    assert difference(exact, other) > 0.05 and np.abs(exact).max() > 0.05
    assert np.abs(expected_gradient(lambda x: x - reference[:, None], logits, shares)).max() <= 1e-6

    def k3(logprob):
        change = reference[:, None] - logprob
        return jnp.exp(change) - 1 - change

    assert difference(expected_gradient(k3, logits, shares), other) <= 1e-6


@pytest.mark.parametrize("kind", list(KINDS))
def test_advantages(kind):
    """Against NumPy in float64, 1e-4; a group of equal rewards has none, and a group of one is refused."""
    rewards = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    rewards[2] = 0.1
    got = np.asarray(advantages(rewards, kind))
    exact = rewards.astype(np.float64)
    expected = exact - exact.mean(axis=1, keepdims=True)
    if kind in ("gspo", "grpo", "dapo"):
        expected /= exact.std(axis=1, keepdims=True) + 1e-4
    elif kind == "rloo":
        for row in range(5):
            expected[row] = [exact[row, i] - np.delete(exact[row], i).mean() for i in range(4)]
    assert difference(got, expected) <= 1e-4 and np.abs(got[2]).max() <= 1e-3
    with pytest.raises(UserError, match="a group of 1"):
        advantages(rewards[:, :1], kind)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(kind="gpo"), "did you mean 'gspo'"),
        (dict(kl="k3"), "k2, exact, none"),
        (dict(kind="dr_grpo"), "needs one above 0"),
        (dict(constant=5), "no other kind"),
        (dict(clip_low=1.0), "clip_low"),
        (dict(truncation=0.5), "truncation"),
        (dict(beta=-1.0), "beta"),
    ],
)
def test_wrong_configs_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        RLConfig(**fields)


def rollouts_of(model, params, rules, rows=4, length=9) -> PolicyBatch:
    """Random text, half of it free, with what the model itself gives it."""
    batch = fake_batch(model.config, rows=rows, length=length, chunks=0)
    rng = np.random.default_rng(0)
    labels, states = random_targets(rules.grammar, (rows, length), rng)
    batch = batch._replace(labels=labels)
    logprob = jax.jit(lambda p: token_logprobs(model, p, batch, labels, states, rules).logprob)(params)
    advantage = rng.standard_normal(rows).astype(np.float32)
    return PolicyBatch(batch, states, logprob, logprob, advantage, np.asarray(logprob) - 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["k2", "exact"])
def test_a_step_of_the_loop(kl):
    """`make_step` with a batch of rollouts: the gradient of on-policy GRPO is −A∇log π beside that of the KL,
    with a reference that lies among the frozen parameters.
    """
    model, params = random_model(tiny_config("gqa"))
    other, others = random_model(tiny_config("gqa"), seed=1)
    rules = Rules(random_table(97), Sampling(0.9))
    rollouts = rollouts_of(model, params, rules)
    config = RLConfig("grpo", kl=kl, beta=0.2)
    objective = reinforcement(model, config, rules, Teacher(other))
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_step(optimizer, objective))
    state = new_state(jax.tree.map(jnp.asarray, params), optimizer, 0, make_mesh(jax.devices()[:1]))
    after, metrics = step(state, {TEACHER: others}, rollouts)
    gradient = jax.tree.map(lambda x, y: x - y, params, after.params)
    assert metrics.applied == 1 and float(metrics.weight) == pytest.approx(4)
    labels, free = rollouts.batch.labels, rollouts.free

    def plain(params):
        allowed = rules.grammar.allowed[rollouts.states][..., rules.grammar.token_class]

        def every(model, params):
            hidden = model.apply({"params": params}, rollouts.batch).hidden
            logits = model.apply({"params": params}, hidden, method="logits")
            return jax.nn.log_softmax(jnp.where(allowed, logits / 0.9, -1e30))

        ours = every(model, params)
        logprob = jnp.take_along_axis(ours, np.maximum(labels, 0)[..., None], -1)[..., 0]
        if kl == "exact":
            pull = jnp.sum(jnp.where(allowed, jnp.exp(ours) * (ours - every(other, others)), 0), -1)
        else:
            pull = jnp.square(logprob - rollouts.reference) / 2
        losses = jnp.where(free, -rollouts.advantages[:, None] * logprob + 0.2 * pull, 0)
        return jnp.mean(jnp.sum(losses, axis=1) / free.sum(axis=1))

    assert tree_difference(gradient, jax.jit(jax.grad(plain))(params)) <= 2e-5


def test_exact_kl_needs_a_fitting_reference():
    model, other = (random_model(tiny_config("gqa", vocab_size=n))[0] for n in (97, 98))
    rules = Rules(random_table(97), Sampling(1.0))
    with pytest.raises(UserError, match="needs a reference"):
        reinforcement(model, RLConfig(kl="exact"), rules)
    with pytest.raises(UserError, match="vocabulary has 98 tokens"):
        reinforcement(model, RLConfig(kl="exact"), rules, Teacher(other))

"""Reverse KL, exact, over the teacher's top-K and by samples, against enumeration in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.peers import difference, random_model, shapes_in, tiny_config, tree_difference
from train.small_grammar import random_table, random_targets

from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling
from iv3jax.models.batch import IGNORE_LABEL, Batch, fake_batch
from iv3jax.models.internvideo3 import boxed_params
from iv3jax.models.lora import Lora
from iv3jax.sharding import make_mesh, unbox
from iv3jax.train.distill import (
    TEACHER,
    DistillConfig,
    Teacher,
    compared,
    distillation,
    reverse_kl,
    sampled_losses,
    teacher_top_k,
    top_k_kl,
    trusted,
)
from iv3jax.train.policy import Reading, Rules, chosen, token_logprobs
from iv3jax.train.policy_batch import PolicyBatch
from iv3jax.train.state import new_state
from iv3jax.train.step import make_step
from iv3jax.train.trainable import split, trainable

VOCAB, TEMPERATURE = 97, 0.8


def plain_kl(ours, theirs, ids) -> float:
    """Σ p (log p − log q) over some ids, both renormalised over them; float64 logits."""

    def logprobs(x):
        return x[ids] - x[ids].max() - np.log(np.exp(x[ids] - x[ids].max()).sum())

    p, q = logprobs(ours), logprobs(theirs)
    return float((np.exp(p) * (p - q)).sum())


@pytest.fixture(scope="module")
def case():
    """Hidden states of a student and of a wider teacher, (2, 37) tokens, with heads of one vocabulary."""
    rng = np.random.default_rng(0)
    table = random_table(VOCAB)
    targets, states = random_targets(table, (2, 37), rng)
    readings = []
    for width, config in ((20, tiny_config("m2la")), (32, tiny_config("gqa", hidden_size=32))):
        vision = replace(config.vision_config, out_hidden_size=width)
        model, params = random_model(replace(config, vision_config=vision))
        hidden = rng.standard_normal((2, 37, width)).astype(np.float32)
        readings.append(Reading(model, {"lm_head": params["lm_head"]}, hidden))
    return (*readings, targets, states, Rules(table, Sampling(TEMPERATURE, top_p=0.9)))


def logits_of(reading: Reading) -> np.ndarray:
    """Over the temperature, float64."""
    return reading.hidden.astype(np.float64) @ np.float64(reading.head["lm_head"]["kernel"]).T / TEMPERATURE


def with_hidden(reading: Reading, hidden) -> Reading:
    return Reading(reading.model, reading.head, hidden)


@pytest.mark.parametrize("chunk", [1, 10, 512])
def test_exact_kl_equals_enumeration(case, chunk):
    """Over all that the grammar allows, top-p or not: 2e-5; log-probabilities are those of `chosen`."""
    student, teacher, targets, states, rules = case
    found = jax.jit(
        lambda h: (
            compared(with_hidden(student, h), teacher, targets, states, rules, chunk),
            chosen(with_hidden(student, h), targets, states, rules, chunk),
        )
    )
    got, alone = found(student.hidden)
    ours, theirs = logits_of(student), logits_of(teacher)
    expected = np.zeros(targets.shape)
    for at in np.ndindex(targets.shape):
        if targets[at] != IGNORE_LABEL:
            ids = np.flatnonzero(rules.grammar.allowed[states[at]][rules.grammar.token_class])
            expected[at] = plain_kl(ours[at], theirs[at], ids)
    assert expected.max() > 0.1 and difference(got.kl, expected) <= 2e-5
    assert difference(got.logprob, alone.logprob) <= 1e-6 and difference(got.entropy, alone.entropy) <= 1e-6
    plain = chosen(teacher, targets, states, rules.unfiltered, chunk)
    assert difference(got.reference, plain.logprob) <= 1e-5


@pytest.mark.parametrize("k", [1, 3, 60, VOCAB])
def test_top_k_is_renormalised_on_both_sides(case, k):
    """Against enumeration over the teacher's K, fewer where the grammar allows fewer; all of them: exact."""
    student, teacher, targets, states, rules = case
    top = jax.jit(lambda h: teacher_top_k(with_hidden(teacher, h), targets, states, rules, k, 10))(
        teacher.hidden
    )
    assert top.ids.shape == (2, 37, k) and top.ids.dtype == jnp.int32
    found = jax.jit(lambda h: top_k_kl(with_hidden(student, h), targets, states, top, rules, 10))(
        student.hidden
    )
    ours, theirs = logits_of(student), logits_of(teacher)
    expected, fewer = np.zeros(targets.shape), 0
    references = np.asarray(chosen(teacher, targets, states, rules.unfiltered, 10).logprob)
    for at in np.ndindex(targets.shape):
        if targets[at] != IGNORE_LABEL:
            ids = np.flatnonzero(rules.grammar.allowed[states[at]][rules.grammar.token_class])
            fewer += len(ids) < k
            best = ids[np.argsort(-theirs[at][ids])[:k]]
            kept = np.asarray(top.logprobs)[at] > -np.inf
            assert sorted(np.asarray(top.ids)[at][kept]) == sorted(best)
            expected[at] = plain_kl(ours[at], theirs[at], best)
            wanted = references[at] if targets[at] in best else -np.inf
            assert float(found.reference[at]) == pytest.approx(wanted, abs=1e-5)
    assert fewer or k < 60
    assert difference(found.kl, expected) <= 2e-5
    if k == VOCAB:
        whole = jax.jit(lambda h: compared(with_hidden(student, h), teacher, targets, states, rules, 10).kl)
        assert difference(found.kl, whole(student.hidden)) <= 2e-5


def test_gradients_are_the_exact_ones(case):
    """∂KL/∂z_j = p_j (log p_j − log q_j − KL), through chunks, exact and as a top-K of all tokens: 2e-5."""
    student, teacher, targets, states, rules = case
    ours, theirs = logits_of(student), logits_of(teacher)
    by_logits = np.zeros((2, 37, VOCAB))
    for at in np.ndindex(targets.shape):
        if targets[at] != IGNORE_LABEL:
            ids = np.flatnonzero(rules.grammar.allowed[states[at]][rules.grammar.token_class])
            p, q = (x[at][ids] - np.log(np.exp(x[at][ids]).sum()) for x in (ours, theirs))
            by_logits[at][ids] = np.exp(p) * (p - q - plain_kl(ours[at], theirs[at], ids))
    expected = by_logits @ np.float64(student.head["lm_head"]["kernel"]) / TEMPERATURE

    def exact(hidden):
        return compared(with_hidden(student, hidden), teacher, targets, states, rules, 10).kl.sum()

    top = jax.jit(lambda h: teacher_top_k(with_hidden(teacher, h), targets, states, rules, VOCAB, 10))(
        teacher.hidden
    )

    def by_top(hidden):
        return top_k_kl(with_hidden(student, hidden), targets, states, top, rules, 10).kl.sum()

    for loss in (exact, by_top):
        assert difference(jax.jit(jax.grad(loss))(student.hidden), expected) <= 2e-5


def test_sampled_advantage_has_the_exact_gradient():
    """Enumerated over all samples of π, and of an older policy with weights that are not cut: 1e-6."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(2 * rng.standard_normal(7))
    teacher, before = (jax.nn.log_softmax(jnp.asarray(rng.standard_normal(7))) for _ in range(2))
    free = jnp.ones((7, 1), bool)
    whole = jax.jit(jax.value_and_grad(lambda x: reverse_kl(x, teacher, jnp.ones(7, bool))))
    value, exact = whole(logits)
    for sampler in (jax.nn.log_softmax(logits), before):

        def expected(logits, sampler=sampler):
            logprob = jax.nn.log_softmax(logits)[:, None]
            losses = sampled_losses(logprob, teacher[:, None], sampler[:, None], free, 1e9)
            return jnp.sum(jnp.exp(sampler)[:, None] * losses)

        got = jax.jit(jax.value_and_grad(expected))(logits)
        assert difference(got[1], exact) <= 1e-6 and difference(got[0], value) <= 1e-6
    assert np.abs(exact).max() > 0.05


def test_other_tokens_change_nothing():
    """NaN where not free reaches neither value nor gradient."""
    free = jnp.array([[True, False]])
    given = [jnp.array([[x, jnp.nan]]) for x in (-1.0, -2.0, -1.0)]
    value, gradient = jax.value_and_grad(lambda x: sampled_losses(x, *given[1:], free, 2.0).sum())(given[0])
    assert float(value) == pytest.approx(1.0) and gradient.tolist() == [[pytest.approx(1.0), 0.0]]


def test_what_follows_a_token_of_no_trust_is_left_out():
    """The token itself counts, others than free ones say nothing, and rows do not touch."""
    free = jnp.array([[0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]], bool)
    reference = jnp.log(jnp.array([[0.0, 0.9, 0.04, 0.0, 0.9, 0.01], [0.5, 0.06, 0.0, 0.3, 1.0, 0.0]]))
    assert trusted(reference, free, 0.05).astype(int).tolist() == [[0, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]]
    unknown = reference.at[0, 1].set(-jnp.inf)
    assert trusted(unknown, free, 0.05).astype(int).tolist()[0] == [0, 1, 0, 0, 0, 0]
    assert jnp.array_equal(trusted(unknown, free, 0.0), free)


def test_no_array_of_all_logits(case):
    """Neither of the student's logits nor of the teacher's, in values and gradients."""
    student, teacher, _, _, rules = case
    length, chunk = 4096, 256
    shapes = [jax.ShapeDtypeStruct((1, length, n), jnp.float32) for n in (20, 32)]
    tokens = np.zeros((1, length), np.int32)

    def loss(ours, theirs):
        found = compared(
            with_hidden(student, ours), with_hidden(teacher, theirs), tokens, tokens, rules, chunk
        )
        return found.kl.sum() + found.logprob.sum()

    made = shapes_in(jax.make_jaxpr(jax.value_and_grad(loss))(*shapes).jaxpr)
    assert (1, chunk, VOCAB) in made
    assert max(np.prod(s) for s in made if VOCAB in s) <= max(chunk, 32) * VOCAB


def rollouts_of(model, params, rules) -> PolicyBatch:
    batch = fake_batch(model.config, rows=2, length=9, chunks=0)
    labels, states = random_targets(rules.grammar, (2, 9), np.random.default_rng(0))
    batch = batch._replace(labels=labels)
    logprob = jax.jit(lambda p: token_logprobs(model, p, batch, labels, states, rules).logprob)(params)
    return PolicyBatch(batch, states, logprob, logprob)


def stepped(objective, params, frozen, rollouts):
    """Loss and gradient of one step of the loop."""
    optimizer = optax.sgd(1.0)
    state = new_state(jax.tree.map(jnp.asarray, params), optimizer, 0, make_mesh(jax.devices()[:1]))
    after, metrics = jax.jit(make_step(optimizer, objective))(state, frozen, rollouts)
    assert metrics.applied == 1
    return float(metrics.loss), jax.tree.map(lambda x, y: np.asarray(x - y), params, after.params)


@pytest.mark.slow
def test_a_step_of_the_loop():
    """All kinds through `make_step`: the exact one and the top-K of all tokens agree, the sampled one is
    (log π − log q)·∇log π, the teacher's words are those of fine-tuning, and a teacher that is the student
    changes nothing.
    """
    model, params = random_model(tiny_config("gqa"))
    other, others = random_model(tiny_config("gqa"), seed=1)
    rules = Rules(random_table(VOCAB), Sampling(1.0))
    rollouts = rollouts_of(model, params, rules)
    labels, states = rollouts.batch.labels, rollouts.states

    @jax.jit
    def from_teacher(others):
        hidden = other.apply({"params": others}, rollouts.batch).hidden
        top = teacher_top_k(Reading(other, others, hidden), labels, states, rules, VOCAB)
        return top, token_logprobs(other, others, rollouts.batch, labels, states, rules).logprob

    top, reference = from_teacher(others)
    given = rollouts._replace(reference=reference, top_ids=top.ids, top_logprobs=top.logprobs)
    exact = distillation(model, DistillConfig(), rules, Teacher(other))
    loss, gradient = stepped(exact, params, {TEACHER: others}, rollouts)
    by_top, same = stepped(distillation(model, DistillConfig("top_k"), rules), params, {}, given)
    assert loss > 0.1 and by_top == pytest.approx(loss, rel=1e-5)
    assert tree_difference(same, gradient) <= 2e-5

    sampled = distillation(model, DistillConfig("sampled"), rules)
    estimate, by_samples = stepped(sampled, params, {}, given)
    gap, count = np.asarray(rollouts.old - reference), rollouts.free.sum()
    assert estimate == pytest.approx(float(gap.sum() / count), rel=1e-4)

    def plain(params):
        logprob = token_logprobs(model, params, rollouts.batch, labels, states, rules).logprob
        return jnp.sum(gap * logprob) / count

    assert tree_difference(by_samples, jax.jit(jax.grad(plain))(params)) <= 2e-5

    # With trust: as if the losses after the first token that the teacher would hardly write were 0.
    least = float(np.exp(np.quantile(np.asarray(reference)[rollouts.free], 0.2)))
    some = np.asarray(trusted(reference, rollouts.free, least))
    assert 0.2 * count < some.sum() < 0.9 * count
    whole = jax.jit(exact.losses)({**params, TEACHER: others}, rollouts, None)
    for kind, params_of, batch in (
        ("exact", {**params, TEACHER: others}, rollouts),
        ("top_k", params, given),
        ("sampled", params, given),
    ):
        of = [
            distillation(model, DistillConfig(kind, trust=x), rules, Teacher(other)).losses
            for x in (0.0, least)
        ]
        everywhere, cut = (jax.jit(losses)(params_of, batch, None) for losses in of)
        assert difference(cut, np.where(some, everywhere, 0.0)) <= 1e-6
        if kind != "sampled":
            assert difference(everywhere, whole) <= 2e-5

    def fine_tuning(params):
        return -token_logprobs(model, params, rollouts.batch, labels, states, rules).logprob.sum() / count

    loss, gradient = stepped(distillation(model, DistillConfig("sequence"), rules), params, {}, rollouts)
    expected, by_words = jax.jit(jax.value_and_grad(fine_tuning))(params)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert tree_difference(gradient, by_words) <= 2e-5
    own = distillation(model, DistillConfig(), rules, Teacher(model, shared=True))
    loss, gradient = stepped(own, params, {}, rollouts)
    assert abs(loss) <= 1e-6 and max(np.abs(x).max() for x in jax.tree.leaves(gradient)) <= 1e-6


@pytest.mark.medium
def test_a_teacher_with_a_view_of_its_own():
    """The same model with more before the rollout: each token meets the one at `teacher_index` of its row;
    and a student with low-rank additions has the model without them as its teacher.
    """
    model, params = random_model(tiny_config("gqa"))
    rules = Rules(random_table(VOCAB), Sampling(1.0))
    rollouts = rollouts_of(model, params, rules)
    more = fake_batch(model.config, rows=2, length=5, chunks=0, seed=1)
    ids = np.concatenate([more.input_ids, rollouts.batch.input_ids], axis=1)
    positions = np.broadcast_to(np.arange(14, dtype=np.int32), (3, 2, 14))
    privileged = Batch(ids, positions, np.ones((2, 14), np.int32))
    index = np.broadcast_to(np.arange(5, 14, dtype=np.int32), (2, 9))
    teacher = Teacher(model, shared=True)

    @jax.jit
    def both(params):
        got = teacher.read(params, rollouts._replace(teacher=privileged, teacher_index=index)).hidden
        return got, model.apply({"params": params}, privileged).hidden[:, 5:]

    got, expected = both(params)
    np.testing.assert_array_equal(got, expected)

    low = Lora(rank=2, targets=("language_model/layers/self_attn/q_proj",))
    adapted, _ = random_model(tiny_config("gqa"), lora=low)
    objective = distillation(adapted, DistillConfig(), rules, teacher)
    shapes = split(unbox(boxed_params(adapted)), trainable(adapted))[0]
    additions = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), shapes)
    loss, gradient = stepped(objective, additions, params, rollouts)
    assert loss > 1e-6 and max(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(kind="exat"), "did you mean 'exact'"),
        (dict(truncation=0.5), "truncation 0.5"),
        (dict(trust=1.0), "trust 1.0 must be"),
    ],
)
def test_wrong_configs_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        DistillConfig(**fields)


def test_a_teacher_of_another_vocabulary_is_refused():
    """Before anything is compiled; so is no teacher at all, and a batch without what the kind needs."""
    model, other = (random_model(tiny_config("gqa", vocab_size=n))[0] for n in (97, 98))
    rules = Rules(random_table(VOCAB), Sampling(1.0))
    with pytest.raises(UserError, match="vocabulary has 98 tokens, the student's 97"):
        distillation(model, DistillConfig(), rules, Teacher(other))
    with pytest.raises(UserError, match="needs a teacher"):
        distillation(model, DistillConfig(), rules)
    tokens = np.zeros((1, 4), np.int32)
    rollouts = PolicyBatch(fake_batch(model.config, 1, 4, 0), tokens, tokens, tokens)
    params = unbox(boxed_params(model))
    for kind, name in (("sampled", "reference"), ("top_k", "top_ids")):
        with pytest.raises(ValueError, match=f"without {name}"):
            jax.eval_shape(distillation(model, DistillConfig(kind), rules).losses, params, rollouts, None)

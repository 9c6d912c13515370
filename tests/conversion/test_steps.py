"""The exact steps of a conversion, each alone, in float64, under M-RoPE with random positions (SPEC §3).

What GQA and M²LA compute is written out here once more in NumPy, from SPEC §2. The layer is odd on purpose:
six query heads and three key heads with biases. M-RoPE is interleaved, 8, 4 and 4 of 16 frequencies.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion.draws import positive, random
from models.peers import difference, tiny_config

from iv3jax.conversion import logits, rotate
from iv3jax.conversion.factorise import factorise
from iv3jax.conversion.layer import GQALayer, Maps, assemble
from iv3jax.conversion.passes import Parts, Rows
from iv3jax.models.rope import Rope

TOLERANCE = 1e-10
HEADS, GROUPS, DIM, WIDTH, TOKENS = 6, 3, 32, 20, 7
SECTION, THETA, EPSILON = (8, 4, 4), 1e4, 1e-6
KEYS, Z = GROUPS * DIM, 2 * GROUPS * DIM
ROTATIONS = ("unitary", "weighted", "real")


def parameters():
    """A source layer's `self_attn` in float64, with biases and with q/k norms."""

    def linear(seed, heads):
        kernel = random(heads, DIM, WIDTH, seed=seed) * WIDTH**-0.5
        return {"kernel": kernel, "bias": random(heads, DIM, seed=seed + 50)}

    return {
        "q_proj": linear(1, HEADS),
        "k_proj": linear(2, GROUPS),
        "v_proj": linear(3, GROUPS),
        "o_proj": {"kernel": random(WIDTH, HEADS, DIM, seed=4)},
        "q_norm": {"scale": random(DIM, seed=5)},
        "k_norm": {"scale": random(DIM, seed=6)},
    }


def positions(still=False):
    """(T, 3) time, height and width of each token; `still`: all tokens at one place."""
    found = np.random.default_rng(7).integers(0, 300, size=(TOKENS, 3))
    return np.broadcast_to(found[:1], found.shape) if still else found


def phases(where, components=1, stride=1):
    """(T, pairs) what RoPE multiplies each pair by; with a stride there are fewer frequencies."""
    pairs = DIM // 2 // stride
    section = [s // stride for s in SECTION]
    axes = [0] * pairs
    for i in range(pairs):
        for axis in (1, 2):
            if i % 3 == axis and i < 3 * section[axis]:
                axes[i] = axis
    angles = [where[:, axes[i]] * THETA ** (-i / pairs) for i in range(pairs)] * components
    return np.exp(1j * np.stack(angles, axis=1))


def paired(x):
    """(…, d) in half order → (…, d/2) complex."""
    return x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]


def numbers(z):
    """Real and imaginary parts."""
    return np.stack([z.real, z.imag])


def interleaved(x):
    """(…, e) in interleaved pairs → (…, e/2) complex."""
    return x[..., 0::2] + 1j * x[..., 1::2]


def rms_factor(x):
    return 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)


def apply(linear, x):
    """(T, in) → (T, …)"""
    return np.tensordot(x, linear["kernel"], axes=(1, -1)) + linear.get("bias", 0)


def attend(found, value):
    """Softmax of (H, T, S) logits over what is not later, times (S, H, v)."""
    seen = np.tril(np.ones(found.shape[1:], bool))
    weights = np.where(seen, np.exp(found - np.where(seen, found, -np.inf).max(-1, keepdims=True)), 0)
    return np.einsum("hts,shv->thv", weights / weights.sum(-1, keepdims=True), value)


def turned_logits(query, key, phase):
    """(T, H, pairs) and (S, H, pairs) complex → (H, T, S), both turned."""
    query, key = query * phase[:, None], key * phase[:, None]
    return np.einsum("thi,shi->hts", np.conj(query), key).real


def repeated(x):
    """(T, G, …) → (T, H, …)."""
    return np.repeat(x, HEADS // GROUPS, axis=1)


def gqa_logits(query, key, phase):
    """The source's, of (T, H, d) queries and (T, G, d) keys before RoPE, without the scale."""
    return turned_logits(paired(query), repeated(paired(key)), phase)


def split_logits(split, query, key, phase):
    """What a split makes of the same: one RoPE key for all heads, and content that is not turned."""
    flat = key.reshape(len(key), -1)
    rope = interleaved(flat @ split.to_rope.T)[:, None].repeat(HEADS, axis=1)
    turned = turned_logits(interleaved(np.einsum("hed,thd->the", split.query_rope, query)), rope, phase)
    content = np.einsum("hdc,sc->shd", split.content_up, flat @ split.to_content.T)
    return turned + np.einsum("thd,shd->hts", query, content)


def rotations(kind, plan):
    """T and T⁻¹ of each frequency, found on random moments."""
    members = plan.members
    moments = rotate.complex_moments(positive(KEYS, seed=8), GROUPS, members)
    weights = np.exp(random(*moments.shape[:2], seed=9)) if kind == "weighted" else None
    return rotate.unitaries(moments, weights, real=kind == "real")


def make_split(components=1, kind="weighted", rope_dim=None, fold=1, sections=SECTION):
    plan = rotate.layout(DIM, rope_dim or DIM * components, components, fold, sections)
    return rotate.split(*rotations(kind, plan), plan, GROUPS, HEADS // GROUPS, DIM)


# Steps 3, 4: which combination of the key heads keeps RoPE.


@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_map_of_one_frequency_commutes_with_rope(kind):
    """The keys mixed before RoPE are the turned keys mixed; its inverse brings the keys back."""
    plan = rotate.layout(DIM, DIM, 1, 1, SECTION)
    to, back = rotations(kind, plan)
    key, phase = paired(random(TOKENS, GROUPS, DIM)), phases(positions())

    def mixed(maps, x):
        return np.einsum("fij,tjf->tif", maps, x)

    before, after = mixed(to, key) * phase[:, None], mixed(to, key * phase[:, None])
    assert difference(numbers(before), numbers(after)) <= TOLERANCE
    assert difference(numbers(mixed(back, before)), numbers(key * phase[:, None])) <= TOLERANCE
    adjoint = np.conj(np.swapaxes(to, 1, 2))
    assert (difference(numbers(adjoint), numbers(back)) <= TOLERANCE) == (kind != "weighted")


@pytest.mark.parametrize("kind", ROTATIONS)
def test_all_components_kept_are_the_source(kind):
    """A RoPE component for each key head: logits of random positions on three axes."""
    query, key = random(TOKENS, HEADS, DIM), random(TOKENS, GROUPS, DIM, seed=1)
    split = make_split(GROUPS, kind)
    assert split.to_rope.shape == (KEYS, KEYS) and split.to_content.shape == (0, KEYS)
    got = split_logits(split, query, key, phases(positions(), GROUPS))
    assert difference(got, gqa_logits(query, key, phases(positions()))) <= TOLERANCE


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize(("components", "rope_dim"), [(1, 32), (2, 64), (1, 8)])
def test_what_stops_turning_is_whole(kind, components, rope_dim):
    """With all tokens at one place RoPE does nothing, and a split with content is exact."""
    query, key = random(TOKENS, HEADS, DIM), random(TOKENS, GROUPS, DIM, seed=1)
    stride = DIM * components // rope_dim
    sections, where = (SECTION, positions(still=True)) if stride == 1 else (None, positions(still=True))
    split = make_split(components, kind, rope_dim, stride, sections)
    assert len(split.to_rope) == rope_dim and len(split.to_content) == KEYS - rope_dim
    got = split_logits(split, query, key, phases(where, components, stride))
    assert difference(got, gqa_logits(query, key, phases(where))) <= TOLERANCE
    moved = split_logits(split, query, key, phases(positions(), components, stride))
    assert difference(moved, gqa_logits(query, key, phases(positions()))) > 1e-2


@pytest.mark.parametrize("kind", ROTATIONS)
def test_the_components_are_the_strongest_and_uncorrelated(kind):
    """E of the components' products is diagonal and descending; moments are those of the keys themselves."""
    key = random(400, GROUPS, DIM) @ random(DIM, DIM, seed=1) + random(GROUPS, DIM, seed=2)
    flat = key.reshape(400, -1)
    plan = rotate.layout(DIM, DIM, 1, 1, SECTION)
    moments = rotate.complex_moments(flat.T @ flat / 400, GROUPS, plan.members)
    z = paired(key)
    expected = np.einsum("tif,tjf->fij", z, np.conj(z)) / 400
    assert difference(numbers(moments), numbers(expected)) <= TOLERANCE
    weights = np.exp(random(*moments.shape[:2], seed=9)) if kind == "weighted" else None
    to, _ = rotate.unitaries(moments, weights, real=kind == "real")
    found = to @ moments @ np.conj(np.swapaxes(to, 1, 2))
    energy = np.diagonal(found, axis1=1, axis2=2).real
    assert (np.diff(energy, axis=1) <= 0).all()
    apart = (found.real if kind == "real" else found) - energy[..., None] * np.eye(GROUPS)
    assert np.abs(apart).max() <= TOLERANCE * energy.max()
    share = energy[:, 0].sum() / energy.sum()
    assert abs(rotate.kept_energy(moments, to, plan) - share) <= TOLERANCE


# How the frequencies are laid out.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((32, 48, 1, 1, None), "qk_rope_head_dim 48 does not divide head_dim 32 × 1 components"),
        ((32, 64, 1, 1, None), "qk_rope_head_dim 64 does not divide head_dim 32 × 1 components"),
        ((32, 16, 1, 1, None), "freqfold 1 must be a multiple of 2 and divide a head's 16 frequencies"),
        ((32, 32, 1, 3, None), "freqfold 3 must be a multiple of 1 and divide a head's 16 frequencies"),
        ((32, 32, 1, 2, SECTION), r"32 with freqfold 2: with .*\[8, 4, 4\].* take 32 and 1$"),
        ((32, 32, 2, 2, SECTION), r"32 with freqfold 2: with .* take 64 and 1$"),
    ],
)
def test_layouts_that_cannot_be(given, message):
    with pytest.raises(rotate.LayoutError, match=message):
        rotate.layout(*given)


@pytest.mark.parametrize(
    ("rope_dim", "components", "fold"),
    [(32, 1, 1), (32, 1, 4), (16, 1, 2), (8, 1, 8), (64, 2, 1), (32, 2, 4)],
)
def test_pairs_turn_at_the_frequencies_of_the_new_model(rope_dim, components, fold):
    """SPEC: f_i = theta^(−2i/e) of e / components dims. A pair is filled from its own frequency's group."""
    plan = rotate.layout(DIM, rope_dim, components, fold, None)
    own = rope_dim // components
    turning = THETA ** (-2 * plan.anchor / DIM)
    expected = np.tile(THETA ** (-2 * np.arange(own // 2) / own), components)
    assert difference(turning, expected) <= TOLERANCE
    assert sorted(np.concatenate(plan.kept)) == list(range(rope_dim // 2))
    for members, kept in zip(plan.members, plan.kept, strict=True):
        assert len(members) == fold and set(plan.anchor[kept]) <= set(members)
    split = make_split(components, "unitary", rope_dim, fold, None)
    # A pair's row meets its group's frequencies, of all heads, and no other.
    for kept, members in zip(plan.kept, plan.members, strict=True):
        for row in (2 * kept, 2 * kept + 1):
            met = np.abs(paired(split.to_rope[row].reshape(-1, GROUPS, DIM))).max(axis=(0, 1))
            assert set(np.flatnonzero(met)) == set(members)


ANCHOR = np.array([0, 0, 0, 1, 4, 4, 7, 15])


def test_pairs_that_are_listed_turn_at_their_own_frequency():
    """Any number of components of a frequency keeps RoPE; the others become content, and nothing is lost."""
    plan = rotate.listed(ANCHOR, DIM // 2)
    assert [list(kept) for kept in plan.kept[:5]] == [[0, 1, 2], [3], [], [], [4, 5]]
    split = rotate.split(*rotations("weighted", plan), plan, GROUPS, HEADS // GROUPS, DIM)
    assert split.to_rope.shape == (16, KEYS) and split.to_content.shape == (KEYS - 16, KEYS)
    for pair, frequency in enumerate(ANCHOR):
        for row in (2 * pair, 2 * pair + 1):
            met = np.abs(paired(split.to_rope[row].reshape(-1, GROUPS, DIM))).max(axis=(0, 1))
            assert set(np.flatnonzero(met)) == {frequency}
    key, query = random(KEYS), random(HEADS, DIM, seed=9)
    there = np.einsum("hed,hd->he", split.query_rope, query) @ (split.to_rope @ key)
    there += np.einsum("hdc,hd->hc", split.content_up, query) @ (split.to_content @ key)
    wanted = np.einsum("hd,hd->h", query, key.reshape(GROUPS, DIM).repeat(HEADS // GROUPS, axis=0))
    assert difference(there, wanted) <= TOLERANCE


# Step 4: the coefficients that are fitted.


@pytest.mark.parametrize("given", [(1, "weighted"), (2, "unitary"), (1, "real", 8, 4, None)])
def test_coefficients_come_back(given):
    split = make_split(*given)
    plan = rotate.layout(DIM, len(split.to_rope), given[0], *(given[3:] or (1, SECTION)))
    index = logits.features_of(plan, GROUPS, DIM)
    values = logits.coefficients(split, index)
    # A frequency of a head has a complex coefficient for every number of its group's.
    assert values.shape == (HEADS, DIM * plan.members.shape[1] * GROUPS)
    same = logits.with_coefficients(split, values, index)
    assert difference(same.query_rope, split.query_rope) <= TOLERANCE
    assert difference(same.content_up, split.content_up) <= TOLERANCE
    other = random(*values.shape)
    again = logits.coefficients(logits.with_coefficients(split, other, index), index)
    assert difference(again, other) <= TOLERANCE


def test_coefficients_of_listed_pairs_come_back():
    plan = rotate.listed(ANCHOR, DIM // 2)
    split = rotate.split(*rotations("weighted", plan), plan, GROUPS, HEADS // GROUPS, DIM)
    index = logits.features_of(plan, GROUPS, DIM)
    other = random(*logits.coefficients(split, index).shape)
    again = logits.coefficients(logits.with_coefficients(split, other, index), index)
    assert difference(again, other) <= TOLERANCE


def sampled(cached, far, split, components, sharpness=1.0):
    """The normal equations of a split, in fp32, and which numbers they are about."""
    shape = dict(num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=DIM, mrope_section=SECTION)
    config = replace(tiny_config("gqa").text_config, **shape)
    phase = phases(positions())[None]
    rows = Rows(Rope(jnp.asarray(phase.real), jnp.asarray(phase.imag)), jnp.ones((1, TOKENS)), None, None)
    query, key = random(1, TOKENS, HEADS, DIM), random(1, TOKENS, GROUPS, DIM, seed=1)
    scale = np.exp(random(1, TOKENS, GROUPS)) if cached else np.ones((1, TOKENS, GROUPS))
    query = sharpness * query
    parts = jax.tree.map(jnp.float32, Parts(query, query, key, key * scale[..., None], scale, key))
    plan = rotate.layout(DIM, DIM * components, components, 1, SECTION)
    index = logits.features_of(plan, GROUPS, DIM)
    maps = map(jnp.float32, (split.to_rope, split.to_content))
    given = (parts, jnp.float32(key.reshape(1, -1, KEYS)), rows, *maps, jnp.asarray(plan.anchor))
    places = tuple(map(jnp.asarray, index))
    return logits.sample(config, 8, 6, cached, far, *given, places, jax.random.key(0)), index


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_an_exact_split_misses_no_logits(cached, far):
    """The normal equations, which are sampled in fp32, say so too; with less kept they do not."""
    found = {1: 1.0}
    for components in (1, GROUPS) if cached else (GROUPS,):
        split = make_split(components)
        samples, index = sampled(cached, far, split, components)
        found[components] = logits.missed(split, samples, index)
        better = logits.fitted(split, samples, index)
        assert logits.missed(better, samples, index) <= max(0.8 * found[components], 1e-6)
    assert found[GROUPS] <= 1e-5 and found[1] > 0.1


def test_keys_without_attention_are_drawn_where_layers_choose():
    """Heads that look at few keys say little of the others, unless far ones are drawn too."""
    split = make_split(1)
    near, far = (sampled(False, which, split, 1, sharpness=8)[0].energy.sum() for which in (False, True))
    assert far > 5 * near


# Step 7, and all of them together.


def test_a_layer_without_biases_has_zeros():
    params = {name: {"kernel": x["kernel"]} for name, x in parameters().items() if "proj" in name}
    layer = GQALayer.of(params)
    assert layer.head_dim == DIM and layer.keys == KEYS and layer.key_value.shape == (Z, WIDTH)
    assert not layer.query_bias.any() and not layer.key_value_bias.any()
    value = np.concatenate([params[n]["kernel"] for n in ("k_proj", "v_proj")]).reshape(Z, WIDTH)
    assert np.array_equal(layer.key_value, value)


def test_the_queries_carry_the_new_scale():
    """Divided by sqrt(n+e) they are what divided by sqrt(d) they were, whatever e is."""
    params = parameters()
    layer = GQALayer.of(params)
    for split in (make_split(1), make_split(GROUPS), make_split(1, rope_dim=8, fold=4, sections=None)):
        e = len(split.to_rope)
        unchanged = np.stack([np.eye(DIM, DIM + 1)] * HEADS)
        rope = split.to_rope @ np.eye(KEYS, Z + 1)
        up = random(len(split.to_content) + KEYS, 3)
        made = assemble(layer, split, Maps(unchanged, rope, random(3, Z + 1), up), params)["q_proj"]
        for kind, old in (("kernel", layer.query), ("bias", layer.query_bias[..., None])):
            new = made[kind].reshape(HEADS, DIM + e, -1) / np.sqrt(DIM + e)
            expected = np.concatenate([old, split.query_rope @ old], axis=1) / np.sqrt(DIM)
            assert difference(new, expected) <= TOLERANCE


def gqa(params, x, phase, query_map, used):
    """(T, D) → (T, D) as SPEC §3 starts from it; the norms' affine substitutes, or None for the norms."""
    query, key, value = (apply(params[f"{name}_proj"], x) for name in "qkv")
    if query_map is None:
        query = query * rms_factor(query) * params["q_norm"]["scale"]
        key = key * rms_factor(key) * params["k_norm"]["scale"]
    else:
        query = np.einsum("hkd,thd->thk", query_map[..., :-1], query) + query_map[..., -1]
        both = np.concatenate([y.reshape(len(x), -1) for y in (key, value)], axis=1)
        both = both @ used[:, :-1].T + used[:, -1]
        key, value = (y.reshape(len(x), GROUPS, DIM) for y in np.split(both, 2, axis=1))
    found = gqa_logits(query, key, phase) / np.sqrt(DIM)
    return np.einsum("thk,dhk->td", attend(found, repeated(value)), params["o_proj"]["kernel"])


def m2la(made, x, phase, e, absorbed):
    """(T, D) → (T, D) by SPEC §2: keys and values written out, or queries carried into the latent."""
    query = apply(made["q_proj"], x)
    factor = np.ones((len(x), HEADS))
    if "q_expand" in made:
        query = query * rms_factor(query) * made["q_norm"]["scale"]
        query = np.einsum("hkd,thd->thk", made["q_expand"]["kernel"], query)
        factor = repeated(rms_factor(apply(made["k_norm_proj"], x)))[..., 0]
    n = query.shape[-1] - e
    inner = apply(made["kv_a_proj_with_mqa"], x)
    latent, rope = inner[:, :-e], interleaved(inner[:, -e:])[:, None].repeat(HEADS, axis=1)
    up_key, up_value = np.split(made["kv_b_proj"]["kernel"], [n], axis=1)
    if absorbed:
        found = np.einsum("thr,sr->hts", np.einsum("thn,hnr->thr", query[..., :n], up_key), latent)
    else:
        found = np.einsum("thn,shn->hts", query[..., :n], np.einsum("sr,hnr->shn", latent, up_key))
    found = found + turned_logits(interleaved(query[..., n:]), rope, phase)
    found = found * factor.T[:, None] / np.sqrt(n + e)
    if absorbed:
        context = attend(found, latent[:, None].repeat(HEADS, axis=1))
        out = np.einsum("thr,hvr->thv", context, up_value)
    else:
        out = attend(found, np.einsum("sr,hvr->shv", latent, up_value))
    return np.einsum("thv,dhv->td", out, made["o_proj"]["kernel"])


@pytest.mark.parametrize("cached", [False, True], ids=["linear", "cached"])
@pytest.mark.parametrize("components", [1, GROUPS])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_the_whole_layer_is_the_source(kind, components, cached):
    """At full rank: with every component kept anywhere, else where all tokens have one place."""
    params, split = parameters(), make_split(components, kind)
    query, used = None, np.eye(Z, Z + 1)
    if cached:
        used[:KEYS, :KEYS] *= np.tile(params["k_norm"]["scale"], GROUPS)
        # A source with norms has no biases of keys (Qwen3).
        del params["k_proj"]["bias"]
    else:
        query = random(HEADS, DIM, DIM + 1, seed=10) / DIM**0.5
        used[:KEYS] = random(KEYS, Z + 1, seed=11) / Z**0.5
    layer = GQALayer.of(params)
    size = len(split.to_content) + KEYS
    factors = factorise(split.targets() @ used, positive(Z + 1, seed=20), positive(size, seed=21))
    maps = Maps(query, split.to_rope @ used[:KEYS], factors.down(size), factors.up(size))
    assert maps.rank == size
    made = assemble(layer, split, maps, params)
    x, where = random(TOKENS, WIDTH, seed=22), positions(still=components < GROUPS)
    expected = gqa(params, x, phases(where), query, used)
    for absorbed in (False, True):
        got = m2la(made, x, phases(where, components), DIM * components, absorbed)
        assert difference(got, expected) <= TOLERANCE
    # What a conversion may fit besides is handed through.
    extra = (random(2, size, size), random(2, size))
    maps = Maps(query, maps.rope, maps.down, maps.up, extra).with_output(2 * layer.output)
    more = assemble(layer, split, maps, params)
    assert np.array_equal(more["o_proj"]["kernel"], 2 * layer.output)
    # The latent's numbers are scaled so that what makes them is as large as what reads them.
    kernel, bias = maps.down[:, :-1] @ layer.key_value, maps.down @ np.append(layer.key_value_bias, 1.0)
    into, outof = more["kv_a_proj_with_mqa"], more["kv_b_proj"]["kernel"]
    size_in, size_out = np.linalg.norm(into["kernel"][:size], axis=1), np.linalg.norm(outof, axis=(0, 1))
    assert difference(size_in, size_out) <= TOLERANCE * size_in.max()
    for matrix, shift, of, by in zip(
        *extra, more["kv_adapters"]["kernel"], more["kv_adapters"]["bias"], strict=True
    ):
        adapted = maps.up[-KEYS:] @ (matrix @ (kernel @ x[0] + bias) + shift)
        same = outof[:, DIM:] @ (of @ (into["kernel"][:size] @ x[0] + into["bias"][:size]) + by)
        assert difference(same, adapted.reshape(GROUPS, DIM).repeat(HEADS // GROUPS, axis=0)) <= 1e-8


def test_targets_are_content_and_values():
    split, y = make_split(1), random(Z)
    assert difference(split.targets() @ y, np.concatenate([split.to_content @ y[:KEYS], y[KEYS:]])) == 0

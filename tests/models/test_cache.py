"""The cache: what is written where, what is not, and how many bytes it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.peers import ATTENTIONS, conversation, difference, forward, random_model, tiny_config

from iv3jax.chips import CHIPS
from iv3jax.data.collate import collate
from iv3jax.errors import UserError
from iv3jax.models.batch import Batch
from iv3jax.models.cache import Cache, init_cache, write
from iv3jax.models.presets import PRESETS
from kernels_pallas.choice import target

CAPACITY = 12


@pytest.fixture(scope="module", params=ATTENTIONS)
def tiny(request):
    """A model, its parameters and the jitted step that feeds tokens into a cache."""
    model, params = random_model(tiny_config(request.param))
    step = jax.jit(lambda batch, cache: model.apply({"params": params}, batch, None, cache))
    return model, params, step


def text(model, lengths, width: int = 8, seed: int = 0) -> Batch:
    """Right-padded rows of text of these lengths."""
    rows = [[conversation(model.config, [n], seed + i)] if n else [] for i, n in enumerate(lengths)]
    return collate(rows, model.config, length=width)


def later(batch: Batch, by: int) -> Batch:
    """The same tokens, so many positions further on."""
    return batch._replace(positions=batch.positions + np.int32(by))


def entries_difference(a: Cache, b: Cache) -> float:
    """The largest difference between the entries of two caches."""
    return max(
        difference(a.entries[k].astype(jnp.float32), b.entries[k].astype(jnp.float32)) for k in a.entries
    )


def by_slot(cache: Cache) -> dict[str, np.ndarray]:
    """The entries with the slots as third axis: (L, B, S, …)."""
    return {k: np.asarray(x if x.ndim == 4 else x.swapaxes(2, 3)) for k, x in cache.entries.items()}


def two_steps(tiny, dtype):
    """Rows of 5, 0 and 8 tokens, then 3, 8 and 0 more: hidden states, those of one forward, the cache."""
    model, params, step = tiny
    cache = init_cache(model.config.text_config, 3, CAPACITY, dtype)
    whole = text(model, [8, 8, 8])
    split = [5, 0, 8]
    first = whole._replace(segment_ids=(np.arange(8) < np.array(split)[:, None]).astype(np.int32))
    # Over a cache a row's tokens come first: those after the first step's move to the front.
    shift = (np.arange(8) + np.array(split)[:, None]) % 8
    rest = whole._replace(
        input_ids=np.take_along_axis(whole.input_ids, shift, axis=1),
        positions=np.take_along_axis(whole.positions, shift[None], axis=2),
        segment_ids=np.take_along_axis(1 - first.segment_ids, shift, axis=1),
    )
    before = step(first, cache)
    assert before.cache.length.tolist() == split
    after = step(rest, before.cache)
    assert after.cache.length.tolist() == [8, 8, 8] and not after.cache.overflow.any()
    back = np.argsort(shift, axis=1)[..., None]
    moved = np.take_along_axis(np.asarray(after.hidden), back, axis=1)
    hidden = np.where(first.segment_ids[..., None] == 1, before.hidden, moved)
    return hidden, forward(model, params, whole)["hidden"], after.cache


def test_rows_have_their_own_length(tiny):
    hidden, expected, _ = two_steps(tiny, jnp.float32)
    assert difference(hidden, expected) <= 1e-5


def test_bf16_entries_are_the_fp32_ones_rounded(tiny):
    """Exactly so in the first layer. Further on the rounding, relative 2⁻⁹ an entry, moves hidden states of
    order 1 by 2e-2.
    """
    hidden, expected, cache = two_steps(tiny, jnp.bfloat16)
    _, _, exact = two_steps(tiny, jnp.float32)
    assert 1e-4 < difference(hidden, expected) <= 5e-2
    for name, entry in cache.entries.items():
        assert entry.dtype == jnp.bfloat16 and exact.entries[name].dtype == jnp.float32
        np.testing.assert_array_equal(entry[0], exact.entries[name][0].astype(jnp.bfloat16))


def test_full_rows_overflow_and_nothing_is_clamped(tiny):
    """A row of 7 tokens with 7 more in 12 slots keeps 12, raises its flag, and changes no written slot."""
    model, _, step = tiny
    cache = init_cache(model.config.text_config, 2, CAPACITY, jnp.float32)
    before = step(text(model, [7, 4]), cache).cache
    after = step(later(text(model, [7, 7], seed=5), 7), before).cache
    assert after.length.tolist() == [12, 11]
    assert after.overflow.tolist() == [True, False]
    for name, entry in by_slot(after).items():
        old = by_slot(before)[name]
        np.testing.assert_array_equal(entry[:, 0, :7], old[:, 0, :7])
        np.testing.assert_array_equal(entry[:, 1, :4], old[:, 1, :4])
        assert not old[:, 0, 7:].any() and entry[0, 0, 7:].any(axis=tuple(range(1, entry.ndim - 2))).all()
        assert not entry[:, 1, 11:].any()
    again = step(later(text(model, [3, 1], seed=9), 14), after).cache
    assert again.length.tolist() == [12, 12] and again.overflow.tolist() == [True, False]
    for name, entry in again.entries.items():
        np.testing.assert_array_equal(entry[:, 0], after.entries[name][:, 0])
    last = step(text(model, [0, 1]), again).cache
    assert last.overflow.tolist() == [True, True]
    assert entries_difference(last, again) == 0


def test_exactly_full_is_no_overflow(tiny):
    model, _, step = tiny
    cache = init_cache(model.config.text_config, 1, 8, jnp.float32)
    out = step(text(model, [8]), cache)
    assert out.cache.length.tolist() == [8] and not out.cache.overflow.any()


def test_finished_rows_write_nothing(tiny):
    """A row whose tokens are all padding keeps entries, length and flag, whatever the tokens are."""
    model, _, step = tiny
    before = step(text(model, [6, 6]), init_cache(model.config.text_config, 2, CAPACITY, jnp.float32)).cache
    fed = later(text(model, [3, 3], seed=4), 6)
    fed.segment_ids[0] = 0
    after = step(fed, before).cache
    assert after.length.tolist() == [6, 9] and not after.overflow.any()
    for name, entry in by_slot(after).items():
        np.testing.assert_array_equal(entry[:, 0], by_slot(before)[name][:, 0])
        assert entry[0, 1, 6:9].any(axis=tuple(range(1, entry.ndim - 2))).all()


# One token a row is written in another way than several.
ROWS = st.sampled_from([1, 4]).flatmap(
    lambda width: st.lists(
        st.tuples(st.integers(0, 6), st.lists(st.booleans(), min_size=width, max_size=width)),
        min_size=1,
        max_size=3,
    )
)


@pytest.mark.medium
@pytest.mark.parametrize("heads", [1, 2])
@settings(max_examples=40, deadline=None)
@given(rows=ROWS)
def test_slots_and_writes_against_a_loop(heads, rows):
    """Any lengths and any padding, on a cache of 6 slots, against appending token by token."""
    capacity, layers = 6, 2
    lengths = [min(n, capacity) for n, _ in rows]
    segments = np.array([real for _, real in rows], np.int32)
    own = (heads, 1)
    entry = np.zeros((layers, len(rows), capacity, *own), np.float32)
    values = 1 + np.arange(segments.size * heads, dtype=np.float32).reshape(*segments.shape, *own)
    cache = Cache(
        {"entry": jnp.asarray(entry.swapaxes(2, 3))}, jnp.asarray(lengths), jnp.zeros(len(rows), bool)
    )

    expected, overflow = entry.copy(), [False] * len(rows)
    for row, (_, real) in enumerate(rows):
        for token in np.flatnonzero(real):
            if lengths[row] == capacity:
                overflow[row] = True
                continue
            expected[1, row, lengths[row]] = values[row, token]
            lengths[row] += 1

    written = write(
        cache.entries["entry"], jnp.int32(1), cache.slots(jnp.asarray(segments)), jnp.asarray(values)
    )
    after = cache.advanced({"entry": written}, jnp.asarray(segments))
    np.testing.assert_array_equal(written, expected.swapaxes(2, 3))
    assert after.length.tolist() == lengths and after.overflow.tolist() == overflow


def test_capacity_in_whole_tiles_on_a_chip():
    config = PRESETS["internvideo3_8b"].text_config
    for chip, capacity in (("v5p", 256), ("h100", 256)):
        with target(CHIPS[chip]):
            assert jax.eval_shape(lambda: init_cache(config, 1, 130)).capacity == capacity
    assert jax.eval_shape(lambda: init_cache(config, 1, 130)).capacity == 130


def test_unknown_and_unfitting_dtypes():
    with pytest.raises(UserError, match="cache dtype int4 is not one of float32, bfloat16"):
        init_cache(tiny_config("m2la").text_config, 1, 4, jnp.int4)
    with pytest.raises(UserError, match="int8 is for latents, and this model has keys and values"):
        init_cache(tiny_config("gqa").text_config, 1, 4, jnp.int8)


@pytest.mark.parametrize(
    ("name", "per_token"),
    # 2 bytes · 36 layers · (896 + 128), and · (2 · 8 · 128); SPEC §2.
    [("internvideo3_8b", 73_728), ("qwen3_vl_8b", 147_456)],
)
def test_bytes_of_the_8b_models(name, per_token):
    config = PRESETS[name].text_config
    sizes = [
        sum(
            x.size * x.dtype.itemsize
            for x in jax.eval_shape(lambda n=n: init_cache(config, 1, n).entries).values()
        )
        for n in (1, 1000)
    ]
    assert sizes == [per_token, 1000 * per_token]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("dtype", "itemsize"), [(jnp.bfloat16, 2), (jnp.float32, 4)])
def test_bytes_of_real_arrays(attention, dtype, itemsize):
    config = tiny_config(attention).text_config
    width = 13 + 8 if attention == "m2la" else 2 * 2 * 8
    cache = init_cache(config, 5, 7, dtype)
    assert cache.nbytes == sum(np.asarray(x).nbytes for x in cache.entries.values())
    assert cache.nbytes == itemsize * 3 * width * 5 * 7
    assert cache.capacity == 7


def test_bytes_of_a_real_8b_cache_slot():
    """Real arrays of the presets' shapes, as the 8B models allocate them: 16 tokens, 1.2 and 2.4 MB."""
    for name, per_token in (("internvideo3_8b", 73_728), ("qwen3_vl_8b", 147_456)):
        cache = init_cache(PRESETS[name].text_config, 1, 16)
        assert sum(np.asarray(x).nbytes for x in cache.entries.values()) == cache.nbytes == 16 * per_token

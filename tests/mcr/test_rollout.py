"""The rollout: what it says, that a plain pass over it agrees, and that company and order change nothing."""

from dataclasses import replace
from itertools import groupby

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

from iv3jax.compiles import Stopwatch
from iv3jax.data.chat import VisionItem, render
from iv3jax.data.positions import mrope_positions
from iv3jax.errors import UserError
from iv3jax.generate.sampling import Sampling, filtered
from iv3jax.mcr.grammar import advance, longest_forced, mask
from iv3jax.mcr.language import TOOLS
from iv3jax.mcr.prompts import Prompts, fill_bank
from iv3jax.mcr.rollout import prepare, program, rollout
from iv3jax.mcr.step import Given, Loop, Work
from iv3jax.mcr.trajectories import FORCED, FREE, OBSERVATION, PAD, PROMPT, Trajectories, as_batch
from iv3jax.mcr.world import NO_TIME
from iv3jax.sharding import make_mesh

pytestmark = pytest.mark.medium

KEY = jax.random.key(7)
MODELS = ["tiny", pytest.param("tiny_gqa", marks=pytest.mark.slow)]


def roll(
    own: loops.Lab, prompts: Prompts, key: jax.Array = KEY, **changes: object
) -> tuple[Trajectories, Work]:
    """A group of rollouts of each prompt."""
    return rollout(*own.given(prompts, **changes), key, loops.GROUP)


def prepare_loop(own: loops.Lab, prompts: Prompts) -> Loop:
    """What `roll` compiles in."""
    model, _, prompts, *rest = own.given(prompts)
    return prepare(model, prompts, *rest, loops.GROUP)


def after_prompts(found: Trajectories, prompts: Prompts) -> list[list[np.ndarray]]:
    """What follows the prompt in each row, as arrays that no padding is in."""
    starts = np.asarray(jnp.sum(prompts.segment_ids, axis=1))[np.asarray(found.prompt)]
    lengths = np.asarray(found.length)
    record = [np.asarray(x) for x in found.record]
    return [
        [x[..., row, start:end] for x in record]
        for row, (start, end) in enumerate(zip(starts, lengths, strict=True))
    ]


def assert_rows_equal(some: list[list[np.ndarray]], others: list[list[np.ndarray]]) -> None:
    for row, (a, b) in enumerate(zip(some, others, strict=True)):
        for x, y in zip(a, b, strict=True):
            if x.dtype == np.float32:
                np.testing.assert_allclose(x, y, atol=1e-4, rtol=0, err_msg=f"row {row}")
            else:
                np.testing.assert_array_equal(x, y, err_msg=f"row {row}")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, 0.8),
        pytest.param(Sampling(1.0), marks=pytest.mark.slow),
        pytest.param(Sampling(1.3, 1.0, 12), marks=pytest.mark.slow),
    ],
)
def test_log_probs_are_those_of_one_plain_pass(name: str, sampling: Sampling) -> None:
    own = loops.lab(name)
    prompts = loops.prompts_of(own)
    found, _ = roll(own, prompts, sampling=sampling)
    batch = as_batch(found, prompts)
    hidden = own.model.apply({"params": own.params}, batch).hidden
    logits = own.model.apply({"params": own.params}, hidden, method="logits")[:, :-1]
    states, tokens = found.record.states[:, 1:], found.tokens[:, 1:]
    kept = filtered(jnp.where(mask(own.grammar, states), logits, -jnp.inf), sampling)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(kept), tokens[..., None], axis=-1)[..., 0]
    free = np.asarray(found.kinds[:, 1:] == FREE)
    assert free.sum() > 100
    np.testing.assert_allclose(logprobs[free], found.record.logprobs[:, 1:][free], atol=1e-4, rtol=0)
    assert not np.asarray(found.record.logprobs)[np.asarray(found.kinds) != FREE].any()


@pytest.mark.parametrize("name", MODELS)
def test_a_trajectory_is_an_ordinary_chat(name: str) -> None:
    """Rendered as messages it has the same tokens and positions, and frames stand at their vision tokens.

    Only the assistant's own tokens are taken from the rollout.
    """
    own = loops.lab(name)
    read = [ordinary(own, loops.prompts_of(own, first=first)) for first in range(0, 30, loops.COUNT)]
    trajectories, shown = np.sum(read, axis=0)
    assert trajectories > 32 and shown > 4


def ordinary(own: loops.Lab, prompts: Prompts) -> tuple[int, int]:
    """How many trajectories were compared, and how many frames their tools showed."""
    found, _ = roll(own, prompts)
    assert np.asarray(found.answered).all() and not np.asarray(found.overflow).any()
    # What was noted may be told again: random tokens that spell no text as a tokenizer would.
    plain = np.flatnonzero(~np.any(np.asarray(found.calls.tools) == TOOLS.index("note"), axis=1))
    shown = 0
    for row in plain:
        length, prompt = int(found.length[row]), int(found.prompt[row])
        tokens, kinds, _, _, positions, visual, _ = (np.asarray(x)[..., row, :length] for x in found.record)
        chat, items = messages_of(own, tokens, visual, np.asarray(prompts.world.times[prompt]))
        rendered = render(own.tokenizer, chat, items)
        said = (kinds == FREE) | (kinds == FORCED)
        runs = np.split(tokens[said], np.flatnonzero(np.diff(np.flatnonzero(said)) > 1) + 1)
        expected = []
        for ours, group in groupby(zip(rendered.input_ids, rendered.loss_mask, strict=True), lambda x: x[1]):
            expected += runs.pop(0).tolist() if ours else [token for token, _ in group]
        # The answer's turn ends with <|im_end|>; a chat has a line break after it.
        np.testing.assert_array_equal(expected[:-1], tokens)
        video, sides = own.model.config.video_token_id, [(1, 1, item.tokens) for item in items]
        np.testing.assert_array_equal(positions, mrope_positions(tokens, -1, video, sides, 1))
        shown += len(items) - 3
    return len(plain), shown


def messages_of(
    own: loops.Lab, tokens: np.ndarray, visual: np.ndarray, times: np.ndarray
) -> tuple[list, list[VisionItem]]:
    """The messages of a trajectory, read from its tokens alone, and what they show; "x": the assistant's."""
    start, end, first, last = (
        own.tokenizer.token_id(f"<|{x}|>") for x in ("im_start", "im_end", "vision_start", "vision_end")
    )
    messages, items = [], []
    for begin in np.flatnonzero(tokens == start):
        stop = begin + int(np.argmax(tokens[begin:] == end))
        assert tokens[stop] == end
        text = own.tokenizer.decode(tokens[begin:stop])
        if text.startswith("assistant\n"):
            messages.append({"role": "assistant", "content": "x"})
            continue
        parts, at = [], begin
        for opened in begin + np.flatnonzero(tokens[begin:stop] == first):
            closed = opened + int(np.argmax(tokens[opened:] == last))
            before, _, stamp = own.tokenizer.decode(tokens[at:opened]).rpartition("<")
            seconds = float(stamp.removesuffix(" seconds>"))
            inside = visual[opened + 1 : closed]
            assert (inside >= 0).all() and times[inside[0] // 2] == round(seconds * 10) < NO_TIME
            parts.append({"type": "text", "text": before})
            parts.append({"type": "video", "frames": None, "times": [seconds]})
            items.append(VisionItem("video", len(inside), (seconds,)))
            at = closed + 1
        parts.append({"type": "text", "text": own.tokenizer.decode(tokens[at:stop])})
        parts[0]["text"] = parts[0]["text"].removeprefix("user\n")
        messages.append({"role": "user", "content": parts})
    return messages, items


def test_states_follow_the_grammar_and_calls_are_what_was_said() -> None:
    own = loops.lab()
    called: set[int] = set()
    for first in range(0, 24, loops.COUNT):
        called |= follow(own, roll(own, loops.prompts_of(own, first=first))[0])
    # Random weights call everything sooner or later.
    assert called == {-1, *range(len(TOOLS))}


def follow(own: loops.Lab, found: Trajectories) -> set[int]:
    """The tools that were called."""
    kinds, tokens, states = (np.asarray(x) for x in (found.kinds, found.tokens, found.record.states))
    steps, tools = np.asarray(found.record.steps), np.asarray(found.calls.tools)
    forced = np.asarray(own.grammar.forced)
    for row in range(len(tokens)):
        said = np.isin(kinds[row], (FREE, FORCED))
        assert (kinds[row][said] == np.where(forced[states[row][said]] < 0, FREE, FORCED)).all()
        for step in range(steps[row].max() + 1):
            here = said & (steps[row] == step)
            after = np.asarray(advance(own.grammar, states[row][here], tokens[row][here]))
            np.testing.assert_array_equal(after[:-1], states[row][here][1:])
            tool = int(own.grammar.ended[after[-1]])
            assert tool == tools[row, step]
            name = own.tokenizer.decode(tokens[row][here]).partition("\n")[2].split(" ")[0]
            assert name == TOOLS[tool]
        assert TOOLS[tool] == "answer" and (tools[row, step + 1 :] == -1).all()
    return set(tools.ravel().tolist())


def test_slots_their_order_and_company_change_nothing() -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own)
    whole, _ = roll(own, prompts)
    wanted = after_prompts(whole, prompts)
    for changes in ({"slots": 1}, {"slots": 32, "patience": 0.1}):
        loops.same(whole, roll(own, prompts, **changes)[0])
    backwards = prompts_in_order(prompts, np.arange(6)[::-1])
    found, _ = roll(own, backwards)
    order = [3 * prompt + i for prompt in range(6)[::-1] for i in range(3)]
    assert_rows_equal(after_prompts(found, backwards), [wanted[i] for i in order])
    # A group of its own, prompts with more padding, and slots that wait for each other.
    alone = loops.prompts_of(own, 2, first=2, length=140)
    found, _ = rollout(*own.given(alone, slots=3, patience=1.0), KEY, 2)
    assert_rows_equal(after_prompts(found, alone), [wanted[i] for i in (6, 7, 9, 10)])


@pytest.mark.slow
def test_devices_share_the_prompts() -> None:
    """On three devices, two prompts and two slots each, the rollouts are those of one."""
    own = loops.lab()
    prompts = loops.prompts_of(own)
    whole, work = roll(own, prompts)
    with jax.set_mesh(make_mesh(jax.devices()[:3], data=3)):
        found, shared = roll(own, prompts, slots=6)
        loops.same(whole, jax.device_get(found))
    assert found.tokens.sharding.num_devices == 3
    assert int(shared.choices) == int(work.choices) and 0.4 < shared.useful <= 1


def prompts_in_order(prompts: Prompts, order: np.ndarray) -> Prompts:
    world = jax.tree.map(lambda x: x[order], prompts.world)
    rows = {name: getattr(prompts, name)[order] for name in ("ids", "tokens", "segment_ids", "visual")}
    return Prompts(**rows, positions=prompts.positions[:, order], world=world)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_fed_in_chunks_of_any_size(name: str) -> None:
    """Frames are cut in two, and some rows end before others."""
    own = loops.lab(name)
    prompts = loops.prompts_of(own, 4)
    whole, parts = (
        jax.jit(lambda params, prompts, n=n: fill_bank(own.model, params, prompts, None, n))(
            own.params, prompts
        )
        for n in (1024, 23)
    )
    np.testing.assert_array_equal(whole.position, parts.position)
    np.testing.assert_array_equal(whole.cache.length, parts.cache.length)
    np.testing.assert_allclose(whole.logits, parts.logits, atol=1e-4, rtol=0)


def test_rollouts_of_a_group_and_keys_differ() -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own)
    runs = [roll(own, prompts, key)[0] for key in (KEY, jax.random.key(8))]
    rows = {tuple(x[0].tolist()) for run in runs for x in after_prompts(run, prompts)}
    assert len(rows) == 2 * loops.COUNT * loops.GROUP


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_not_scanned_say_the_same(name: str) -> None:
    """A cache of another layout: prompts are copied into slots just so."""
    own, other = loops.lab(name), loops.lab(name, False)
    layers = own.params["language_model"]["layers"]
    rest = {k: v for k, v in own.params["language_model"].items() if k != "layers"}
    apart = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(3)}
    other = replace(other, params={**own.params, "language_model": {**rest, **apart}})
    prompts = loops.prompts_of(own)
    loops.same(roll(own, prompts)[0], roll(other, prompts)[0])


@pytest.mark.slow
def test_a_quantised_cache_is_copied_with_its_scales() -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own, 3)
    alone, _ = rollout(*own.given(prompts, cache_dtype="int8", slots=6), KEY, 2)
    queued, _ = rollout(*own.given(prompts, cache_dtype="int8", slots=2), KEY, 2)
    loops.same(alone, queued, 1e-3)


@pytest.mark.slow
def test_an_answer_is_always_given_in_time() -> None:
    """Whatever steps and budget are; the smallest budget that is not refused leaves one step at least."""
    own = loops.lab()
    prompts = loops.prompts_of(own)
    for steps, more in ((1, 0), (6, 60)):
        with pytest.raises(UserError, match="is smaller than") as refused:
            rollout(*own.given(prompts, steps=steps, budget=3), KEY)
        least = int(str(refused.value).split("is smaller than ")[1].split(",")[0])
        with pytest.raises(UserError, match="smaller"):
            rollout(*own.given(prompts, steps=steps, budget=least - 1), KEY)
        found, _ = roll(own, prompts, steps=steps, budget=least + more)
        assert np.asarray(found.answered).all() and not np.asarray(found.overflow).any()
        used = np.asarray(found.kinds) >= FREE
        assert used.sum(axis=1).max() <= least + more
        assert np.asarray(found.record.steps).max() < steps


def test_a_full_cache_ends_its_row_and_no_other() -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own)
    whole, _ = roll(own, prompts)
    found, _ = roll(own, prompts, capacity=160)
    over = np.asarray(found.overflow)
    assert 0 < over.sum() < len(over)
    np.testing.assert_array_equal(over, ~np.asarray(found.answered))
    for row, (some, all_of_it) in enumerate(
        zip(after_prompts(found, prompts), after_prompts(whole, prompts), strict=True)
    ):
        length = some[0].shape[-1]
        if over[row]:
            assert int(found.length[row]) > 160
        else:
            assert length == all_of_it[0].shape[-1]
        # Up to the end nothing is different, and nothing was written over anything.
        assert_rows_equal([some], [[x[..., :length] for x in all_of_it]])


def test_forced_tokens_are_fed_in_chunks_of_any_size() -> None:
    """The run that is fed at once is short on a CPU and whole on a chip; what is said is the same."""
    own = loops.lab()
    prompts = loops.prompts_of(own)
    wanted, _ = roll(own, prompts)
    loop = prepare_loop(own, prompts)
    given = Given(own.params, prompts, own.grammar, own.words, KEY)
    whole = 1 + longest_forced(own.grammar)
    assert loop.lengths.run == 2 < whole
    passes = {}
    for run in (1, whole):
        found, work = program(replace(loop, lengths=replace(loop.lengths, run=run)), given)
        assert_rows_equal(after_prompts(found, prompts), after_prompts(wanted, prompts))
        passes[run] = int(work.decoded)
    assert passes[whole] < passes[1]


def test_finished_work_costs_nothing_and_is_counted() -> None:
    """As many row-steps as chunks of tokens that were fed, whatever the slots; spare slots add no passes."""
    own = loops.lab()
    prompts = loops.prompts_of(own)
    found, work = roll(own, prompts)
    run = prepare_loop(own, prompts).lengths.run
    assert int(work.choices) == sum(chunks_fed(kinds, run) for kinds in np.asarray(found.kinds))
    assert 0.5 < work.useful <= 1
    _, spare = roll(own, prompts, slots=32, patience=0.1)
    assert int(spare.choices) == int(work.choices)
    assert int(spare.decoded) // 32 < int(work.decoded) // own.config.slots


def chunks_fed(kinds: np.ndarray, run: int) -> int:
    """Of a row's tokens: a free one, or the first of a step, begins a run, of which `run` are fed at once."""
    chosen = (kinds == FREE) | (kinds == FORCED)
    begins = (kinds == FREE) | (chosen & ~np.r_[False, chosen[:-1]])
    lengths = np.bincount(np.cumsum(begins)[chosen])
    return int(np.sum(-(-lengths // run)))


def test_nothing_compiles_after_the_first_call() -> None:
    own = loops.lab()
    jax.block_until_ready(roll(own, loops.prompts_of(own)))
    again, key = loops.prompts_of(own, first=6), jax.random.key(9)
    jax.block_until_ready((again, key))
    watch = Stopwatch()
    jax.block_until_ready(roll(own, again, key))
    assert watch.compiles == 0


@pytest.mark.slow
def test_greedy_rollouts_of_a_group_are_the_same() -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own)
    found, _ = roll(own, prompts, sampling=Sampling(0.0))
    rows = after_prompts(found, prompts)
    assert_rows_equal(rows[::3], rows[1::3])


def test_kinds_lie_in_order() -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own)
    found, _ = roll(own, prompts)
    kinds = np.asarray(found.kinds)
    for row, length in enumerate(np.asarray(found.length)):
        start = int(jnp.sum(prompts.segment_ids[found.prompt[row]]))
        assert (kinds[row, :start] == PROMPT).all() and (kinds[row, length:] == PAD).all()
        assert np.isin(kinds[row, start:length], (FREE, FORCED, OBSERVATION)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"budget": 0}, "budget is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"patience": 0.0}, "patience is 0"),
        ({"capacity": 8}, "capacity of 8 tokens is smaller than the prompts"),
        ({"budget": 10**6}, "max_position_embeddings"),
        ({"budget": 30}, "budget of 30 tokens is smaller than"),
    ],
)
def test_what_cannot_work_is_refused_before_compiling(changes: dict, message: str) -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own, 1)
    watch = Stopwatch()
    with pytest.raises(UserError, match=message):
        rollout(*own.given(prompts, **changes), KEY)
    assert watch.compiles == 0


def test_prompts_that_cannot_work_are_refused() -> None:
    own = loops.lab()
    prompts = loops.prompts_of(own, 2)
    with pytest.raises(UserError, match="the same id"):
        rollout(*own.given(prompts._replace(ids=jnp.zeros(2, jnp.int32))), KEY)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        rollout(*own.given(prompts._replace(segment_ids=prompts.segment_ids.at[1].set(0))), KEY)
    with pytest.raises(UserError, match="prompt 0 has padding before tokens"):
        rollout(*own.given(prompts._replace(segment_ids=prompts.segment_ids.at[0, 0].set(0))), KEY)
    with pytest.raises(UserError, match="a group of 0"):
        rollout(*own.given(prompts), KEY, 0)
    with pytest.raises(UserError, match="longer than 20"):
        loops.prompts_of(own, 1, length=20)

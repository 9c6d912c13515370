"""Scripted traces: what the loop's grammar accepts and its tools show, token for token."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv3jax.data.config import DataConfig, SourceConfig
from iv3jax.data.processor import Processor
from iv3jax.data.sources import open_sources
from iv3jax.data.tasks import TRACES
from iv3jax.data.tasks.judge import score
from iv3jax.data.tasks.traces import patch_times, spread
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.mcr import tools
from iv3jax.mcr.grammar import TOOLS, GrammarConfig, build, start_call, walk
from iv3jax.mcr.language import parse
from iv3jax.mcr.memory import empty_memory
from iv3jax.mcr.wording import make_wording
from iv3jax.mcr.world import WorldSize, episode_scene, world_of
from iv3jax.models.batch import IGNORE_LABEL
from iv3jax.models.presets import preset

CONFIG = preset("tiny")
PROCESSOR = Processor.from_dir(TINY_FOLDER, CONFIG)
NAMES = ("zoom", "answer")
GRAMMAR = build(
    GrammarConfig(thought_tokens=8, text_tokens=4, answer_tokens=20, tools=NAMES), PROCESSOR.tokenizer, 512
)
OPTIONS = {
    "read": (),
    "at": (),
    "when": (),
    "chase": ("hops=2", "chains=2"),
    "ground": ("seconds=16", "overview=16"),
}


def answer_of(record) -> str:
    return parse(record.messages[-1]["content"]).text


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_what_the_grammar_accepts(name: str):
    """As tokens, too: those of the conversation that are trained on are the steps, one after the other."""
    source = TRACES[name](OPTIONS[name])
    end = PROCESSOR.tokenizer.end_id
    for index in range(4):
        record = source[index]
        spoken = [parse(m["content"]) for m in record.messages if m["role"] == "assistant"]
        assert [one.name for one in spoken] == ["zoom"] * (len(spoken) - 1) + ["answer"]
        assert len(spoken) == {"read": 1, "chase": 4}.get(name, 2)
        sample = PROCESSOR(record.messages)
        trained = sample.labels[sample.labels != IGNORE_LABEL]
        steps = np.split(trained, np.flatnonzero(trained == end) + 1)[:-1]
        assert len(steps) == len(spoken)
        for step in steps:
            walk(GRAMMAR, step)


@pytest.mark.parametrize("name", OPTIONS)
def test_answers_are_right_or_as_good_as_the_frames(name: str):
    source = TRACES[name](OPTIONS[name])
    scores = []
    for index in range(12):
        split_key = np.random.default_rng([0, 0, index, 2])
        _, question = source.draw(split_key)
        scores.append(score(question, answer_of(source[index])))
        # The script sees what it says: each piece of evidence has a frame that was shown.
        times = np.concatenate(
            [p["times"] for m in source[index].messages for p in m["content"] if "times" in p]
        )
        for start, stop in question.evidence:
            assert ((times >= start) & (times < stop)).any()
    assert min(scores) == 1 if name in ("read", "at", "chase") else np.mean(scores) > 0.7


def test_a_zoom_shows_what_the_loop_shows():
    """The turn after a zoom, token for token, and the overview's choice of patches."""
    source = TRACES["chase"](("seconds=16", "shown=2", "chains=2"))
    words, size = make_wording(PROCESSOR.tokenizer), WorldSize(64, 1, 1, 1)
    table = jnp.zeros((512, 8))
    config = tools.ToolConfig(frames=source.script.zoom, memory=2)
    observe = jax.jit(
        lambda world, call: tools.observe(
            words,
            config,
            world,
            jnp.zeros(1, jnp.int32),
            jnp.full(1, TOOLS.index("zoom")),
            call,
            empty_memory(1, 2, 4),
            jnp.zeros(1, jnp.int32),
            table,
            NAMES,
        )[0]
    )
    for index in range(3):
        episode, _ = source.draw(np.random.default_rng([0, 0, index, 2]))
        scene = episode_scene(episode)
        np.testing.assert_allclose(patch_times(episode), scene.times, atol=0.051)
        world = world_of([scene], jnp.zeros((1, 64, 1, 2, 8)), size, PROCESSOR.tokenizer, table)
        messages = source[index].messages
        for turn in range(1, len(messages) - 1, 2):
            spoken = parse(messages[turn]["content"])
            call = start_call(1, 4)
            tenths = np.round(np.array(spoken.numbers) * 10).astype(np.int32)
            shown = observe(world, call._replace(numbers=call.numbers.at[0, :2].set(tenths)))
            before = PROCESSOR(messages[: turn + 1]).input_ids
            after = PROCESSOR(messages[: turn + 2], generation=True).input_ids
            # The chat ends a turn with a line break, with which the loop begins its observation.
            expected = after[len(before) - 1 :]
            np.testing.assert_array_equal(np.asarray(shown.tokens[0])[np.asarray(shown.real[0])], expected)


def test_fewer_looks_are_the_same_ones_and_the_answer_is_right_all_the_same():
    whole = TRACES["chase"](OPTIONS["chase"])[5].messages
    for looks in (0, 2):
        cut = TRACES["chase"]((*OPTIONS["chase"], f"looks={looks}"))[5].messages
        assert len(cut) == 2 * looks + 2
        assert [m["content"] for m in cut[1:-1:2]] == [m["content"] for m in whole[1 : 2 * looks : 2]]
        assert parse(cut[-1]["content"]).text == parse(whole[-1]["content"]).text


@pytest.mark.parametrize("frames", [1, 2, 3, 8])
def test_patches_are_spread_as_the_loop_spreads_them(frames: int):
    for count in (1, 2, 3, 7, 8, 9, 64):
        theirs = np.asarray(tools.spread(count, frames))
        np.testing.assert_array_equal(spread(count, frames), theirs[theirs < count])


def test_traces_are_a_source_like_others():
    """Random access, the same each time, pickled for workers, mixed with tasks."""
    entries = (SourceConfig("trace:at", weight=1.0), SourceConfig("task:at", weight=1.0))
    opened = open_sources(DataConfig(sources=entries))
    assert [one.name for one in opened] == ["trace:at", "task:at"]
    source = pickle.loads(pickle.dumps(opened[0].source))
    assert source[3].name == "trace:at:3" and answer_of(source[3]) == answer_of(opened[0].source[3])


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("trace:count", (), "no script for this task"),
        ("trace:chas", (), "no task 'chas'"),
        ("trace:at", ("zom=3",), "unknown option 'zom'; did you mean 'zoom'"),
        ("trace:at", ("half=0.1",), "half: 0.1 must be 0.5 or more"),
        ("trace:at", ("looks=-1",), "looks: -1 must be 0 or more"),
        ("trace:at", ("varied=-1",), "varied: -1 must be 0 or more"),
        ("trace:ground", ("overview=1", "seconds=900"), "almost never show"),
    ],
)
def test_sources_that_cannot_be(kind: str, options: tuple[str, ...], words: str):
    with pytest.raises(UserError, match=words):
        open_sources(DataConfig(sources=(SourceConfig(kind, options=options),)))

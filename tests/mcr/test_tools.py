"""The tools against plain Python, every observation against `render` and `mrope_positions` of the same turn.

`Host` below is the reference: what each tool says as the content of a message, with lists and loops.
"""

import json
from functools import partial

import jax
import numpy as np
import pytest

from iv3jax.data.chat import VisionItem, render
from iv3jax.data.positions import mrope_positions
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.grammar import TOOLS, Call
from iv3jax.mcr.memory import empty_memory
from iv3jax.mcr.tools import ToolConfig, observe, spread
from iv3jax.mcr.wording import make_wording
from iv3jax.mcr.world import Scene, TimedText, WorldSize, world_of
from iv3jax.models.presets import preset

pytestmark = pytest.mark.medium

TINY = Tokenizer.from_dir(TINY_FOLDER, preset("tiny"))
CONFIG = ToolConfig(frames=4, results=3, memory=3, grid=(2, 3))
IDS = preset("tiny")
WIDTH, TEXT, ROWS = 16, 6, 48
SIZE = WorldSize(patches=24, texts=5, text_tokens=24, segments=5)
TABLE = np.random.default_rng(0).normal(size=(512, WIDTH)).astype(np.float32)
NOTES = (" the number is 45", " look left.", " 7", " not (yet) seen", " one two")
SAYINGS = ("He came in.", "the number is 45", "12 of them", "(nothing) said", "a  long\n walk")


def scenes() -> list[Scene]:
    """Videos with all room taken, with nothing but patches, and with patches close together."""
    full = Scene(
        np.arange(24) * 0.5 + 0.25,
        12.0,
        tuple(TimedText(i * 2.0, i * 2.0 + 1.25, text) for i, text in enumerate(SAYINGS)),
        ((0.0, 1.5), (1.5, 4.0), (4.0, 8.0), (8.0, 10.0), (10.0, 12.0)),
    )
    bare = Scene(np.arange(5) * 700.0, 3100.5)
    some = Scene(np.arange(17) * 0.05 + 62.0, 63.0, (TimedText(0, 1, "x"),), ((0.0, 63.0),))
    return [full, bare, some]


FEATURES = np.random.default_rng(1).normal(size=(3, SIZE.patches, 6, 2, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def world():
    return world_of(scenes(), FEATURES, SIZE, TINY, TABLE)


def clock(tenths: int) -> str:
    return f"{tenths / 10:.1f}"


class Host:
    """One rollout's tools. Times are tenths; a content is of texts and (time, height, width, indices)."""

    def __init__(self, scene: Scene, features: np.ndarray):
        self.times = [round(float(f"{t:.1f}") * 10) for t in scene.times]
        self.duration = round(scene.duration * 10)
        self.scene, self.features = scene, features
        self.memory: list[tuple] = []
        self.dropped = 0

    def add(self, *entry) -> None:
        if len(self.memory) == CONFIG.memory:
            evidence = [i for i, e in enumerate(self.memory) if e[0] != "note"]
            del self.memory[evidence[0] if evidence else 0]
            self.dropped += 1
        self.memory.append(entry)

    def frame(self, i: int, top=0, left=0, bottom=1, right=2):
        places = [i * 6 + r * 3 + c for r in range(top, bottom + 1) for c in range(left, right + 1)]
        return self.times[i], bottom - top + 1, right - left + 1, places

    def zoom(self, numbers, text, step):
        start, end = numbers[:2]
        if start >= end or start >= self.duration:
            limit = clock(self.duration)
            return [f"a window must start before it ends and before {limit} seconds"]
        end = min(end, self.duration)
        self.add("zoom", start, end, step)
        inside = [i for i, t in enumerate(self.times) if start <= t < end]
        if not inside:
            inside = [min(range(len(self.times)), key=lambda i: abs(self.times[i] - (start + end) / 2))]
        if len(inside) > CONFIG.frames:
            at = np.floor(np.linspace(0, len(inside) - 1, CONFIG.frames) + 0.5).astype(int)
            inside = [inside[i] for i in at]
        return [self.frame(i) for i in inside]

    def crop(self, numbers, text, step):
        at, left, top, right, bottom = numbers
        if at >= self.duration or left > right or top > bottom:
            limit = clock(self.duration)
            return [f"a crop needs left before right, top before bottom and a time before {limit} seconds"]
        i = min(range(len(self.times)), key=lambda i: abs(self.times[i] - at))
        self.add("crop", self.times[i], self.times[i], step)

        def touched(first, last, count):
            """The parts of `count` that have something of the tenths first … last."""
            fine = np.arange(count * 10) // 10, np.arange(count * 10) // count
            return [int(a) for a, b in zip(*fine, strict=True) if first <= b <= last]

        rows, columns = touched(top, bottom, 2), touched(left, right, 3)
        return [self.frame(i, rows[0], columns[0], rows[-1], columns[-1])]

    def wanted(self, text):
        return TABLE[TINY.encode(text)].mean(axis=0)

    def search(self, numbers, text, step):
        wanted, found = self.wanted(text), []
        for i, (start, end, said) in enumerate(self.scene.texts):
            said = " ".join(said.split())
            own = TABLE[TINY.encode(f" {said}")].mean(axis=0)
            cosine = wanted @ own / np.linalg.norm(wanted) / np.linalg.norm(own)
            found.append((-cosine, i, f"<{start:.1f}-{end:.1f} seconds> {said}\n"))
        return ["".join(line for _, _, line in sorted(found)[: CONFIG.results]) or "nothing found"]

    def ground(self, numbers, text, step):
        wanted = self.wanted(text)
        own = self.features[: len(self.times), :, 0].mean(axis=1)
        score = own @ wanted / np.linalg.norm(own, axis=1)
        lines = ""
        for _ in range(CONFIG.results):
            best = int(score.argmax())
            if score[best] == -np.inf:
                break
            lines += f"<{clock(self.times[best])} seconds>\n"
            score[max(best - 1, 0) : best + 2] = -np.inf
        return [lines]

    def segments(self, numbers, text, step):
        lines = [f"<{a:.1f}-{b:.1f} seconds>\n" for a, b in self.scene.segments]
        more = len(lines) - CONFIG.results
        shown = "".join(lines[: CONFIG.results])
        return [shown + (f"and {more} more\n" if more > 0 else "") or "nothing found"]

    def note(self, numbers, text, step):
        self.add("note", text, step)
        return ["noted"]

    def line(self, entry, label="note"):
        if entry[0] == "note":
            return f"{label}{entry[1]} (step {entry[2]})\n"
        kind, start, end, step = entry
        return f"{kind} <{clock(start)}-{clock(end)} seconds> (step {step})\n"

    def recall(self, numbers, text, step):
        lines = "".join(map(self.line, self.memory)) or "nothing in memory"
        return [lines + (f"{self.dropped} dropped\n" if self.dropped else "")]

    def verify(self, numbers, text, step):
        notes = [i for i, e in enumerate(self.memory) if e[0] == "note"]
        said = self.line(self.memory[notes[-1]], "hypothesis:") if notes else "no hypothesis\n"
        said += "".join(self.line(e) for e in self.memory if e[0] != "note")
        since = bool(notes) and any(e[0] != "note" for e in self.memory[notes[-1] :])
        return [said + ("supported" if since else "not looked at")]


def turn(content, tokenizer=TINY):
    """(tokens, visual, offsets) of a content as the next turn of a chat, from the end of the call on."""
    parts, items, grids, visual = [], [], [], []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        time, height, width, places = part
        parts.append({"type": "video", "video": "x"})
        items.append(VisionItem("video", len(places), (time / 10,)))
        grids.append((1, height * 2, width * 2))
        visual += places
    chat = [
        {"role": "user", "content": "When is it?"},
        {"role": "assistant", "content": "it is there\nsegments"},
    ]
    known = len(render(tokenizer, chat).input_ids) - len(tokenizer.encode("\n"))
    ids = render(tokenizer, [*chat, {"role": "user", "content": parts}], items, generation=True).input_ids
    positions = mrope_positions(ids, IDS.image_token_id, IDS.video_token_id, grids, 2)
    index = np.full(len(ids), -1)
    index[ids == IDS.video_token_id] = visual
    return ids[known:], index[known:], positions[:, known:] - positions[:, known - 1 :][:, :1] - 1


@pytest.fixture(scope="module")
def seen(world):
    """The compiled tools."""
    return jax.jit(partial(observe, make_wording(TINY), CONFIG))


def draw(rng: np.random.Generator):
    """Random calls of ROWS rows: (tools, numbers, texts)."""
    tools = rng.integers(len(TOOLS), size=ROWS)
    numbers = np.where(
        rng.random((ROWS, 5)) < 0.5, rng.integers(0, 140, (ROWS, 5)), rng.integers(0, 40000, (ROWS, 5))
    )
    near = rng.random(ROWS) < 0.3
    numbers[near, :2] = rng.integers(615, 635, (near.sum(), 2))
    crops = tools == TOOLS.index("crop")
    numbers[crops, 1:] = rng.integers(0, 10, (crops.sum(), 4))
    return tools, numbers, rng.choice(NOTES, ROWS)


def as_call(numbers, texts) -> Call:
    ids = [TINY.encode(text)[:TEXT] for text in texts]
    text = np.array([i + [9] * (TEXT - len(i)) for i in ids], np.int32)
    return Call(numbers.astype(np.int32), text, np.array(list(map(len, ids)), np.int32))


def test_every_observation_is_the_turn_that_render_would_write(world, seen):
    """12 random steps of 48 rollouts: tokens, vision tokens, positions; and memories that overflow."""
    rng = np.random.default_rng(5)
    prompt = rng.integers(3, size=ROWS).astype(np.int32)
    hosts = [Host(scenes()[p], FEATURES[p]) for p in prompt]
    memory = empty_memory(ROWS, CONFIG.memory, TEXT)
    compared = set()
    for step in range(12):
        tools, numbers, texts = draw(rng)
        # As it was called: cut to the length of the register.
        texts = [TINY.decode(TINY.encode(text)[:TEXT]) for text in texts]
        steps = np.full(ROWS, step * 9, np.int32)
        out, memory = seen(
            world, prompt, tools.astype(np.int32), as_call(numbers, texts), memory, steps, TABLE
        )
        out = jax.tree.map(np.asarray, out)
        for row, host in enumerate(hosts):
            name = TOOLS[tools[row]]
            if name == "answer":
                assert not out.real[row].any() and out.advance[row] == 0
                continue
            content = getattr(host, name)(numbers[row].tolist(), texts[row], step * 9)
            tokens, visual, offsets = turn(content)
            count = len(tokens)
            compared.add((name, str(content[0]).split()[0]))
            assert out.real[row].tolist() == [True] * count + [False] * (len(out.real[row]) - count)
            assert out.tokens[row, :count].tolist() == tokens.tolist(), TINY.decode(out.tokens[row, :count])
            assert out.visual[row, :count].tolist() == visual.tolist()
            np.testing.assert_array_equal(out.offsets[:, row, :count], offsets)
            assert out.advance[row] == offsets[:, -1].max() + 1
    assert {name for name, _ in compared} == set(TOOLS) - {"answer"}
    assert {("zoom", "a"), ("crop", "a"), ("search", "nothing"), ("segments", "nothing")} <= compared
    for row, host in enumerate(hosts):
        kinds = [("", "zoom", "crop", "note")[k] for k in np.asarray(memory.kinds[row])]
        assert [k for k in kinds if k] == [e[0] for e in host.memory]
        assert memory.dropped[row] == host.dropped
    assert max(host.dropped for host in hosts) > 0


def test_a_row_does_not_depend_on_its_company(world, seen):
    rng = np.random.default_rng(6)
    tools, numbers, texts = draw(rng)
    prompt = rng.integers(3, size=ROWS).astype(np.int32)
    order = rng.permutation(ROWS)
    memory = empty_memory(ROWS, CONFIG.memory, TEXT)
    call, steps = as_call(numbers, texts), np.zeros(ROWS, np.int32)
    one = seen(world, prompt, tools, call, memory, steps, TABLE)
    other = seen(world, prompt[order], tools[order], Call(*(x[order] for x in call)), memory, steps, TABLE)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        moved = a[:, order] if a.ndim == 3 and a.shape[0] == 3 else a[order]
        np.testing.assert_array_equal(moved, b)


def test_no_tool_shows_nothing_and_changes_nothing(world, seen):
    memory = empty_memory(ROWS, CONFIG.memory, TEXT)
    numbers = np.full((ROWS, 5), 5)
    call = as_call(numbers, [" 7"] * ROWS)
    zeros = np.zeros(ROWS, np.int32)
    out, after = seen(world, zeros, zeros - 1, call, memory, zeros, TABLE)
    assert not out.real.any() and not out.advance.any()
    assert not any(np.asarray(x).any() for x in after)


def test_only_tools_that_can_be_called_take_room(world):
    words, memory = make_wording(TINY), empty_memory(ROWS, CONFIG.memory, TEXT)
    zeros = np.zeros(ROWS, np.int32)
    call = as_call(np.full((ROWS, 5), 5), [" 7"] * ROWS)

    def length(*tools):
        made = partial(observe, words, CONFIG, tools=tools)
        return jax.eval_shape(made, world, zeros, zeros, call, memory, zeros, TABLE)[0].tokens.shape[1]

    assert length("answer") == len(words.begin) + len(words.finish)
    assert length("answer") < length("note", "answer") < length("zoom", "answer") < length(*TOOLS)


def test_spread_takes_all_or_evenly():
    for frames in (1, 2, 5, 8):
        for count, place in enumerate(np.asarray(spread(np.arange(1, 40), frames)), 1):
            kept = place[place < count]
            assert len(kept) == min(count, frames) and len(set(kept.tolist())) == len(kept)
            if count > frames > 1:
                assert kept[0] == 0 and kept[-1] == count - 1
                assert np.ptp(np.diff(kept)) <= 1


@pytest.mark.parametrize("text", ["", " seconds>|"], ids=["Qwen's pattern", "the tiny preset's"])
def test_words_fit_together_for_tokenizers_that_split_digits(text):
    """Qwen's own pattern ends a timestamp in two words."""
    data = json.loads(TINY.to_json())
    pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = text + pattern["Regex"].removeprefix(" seconds>|")
    tokenizer = Tokenizer(json.dumps(data), "here")
    words = make_wording(tokenizer)
    content = ["<12.0-15.5 seconds> it is.\n<3.0-4.0 seconds> 5 (more)\n"]
    tokens, _, _ = turn(content, tokenizer)
    assert tokenizer.decode(tokens, skip_special=False).startswith("\n<|im_start|>user\n<12.0")
    assert tokens[: len(words.begin)].tolist() == words.begin.tolist()
    assert tokens[-len(words.finish) :].tolist() == words.finish.tolist()


def test_a_tokenizer_that_joins_digits_is_refused():
    data = json.loads(TINY.to_json())
    pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace("|\\p{N}|", "|\\p{N}{1,3}|")
    model = data["model"]
    spare = next(token for token in model["vocab"] if len(token) > 6)
    number = model["vocab"].pop(spare)
    model["vocab"]["12"] = number
    model["merges"] = [m for m in model["merges"] if "".join(m) != spare and spare not in m] + [["1", "2"]]
    with pytest.raises(UserError, match="joins words or digits"):
        make_wording(Tokenizer(json.dumps(data), "here"))


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"results": 0}, {"memory": 0}, {"grid": (0, 1)}])
def test_configs_that_show_nothing_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ToolConfig(**wrong)


def test_a_grid_that_is_not_the_worlds_is_an_error(world):
    zeros = np.zeros(1, np.int32)
    call = as_call(np.full((1, 5), 5), [" 7"])
    with pytest.raises(ValueError, match="grid"):
        observe(
            make_wording(TINY),
            ToolConfig(),
            world,
            zeros,
            zeros,
            call,
            empty_memory(1, 8, TEXT),
            zeros,
            TABLE,
        )

"""The tools of the loop in a compiled graph: a call in, an observation out, the memory brought up to date.

`observe` runs all of them for every row and keeps what each row called for: what they read was encoded
before, so they cost little. What a tool looks at is in world.py, the words it says are in wording.py, and the
tools are in

* look.py: zoom, crop
* find.py: search, ground, segments
* recall.py: recall, verify (note only writes to memory.py)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from iv3jax.errors import UserError
from iv3jax.mcr.grammar import TOOLS, Call
from iv3jax.mcr.memory import CROP, NOTE, ZOOM, Memory, remember
from iv3jax.mcr.tools.find import ground, search, segments
from iv3jax.mcr.tools.look import Look, crop, spread, zoom
from iv3jax.mcr.tools.recall import recall, verify
from iv3jax.mcr.tools.strip import Strip, chosen, compact, join, offsets, piece
from iv3jax.mcr.wording import Wording
from iv3jax.mcr.world import World, mean_embedding
from iv3jax.typing import Array

__all__ = ["Observation", "ToolConfig", "observe", "spread"]


@dataclass(frozen=True)
class ToolConfig:
    """How much the tools show.

    Attributes:
        frames: temporal patches of a zoom, at most.
        results: lines of search, ground and segments, at most.
        memory: slots of the memory.
        grid: height and width of a temporal patch, in vision tokens.
    """

    frames: int = 8
    results: int = 4
    memory: int = 8
    grid: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        for name in ("frames", "results", "memory"):
            if getattr(self, name) < 1:
                raise UserError(f"tools: {name} is {getattr(self, name)}; it must be at least 1")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise UserError(f"tools: grid is {self.grid}; it must be a height and a width of at least 1")


class Observation(NamedTuple):
    """What the tools answer: each row's tokens first, padding after them. O places, the same for every call.

    Attributes:
        tokens: (B, O) int32; padding may hold anything.
        real: (B, O) bool.
        visual: (B, O) int32, which of the F·M vision tokens of the row's own video stands here, −1 for text.
        offsets: (3, B, O) int32 positions, relative to that of the token after the call's `<|im_end|>`.
        advance: (B,) int32, how far the position moves on.
    """

    tokens: Array
    real: Array
    visual: Array
    offsets: Array
    advance: Array


def observe(
    words: Wording,
    config: ToolConfig,
    world: World,
    prompt: Array,
    tool: Array,
    call: Call,
    memory: Memory,
    step: Array,
    table: Array,
    tools: Sequence[str] = TOOLS,
) -> tuple[Observation, Memory]:
    """What each row's call shows. Pure; `config` and `tools` are compiled in.

    `answer`, and a `tool` of −1, show nothing and leave the memory as it is.

    Args:
        words: of the model's tokenizer.
        world: of P videos, with patches of `config.grid`.
        prompt: (B,) int32, each row's video.
        tool: (B,) int32, index into TOOLS.
        call: the arguments.
        memory: of `config.memory` slots, its notes as long as the call's text.
        step: (B,) int32, the number of the step, up to 999; it is noted in the memory.
        table: (V, D), the model's embedding table, in which a text is looked for.
        tools: those that can be called; there is no room for the words of others.

    Raises:
        ValueError: a world with patches of another size.
    """
    if world.features.shape[2] != config.grid[0] * config.grid[1]:
        raise ValueError(f"patches of {world.features.shape[2]} vision tokens with a grid of {config.grid}")
    everywhere = jnp.ones(tool.shape, bool)
    zoomed = zoom(words, world, config.frames, config.grid, prompt, call.numbers[:, :2])
    cropped = crop(words, world, config.grid, prompt, call.numbers)
    wanted = mean_embedding(table, call.text, call.length)
    # Only tools that can be called are written out.
    makers: dict[str, Callable[[], Strip]] = {
        "zoom": lambda: zoomed.strip,
        "crop": lambda: cropped.strip,
        "search": lambda: search(words, world, config.results, prompt, wanted),
        "segments": lambda: segments(words, world, config.results, prompt),
        "ground": lambda: ground(words, world, config.results, prompt, wanted),
        "note": lambda: piece(words.noted, everywhere),
        "recall": lambda: recall(words, memory),
        "verify": lambda: verify(words, memory),
    }
    names = [name for name in TOOLS if name in tools and name in makers]
    called = [tool == TOOLS.index(name) for name in names]
    content = chosen([makers[name]() for name in names], called, len(tool))
    says = jnp.any(content.real, axis=1)
    spoken = compact(join(piece(words.begin, says), content, piece(words.finish, says)))
    places, advance = offsets(spoken)
    observation = Observation(spoken.tokens, spoken.real, spoken.visual, places, advance)
    return observation, _remembered(memory, tool, call, step, zoomed, cropped)


def _remembered(memory: Memory, tool: Array, call: Call, step: Array, zoomed: Look, cropped: Look) -> Memory:
    """The memory with what was seen or noted."""
    is_zoom, is_crop, is_note = (tool == TOOLS.index(name) for name in ("zoom", "crop", "note"))
    write = (is_zoom & zoomed.seen) | (is_crop & cropped.seen) | is_note
    window = jnp.where(is_zoom[:, None], zoomed.window, cropped.window)
    return remember(
        memory,
        write,
        kind=jnp.select([is_zoom, is_crop], [ZOOM, CROP], NOTE),
        window=jnp.where(is_note[:, None], 0, window),
        text=jnp.where(is_note[:, None], call.text, 0),
        length=jnp.where(is_note, call.length, 0),
        step=step,
    )

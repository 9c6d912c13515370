"""Small loops for the tests: a tiny model with random weights, random videos, prompts of many lengths."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.generate.sampling import Sampling
from iv3jax.mcr.grammar import Grammar, GrammarConfig, build
from iv3jax.mcr.prompts import Prompts, write_prompts
from iv3jax.mcr.rollout_config import RolloutConfig
from iv3jax.mcr.tools import ToolConfig
from iv3jax.mcr.wording import Wording, make_wording
from iv3jax.mcr.world import Scene, TimedText, WorldSize, world_of
from iv3jax.models.internvideo3 import InternVideo3, init_params
from iv3jax.models.layers import Execution
from iv3jax.models.presets import preset
from iv3jax.typing import Params

GRID = (1, 2)
PATCHES = 12
SIZE = WorldSize(PATCHES, texts=3, text_tokens=32, segments=3)

# One shape for most tests, so that they share one compiled program: prompts, rollouts of each.
COUNT, GROUP = 6, 3

QUESTIONS = (
    "when?",
    "what is the number on the screen at the end?",
    "who?",
    "how many dogs are there, why?",
)


@dataclass(frozen=True)
class Lab:
    """All that a rollout takes. scenes: what the prompts are about."""

    model: InternVideo3
    params: Params
    tokenizer: Tokenizer
    config: RolloutConfig
    grammar: Grammar
    words: Wording

    def given(self, prompts: Prompts, **changes: Any) -> tuple:
        """The arguments of `rollout` up to the grammar's words."""
        return self.model, self.params, prompts, replace(self.config, **changes), self.grammar, self.words


@lru_cache(maxsize=4)
def lab(name: str = "tiny", scan_layers: bool = True, temperature: float = 1.0, top_p: float = 1.0) -> Lab:
    """A model of that preset in fp32, its weights random, and a small loop."""
    shapes = preset(name)
    model = InternVideo3(shapes, Execution(dtype=jnp.float32, scan_layers=scan_layers))
    params = init_params(model, jax.random.key(1))
    tokenizer = Tokenizer.from_dir(TINY_FOLDER, shapes)
    config = RolloutConfig(
        steps=4,
        budget=420,
        slots=4,
        sampling=Sampling(temperature, top_p),
        grammar=GrammarConfig(thought_tokens=4, text_tokens=3, answer_tokens=4),
        tools=ToolConfig(frames=3, results=2, memory=2, grid=GRID),
    )
    grammar = build(config.grammar, tokenizer, shapes.text_config.vocab_size)
    return Lab(model, params, tokenizer, config, grammar, make_wording(tokenizer))


def prompts_of(
    own: Lab, count: int = COUNT, seed: int = 0, length: int = 112, first: int = 0, frames: int = 3
) -> Prompts:
    """Prompts first … first+count−1 of an endless row of random ones.

    The videos are so long that a random time is often inside.
    """
    scenes, features = [], []
    text = own.model.config.text_config
    for i in range(first, first + count):
        rng = np.random.default_rng([seed, i])
        patches = int(rng.integers(4, PATCHES + 1))
        times = np.arange(patches) * 700.0 + 0.25
        texts = tuple(TimedText(t, t + 1.5, f"line {t} of {i}") for t in range(int(rng.integers(3))))
        segments = ((0.0, 4.0), (4.0, patches * 700.0))[: int(rng.integers(3))]
        scenes.append(Scene(times, patches * 700.0, texts, segments))
        features.append(rng.normal(size=(PATCHES, GRID[0] * GRID[1], 2, text.hidden_size)).astype(np.float32))
    world = world_of(scenes, np.stack(features), SIZE, own.tokenizer, own.params["embed_tokens"]["embedding"])
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(first, first + count)]
    ids = range(first, first + count)
    return write_prompts(
        own.tokenizer,
        own.model.config,
        scenes,
        questions,
        world,
        frames=frames,
        grid=GRID,
        length=length,
        ids=ids,
    )


def same(a: Any, b: Any, tolerance: float = 1e-4) -> None:
    """Two sets of trajectories say the same; log-probs and nothing else may differ by rounding."""
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        if x.dtype == jnp.float32:
            np.testing.assert_allclose(x, y, atol=tolerance, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)

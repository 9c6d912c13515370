"""The synthetic tasks as environments: endless questions in a fixed order, as prompts, and what answers earn.

Question i is the same on any machine. Its video is rendered on the host, in a thread if the caller likes, and
encoded on the device by the policy's own tower, so the tower must be one that does not change.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from iv3jax.data.config import DataConfig
from iv3jax.data.digits import SIDE, Split
from iv3jax.data.mixture import Mixture
from iv3jax.data.processor import Processor
from iv3jax.data.sample import Sample
from iv3jax.data.sources import Named, Opened, open_sources
from iv3jax.data.tasks.episode import Episode
from iv3jax.data.tasks.source import TaskSource
from iv3jax.data.tasks.task import Question
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.grammar import Grammar, build
from iv3jax.mcr.prompts import Prompts, write_prompts
from iv3jax.mcr.rewards import Reward, RewardConfig, make_facts, reward
from iv3jax.mcr.rollout import prepare, rollout
from iv3jax.mcr.rollout_config import RolloutConfig
from iv3jax.mcr.step import Loop, Work
from iv3jax.mcr.trajectories import Trajectories
from iv3jax.mcr.wording import Wording, make_wording
from iv3jax.mcr.world import (
    Scene,
    World,
    WorldSize,
    encoded_features,
    episode_sample,
    episode_scene,
    tenths,
    world_of,
)
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.typing import Array, Params

_QUESTION = 1
"""Sets the questions' random numbers apart from those of the samples that a task's source gives."""


@dataclass(frozen=True)
class Asked:
    """P questions on the host, each about a video of its own.

    Attributes:
        names: where a person finds each. ids: numbers of their own, as `Prompts.ids`.
        samples: the frames of the videos, cut into patches.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    scenes: tuple[Scene, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Chosen:
    """A question worth asking: its number in the order of all, and the name it has there."""

    number: int
    name: str


class Rolled(NamedTuple):
    """What was asked and what came of it, on the devices."""

    prompts: Prompts
    trajectories: Trajectories
    work: Work


class Environment:
    """Questions of a mixture of tasks, for rollouts of one configuration.

    Attributes:
        config: of the rollouts, with the grid that the frames have.
        grammar, words: of the model's tokenizer.
        patches: temporal patches of the longest video.
    """

    def __init__(
        self,
        data: DataConfig,
        model: InternVideo3,
        processor: Processor,
        config: RolloutConfig,
        *,
        frames: int,
        length: int,
        seed: int,
        only: Sequence[Chosen] = (),
        zeroed: bool = False,
    ) -> None:
        """Opens the sources.

        Args:
            data: its sources are tasks. config: its grid is replaced by that of the frames.
            frames: temporal patches of the overview that a prompt shows.
            length: tokens of a prompt.
            seed: of the order of the questions.
            only: the questions to ask, over and over; none: all.
            zeroed: ask about videos in which nothing can be read (`Episode.zeroed`), as a control.

        Raises:
            UserError: a source that is no task, or cannot be opened; a model without a tower; questions of
                other sources.
        """
        vision = model.config.vision_config
        if vision is None:
            raise UserError("this model has no vision tower; the loop needs one to look at videos")
        opened = open_sources(data)
        self._tasks = [_task(one) for one in opened]
        self._names = [one.name for one in opened]
        counts, weights = [len(one.source) for one in opened], [one.weight for one in opened]
        self._order = Mixture(counts, weights, seed)
        self._model, self._processor, self._frames, self._length = model, processor, frames, length
        side = SIDE // (vision.patch_size * vision.spatial_merge_size)
        self.config = replace(config, tools=replace(config.tools, grid=(side, side)))
        vocabulary = model.config.text_config.vocab_size
        self.grammar: Grammar = build(config.grammar, processor.tokenizer, vocabulary)
        self.words: Wording = make_wording(processor.tokenizer)
        longest = max(max(task.task.durations) for task in self._tasks)
        self.patches = len(episode_scene(Episode(longest, (), "train", 0)).times)
        for one in only:
            if (name := self._record(one.number)[2]) != one.name:
                raise UserError(
                    f"question {one.number} is {name} here, not {one.name}; choose anew, for these "
                    "data.sources and this seed"
                )
        self._only = tuple(one.number for one in only)
        self._zeroed = zeroed

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._processor.tokenizer

    def check(self, prompts: int, group: int) -> None:
        """Refuses rollouts that cannot work, before anything is compiled.

        Raises:
            UserError: see `rollout.prepare`.
        """
        self.loop(self.shapes(prompts), group)

    def loop(self, prompts: Prompts, group: int) -> Loop:
        """What is compiled in.

        Raises:
            UserError: see `rollout.prepare`.
        """
        return prepare(self._model, prompts, self.config, self.grammar, self.words, group)

    def shapes(self, prompts: int) -> Prompts:
        """So many questions as `prompts` makes them, their shapes."""
        text, vision = self._model.config.text_config, self._model.config.vision_config
        assert vision is not None, "refused above"
        size = room(self.patches)
        each = self.config.tools.grid[0] * self.config.tools.grid[1]
        levels = 1 + len(vision.deepstack_visual_indexes)

        def shape(dtype: Any, *sizes: int) -> Any:
            return jax.ShapeDtypeStruct((prompts, *sizes), dtype)

        world = World(
            features=shape(self._model.run.dtype, size.patches, each, levels, text.hidden_size),
            times=shape(np.int32, size.patches),
            duration=shape(np.int32),
            patch_vectors=shape(np.float32, size.patches, text.hidden_size),
            texts=shape(np.int32, size.texts, size.text_tokens),
            text_lengths=shape(np.int32, size.texts),
            text_times=shape(np.int32, size.texts, 2),
            text_vectors=shape(np.float32, size.texts, text.hidden_size),
            segments=shape(np.int32, size.segments, 2),
        )
        ids, row = shape(np.int32), shape(np.int32, self._length)
        positions: Any = jax.ShapeDtypeStruct((3, *row.shape), np.int32)
        return Prompts(ids, row, row, positions, row, world)

    def asked(self, first: int, count: int) -> Asked:
        """Questions number first … first + count − 1. On the host alone."""
        names, questions, scenes, samples = [], [], [], []
        for number in range(first, first + count):
            source, record, name = self._record(
                self._only[number % len(self._only)] if self._only else number
            )
            task = self._tasks[source]
            key = (task.view.seed, get_args(Split).index(task.view.split), record, _QUESTION)
            episode, about = task.task.make(np.random.default_rng(key), task.view.split)
            episode = replace(episode, zeroed=self._zeroed)
            names.append(name)
            questions.append(about[0])
            scenes.append(episode_scene(episode))
            samples.append(episode_sample(self._processor, episode))
        ids = tuple(range(first, first + count))
        return Asked(tuple(names), ids, tuple(questions), tuple(scenes), tuple(samples))

    def seen_by(self, model: InternVideo3, frames: int, length: int) -> "Environment":
        """The same questions as another model is asked them.

        Args:
            model: of the same vocabulary. frames, length: of its prompts, as in the constructor.

        Raises:
            UserError: a model without a tower, or one whose patches are others.
        """
        mine, theirs = self._model.config.vision_config, model.config.vision_config
        if theirs is None:
            raise UserError("the other model has no vision tower; it cannot look at the same videos")
        for name in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
            if (ours := getattr(mine, name)) != (other := getattr(theirs, name)):
                raise UserError(
                    f"{name} is {ours} here and {other} in the other model; frames are cut once for both"
                )
        other = copy(self)
        other._model, other._frames, other._length = model, frames, length
        return other

    def prompts(self, params: Params, asked: Asked) -> Prompts:
        """The questions as prompts, their videos encoded by the tower of these parameters.

        Raises:
            UserError: a prompt is longer than the length.
        """
        world = world_of(
            asked.scenes,
            encoded_features(self._model, params, asked.samples, self.patches),
            room(self.patches),
            self.tokenizer,
            params["embed_tokens"]["embedding"],
        )
        return write_prompts(
            self.tokenizer,
            self._model.config,
            asked.scenes,
            [question.text for question in asked.questions],
            world,
            frames=self._frames,
            grid=self.config.tools.grid,
            length=self._length,
            ids=asked.ids,
        )

    def _record(self, number: int) -> tuple[int, int, str]:
        """Source and record of a question of the whole order, and its name."""
        source, record = self._order[number]
        return source, record, f"{self._names[source]}:{record}"

    def roll(self, params: Params, asked: Asked, key: Array, group: int) -> Rolled:
        """`group` rollouts of each question, by the model with these parameters.

        Raises:
            UserError: a prompt that is too long.
        """
        prompts = self.prompts(params, asked)
        trajectories, work = rollout(
            self._model, params, prompts, self.config, self.grammar, self.words, key, group
        )
        return Rolled(prompts, trajectories, work)

    def rewards(self, config: RewardConfig, asked: Asked, trajectories: Trajectories) -> list[Reward]:
        """What each rollout is worth; `trajectories` are on the host."""
        each = self.config.tools.grid[0] * self.config.tools.grid[1]
        times = [
            np.array([tenths(t, name) for t in scene.times])
            for name, scene in zip(asked.names, asked.scenes, strict=True)
        ]
        found = []
        for row, prompt in enumerate(trajectories.prompt.tolist()):
            facts = make_facts(self.tokenizer, trajectories, row, times, each)
            found.append(reward(config, asked.questions[prompt], facts))
        return found


def _task(opened: Opened) -> TaskSource:
    source = opened.source.source if isinstance(opened.source, Named) else opened.source
    if not isinstance(source, TaskSource):
        raise UserError(
            f"data.sources: {opened.name} is no synthetic task; rollouts need sources of kind task:NAME"
        )
    return source


def room(patches: int) -> WorldSize:
    """Of worlds without texts and segments, of which there must be room for one."""
    return WorldSize(patches, texts=1, text_tokens=1, segments=1)

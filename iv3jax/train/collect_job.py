"""The Job of a stage that learns from its own rollouts: objective, collector, and the model beside."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from iv3jax.checkpoint.run_folder import shape_folder
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.environment import Environment
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from iv3jax.paths import AnyPath
from iv3jax.train.choices import read_questions
from iv3jax.train.collect import RolloutCollector, together
from iv3jax.train.config import TrainConfig
from iv3jax.train.distill import Teacher, distillation
from iv3jax.train.lesson import Lesson
from iv3jax.train.loop import Job
from iv3jax.train.model import load_params
from iv3jax.train.objective import Objective
from iv3jax.train.policy import Rules
from iv3jax.train.rl import reinforcement
from iv3jax.train.trainable import trainable
from iv3jax.typing import Params

Beside = Callable[[Params], Params] | None


def collecting_job(
    config: TrainConfig,
    model: InternVideo3,
    processor: Processor,
    start: Callable[[Params], Params],
    mesh: Mesh,
    out: AnyPath | None,
) -> Job:
    """The Job of a stage that learns from rollouts; nothing is compiled yet.

    Args:
        start: as in Job. out: the run's folder, for traces.

    Raises:
        UserError: a tower that is trained, sources that are no tasks, rollouts that cannot work, or a teacher
            that cannot be loaded or has another vocabulary.
    """
    if any(path[0] == "visual" for path in trainable(model, config.frozen)):
        raise UserError(
            f"stage {config.stage!r} looks at videos that were encoded before, but the tower is trained; add "
            "model.visual.* to frozen"
        )
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.collect.prompts % parts:
        raise UserError(
            f"collect.prompts {config.collect.prompts} is no multiple of the {parts} devices that share a "
            "batch (mesh.data x mesh.fsdp)"
        )
    environment = environment_of(config, model, processor)
    rules = Rules(environment.grammar, environment.config.sampling)
    lesson: Lesson | None = None
    if config.stage == "distill":
        objective, beside, lesson = _distilling(config, model, processor, environment, rules, mesh)
    else:
        objective, other = reinforcing(config, model, rules)
        # The reference is the model as the run began; what is frozen is shared with it.
        beside = None if other is None else _same

    def opened(_: np.ndarray | None, group: int, groups: int) -> RolloutCollector:
        lanes = config.rows * config.accumulate // groups
        return RolloutCollector(config, model, environment, mesh, out, lanes, lesson)

    return Job(
        model, config, objective, opened, start, config.stage, beside=beside, together=together(config)
    )


def environment_of(config: TrainConfig, model: InternVideo3, processor: Processor) -> Environment:
    """The questions of a stage that learns from rollouts.

    Raises:
        UserError: as `collecting_job`, of sources and rollouts.
    """
    environment = Environment(
        config.data,
        model,
        processor,
        config.rollout,
        frames=config.collect.frames,
        length=config.length - config.rollout.budget,
        seed=config.seed,
        only=read_questions(config.collect.questions) if config.collect.questions else (),
    )
    environment.check(config.collect.prompts, config.collect.group)
    return environment


def reinforcing(
    config: TrainConfig, model: InternVideo3, rules: Rules
) -> tuple[Objective, InternVideo3 | None]:
    """The objective of stage "rl", and the reference beside the policy, if it has one."""
    if config.rl.kl == "none":
        return reinforcement(model, config.rl, rules), None
    return reinforcement(model, config.rl, rules, Teacher(model)), model


def _distilling(
    config: TrainConfig,
    model: InternVideo3,
    processor: Processor,
    environment: Environment,
    rules: Rules,
    mesh: Mesh,
) -> tuple[Objective, Beside, Lesson]:
    other, beside, view = teacher_of(config, model, processor, environment, mesh)
    teacher = Teacher(other)
    objective = distillation(model, config.distill, rules, teacher)
    parts = config.collect.prompts * config.collect.group // config.rows
    return objective, beside, Lesson(config.distill, teacher, view, rules, parts)


def teacher_of(
    config: TrainConfig, model: InternVideo3, processor: Processor, environment: Environment, mesh: Mesh
) -> tuple[InternVideo3, Callable[[Params], Params], Environment]:
    """The model to learn from, what makes its parameters of the student's first ones, and its questions.

    Raises:
        UserError: a teacher that cannot be loaded, has another vocabulary or cuts frames otherwise.
    """
    other: InternVideo3 = model
    beside: Callable[[Params], Params] = _same
    if config.distill.teacher:
        other, beside = _loaded(config, processor, mesh)
    length = config.length - config.rollout.budget + config.distill.room
    frames = config.distill.frames or config.collect.frames
    return other, beside, environment.seen_by(other, frames, length)


def _same(whole: Params) -> Params:
    return whole


def _loaded(
    config: TrainConfig, processor: Processor, mesh: Mesh
) -> tuple[InternVideo3, Callable[[Params], Params]]:
    """Another model, in the dtype of computing, and what reads its parameters."""
    source = config.distill.teacher
    other = named_teacher(config)
    if not Tokenizer.from_dir(shape_folder(source), other.config).same_vocabulary(processor.tokenizer):
        raise UserError(
            f"distill.teacher: {source} has another vocabulary than the student; its log-probabilities would "
            "be of other tokens"
        )
    return other, lambda _: load_params(source, other.run, mesh)


def named_teacher(config: TrainConfig) -> InternVideo3:
    """The model that `distill.teacher` names, in the dtype of computing, without its parameters."""
    compute = jnp.dtype(config.dtype).type
    shape = ModelConfig.from_file(shape_folder(config.distill.teacher))
    return InternVideo3(shape, Execution(compute, compute, config.remat, scan_layers=config.scan_layers))

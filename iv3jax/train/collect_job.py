"""The Job of a stage that learns from its own rollouts: objective, collector, and the model beside."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from iv3jax.data.processor import Processor
from iv3jax.errors import UserError
from iv3jax.mcr.environment import Environment
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.paths import AnyPath
from iv3jax.train.collect import RolloutCollector, together
from iv3jax.train.config import TrainConfig
from iv3jax.train.distill import Teacher
from iv3jax.train.loop import Job
from iv3jax.train.policy import Rules
from iv3jax.train.rl import reinforcement
from iv3jax.train.trainable import trainable
from iv3jax.typing import Params


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
        UserError: a tower that is trained, sources that are no tasks, or rollouts that cannot work.
    """
    if any(path[0] == "visual" for path in trainable(model, config.frozen)):
        raise UserError(
            f"stage {config.stage!r} looks at videos that were encoded before, but the tower is trained; add "
            "model.visual.* to frozen"
        )
    environment = Environment(
        config.data,
        model,
        processor,
        config.rollout,
        frames=config.collect.frames,
        length=config.length - config.rollout.budget,
        seed=config.seed,
    )
    environment.check(config.collect.prompts, config.collect.group)
    rules = Rules(environment.grammar, environment.config.sampling)
    # The reference is the model as the run began; what is frozen is shared with it.
    reference = None if config.rl.kl == "none" else Teacher(model)
    objective = reinforcement(model, config.rl, rules, reference)

    def opened(_: np.ndarray | None, group: int, groups: int) -> RolloutCollector:
        lanes = config.rows * config.accumulate // groups
        return RolloutCollector(config, model, environment, mesh, out, lanes)

    return Job(
        model,
        config,
        objective,
        opened,
        start,
        config.stage,
        beside=None if reference is None else lambda whole: whole,
        together=together(config),
    )

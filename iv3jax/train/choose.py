"""`iv3 data choose`: the paper's filters (SPEC §6) over an experiment's own questions.

For RL the fine-tuned model answers each question several times, and what it can neither always nor never do
is kept. For distillation its teacher answers too, and what the teacher can do and it cannot is kept.
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from iv3jax.data.processor import Processor
from iv3jax.errors import UserError
from iv3jax.mcr.environment import Asked, Environment
from iv3jax.models.internvideo3 import boxed_params
from iv3jax.sharding import param_shardings
from iv3jax.train.choices import Choice
from iv3jax.train.collect_job import environment_of, teacher_of
from iv3jax.train.config import TrainConfig
from iv3jax.train.loop import mesh_of
from iv3jax.train.rl_filter import data_filter, gap_filter
from iv3jax.train.run import begin
from iv3jax.typing import Params

ANSWERS = 8
"""Of each model to each question."""


def choose(config: TrainConfig, questions: int, answers: int = ANSWERS) -> Iterator[Choice]:
    """The first questions of an experiment, each with whether it is worth learning from.

    Args:
        config: of stage "rl" or "distill". questions: at least so many, in whole rounds of collect.prompts.
        answers: of each model to each question.

    Raises:
        UserError: another stage; no question; fewer than two answers; questions that are chosen already; what
            `collecting_job` refuses.
    """
    if config.stage == "supervised":
        raise UserError(
            'questions are chosen for the stages that learn from rollouts, "rl" and "distill"; '
            'this experiment\'s is "supervised"'
        )
    if questions < 1:
        raise UserError(f"questions {questions}: must be at least 1")
    if answers < 2:
        raise UserError(f"answers {answers}: one answer is never sometimes right; make it 2 or more")
    if config.collect.questions:
        raise UserError(
            f"collect.questions: {config.collect.questions} has been chosen already; choose among all, with "
            'collect.questions=""'
        )
    mesh = mesh_of(config.mesh)
    model, folder, start = begin(config)
    processor = Processor.from_dir(folder, model.config)
    environment = environment_of(config, model, processor)
    with jax.set_mesh(mesh):
        params = start(param_shardings(boxed_params(model), mesh))
        own = _scores(config, environment, params, answers)
        theirs = None
        if config.stage == "distill":
            _, beside, view = teacher_of(config, model, processor, environment, mesh)
            theirs = _scores(config, view, beside(params), answers)
        for first in range(0, questions, config.collect.prompts):
            asked = environment.asked(first, config.collect.prompts)
            scores = own(asked)
            if theirs is None:
                teacher = np.zeros((len(scores), 0))
                kinds = ["choice" if one.span is None else "grounding" for one in asked.questions]
                kept = np.array(
                    [data_filter(kind, row[None])[0] for kind, row in zip(kinds, scores, strict=True)]
                )
            else:
                teacher = theirs(asked)
                kept = gap_filter(teacher, scores)
            for i, name in enumerate(asked.names):
                yield Choice(
                    asked.ids[i], name, tuple(scores[i].tolist()), tuple(teacher[i].tolist()), bool(kept[i])
                )


def _scores(
    config: TrainConfig, environment: Environment, params: Params, answers: int
) -> Callable[[Asked], np.ndarray]:
    """What gives (P, answers) scores of a model's answers: IoU of a start and end, else right or wrong."""
    key = jax.random.key(config.seed)

    def scores(asked: Asked) -> np.ndarray:
        rolled = environment.roll(params, asked, key, answers)
        rewards = environment.rewards(config.reward, asked, jax.device_get(rolled.trajectories))
        parts = ["exact" if one.span is None else "iou" for one in asked.questions]
        each = [one.parts[parts[row // answers]] for row, one in enumerate(rewards)]
        return np.array(each).reshape(len(parts), answers)

    return scores

"""What a teacher adds to the student's rollouts: what it reads, or what it makes of that; or its own ones."""

from dataclasses import dataclass

import jax

from iv3jax.mcr.environment import Asked, Environment, Rolled
from iv3jax.mcr.prompts import Prompts
from iv3jax.mcr.trajectories import Trajectories, after_others
from iv3jax.train.collect_batch import teachers_logprobs, teachers_tokens, with_view
from iv3jax.train.distill import TEACHER, DistillConfig, Teacher
from iv3jax.train.policy import Rules
from iv3jax.train.policy_batch import PolicyBatch
from iv3jax.typing import Array, Params

_after_others = jax.jit(after_others)


@dataclass(frozen=True)
class Lesson:
    """A teacher for a collector.

    Attributes:
        teacher: the model. environment: the questions as it sees them.
        rules: the student's.
        parts: into how many parts rows are split to be read.
    """

    config: DistillConfig
    teacher: Teacher
    environment: Environment
    rules: Rules
    parts: int

    def roll(
        self, student: Environment, own: Params, params: Params, asked: Asked, key: Array, group: int
    ) -> Rolled:
        """The rollouts to learn from: the student's, or for "sequence" the teacher's after its prompts.

        Args:
            own: the student's parameters. params: the teacher's.
        """
        if self.config.kind != "sequence":
            return student.roll(own, asked, key, group)
        prompts, trajectories, work = self.environment.roll(params, asked, key, group)
        others = student.prompts(own, asked)
        return Rolled(others, _after_others(trajectories, prompts, others), work)

    def __call__(
        self,
        batch: PolicyBatch,
        trajectories: Trajectories,
        prompts: Prompts,
        asked: Asked,
        params: Params,
    ) -> PolicyBatch:
        """The rows of `rows_of` with what the kind of distillation needs.

        Args:
            params: the teacher's own.
        """
        if self.config.kind == "sequence":
            return batch
        others = self.environment.prompts(params, asked)
        batch = with_view(batch, trajectories, prompts, others)
        if self.config.kind == "exact":
            return batch
        given = {TEACHER: params}
        if self.config.kind == "sampled":
            found = teachers_logprobs(self.teacher, self.rules.unfiltered, given, self.parts, batch)
            batch = batch._replace(reference=found)
        else:
            top = teachers_tokens(self.teacher, self.rules, self.config.top, given, self.parts, batch)
            batch = batch._replace(top_ids=top.ids, top_logprobs=top.logprobs)
        # What it read is not needed any more.
        return batch._replace(teacher=None, teacher_index=None)

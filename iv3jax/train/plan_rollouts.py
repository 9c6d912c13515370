"""What the plan compiles for a stage that learns from rollouts, as shapes: its learning step, its rollouts.

The rollouts are a program of their own, which runs while the step's state lies beside it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from iv3jax.checkpoint.run_folder import shape_folder
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.grammar import build
from iv3jax.mcr.rollout import program
from iv3jax.mcr.step import Given, Loop
from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.models.presets import preset
from iv3jax.sharding import param_shardings, partition_spec, unbox
from iv3jax.train.collect_job import environment_of, named_teacher, reinforcing
from iv3jax.train.config import TrainConfig
from iv3jax.train.distill import Teacher, distillation
from iv3jax.train.objective import Objective
from iv3jax.train.policy import Rules
from iv3jax.train.policy_batch import PolicyBatch, each_field
from iv3jax.typing import Params


def rollout_objective(config: TrainConfig, model: InternVideo3) -> tuple[Objective, InternVideo3 | None]:
    """What is made small, and the model that lies beside the one that is trained.

    The grammar is that of the tokenizer of `init`, or of the tiny preset's where there is none: of about the
    same size, which is what counts here.

    Raises:
        UserError: a tokenizer or teacher that cannot be read or does not fit.
    """
    folder = shape_folder(config.init) if config.init else TINY_FOLDER
    tokenizer = Tokenizer.from_dir(folder)
    grammar = build(config.rollout.grammar, tokenizer, model.config.text_config.vocab_size)
    rules = Rules(grammar, config.rollout.sampling)
    if config.stage == "rl":
        return reinforcing(config, model, rules)
    other = named_teacher(config) if config.distill.teacher else model
    return distillation(model, config.distill, rules, Teacher(other)), other


@dataclass(frozen=True)
class PlannedRollouts:
    """The rollouts of one round, as shapes with shardings.

    Attributes:
        loop: what is compiled in. given: its arguments.
    """

    loop: Loop
    given: Given

    def lower(self) -> Any:
        """The program, to be compiled, under the ambient mesh."""
        return program.lower(self.loop, self.given)


def planned_rollouts(config: TrainConfig, model: InternVideo3, params: Params, mesh: Mesh) -> PlannedRollouts:
    """The rollouts that `iv3 train` would make before it learns from them.

    Args:
        params: all of the policy's, shapes with shardings.

    Raises:
        UserError: as `collect_job.environment_of`.
    """
    # Without a model there is no tokenizer of its ids; with the tiny one prompts and grammar are as large.
    if config.init:
        processor = Processor.from_dir(shape_folder(config.init), model.config)
    else:
        processor = Processor.from_dir(TINY_FOLDER, preset("tiny"))
    environment = environment_of(config, model, processor)
    prompts = environment.shapes(config.collect.prompts)
    loop = environment.loop(prompts, config.collect.group)
    rows = NamedSharding(mesh, partition_spec(("batch",)))
    positions = NamedSharding(mesh, partition_spec((None, "batch")))
    whole = NamedSharding(mesh, partition_spec(()))

    split = jax.tree.map(lambda x: _placed(x, rows), prompts)
    split = split._replace(positions=_placed(prompts.positions, positions))
    rest = (environment.grammar, environment.words, jax.eval_shape(lambda: jax.random.key(0)))
    return PlannedRollouts(loop, Given(params, split, *jax.tree.map(lambda x: _placed(x, whole), rest)))


def beside_shapes(model: InternVideo3, mesh: Mesh) -> Any:
    """Its parameters, shapes with shardings."""
    boxed = boxed_params(model)
    return jax.tree.map(_placed, unbox(boxed), param_shardings(boxed, mesh))


def rollout_batch(
    config: TrainConfig, model: InternVideo3, beside: InternVideo3 | None, mesh: Mesh
) -> PolicyBatch:
    """The batch of a step, shapes with shardings."""
    rows = config.rows * config.accumulate
    tokens = jax.ShapeDtypeStruct((rows, config.length), jnp.int32)
    numbers = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    batch = PolicyBatch(_read(model, rows, config.length), tokens, numbers, numbers)
    if config.stage == "rl":
        batch = batch._replace(advantages=jax.ShapeDtypeStruct((rows,), jnp.float32))
        if config.rl.kl == "k2":
            batch = batch._replace(reference=numbers)
    elif config.distill.kind == "exact":
        assert beside is not None, "distillation has a teacher"
        view = _read(beside, rows, config.length + config.distill.room)
        batch = batch._replace(teacher=view._replace(labels=None), teacher_index=tokens)
    elif config.distill.kind == "top_k":
        top = (rows, config.length, config.distill.top)
        batch = batch._replace(
            top_ids=jax.ShapeDtypeStruct(top, jnp.int32), top_logprobs=jax.ShapeDtypeStruct(top, jnp.float32)
        )
    elif config.distill.kind == "sampled":
        batch = batch._replace(reference=numbers)

    def placed(x: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return _placed(x, NamedSharding(mesh, partition_spec(axes)))

    out: PolicyBatch = each_field(placed, batch)
    return out


def _read(model: InternVideo3, rows: int, length: int) -> Batch:
    """What a model reads of trajectories (`mcr.trajectories.as_batch`): features for every place."""
    vision = model.config.vision_config
    if vision is None:
        raise UserError("this model has no vision tower; the loop needs one to look at videos")
    array = partial(jax.ShapeDtypeStruct, dtype=np.dtype(np.int32))
    tokens = array((rows, length))
    levels = 1 + len(vision.deepstack_visual_indexes)
    width = model.config.text_config.hidden_size
    features = jax.ShapeDtypeStruct((rows, length, levels, width), model.run.dtype)
    return Batch(
        tokens,
        array((3, rows, length)),
        tokens,
        labels=tokens,
        visual_index=tokens,
        features=features,
    )


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

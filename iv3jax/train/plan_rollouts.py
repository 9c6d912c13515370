"""What the plan compiles for a stage that learns from rollouts: its learning step, as shapes.

The rollouts themselves are not in it: they are a program of their own.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from iv3jax.checkpoint.run_folder import shape_folder
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.errors import UserError
from iv3jax.mcr.grammar import build
from iv3jax.models.batch import Batch
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.sharding import param_shardings, partition_spec, unbox
from iv3jax.train.collect_job import named_teacher, reinforcing
from iv3jax.train.config import TrainConfig
from iv3jax.train.distill import Teacher, distillation
from iv3jax.train.objective import Objective
from iv3jax.train.policy import Rules
from iv3jax.train.policy_batch import PolicyBatch, each_field


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


def beside_shapes(model: InternVideo3, mesh: Mesh) -> Any:
    """Its parameters, shapes with shardings."""
    boxed = boxed_params(model)

    def placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(placed, unbox(boxed), param_shardings(boxed, mesh))


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
    else:
        batch = batch._replace(reference=numbers)

    def placed(x: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition_spec(axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

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

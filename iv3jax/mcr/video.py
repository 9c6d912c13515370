"""A question about a video file, answered by the loop: the file as a world, one greedy rollout, its trace."""

from dataclasses import replace

import jax
import numpy as np

from iv3jax.checkpoint.load import LoadedModel
from iv3jax.data.collate import round_up_bucket
from iv3jax.data.sampling import temporal_patch_times
from iv3jax.errors import UserError
from iv3jax.mcr.environment import room
from iv3jax.mcr.grammar import build
from iv3jax.mcr.prompts import write_prompts
from iv3jax.mcr.rollout import rollout
from iv3jax.mcr.rollout_config import RolloutConfig
from iv3jax.mcr.trace import Trace, make_trace
from iv3jax.mcr.wording import make_wording
from iv3jax.mcr.world import Scene, encoded_features, world_of
from iv3jax.paths import PathArgument


def reason(
    model: LoadedModel,
    path: PathArgument,
    question: str,
    config: RolloutConfig,
    *,
    frames: int,
    fps: float,
    max_frames: int | None = None,
    seed: int = 0,
) -> Trace:
    """What the model looks at until it answers, step by step.

    Args:
        path: a video file. question: follows the overview in the user's turn.
        config: what a rollout may spend and which tools it has; slots and grid are the file's.
        frames: temporal patches of the overview.
        fps, max_frames: frames a second that a zoom can show at most, and of the whole video; None takes the
            model folder's. All of them are encoded before.

    Raises:
        UserError: an empty question, a model without a tower, a file that cannot be read, or a rollout that
            cannot work.
    """
    if not question.strip():
        raise UserError("the question is empty")
    vision = model.config.vision_config
    if vision is None:
        raise UserError("this model has no vision tower; the loop needs one to look at videos")
    processor = replace(model.processor, fps=fps)
    if max_frames is not None:
        processor = replace(
            processor, min_frames=min(processor.min_frames, max_frames), max_frames=max_frames
        )
    sample = processor([{"role": "user", "content": [{"type": "video", "video": str(path)}]}])
    ((count, height, width),) = sample.grids
    grid = (height // vision.spatial_merge_size, width // vision.spatial_merge_size)
    # Few shapes, so that a second video does not compile again.
    patches = round_up_bucket(count, 64)
    times = np.asarray(sample.media[0].times)
    scene = Scene(temporal_patch_times(times), float(times[-1]) + 1 / fps)
    tokenizer = processor.tokenizer
    spend = replace(config, slots=1, tools=replace(config.tools, grid=grid))
    with jax.set_mesh(model.mesh):
        world = world_of(
            [scene],
            encoded_features(model.model, model.params, [sample], patches),
            room(patches),
            tokenizer,
            model.params["embed_tokens"]["embedding"],
        )
        prompts = write_prompts(tokenizer, model.config, [scene], [question], world, frames=frames, grid=grid)
        grammar = build(spend.grammar, tokenizer, model.config.text_config.vocab_size)
        words = make_wording(tokenizer)
        found, _ = rollout(
            model.model, model.params, prompts, spend, grammar, words, jax.random.key(seed), group=1
        )
    return make_trace(tokenizer, jax.device_get(found), 0, np.zeros(1, np.int32))

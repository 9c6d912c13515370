"""From an experiment to a trained model: the door through which `iv3 train` and Python go."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from iv3jax import distributed
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.checkpoint.lora import save_adapter
from iv3jax.checkpoint.run_folder import shape_folder
from iv3jax.checkpoint.save import save, write_shape
from iv3jax.data.features import FeatureStore
from iv3jax.data.feed import Feed
from iv3jax.data.inspect import Report, inspect
from iv3jax.data.lanes import open_feed
from iv3jax.data.processor import Processor
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError
from iv3jax.generate.encode import tower_fingerprint
from iv3jax.models.batch import Batch
from iv3jax.models.config import ModelConfig
from iv3jax.models.internvideo3 import InternVideo3, boxed_params, init_params
from iv3jax.models.presets import preset
from iv3jax.paths import AnyPath, PathArgument, StorePath, make_path
from iv3jax.sharding import param_shardings
from iv3jax.train.collect_job import collecting_job
from iv3jax.train.config import TrainConfig
from iv3jax.train.digits import digit_feed
from iv3jax.train.feeds import place_batch, row_group
from iv3jax.train.loop import Job, mesh_of, train
from iv3jax.train.model import load_params, model_of
from iv3jax.train.objective import supervised
from iv3jax.train.trainable import trainable
from iv3jax.typing import Params

QUARANTINE = "quarantine.jsonl"
"""Samples that could not be read, in OUT: named here, they are passed over from then on."""

HELD_OUT_QUARANTINE = "held_out_quarantine.jsonl"

WITH_TOKENIZER = ("tiny", "tiny_half", "tiny_gqa")
"""Presets that the repository has a tokenizer for."""


def run(config: TrainConfig, out: PathArgument) -> AnyPath:
    """Trains a model and writes it to OUT/model, which it returns; goes on where OUT holds a run.

    Low-rank additions are merged there, and written by themselves to OUT/adapter. Several hosts write
    checkpoints only, and OUT is returned.

    Raises:
        Stopped: asked to stop, with everything saved; the same call goes on.
        UserError: `load`'s for `config.init`, `train`'s, or sources that cannot be opened.
    """
    place = make_path(out)
    if isinstance(place, StorePath):
        raise UserError(
            f"{place}: a run's folder must be local or mounted; copy its model to a store with iv3 export"
        )
    distributed.start()
    mesh = mesh_of(config.mesh)
    model, folder, start = begin(config)
    processor = Processor.from_dir(folder, model.config)
    if config.data.features:
        processor, start = with_features(processor, config, model, mesh, start)
    if config.stage == "supervised":
        job = Job(
            model,
            config,
            supervised(model, config.reduction),
            _feed_of(config, processor, place / QUARANTINE),
            start,
            "training",
            _held_out_of(config, processor, place / HELD_OUT_QUARANTINE, mesh)
            if config.held_out.sources
            else None,
        )
    else:
        job = collecting_job(config, model, processor, start, mesh, place)
    write_shape(place, model, folder)
    trained = LoadedModel(model, train(job, mesh, place), folder, mesh)
    if jax.process_count() > 1:
        # Parameters are spread over the hosts: `iv3 export OUT` gathers them on one.
        return place
    if model.run.lora is not None:
        save_adapter(trained, place / "adapter", replace=True)
    return save(trained, place / "model", config.dtype)


def begin(config: TrainConfig) -> tuple[InternVideo3, AnyPath, Callable[[Params], Params]]:
    """The model, the folder of its tokenizer, and what makes its first parameters where shardings say.

    Raises:
        UserError: `load`'s; a preset that cannot be trained because it has no tokenizer.
    """
    folder, shape = shape_of(config)
    model = model_of(config, shape)
    how = model.run

    def start(shardings: Params) -> Params:
        if not config.init:
            return init_params(model, jax.random.key(config.seed), shardings)
        mesh = jax.tree.leaves(shardings)[0].mesh
        return load_params(config.init, how, mesh)

    return model, folder, start


def with_features(
    processor: Processor,
    config: TrainConfig,
    model: InternVideo3,
    mesh: Mesh,
    start: Callable[[Params], Params],
) -> tuple[Processor, Callable[[Params], Params]]:
    """A processor that takes videos from the config's store, and a start that is made once for both.

    Raises:
        UserError: a model without a tower, a tower that is trained, or a store that another tower has
            written.
    """
    vision = model.config.vision_config
    if vision is None:
        raise UserError("data.features: this model has no vision tower, so no features; leave it empty")
    if any(path[0] == "visual" for path in trainable(model, config.frozen)):
        raise UserError(
            "data.features: the tower is trained, but videos come from a store; add model.visual.* to frozen"
        )
    params = start(param_shardings(boxed_params(model), mesh))
    store = FeatureStore(config.data.features, tower_fingerprint(vision, params["visual"]))
    return replace(processor, features=store), lambda _: params


def shape_of(config: TrainConfig) -> tuple[AnyPath, ModelConfig]:
    """The folder of the tokenizer, and the model's shape.

    Raises:
        UserError: no such model; a preset without a tokenizer.
    """
    if config.init:
        folder = shape_folder(config.init)
        return folder, ModelConfig.from_file(folder)
    if config.preset in WITH_TOKENIZER:
        return TINY_FOLDER, preset(config.preset)
    raise UserError(
        f"preset {config.preset} has no tokenizer, so it cannot be trained from nothing; name a model folder "
        f"as init, or one of {', '.join(WITH_TOKENIZER)}"
    )


def inspect_data(config: TrainConfig, samples: int) -> Report:
    """What the config's sources give (`iv3 data inspect`).

    Raises:
        UserError: a config without sources, or one whose sources cannot be opened.
    """
    if not config.data.sources:
        raise UserError("data.sources: is empty; this experiment makes its data as it goes (data/digits.py)")
    folder, shape = shape_of(config)
    return inspect(
        config.data,
        Processor.from_dir(folder, shape),
        length=config.length,
        chunks=config.chunks,
        chunk_patches=config.chunk_patches,
        seed=config.seed,
        samples=samples,
    )


def _feed_of(
    config: TrainConfig, processor: Processor, quarantine: AnyPath
) -> Callable[[np.ndarray | None, int, int], Feed]:
    """What opens the config's batches (`loop.Job.open_feed`)."""
    if not config.data.sources:
        return partial(digit_feed, config, processor)

    def opened(state: np.ndarray | None, group: int, groups: int) -> Feed:
        return open_feed(
            config.data,
            processor,
            processor.config,
            rows=config.rows * config.accumulate,
            host=group,
            hosts=groups,
            length=config.length,
            chunks=config.chunks,
            chunk_patches=config.chunk_patches,
            seed=config.seed,
            quarantine=quarantine,
            state=state,
        )

    return opened


def _held_out_of(
    config: TrainConfig, processor: Processor, quarantine: AnyPath, mesh: Mesh
) -> Callable[[], list[Batch]]:
    """What reads the held-out batches, always the same ones, and places them."""
    data = replace(config.data, sources=config.held_out.sources, workers=0)
    open_it = _feed_of(replace(config, data=data, accumulate=1), processor, quarantine)

    def batches() -> list[Batch]:
        feed = open_it(None, *row_group(mesh))
        try:
            return [place_batch(next(feed).batch, mesh) for _ in range(config.held_out.batches)]
        finally:
            feed.close()

    return batches

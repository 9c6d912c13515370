"""Models of those who train: a finished one's folder in place of an older one, a run's small files."""

from dataclasses import replace

import jax

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.folder import CONFIG, small_files
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.checkpoint.run_folder import SHAPE
from iv3jax.checkpoint.write import plan
from iv3jax.models.internvideo3 import InternVideo3, boxed_params
from iv3jax.paths import AnyPath, PathArgument, make_path
from iv3jax.sharding import make_mesh, unbox


def save(loaded: LoadedModel, folder: PathArgument, dtype: str | None = None) -> AnyPath:
    """Writes a model folder as `export` does, replacing an older one of that name; returns it."""
    export(loaded, folder, dtype=dtype, replace=True)
    return make_path(folder)


def write_shape(out: AnyPath, model: InternVideo3, folder: AnyPath) -> None:
    """Writes OUT/shape, config.json last: the small files of a run's model, from those of its source."""
    place = out / SHAPE
    if (place / CONFIG).exists():
        return
    place.mkdir(parents=True, exist_ok=True)
    plain = InternVideo3(model.config, replace(model.run, lora=None, weights=None))
    abstract = LoadedModel(plain, unbox(boxed_params(plain)), folder, make_mesh(jax.devices()[:1]))
    for name, content in small_files(abstract, plan(abstract)).items():
        (place / name).write_bytes(content)

"""A model in memory → its folder, in place of an older one: `export` for those who train."""

from iv3jax.checkpoint.export import export
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.paths import AnyPath, PathArgument, make_path


def save(loaded: LoadedModel, folder: PathArgument) -> AnyPath:
    """Writes a model folder as `export` does, replacing an older one of that name; returns it."""
    export(loaded, folder, replace=True)
    return make_path(folder)

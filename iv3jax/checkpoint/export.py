"""`iv3jax.export`: a model → a Hugging Face folder for transformers and `load`. Nothing else writes one."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from iv3jax.checkpoint.dtypes import DTYPES, parse_dtype, torch_name
from iv3jax.checkpoint.files import TensorFiles
from iv3jax.checkpoint.folder import TOKENIZER, check_folder, small_files
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.lora import merged
from iv3jax.checkpoint.target import LocalTarget
from iv3jax.checkpoint.upload import StoreTarget
from iv3jax.checkpoint.write import Planned, compare, plan, write
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, PathArgument, StorePath, make_path, remove_folder

MAX_SHARD_SIZE = "5GB"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Export:
    """What was written, read back and found equal.

    Attributes:
        folder: where.
        files: names of all files.
        tensors: how many.
        nbytes: bytes of all tensors.
        dtypes: config.json's name of each dtype → how many tensors have it.
    """

    folder: str
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    dtypes: Mapping[str, int]


def export(
    source: LoadedModel | PathArgument,
    out_dir: PathArgument,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    replace: bool = False,
    random_weights: bool = False,
) -> Export:
    """Writes a model folder: weights, config, tokenizer and processor files, and PyTorch code where needed.

    Qwen3-VL, Qwen3, Qwen2 and Llama models go to transformers' own classes; an InternVideo3 carries its own
    code (`trust_remote_code=True`). Every tensor of the source comes back bit for bit under its name, but for
    two that are repetitions and are left out: `lm_head.weight` where config.json ties it to the embeddings,
    and `rotary_emb.inv_freq`. The folder is then read anew, and every tensor compared with the parameters.

    A local folder is written beside its place and renamed, so it appears whole or not at all. On a store
    nothing can be renamed: config.json, without which nothing is a model, is uploaded last, and the check
    reads what lies there. Beside the parameters the host holds two copies of one tensor at most.

    Args:
        source: a model in memory, or what `load` takes. Low-rank additions are merged into the weights
            (checkpoint/lora.py writes them by themselves).
        out_dir: a folder that does not exist or is empty, local or on a store.
        dtype: bfloat16, float16 or float32 for all tensors; None keeps each one's own.
        max_shard_size: most bytes of one file, as a number or with a unit (5GB, 500MB; powers of ten). A
            larger tensor gets a file of its own.
        replace: allow an older folder at `out_dir`, which goes when the new one is whole.
        random_weights: see `load`.

    Raises:
        UserError: see `load`; a target that is taken, inside the source or cannot be written to, an unknown
            dtype or size, numbers that do not fit the dtype, a quantised model, one spread over several
            hosts, or a folder that does not read back.
    """
    wanted = None if dtype is None else parse_dtype(dtype)
    shard_bytes = parse_size(max_shard_size)
    out = make_path(out_dir)
    place = source.folder if isinstance(source, LoadedModel) else make_path(source)
    # A model may replace its own folder where the new one is written beside the old.
    itself = replace and out == place and not isinstance(out, StorePath)
    if place is not None and not itself and _inside(out, place):
        raise UserError(f"{out}: lies in the model folder {place}; export to another place")
    # Before the model is loaded, which may take long.
    target = _target(out, replace)
    try:
        loaded = merged(source if isinstance(source, LoadedModel) else _load(source, wanted, random_weights))
        if loaded.model.run.weights is not None:
            raise UserError(
                f"{place}: loaded with {loaded.model.run.weights} weights, which no longer are the model's; "
                "export from the original"
            )
        planned = plan(loaded, wanted)
        names = write(planned, shard_bytes, target.open)
        small = small_files(loaded, planned)
        for name, content in small.items():
            with target.open(name) as file:
                file.write(content)
        _check_and_finish(target, loaded, planned)
    except BaseException:
        target.discard()
        raise
    counts = Counter(torch_name(tensor.dtype) for tensor in planned.values())
    nbytes = sum(tensor.nbytes for tensor in planned.values())
    return Export(str(out), (*names, *small), len(planned), nbytes, dict(counts))


def summary(done: Export) -> str:
    """An Export in a few lines."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in done.dtypes.items())
    shards = [name for name in done.files if name.endswith(".safetensors")]
    others = [name for name in done.files if name not in shards]
    names = [f"{len(shards)} files of weights" if len(shards) > 1 else shards[0], *others]
    lines = [
        f"written  {done.folder}",
        f"files    {len(done.files)}: {', '.join(names)}",
        f"tensors  {done.tensors} of {done.nbytes:,} bytes: {dtypes}",
        "checked  config and every tensor read back bit for bit",
    ]
    if TOKENIZER not in done.files:
        lines.append(f"note     the source has no {TOKENIZER}; what it has of other such files was copied")
    return "\n".join(lines)


def parse_size(size: int | str) -> int:
    """Bytes: a number, or one with KB, MB, GB or TB (powers of ten).

    Raises:
        UserError: anything else, or less than one byte.
    """
    text = str(size).strip().upper()
    number, factor = (text[:-2], _UNITS[text[-2:]]) if text[-2:] in _UNITS else (text, 1)
    try:
        value = float(number) * factor
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise UserError(f"max shard size {size!r} is no size; write 5GB or 500MB, for example")
    return int(value)


def _load(source: PathArgument, wanted: str | None, random_weights: bool) -> LoadedModel:
    """The model to be written; what its parameters cannot hold, such as fp64, is rounded as it is read."""
    return load(source, dtype=None if wanted is None else DTYPES[wanted], random_weights=random_weights)


def _target(out: AnyPath, replace: bool) -> LocalTarget | StoreTarget:
    if not isinstance(out, StorePath):
        return LocalTarget(out, replace)
    if replace:
        remove_folder(out)
    return StoreTarget(out)


def _check_and_finish(
    target: LocalTarget | StoreTarget, loaded: LoadedModel, planned: Mapping[str, Planned]
) -> None:
    """Reads what was written: before it appears, or on a store after, for `discard` to take it away again."""
    if isinstance(target, LocalTarget):
        _check(target.part, loaded, planned)
        target.finish()
    else:
        target.finish()
        _check(target.folder, loaded, planned)


def _check(folder: AnyPath, loaded: LoadedModel, planned: Mapping[str, Planned]) -> None:
    check_folder(folder, loaded)
    compare(TensorFiles(folder), loaded, planned)


def _inside(out: AnyPath, source: AnyPath) -> bool:
    """Whether a path is a folder or lies below it."""
    if isinstance(out, StorePath) or isinstance(source, StorePath):
        return f"{out}/".startswith(f"{source}/")
    return Path(out).resolve().is_relative_to(Path(source).resolve()) and source.is_dir()

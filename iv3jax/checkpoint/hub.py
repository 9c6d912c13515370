"""From the name of a model to its folder: local, on a store, or downloaded from the Hugging Face hub.

An id of the hub is `org/name` or `org/name@revision`; a folder or a preset of that name goes first.
"""

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from iv3jax.errors import UserError
from iv3jax.models.presets import PRESETS
from iv3jax.paths import AnyPath, PathArgument, StorePath, make_path

CONFIG_FILES = ("config.json",)
"""What is needed to know a model's shapes."""

MODEL_FILES = (
    *CONFIG_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "*processor_config.json",
    "chat_template*",
    "generation_config.json",
)
"""What is needed to run and to export a model."""

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_SECONDS = 10.0


def model_folder(source: PathArgument, files: tuple[str, ...] = MODEL_FILES) -> AnyPath | None:
    """Where the files of a named model lie; None for a preset, which has none.

    Args:
        source: a folder, a preset's name, or an id of the hub.
        files: patterns of the files that the hub is asked for.

    Raises:
        UserError: there is no such thing, or the store or the hub cannot be reached.
    """
    folder = make_path(source)
    if folder.is_dir():
        return folder
    if str(source) in PRESETS:
        return None
    if folder.exists():
        raise UserError(f"{source}: a file; a model is a folder with config.json and safetensors")
    if isinstance(folder, StorePath):
        raise UserError(f"{source}: no such folder on the store; check the bucket and the path")
    if is_hub_id(source):
        return hub_folder(str(source), files)
    raise UserError(f"{source}: neither a folder nor a preset ({', '.join(PRESETS)})")


def is_hub_id(source: object) -> bool:
    """Whether a name could be one of the hub's; a relative folder `runs/model` could be as well."""
    return isinstance(source, str) and _ID.fullmatch(source) is not None


def hub_folder(source: str, files: tuple[str, ...] = MODEL_FILES) -> Path:
    """Downloads a model's files, with progress shown, or takes them from the hub's cache on this machine.

    Offline, what is in the cache is used. The hub is asked once, for at most 10 seconds, so that a
    mistyped path does not make anyone wait.

    Args:
        source: an id, see `is_hub_id`.
        files: patterns of the files wanted.

    Raises:
        UserError: no such model or revision, a gated one, or a hub that cannot be reached. As the name may
            be that of a mistyped folder, the text says that there is none.
    """
    match = _ID.fullmatch(source)
    assert match is not None, "is_hub_id says which are"
    repo, revision = match["repo"], match["revision"]
    start = f"{source}: no such folder, and "
    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=_SECONDS).sha
    except GatedRepoError:
        raise UserError(
            f"{start}the hub's model {repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then "
            "log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{start}no public model {repo} at {constants.ENDPOINT}; check the name, or log in with "
            "`hf auth login` if the model is private"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{start}the model {repo} at {constants.ENDPOINT} has no revision {revision}; check it"
        ) from None
    except (OfflineModeIsEnabled, HTTPError) as error:
        return _cached(repo, revision, files, start, _line(error))
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(files)))
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{source}: the download broke off ({_line(error)}); check the network and the disk's room and "
            "run it again, it goes on where it stopped"
        ) from None


def _cached(repo: str, revision: str | None, files: tuple[str, ...], start: str, reason: str) -> Path:
    """The files of an earlier download; `start` and `reason` make the error where there was none."""
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(files), local_files_only=True)
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{start}the hub, where it could be a model's name, cannot be asked ({reason}); check the path, "
            f"or the network and HF_ENDPOINT ({constants.ENDPOINT})"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

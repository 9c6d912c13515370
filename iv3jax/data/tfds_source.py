"""A tensorflow-datasets data set in ArrayRecord, read without TensorFlow, and the builder that writes one.

A data set holds the lines of an annotation of internvideo3_json.py, checked when they are written; its media
stay files beside it. ArrayRecord reads any record without an index of lines, from many shards.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from iv3jax.data.config import SourceConfig
from iv3jax.data.internvideo3_json import open_annotation, read_messages
from iv3jax.data.record import Record, folder_of, parse_object
from iv3jax.errors import UserError
from iv3jax.paths import AnyPath, make_path


@dataclass(eq=False)
class Dataset:
    """A `Source` of one split of a data set.

    Attributes:
        path: the folder of the version, which holds dataset_info.json.
        split: its name.
        label: what it is called in names.
        root: folder of relative media paths.
        fps, min_frames, max_frames: of all its videos; 0 leaves it to the config.
    """

    path: AnyPath
    split: str
    label: str
    root: AnyPath
    fps: float = 0.0
    min_frames: int = 0
    max_frames: int = 0
    _data: Any = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        return len(self._open())

    def name(self, index: int) -> str:
        """`LABEL:NUMBER`."""
        return f"{self.label}:{index}"

    def __getitem__(self, index: int) -> Record:
        value = self._open()[index]["record"]
        where = f"{self.path}:{index}"
        data = parse_object(value if isinstance(value, bytes) else str(value).encode(), where)
        messages = read_messages(data, self.root, where)
        return Record(self.name(index), messages, self.fps, self.min_frames, self.max_frames)

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens its own readers.
        return self.__dict__ | {"_data": None}

    def _open(self) -> Any:
        if self._data is None:
            import tensorflow_datasets as tfds

            if not (self.path / "dataset_info.json").exists():
                raise UserError(f"{self.path}: no data set; give the folder that holds dataset_info.json")
            builder = tfds.builder_from_directory(str(self.path))
            if self.split not in builder.info.splits or "record" not in builder.info.features:
                splits = ", ".join(builder.info.splits)
                raise UserError(f"{self.path}: needs a feature `record` and split {self.split}, not {splits}")
            self._data = builder.as_data_source(split=self.split)
        return self._data


def open_dataset(config: SourceConfig) -> list[tuple[str, Dataset, float]]:
    """The one source of a data set: its name, itself, ratio 1. The option `split=NAME` picks a split.

    Raises:
        UserError: the folder holds no such data set, or an option is unknown.
    """
    path = make_path(config.path)
    split = "train"
    for option in config.options:
        key, _, split = option.partition("=")
        if key != "split":
            raise UserError(f"{config.path}: option {option!r} is unknown; there is split=NAME")
    label = config.name or path.name
    root = folder_of(path, config.media_root)
    source = Dataset(path, split, label, root, config.fps, config.min_frames, config.max_frames)
    return [(label, source, 1.0)]


def write_dataset(annotation: str, folder: str, name: str = "records") -> AnyPath:
    """Writes an annotation as a data set of one split, `train`.

    Args:
        annotation: the JSON lines; media paths are kept as they are.
        folder: the data set lies in FOLDER/NAME/1.0.0, which is returned.
        name: lower-case letters, digits and underscores.

    Raises:
        UserError: a line is damaged; nothing is written then.
    """
    import tensorflow_datasets as tfds

    [(_, source, _)] = open_annotation(SourceConfig("internvideo3", path=annotation))
    for index in range(len(source)):
        source[index]
    # A second data set of this process would be called the same.
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            # Where a list of downloads would lie; to look for it takes a package that tfds does not name.
            code_path = None

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({"record": tfds.features.Text()})
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Iterator[tuple[int, dict[str, bytes]]]:
                for index in range(len(source)):
                    yield index, {"record": source.pieces.raw(index)}

    Builder.name = name
    builder = Builder(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return make_path(str(builder.data_dir))

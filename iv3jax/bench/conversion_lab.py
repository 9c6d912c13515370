"""Many conversions of one source for the least work, in memory: what the table of real weights is made with.

Steps that no rank decides are made once for a method and layout, the source's own pass once for all. What
comes out is what `iv3 convert` writes, before it is written.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.checkpoint.files import TensorFiles
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.checkpoint.names import insert, tensors
from iv3jax.conversion.calibration import Calibration
from iv3jax.conversion.config import ConvertConfig, converted_config, plan
from iv3jax.conversion.convert import convert_layers, prepare
from iv3jax.conversion.layer import GQALayer, Maps, assemble
from iv3jax.conversion.methods import METHODS
from iv3jax.conversion.run import Conversion, begin, run_source
from iv3jax.conversion.source import Source
from iv3jax.conversion.split import split_of
from iv3jax.conversion.work import Work
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.models.layers import Execution
from iv3jax.typing import Params


@dataclass(frozen=True)
class Made:
    """A conversion in memory.

    Attributes:
        run: how it was made, its steps still on the disk.
        ranks: of each layer.
        attention: each layer's `self_attn` parameters.
    """

    run: Conversion
    ranks: tuple[int, ...]
    attention: tuple[Params, ...]

    @property
    def numbers(self) -> float:
        """Cached for a token and layer, the mean over layers."""
        return float(np.mean(self.ranks)) + self.run.plan.rope_dim


@dataclass(frozen=True)
class Lab:
    """One source and the tokens that its conversions are calibrated on, none held out.

    Attributes:
        folder: where steps lie, so that a bench that was stopped goes on.
    """

    source: Source
    calibration: Calibration
    folder: Path

    @contextmanager
    def prepared(self, method: str, rope_dim: int, freqfold: int | None) -> Iterator[Conversion]:
        """A conversion, of no rank yet, with all steps that no rank decides; without a folding of pairs that
        each layer chooses.

        Steps that are the same as another conversion's are that one's: the source's pass, and where keys
        are split alike (`_split_alike`), the split.
        """
        pairs = "chosen" if freqfold is None else "even"
        config = ConvertConfig(rank=1, method=method, rope_dim=rope_dim, freqfold=freqfold, rope_pairs=pairs)
        calibration = {"calibration": self.calibration.fingerprint}
        prints = {"method": asdict(METHODS[method]), **calibration}
        self.folder.mkdir(parents=True, exist_ok=True)
        with Work.open(self.folder / "source", calibration) as shared:
            run_source(self._run(config, shared), _say)
            with Work.open(self.folder / _name(method, config), prints) as work:
                _link(shared, work, "source")
                for other in METHODS:
                    if _split_alike(method, other):
                        _link(Work(self.folder / f"{_name(other, config)}.converting"), work, "split")
                run = self._run(config, work)
                prepare(run, _say)
                yield run

    def _run(self, config: ConvertConfig, work: Work) -> Conversion:
        stream = begin(self.source, self.calibration, work)
        return Conversion(self.source, config, plan(config, self.source.config), stream, (), work)


def _name(method: str, config: ConvertConfig) -> str:
    return f"{method}-e{config.rope_dim}-f{config.freqfold or 'chosen'}"


def make(run: Conversion, rank: int, budget: str = "uniform") -> Made:
    """Converts at a rank.

    A method whose fits do not see converted layers has the same directions at every rank, the most important
    first: it is converted once without a limit, and cut.
    """
    wanted = _at(run, rank, budget)
    if run.method.stream == "converted" or run.method.refit or budget != "uniform":
        return _converted(wanted, keep=False)
    return _cut(_converted(_at(run, run.plan.largest), keep=True), wanted)


def rope_step(run: Conversion) -> Made:
    """Only what keeps RoPE is decided: the latent has room for all the rest, and nothing is fitted to it."""
    made = []
    for i in range(run.text.num_hidden_layers):
        params, arrays = run.params(i), run.work.arrays(f"split_{i}")
        split, used = split_of(arrays), np.asarray(arrays["used"])
        rope = split.to_rope @ used[: split.to_rope.shape[1]]
        size = run.plan.largest
        maps = Maps(np.asarray(arrays["query"]), rope, split.targets() @ used, np.eye(size))
        attention = assemble(GQALayer.of(params["self_attn"]), split, maps, params["self_attn"])
        made.append(jax.tree.map(lambda x: np.asarray(x, np.float32), attention))
    return Made(_at(run, size), (size,) * len(made), tuple(made))


def _at(run: Conversion, rank: int, budget: str = "uniform") -> Conversion:
    """The same conversion at another rank."""
    config = replace(run.config, rank=rank, budget=budget)
    return replace(run, config=config, plan=plan(config, run.source.config))


def _converted(run: Conversion, keep: bool) -> Made:
    """The layers' steps, in a folder of their own; removed when they are read, unless kept."""
    prints = {"config": asdict(run.config)}
    name = f"{run.work.folder.stem}-{run.config.budget}{run.plan.rank}"
    with Work.open(run.work.folder.with_name(name), prints) as work:
        _link(run.work, work, "source", "split", "metric")
        config, reports = convert_layers(replace(run, work=work), _say)
        table = tensors(config, scan_layers=False)
        attention = tuple(_read(table, i, TensorFiles(work.path(f"layer_{i}"))) for i in range(len(reports)))
        if not keep:
            work.remove()
    return Made(run, tuple(report.rank for report in reports), attention)


def _read(table: Sequence[Any], layer: int, files: TensorFiles) -> Params:
    inside = ("language_model", f"layers_{layer}", "self_attn")
    found: dict[str, Any] = {}
    for tensor in table:
        if tensor.path[:3] == inside:
            insert(found, tensor.path[3:], np.array(tensor.to_ours(files.read(tensor.name))))
    return found


def _cut(made: Made, run: Conversion) -> Made:
    """The conversion at the run's rank, from one at a larger rank whose directions are the same."""
    rank, whole = run.plan.rank, made.ranks[0]

    def cut(attention: Params) -> Params:
        down, up = attention["kv_a_proj_with_mqa"], attention["kv_b_proj"]
        rows = np.r_[:rank, whole : len(down["bias"])]
        return {
            **attention,
            "kv_a_proj_with_mqa": {name: x[rows] for name, x in down.items()},
            "kv_b_proj": {"kernel": up["kernel"][..., :rank]},
        }

    return Made(run, (rank,) * len(made.ranks), tuple(map(cut, made.attention)))


def model_of(made: Made, source: LoadedModel) -> LoadedModel:
    """The converted model, whose other weights are the loaded source's (layers standing alone)."""
    run = made.run
    anchors = [run.work.arrays(f"split_{i}")["anchor"] for i in range(len(made.ranks))]
    config = converted_config(source.config, run.source.target_type, run.plan, made.ranks, False, anchors)
    attention = {f"layers_{i}": jax.tree.map(jnp.asarray, own) for i, own in enumerate(made.attention)}
    params = with_attention(source.params, attention)
    model = InternVideo3(config, Execution(scan_layers=False))
    return LoadedModel(model, params, source.folder, source.mesh)


def with_attention(params: Params, attention: Params) -> Params:
    """A model's parameters with other `self_attn` in the layers named."""
    decoder = dict(params["language_model"])
    for name, own in attention.items():
        decoder[name] = {**decoder[name], "self_attn": own}
    return {**params, "language_model": decoder}


def load_source(folder: Path) -> LoadedModel:
    """The source as `model_of` takes it."""
    return load(folder, run=Execution(scan_layers=False))


def _split_alike(one: str, other: str) -> bool:
    """Whether two methods split keys in the same way."""
    fields = ("real_rotation", "fitted", "features")
    return one != other and all(getattr(METHODS[one], f) == getattr(METHODS[other], f) for f in fields)


def _link(from_work: Work, to_work: Work, *prefixes: str) -> None:
    """Finished steps of another work folder, in place."""
    for prefix in prefixes:
        for path in from_work.folder.glob(f"{prefix}_*"):
            if path.suffix != ".part" and not to_work.path(path.name).exists():
                to_work.path(path.name).symlink_to(path.resolve(), target_is_directory=True)


def _say(stage: str, layer: int, note: str) -> None:
    """A line for the tenth of a stage's layers that is done."""
    if layer % 10 == 9:
        print(f"  {stage:8} layer {layer + 1} {note}".rstrip(), file=sys.stderr, flush=True)

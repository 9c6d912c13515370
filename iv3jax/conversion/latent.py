"""A layer converted: its latent fitted on what the layers before it give, its tensors, its line of
the report.
"""

import dataclasses
import json
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.checkpoint.names import Tensor, lookup
from iv3jax.conversion import measure, passes
from iv3jax.conversion.assemble import save_tensors
from iv3jax.conversion.factorise import Factors, adapters, ridge
from iv3jax.conversion.layer import GQALayer, Maps, Split, assemble
from iv3jax.conversion.metric import factors_of
from iv3jax.conversion.report import LayerReport
from iv3jax.conversion.run import Conversion, moments
from iv3jax.conversion.split import split_of
from iv3jax.conversion.work import save_arrays
from iv3jax.models.attention import M2LAAttention, Tokens
from iv3jax.models.config import TextConfig
from iv3jax.models.decoder import DecoderLayer, gather_visual
from iv3jax.models.rope import Rope
from iv3jax.typing import Params

Array = np.ndarray

REPORT = "report.json"

PULL = 1e-2
"""How strongly what is fitted anew is pulled towards what it was, as a share of the mean diagonal."""


def convert_layer(
    run: Conversion, layer: int, config: TextConfig, expected: list[Tensor], rank: int
) -> LayerReport:
    """Writes the step `layer_i` and returns its report.

    Args:
        config: the converted model's decoder, of this layer alone (`TextConfig.of_layer`).
        expected: the layer's tensors inside `self_attn` as the converted checkpoint has them.
        rank: of its latent.
    """
    how, config = run.method, dataclasses.replace(config, rope_frequency_list=None)
    params, arrays = run.params(layer), run.work.arrays(f"split_{layer}")
    split, used = split_of(arrays), np.asarray(arrays["used"])
    anchor = np.asarray(arrays["anchor"])
    source = run.hidden(f"source_{layer}")
    streamed = source if layer == 0 or how.stream == "source" else run.hidden(f"layer_{layer - 1}")
    targets = source if how.follow else streamed
    gqa = GQALayer.of(params["self_attn"])
    if how.features == "weights":
        found = measure.Moments(arrays["features"], arrays["cross"], *[None] * 4)
    else:
        found = moments(run, params, targets, streamed)
    factors = factors_of(run, layer, found, used, split)
    maps = _maps(run, found, factors, split, used, arrays.get("query"), rank)
    made = assemble(gqa, split, maps, params["self_attn"])
    rounded = _rounded(made, expected, params)
    out = _output(run, layer, config, params, rounded, split, anchor, targets, streamed)
    if how.refit:
        kernel = ridge(out.cross, out.features, gqa.output.reshape(out.cross.shape), PULL)
        made["o_proj"] = {"kernel": kernel.reshape(gqa.output.shape)}
        rounded = _rounded(made, expected, params)
    report = LayerReport(
        layer,
        rank,
        query_norm_residual=_number(arrays, "query_residual"),
        key_norm_residual=_number(arrays, "key_residual"),
        rope_energy=float(arrays["rope_energy"]),
        logit_error=_number(arrays, "logit_error"),
        energies=tuple(float(x) for x in factors.energies),
        lost=float(factors.lost[rank] / max(factors.lost[0], 1e-300)),
        output_error=out.error(rounded["o_proj"]["kernel"]),
    )
    with run.work.step(f"layer_{layer}") as folder:
        stored = {t.name: t.to_theirs(lookup(rounded, _inside(t))) for t in expected}
        save_tensors(folder, stored)
        if how.stream != "source":
            passed = rounded
            if how.stream == "split":
                whole = dataclasses.replace(maps, down=split.targets() @ used, up=np.eye(run.plan.largest))
                passed = assemble(gqa, split, whole, params["self_attn"])
            _advance(run, layer, config, params, passed, anchor, streamed, folder)
        (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report)))
    if layer and how.stream != "source":
        run.forget(f"layer_{layer - 1}", "hidden")
    return report


def _number(arrays: dict[str, Array], name: str) -> float | None:
    return float(arrays[name]) if name in arrays else None


def _maps(
    run: Conversion,
    found: measure.Moments,
    factors: Factors,
    split: Split,
    used: Array,
    query: Array | None,
    rank: int,
) -> Maps:
    """The layer's maps at a rank."""
    keys = split.to_rope.shape[1]
    rope = split.to_rope @ used[:keys]
    down, up = factors.down(rank), factors.up(rank)
    if run.method.follow:
        cross, features = found.of_both()
        rope = ridge(split.to_rope @ cross[:keys], features, rope, PULL)
        if query is not None:
            query = measure.affine_fit(found.query, found.query_features, np.asarray(query), PULL)
    extra = None
    if run.config.adapters:
        extra = adapters(split.targets() @ found.cross, found.features, factors, rank, run.plan.unseen_mean)
    return Maps(None if query is None else np.asarray(query), rope, down, up, extra)


def _inside(tensor: Tensor) -> tuple[str, ...]:
    """The path of a tensor's parameter below `self_attn`."""
    return tensor.path[tensor.path.index("self_attn") + 1 :]


def _rounded(made: Params, expected: list[Tensor], params: Params) -> Params:
    """The parameters as the checkpoint will hold them: its set, and the source's dtype."""
    dtype = params["self_attn"]["o_proj"]["kernel"].dtype
    out: dict[str, Any] = {}
    for tensor in expected:
        path = _inside(tensor)
        module = made[path[0]]
        value = module.get(path[1])
        if value is None:
            # A bias that the config gives every projection and that this one has not.
            value = np.zeros(dict(tensor.sizes)["h"] * dict(tensor.sizes)["k"])
            value = tensor.to_ours(value)
        out.setdefault(path[0], {})[path[1]] = np.asarray(value).astype(dtype)
    return out


@dataclasses.dataclass(frozen=True)
class _Output:
    """Sums over tokens of the wanted output y (D) and of the converted heads' context x (H·v)."""

    cross: Array
    features: Array
    energy: float

    def error(self, kernel: Array) -> float:
        """E|y − O·x|² / E|y|²."""
        o = np.asarray(kernel, np.float64).reshape(self.cross.shape)
        squared = np.sum((o @ self.features) * o)
        return float(max(0.0, self.energy - 2 * np.sum(o * self.cross) + squared) / max(self.energy, 1e-300))


def _output(
    run: Conversion,
    layer: int,
    config: TextConfig,
    params: Params,
    made: Params,
    split: Split,
    anchor: Array,
    targets: Any,
    streamed: Any,
) -> _Output:
    total: Any = None
    for b in run.fitted:
        rows, modality = run.stream.rows(b), run.stream.modality(b)
        batch = _output_sums(
            run.text,
            config,
            params,
            jax.tree.map(jnp.asarray, made),
            targets(b),
            streamed(b),
            rows,
            anchor,
            modality,
        )
        values = [np.asarray(x, np.float64) for x in batch]
        total = values if total is None else [x + y for x, y in zip(total, values, strict=True)]
    cross, features, energy = total
    return _Output(cross, features, float(energy))


@partial(jax.jit, static_argnums=(0, 1))
def _output_sums(
    text: TextConfig,
    config: TextConfig,
    params: Params,
    made: Params,
    targets: jax.Array,
    hidden: jax.Array,
    rows: passes.Rows,
    anchor: jax.Array,
    modality: jax.Array,
) -> tuple[jax.Array, ...]:
    p = passes.parts(text, params, targets)
    wanted = passes.attend(passes.source_logits(text, p, rows.rope), rows.mask(), p.value)
    x = context(config, params, made, hidden, rows, anchor, modality)
    counted = (modality >= 0).astype(jnp.float32)[..., None]
    y = passes.project_out(params, wanted) * counted
    x = passes.flat(x) * counted
    return jnp.einsum("btd,btx->dx", y, x), jnp.einsum("btx,btz->xz", x, x), jnp.sum(y * y)


def tokens(rows: passes.Rows, anchor: jax.Array, modality: jax.Array) -> Tokens:
    """What M²LA, whose pairs turn by the source's frequencies `anchor`, knows of the calibration tokens."""
    rope = Rope(*(x[..., anchor] for x in rows.rope))
    return Tokens(rope, rows.segment_ids, None, None, None, modality=jnp.maximum(modality, 0))


def context(
    config: TextConfig,
    params: Params,
    made: Params,
    hidden: jax.Array,
    rows: passes.Rows,
    anchor: jax.Array,
    modality: jax.Array,
) -> jax.Array:
    """(B, T, H, v): what M²LA's heads give to o_proj."""
    seen: list[jax.Array] = []

    def watch(next_function: Any, args: Any, kwargs: Any, called: Any) -> Any:
        if called.module.name == "o_proj" and called.method_name == "__call__":
            seen.append(args[0])
        return next_function(*args, **kwargs)

    norm = passes.RMSNorm(config.hidden_size, config.rms_norm_eps)
    x = norm.apply({"params": params["input_layernorm"]}, hidden)
    with nn.intercept_methods(watch):
        M2LAAttention(config).apply({"params": made}, x, tokens(rows, anchor, modality), None, jnp.int32(0))
    return seen[0]


@partial(jax.jit, static_argnums=0)
def _converted(
    config: TextConfig,
    params: Params,
    hidden: jax.Array,
    layer: jax.Array,
    rows: passes.Rows,
    anchor: jax.Array,
    modality: jax.Array,
) -> jax.Array:
    deepstack = None
    if rows.deepstack is not None and rows.visual_index is not None:
        deepstack = jnp.stack([gather_visual(level, rows.visual_index) for level in rows.deepstack])
    given = (hidden, None), layer, tokens(rows, anchor, modality), deepstack
    (after, _), _ = DecoderLayer(config).apply({"params": params}, *given)
    return after


def _advance(
    run: Conversion,
    layer: int,
    config: TextConfig,
    params: Params,
    made: Params,
    anchor: Array,
    hidden: Any,
    folder: Any,
) -> None:
    """The calibration tokens through the converted layer."""
    rank = made["kv_b_proj"]["kernel"].shape[-1]
    config = dataclasses.replace(config, kv_lora_rank=rank)
    whole = {**params, "self_attn": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), made)}
    for b in range(len(run.stream.batches)):
        after = _converted(
            config, whole, hidden(b), jnp.int32(layer), run.stream.rows(b), anchor, run.stream.modality(b)
        )
        save_arrays(folder, {f"hidden_{b}": np.asarray(after)})

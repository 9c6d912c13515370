"""What a conversion is asked for, and what follows from it before any weight is read."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iv3jax.conversion.methods import method
from iv3jax.conversion.rotate import Layout, LayoutError, layout
from iv3jax.errors import UserError
from iv3jax.models.config import ModelConfig, TextConfig

BUDGETS = ("uniform", "dynamic")
QK_NORMS = ("linear", "cached", "dropped")
PAIRS = ("chosen", "even")


@dataclass(frozen=True)
class ConvertConfig:
    """One conversion.

    Attributes:
        rank: of the latent in every layer; with a dynamic budget their mean, or beside `cache_fraction` the
            most that a layer may get. None: what `cache_fraction` gives.
        cache_fraction: numbers cached per token against the source's keys and values; instead of `rank`,
            unless the budget is dynamic.
        budget: "uniform", or "dynamic": ranks by layer, where they save the most of the expected loss.
        rope_dim: `qk_rope_head_dim`; None is head_dim.
        rope_pairs: which pairs keep RoPE. "chosen": of each layer those that its attention logits need most,
            of all components of all frequencies (`rope_frequency_list`). "even": components of every
            frequency alike, as InternVideo3 has it. None is chosen for iv3, even for the other methods.
        rope_components: of even pairs, how many components of each frequency; as many as there are key
            heads, and a rank that holds all values, are no approximation at all.
        freqfold: of even pairs, neighbouring frequencies treated as one; None takes as few as it can.
        qk_norm: what becomes of q/k norm where the source has it: "linear", an affine substitute; "cached",
            kept exactly, with one number per key head and token in the cache; "dropped", left out.
        adapters: an affine map of the latent for text and one for vision tokens.
        method: a key of METHODS.
        tokens: of calibration, most. length: tokens of a row.
        seed: of the draws.
    """

    rank: int | None = None
    cache_fraction: float | None = None
    budget: str = "uniform"
    rope_dim: int | None = None
    rope_pairs: str | None = None
    rope_components: int = 1
    freqfold: int | None = None
    qk_norm: str = "linear"
    adapters: bool = False
    method: str = "iv3"
    tokens: int = 65536
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        method(self.method)
        choices = (
            ("budget", self.budget, BUDGETS),
            ("qk-norm", self.qk_norm, QK_NORMS),
            ("rope-pairs", self.pairs, PAIRS),
        )
        for name, value, known in choices:
            if value not in known:
                raise UserError(f"--{name} {value}: there are {', '.join(known)}")
        if self.rank is None and self.cache_fraction is None:
            raise UserError("how small is the cache to be? name --rank or --cache-fraction")
        if self.rank is not None and self.cache_fraction is not None and self.budget == "uniform":
            raise UserError(
                "--rank and --cache-fraction both say what every layer gets; name one of them, or give "
                "--budget dynamic, where the fraction is the mean and the rank the most of a layer"
            )
        for name in ("rank", "rope_dim", "rope_components", "freqfold"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
        if self.cache_fraction is not None and not 0 < self.cache_fraction <= 1:
            raise UserError(f"--cache-fraction {self.cache_fraction}: must be above 0 and at most 1")
        if self.tokens < self.length or self.length < 2:
            raise UserError(
                f"--tokens {self.tokens} must be at least one row of --length {self.length}, 2 or more"
            )

    @property
    def pairs(self) -> str:
        """`rope_pairs`, or what None means."""
        return self.rope_pairs or ("chosen" if method(self.method).fitted else "even")


@dataclass(frozen=True)
class Plan:
    """What a conversion of one source means in numbers.

    Attributes:
        text: the source's decoder.
        layout: of the RoPE key's frequencies; None where each layer chooses its own.
        rope_dim: e. rank: r, the mean over layers. limit: what was asked for as the most of a layer.
        step: ranks of a dynamic budget are multiples of it.
        cached: whether norms stay and are cached.
    """

    text: TextConfig
    layout: Layout | None
    rope_dim: int
    rank: int
    limit: int | None
    step: int
    cached: bool

    @property
    def content(self) -> int:
        """c, the key dims that lose their rotation."""
        return self.text.num_key_value_heads * self.text.head_dim - self.rope_dim

    @property
    def unseen_mean(self) -> int:
        """How many targets' means are the same for all keys, so nothing to the softmax: the content's.

        Not where norms are cached: they scale what each key gives.
        """
        return 0 if self.cached else self.content

    @property
    def largest(self) -> int:
        """The rank that leaves nothing out."""
        return self.content + self.text.num_key_value_heads * self.text.head_dim

    @property
    def most(self) -> int:
        """The largest rank that a layer may get."""
        return self.largest if self.limit is None else self.limit


def plan(config: ConvertConfig, source: ModelConfig) -> Plan:
    """Checks a conversion against its source.

    Raises:
        UserError: a rank above what exists, a budget that cannot be met, a RoPE width that does not fit, or
            norms to be kept where there are none.
    """
    text = source.text_config
    heads, d = text.num_key_value_heads, text.head_dim
    rope = d * config.rope_components if config.rope_dim is None else config.rope_dim
    if config.rope_components > heads:
        raise UserError(f"--rope-components {config.rope_components}: the source has {heads} key heads")
    cached = config.qk_norm == "cached"
    if cached and not text.use_qk_norm:
        raise UserError("--qk-norm cached: the source has no q/k norm; leave the option out")
    if cached and config.method != "iv3":
        raise UserError(f"--qk-norm cached: is not part of --method {config.method}; leave the option out")
    if config.adapters and source.vision_config is None:
        raise UserError("--adapters on: the source is text-only, and adapters tell text from vision")
    frequencies = _layout(config, text, rope)
    # A cached norm is an fp32 number per key head, two of bf16.
    extra = 2 * heads if cached else 0
    if config.cache_fraction is None:
        assert config.rank is not None
        rank = config.rank
    else:
        rank = math.floor(config.cache_fraction * text.cache_width + 1e-6) - rope - extra
        if rank < 1:
            least = (rope + extra + 1) / text.cache_width
            raise UserError(
                f"--cache-fraction {config.cache_fraction}: the RoPE key alone takes {rope + extra} of the "
                f"source's {text.cache_width} numbers per token and layer; ask for {least:.3f} or more"
            )
    both = config.rank is not None and config.cache_fraction is not None
    found = Plan(text, frequencies, rope, rank, config.rank if both else None, _step(rank), cached)
    for value in (rank, found.most):
        if value > found.largest:
            raise UserError(
                f"rank {value}: the source has {found.largest} dims besides the RoPE key's {rope}; "
                f"ask for {found.largest} or less"
            )
    if rank > found.most:
        raise UserError(
            f"--cache-fraction {config.cache_fraction}: is a mean rank of {rank}, above --rank {found.most}, "
            "the most of a layer; ask for a smaller fraction or a larger rank"
        )
    return found


def _layout(config: ConvertConfig, text: TextConfig, rope: int) -> Layout | None:
    """Of even pairs."""
    heads, d = text.num_key_value_heads, text.head_dim
    if config.pairs == "even":
        fold = config.freqfold or max(1, d * config.rope_components // rope)
        try:
            return layout(d, rope, config.rope_components, fold, text.mrope_section)
        except LayoutError as error:
            raise UserError(str(error)) from None
    if not method(config.method).fitted:
        raise UserError(f"--rope-pairs chosen: is not part of --method {config.method}; leave the option out")
    if config.rope_components != 1 or config.freqfold is not None:
        raise UserError("--rope-components and --freqfold: are of even pairs; give --rope-pairs even")
    if rope % 2 or rope > heads * d:
        raise UserError(f"--rope-dim {rope}: must be even and at most the {heads * d} dims that keys have")
    return None


def _step(rank: int) -> int:
    """The largest power of two, up to a chip's tile of 128, of which a mean rank has at least six."""
    step = 1
    while step < 128 and 12 * step <= rank:
        step *= 2
    return step


def converted_config(
    source: ModelConfig,
    target_type: str,
    found: Plan,
    ranks: tuple[int, ...],
    adapters: bool,
    anchors: Sequence[np.ndarray],
) -> ModelConfig:
    """The config of the converted model.

    Args:
        anchors: of each layer, the source's frequency that each pair turns by (`Layout.anchor`).
    """
    text, chosen = found.text, found.layout is None
    stride = 1 if found.layout is None else _stride(found.layout, text.head_dim)
    section = text.mrope_section
    new = dataclasses.replace(
        text,
        attention_bias=True,
        attention_output_bias=False,
        use_qk_norm=found.cached,
        kv_lora_rank=max(ranks),
        kv_lora_rank_list=None if len(set(ranks)) == 1 else ranks,
        qk_nope_head_dim=text.head_dim,
        qk_rope_head_dim=found.rope_dim,
        v_head_dim=text.head_dim,
        rope_components=1 if chosen else found.rope_dim * stride // text.head_dim,
        rope_frequency_list=tuple(tuple(map(int, a)) for a in anchors) if chosen else None,
        latent_adapters=adapters,
        mrope_section=section and (section[0] // stride, section[1] // stride, section[2] // stride),
    )
    return dataclasses.replace(source, model_type=target_type, text_config=new, source={})


def _stride(even: Layout, head_dim: int) -> int:
    """Every how many of the source's frequencies one turns."""
    return head_dim // 2 // len(set(even.anchor.tolist()))

"""How many FLOPs a training step takes, from formulas; a product of (m, k) and (k, n) is 2·m·k·n.

`cost_analysis` of a compiled program is no such count: it counts a loop's body once and a kernel as nothing.
Norms, softmax, rotary angles, embeddings and the optimiser are left out: under 1 % at the 8B's sizes.

Letters as in SPEC: T tokens of a row, D width, F feed-forward's width, H heads, G key/value heads, r, n, e, v
of M²LA, L layers, V vocabulary; of the tower W width, M its feed-forward's, C patches of a chunk, K DeepStack
levels.

    decoder layer, per token   2·(D·H(n+e) + D(r+e) + H·v·D + 3·D·F), and 2·r·H(n+v) to expand a latent
                               GQA, heads of d: 2·(2·D·H·d + 2·D·G·d + 3·D·F)
    attention, per token       2·H·(n+e + v) for each key that is seen: (S+1)/2 in a sample of S tokens
    head, per token            2·D·V
    tower, per patch           2·1536·W + blocks · (2·(4·W² + 2·W·M) + 4·W·C), all keys of a chunk
    mergers, per 4 patches     (1+K) · 2·(4W·4W + 4W·D)

A backward pass takes twice as many. What is computed again is in `executed` only; MFU does not count it.
"""

from dataclasses import dataclass

from iv3jax.models.config import ModelConfig, TextConfig, VisionConfig
from iv3jax.train.config import TrainConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs for each of the T tokens of every row, padding and vision included.

    Attributes:
        forward: of one forward pass, by part: "decoder", "attention", "head", "tower".
        training: forward and backward, nothing computed twice; without products for frozen weights'
            gradients.
        executed: with what remat, the tower's steps, the chunked loss, kernels and the context axis do again.
    """

    forward: dict[str, float]
    training: float
    executed: float


def flops_per_token(
    model: ModelConfig,
    config: TrainConfig,
    sample: int,
    context: int = 1,
    steps_of_tower: int = 2,
    kernels: bool = True,
    tower: bool = True,
) -> Flops:
    """The FLOPs of a training step, for each token of a row.

    Args:
        sample: tokens S of a sample; `config.length` where one fills its row.
        context: devices that a sequence is split over; each expands the latents of the whole sequence.
        steps_of_tower: in which a device works off its chunks; in several, each is computed again backwards.
        kernels: whether the decoder's kernels are trained, or only small additions (LoRA): then products have
            a gradient by their inputs alone.
        tower: whether anything of the tower is trained; else it has no backward pass.
    """
    text, vision = model.text_config, model.vision_config
    again = {"full": 1, "dots": 0, "none": 0}[config.remat]
    patches = config.chunks * config.chunk_patches / config.length if vision is not None else 0.0
    expand = _expanding(text) * text.num_hidden_layers
    forward = {
        "decoder": _products(text) * text.num_hidden_layers + expand,
        "attention": _key(text) * (sample + 1) / 2 * text.num_hidden_layers,
        "head": 2.0 * text.hidden_size * text.vocab_size,
        "tower": patches * _patch(vision, config.chunk_patches) if vision is not None else 0.0,
    }
    # Forward, by a product's inputs, by its weights; attention has no weights, but two inputs.
    products = 3 if kernels else 2
    vision_passes = 3 if tower else 1
    training = (
        (forward["decoder"] + forward["head"]) * products
        + forward["attention"] * 3
        + forward["tower"] * vision_passes
    )
    # M²LA's kernels compute logits again backwards, once for queries and once for keys and values.
    backward = _backward(text) * (sample + 1) / 2 * text.num_hidden_layers
    executed = (
        forward["decoder"] * (products + again)
        + expand * (context - 1) * (products + again)
        + forward["attention"] * (1 + again)
        + backward
        + forward["head"] * (products + 1)
        + forward["tower"] * (vision_passes + (again + (steps_of_tower > 1) if tower else 0))
    )
    return Flops(forward, training, executed)


def _products(c: TextConfig) -> float:
    """Of one decoder layer's products with weights, without the expansion of latents."""
    width, heads = c.hidden_size, c.num_attention_heads
    if c.kv_lora_rank is None:
        attention = width * c.head_dim * (2 * heads + 2 * c.num_key_value_heads)
    else:
        n, e, v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        attention = width * (heads * (n + e) + c.kv_lora_rank + e + heads * v)
    return 2.0 * (attention + 3 * width * c.intermediate_size)


def _expanding(c: TextConfig) -> float:
    """Of one layer's keys and values of a token, from its latent."""
    if c.kv_lora_rank is None:
        return 0.0
    return 2.0 * c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)


def _key(c: TextConfig) -> float:
    """Of one layer's attention, for a query and a key."""
    if c.kv_lora_rank is None:
        return 4.0 * c.num_attention_heads * c.head_dim
    return 2.0 * c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)


def _backward(c: TextConfig) -> float:
    """Of its backward pass: dq takes logits, dP and dq; dk and dv take logits, dP, dv and dk."""
    if c.kv_lora_rank is None:
        return 3 * _key(c)
    both = c.qk_nope_head_dim + c.qk_rope_head_dim
    return 2.0 * c.num_attention_heads * (4 * both + 3 * c.v_head_dim)


def _patch(c: VisionConfig, chunk: int) -> float:
    """Of the tower and its mergers, for one patch."""
    block = (
        2.0 * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size) + 4.0 * c.hidden_size * chunk
    )
    merged = c.hidden_size * c.spatial_merge_size**2
    mergers = (1 + len(c.deepstack_visual_indexes)) * 2.0 * merged * (merged + c.out_hidden_size)
    return 2.0 * c.patch_dim * c.hidden_size + c.depth * block + mergers / c.spatial_merge_size**2

"""The small layers every part is made of. Each parameter names its logical axes (sharding.RULES)."""

import dataclasses
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from iv3jax.errors import UserError
from iv3jax.sharding import constrain
from iv3jax.typing import Array, DType

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}
"""What a layer keeps for its backward pass: everything, nothing, or the products with weights."""


@dataclass(frozen=True)
class Execution:
    """How a model is run, as opposed to what it computes (its config).

    Attributes:
        dtype: dtype of activations and products. Softmax, norms and rotary angles are always fp32.
        param_dtype: dtype in which new parameters are made.
        remat: a key of REMAT_POLICIES, applied to each decoder layer and vision block.
        patches_per_step: patches the vision tower works on at a time (at least one chunk).
        scan_layers: whether the decoder's layers are one scanned stack, which compiles in seconds at any
            depth, or stand alone, each with parameters and cache of its own. XLA copies a layer's slice
            of a stack before it multiplies, on a CPU through memory, which halves the speed of decoding.
    """

    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: str = "none"
    patches_per_step: int = 16384
    scan_layers: bool = True

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat {self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")

    def checkpointed(self, layer: type[nn.Module]) -> type[nn.Module]:
        """The layer class under the remat policy, for use inside a scan."""
        if self.remat == "none":
            return layer
        return nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)


class Linear(nn.Module):
    """y = x·W + b over the last len(in_shape) axes of x.

    kernel: (*in_shape, *out_shape), bias: out_shape; so heads stay an axis of their own. New biases are
    normal with `bias_scale` as their standard deviation.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool = False
    run: Execution = dataclasses.field(default_factory=Execution)
    bias_scale: float = 0.0

    def setup(self) -> None:
        init = nn.initializers.normal(1 / math.sqrt(math.prod(self.in_shape)))
        self.kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, (*self.in_axes, *self.out_axes)),
            (*self.in_shape, *self.out_shape),
            self.run.param_dtype,
        )
        if self.use_bias:
            self.bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.normal(self.bias_scale), self.out_axes),
                self.out_shape,
                self.run.param_dtype,
            )

    def __call__(self, x: Array) -> Array:
        count = len(self.in_shape)
        x_axes = tuple(range(x.ndim - count, x.ndim))
        y = jax.lax.dot_general(
            x.astype(self.run.dtype),
            self.kernel.astype(self.run.dtype),
            ((x_axes, tuple(range(count))), ((), ())),
        )
        return y + self.bias.astype(self.run.dtype) if self.use_bias else y


class Embedding(nn.Module):
    """A table of `rows` vectors of `width`."""

    rows: int
    width: int
    axes: tuple[str, str | None]
    run: Execution = dataclasses.field(default_factory=Execution)

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes),
            (self.rows, self.width),
            self.run.param_dtype,
        )

    def __call__(self, ids: Array) -> Array:
        return jnp.take(self.embedding, ids, axis=0).astype(self.run.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last axis, in fp32."""

    width: int
    epsilon: float
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (self.width,), self.run.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale.astype(jnp.float32)).astype(self.run.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / std · scale + bias over the last axis, in fp32 (epsilon 1e-6, SPEC §4)."""

    width: int
    run: Execution = dataclasses.field(default_factory=Execution)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def param(name: str, init: nn.initializers.Initializer) -> Array:
            boxed = nn.with_logical_partitioning(init, ("norm",))
            return self.param(name, boxed, (self.width,), self.run.param_dtype).astype(jnp.float32)

        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        y = y * param("scale", nn.initializers.ones) + param("bias", nn.initializers.zeros)
        return y.astype(self.run.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), the decoder's feed-forward."""

    width: int
    hidden: int
    run: Execution = dataclasses.field(default_factory=Execution)

    def setup(self) -> None:
        up = dict(in_shape=(self.width,), out_shape=(self.hidden,), in_axes=("embed",), out_axes=("mlp",))
        down = dict(in_shape=(self.hidden,), out_shape=(self.width,), in_axes=("mlp",), out_axes=("embed",))
        self.gate_proj = Linear(**up, run=self.run)
        self.up_proj = Linear(**up, run=self.run)
        self.down_proj = Linear(**down, run=self.run)

    def __call__(self, x: Array) -> Array:
        y = nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(constrain(y, "batch", "sequence", "act_mlp"))

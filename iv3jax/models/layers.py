"""The small layers every part is made of. Each parameter names its logical axes (sharding.RULES)."""

import dataclasses
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from iv3jax import ops
from iv3jax.errors import UserError
from iv3jax.models import quantized
from iv3jax.models.lora import Lora, addition
from iv3jax.sharding import constrain, gathered, gradients_first
from iv3jax.typing import Array, DType, Params

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
        remat: a key of REMAT_POLICIES, applied to each decoder layer and vision block. With "full" a decoder
            layer also makes the feed-forward's gradients before attention's.
        patches_per_step: patches the vision tower works on at a time on a device (at least one chunk).
        scan_layers: whether the decoder's layers are one scanned stack, which compiles in seconds at any
            depth, or stand alone, each with parameters and cache of its own. On a CPU and a GPU XLA copies
            a layer's slice of a stack before it multiplies, which on a CPU halves the speed of decoding.
        weights: how the kernels of every Linear are stored: None as floats of `param_dtype`, else a key of
            quantized.FORMATS. A quantised model is for inference, and for training something beside it.
        lora: low-rank additions to some Linears, to be trained beside their kernels; None or rank 0: none.
        implementation: of M²LA's operations (kernels_pallas): None takes the chip's kernels where they
            accept the shapes, else XLA; "xla", "tpu" or "gpu" is taken or refused. On a CPU the kernels run
            interpreted, which is for tests.
    """

    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32
    remat: str = "none"
    patches_per_step: int = 16384
    scan_layers: bool = True
    weights: str | None = None
    lora: Lora | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat {self.remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        if self.weights is not None and self.weights not in quantized.FORMATS:
            raise UserError(f"weights {self.weights!r} are not one of {', '.join(quantized.FORMATS)}")
        if self.implementation is not None and self.implementation not in ops.IMPLEMENTATIONS:
            names = ", ".join(ops.IMPLEMENTATIONS)
            raise UserError(f"implementation {self.implementation!r} is not one of {names}")

    def within(self, *path: str) -> "Execution":
        """For a module that stands alone, whose parameters are those at `path` of a whole model."""
        if self.lora is None or not path:
            return self
        inside = "/".join(path) + "/"
        targets = tuple(t.removeprefix(inside) for t in self.lora.targets if t.startswith(inside))
        low = dataclasses.replace(self.lora, targets=targets) if targets else None
        return dataclasses.replace(self, lora=low)

    def checkpointed(self, layer: type[nn.Module]) -> type[nn.Module]:
        """The layer class under the remat policy, for use inside a scan."""
        if self.remat == "none":
            return layer
        return nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)


def compute_kernels(params: Params, dtype: DType) -> Params:
    """The parameters with kernels and tables in the dtype of computing, in which modules use them anyway."""

    def cast(path: tuple, x: Array) -> Array:
        return x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x

    cast_all: Params = jax.tree_util.tree_map_with_path(cast, params)
    return cast_all


class Linear(nn.Module):
    """y = x·Wᵀ + b over the last len(in_shape) axes of x.

    kernel: (*out_shape, *in_shape), bias: out_shape; so heads stay an axis of their own. Outputs come first,
    as in checkpoints: a CPU reads such a kernel a quarter faster when there is one token to decode, one that
    is also used the other way round (kv_b_proj) is used as it lies, and loading moves no axis. New biases are
    normal with `bias_scale` as their standard deviation. With `run.weights`, kernel_codes and kernel_scale
    are there instead of kernel (quantized.py says how), and new ones are uniform. A target of `run.lora` has
    lora_a and lora_b as well (lora.py).
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    use_bias: bool = False
    run: Execution = dataclasses.field(default_factory=Execution)
    bias_scale: float = 0.0

    def setup(self) -> None:
        std = 1 / math.sqrt(self.rows)
        if self.run.weights is None:
            self.kernel = self.param(
                "kernel",
                nn.with_logical_partitioning(nn.initializers.normal(std), (*self.out_axes, *self.in_axes)),
                (*self.out_shape, *self.in_shape),
                self.run.param_dtype,
            )
        else:
            how = quantized.FORMATS[self.run.weights]
            # The first of several input axes is the outermost, so what splits it splits the rows alike.
            self.kernel_codes = self.param(
                "kernel_codes",
                nn.with_logical_partitioning(how.init_codes, (self.in_axes[0], *self.out_axes)),
                how.codes_shape(self.rows, self.out_shape),
                how.code_dtype,
            )
            # Too few groups to be split wherever the rows are; the codes are many times their size.
            self.kernel_scale = self.param(
                "kernel_scale",
                nn.with_logical_partitioning(
                    nn.initializers.constant(std / how.code_rms), (None, *self.out_axes)
                ),
                how.scale_shape(self.rows, self.out_shape),
                jnp.bfloat16,
            )
        if self.use_bias:
            self.bias = self.param(
                "bias",
                nn.with_logical_partitioning(nn.initializers.normal(self.bias_scale), self.out_axes),
                self.out_shape,
                self.run.param_dtype,
            )
        if (low := self._lora) is not None:
            self.lora_a = self.param(
                "lora_a",
                nn.with_logical_partitioning(nn.initializers.normal(std), (None, *self.in_axes)),
                (low.rank, *self.in_shape),
                jnp.float32,
            )
            self.lora_b = self.param(
                "lora_b",
                nn.with_logical_partitioning(nn.initializers.zeros, (*self.out_axes, None)),
                (*self.out_shape, low.rank),
                jnp.float32,
            )

    @property
    def rows(self) -> int:
        """Numbers that go into each product."""
        return math.prod(self.in_shape)

    @property
    def _lora(self) -> Lora | None:
        """What is added to this layer's kernel."""
        how = self.run.lora
        return how if how is not None and how.rank and "/".join(self.path) in how.targets else None

    def __call__(self, x: Array, kernel: Array | None = None) -> Array:
        y = self.product(x, self.run.dtype, kernel)
        return y + self.bias.astype(self.run.dtype) if self.use_bias else y

    def product(self, x: Array, dtype: DType, kernel: Array | None = None) -> Array:
        """x·Wᵀ in `dtype`, from factors in the dtype of computing; no bias. `kernel`: instead of its own."""
        lead = x.shape[: x.ndim - len(self.in_shape)]
        x = x.reshape(*lead, self.rows)
        if self.run.weights is not None:
            y = quantized.matmul(x, self.kernel_codes, self.kernel_scale, self.run.weights, self.run.dtype)
            y = y.astype(dtype)
        else:
            kernel = self.kernel if kernel is None else kernel
            kernel = gathered(kernel.astype(self.run.dtype), *self.out_axes, *self.in_axes)
            y = self._times(x, kernel, dtype).reshape(*lead, *self.out_shape)
        if (how := self._lora) is not None:
            inner = self._times(x, self.lora_a, jnp.float32) * how.scale
            y = y + self._times(inner, self.lora_b, dtype).reshape(y.shape)
        return y

    def _times(self, x: Array, kernel: Array, dtype: DType) -> Array:
        """x (…, K) · kernelᵀ → (…, N) in `dtype`, whatever axes K and N are in the kernel."""
        # As a plain matrix: a product over several axes is one that XLA on a CPU copies the kernel for.
        kernel = kernel.astype(self.run.dtype).reshape(-1, x.shape[-1])
        return ops.product(x.astype(self.run.dtype), kernel, dtype)

    def dense(self, x: Array) -> tuple[Array, Array | None]:
        """Kernel (*out_shape, *in_shape) and bias in the dtype of computing, for other products with x."""
        bias = self.bias.astype(self.run.dtype) if self.use_bias else None
        how = self._lora
        if self.run.weights is None:
            kernel = self.kernel
        else:
            codes = quantized.here(x, self.kernel_codes)
            dtype = self.run.dtype if how is None else jnp.float32
            kernel = quantized.dequantize(codes, self.kernel_scale, self.rows, self.run.weights, dtype)
            kernel = kernel.reshape(*self.in_shape, *self.out_shape)
            inward = tuple(range(len(self.in_shape)))
            kernel = jnp.moveaxis(kernel, inward, [i - len(inward) for i in inward])
        if how is not None:
            kernel = kernel.astype(jnp.float32) + addition(self.lora_a, self.lora_b, how.scale)
        return kernel.astype(self.run.dtype), bias


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
        x = jnp.take(self.embedding, ids, axis=0).astype(self.run.dtype)
        if self.axes[1] == "embed" and ids.ndim == 2:
            # Looked up where a part of the table's width lies, then sent to where the tokens lie, over one
            # axis after the other: else the whole table is gathered, and its gradient summed up everywhere.
            x = constrain(constrain(x, "replicas", None, "embed"), "replicas", "sequence", "hidden_parts")
        return x


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
        kernels: list[Array | None] = [None] * 3
        if self.run.remat == "full" and self.run.weights is None:
            # Of all that a layer's backward pass keeps, half is in here.
            layers = (self.gate_proj, self.up_proj, self.down_proj)
            axes = [(*layer.out_axes, *layer.in_axes) for layer in layers]
            own = [layer.kernel.astype(self.run.dtype) for layer in layers]
            kernels[:], x = gradients_first(own, axes, x)
        gate, up, down = kernels
        y = nn.silu(self.gate_proj(x, gate)) * self.up_proj(x, up)
        return self.down_proj(constrain(y, "batch", "sequence", "act_mlp"), down)

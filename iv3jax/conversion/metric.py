"""What an error of a layer's content and values costs, the latent found in that metric, and ranks by
layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.conversion import measure, passes
from iv3jax.conversion.budget import spend
from iv3jax.conversion.factorise import Factors, damped, factorise, ridge
from iv3jax.conversion.layer import Split
from iv3jax.conversion.run import Conversion, Say
from iv3jax.conversion.split import split_of
from iv3jax.conversion.stream import Head
from iv3jax.conversion.work import save_arrays

Array = np.ndarray


def run_metrics(run: Conversion, say: Say) -> None:
    """Fisher information of content and values, from the last layer to the first."""
    layers = run.text.num_hidden_layers
    missing = [i for i in range(layers) if not run.work.done(f"metric_{i}")]
    if not missing:
        return
    head = Head.of(run.source) if max(missing) == layers - 1 else None
    for i in reversed(missing):
        params, before = run.params(i), run.hidden(f"source_{i}")
        split = split_of(run.work.arrays(f"split_{i}"))
        up = jnp.asarray(split.content_up, jnp.float32)
        above = None if i == layers - 1 else run.work.arrays(f"metric_{i + 1}")
        fisher: Any = 0.0
        latents: dict[int, Array] = {}
        with run.work.step(f"metric_{i}") as folder:
            for b in run.fitted:
                if above is None:
                    assert head is not None
                    rng = jax.random.fold_in(jax.random.key(run.config.seed + 1), b)
                    after = run.hidden(f"source_{layers}")(b)
                    gradient = head.gradient(after, run.stream.batches[b], rng)
                else:
                    gradient = above[f"gradient_{b}"]
                back = passes.source_gradients(
                    run.text,
                    run.plan.cached,
                    params,
                    before(b),
                    jnp.int32(i),
                    run.stream.rows(b),
                    up,
                    jnp.asarray(gradient),
                )
                save_arrays(folder, {f"gradient_{b}": np.asarray(back.hidden)})
                latents[b] = np.asarray(back.latent)
                flat = latents[b].reshape(-1, latents[b].shape[-1]).astype(np.float64)
                fisher = fisher + flat.T @ flat
            fisher = fisher / run.stream.tokens
            save_arrays(folder, {"fisher": fisher})
        if above is not None:
            run.forget(f"metric_{i + 1}", "gradient")
        say("metric", i, "")
    run.forget("metric_0", "gradient")


def metric_of(run: Conversion, layer: int, targets: Array, features: Array) -> Array:
    """What an error of [content ‖ values] costs, (c + G·d) squared."""
    if run.method.metric == "fisher":
        return np.asarray(run.work.arrays(f"metric_{layer}")["fisher"])
    size, content = len(targets), run.plan.content
    if run.method.metric == "plain":
        return np.eye(size)
    norms = np.sqrt(np.sum((targets @ features) * targets, axis=1))
    ratio = norms[:content].mean() / norms[content:].mean()
    return np.diag(np.where(np.arange(size) < content, ratio**-2.0, 1.0))


def factors_of(run: Conversion, layer: int, found: measure.Moments, used: Array, split: Split) -> Factors:
    """The latent's regression in the method's metric, to be cut at any rank."""
    cross, features = found.of_both()
    wanted = split.targets()
    targets = wanted @ used
    metric = metric_of(run, layer, targets, features)
    damping = run.method.damping + 1e-9
    if not run.method.follow:
        return factorise(targets, damped(features, damping), metric)
    # No rank is spent on a mean that makes no difference.
    goal, content = wanted @ cross, run.plan.unseen_mean
    mean = goal[:content, -1] / features[-1, -1]
    goal[:content] -= np.outer(mean, features[-1])
    targets[:content, -1] -= mean
    # Pulled towards the source's own map, so that nothing is lost where nothing has to be.
    return factorise(ridge(goal, features, targets, damping), damped(features, damping), metric)


def ranks_of(run: Conversion) -> tuple[int, ...]:
    """Each layer's rank."""
    layers = run.text.num_hidden_layers
    if run.config.budget == "uniform":
        return (run.plan.rank,) * layers
    spectra = []
    for i in range(layers):
        arrays = run.work.arrays(f"split_{i}")
        found = measure.Moments(arrays["features"], arrays["cross"], *[None] * 4)
        factors = factors_of(run, i, found, np.asarray(arrays["used"]), split_of(arrays))
        spectra.append(factors.energies)
    return spend(spectra, run.plan.rank * layers, run.plan.step, run.plan.most)

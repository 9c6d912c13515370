"""The conversions that `iv3 convert --method` knows: ours, and the published ones it is measured against.

A method is a choice for each of the shared steps (SPEC §3); nothing else differs between them.
"""

from dataclasses import dataclass

from iv3jax.errors import UserError


@dataclass(frozen=True)
class Method:
    """One choice for each step.

    Attributes:
        source: where it was published.
        real_rotation: one real rotation over the heads for a pair's two numbers, else a complex unitary with
            errors weighed by the queries' energy.
        fitted: whether each head's coefficients are then fitted on the attention logits.
        metric: what an error of the latent costs: "fisher", the loss's own curvature; "balanced", so that
            content and values weigh alike (step 5); "plain", every number the same.
        features: what the latent is found on: "activations" of calibration tokens, or "weights" alone.
        damping: added to the features' moment, as a share of its mean diagonal.
        stream: which layers the calibration tokens have passed: the "source"'s, those with the positional
            "split" only, or "converted" ones.
        follow: whether a layer is fitted to what the source computes on its own undisturbed input; else to
            the source layer on the input that there is.
        refit: whether o_proj is fitted anew to the converted heads.
    """

    source: str
    real_rotation: bool = True
    fitted: bool = False
    metric: str = "balanced"
    features: str = "activations"
    damping: float = 0.0
    stream: str = "split"
    follow: bool = False
    refit: bool = False


METHODS = {
    "iv3": Method(
        "this project",
        real_rotation=False,
        fitted=True,
        metric="fisher",
        damping=1e-4,
        stream="converted",
        follow=True,
        refit=True,
    ),
    "transmla": Method("TransMLA, arXiv 2502.07864"),
    "care": Method("CARE, arXiv 2603.17946", metric="plain", damping=0.1, stream="converted"),
    "svd": Method("weights only", metric="plain", features="weights", stream="source"),
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"--method {name}: there are {', '.join(METHODS)}")
    return METHODS[name]

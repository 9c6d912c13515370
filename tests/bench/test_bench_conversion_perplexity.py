"""Log-perplexity against the plain formula, whatever the grouping of the windows."""

import jax
import jax.numpy as jnp
import numpy as np

from iv3jax.bench.perplexity import log_perplexity, token_losses
from iv3jax.checkpoint.load import load
from iv3jax.models.batch import fake_batch


def test_losses_are_those_of_the_logits():
    loaded = load("tiny", random_weights=True, dtype=jnp.float32)
    batch = fake_batch(loaded.config, rows=3, length=12, chunks=0)
    ids = np.asarray(batch.input_ids)
    found = token_losses(loaded, ids, rows=2)

    @jax.jit
    def plain(params):
        hidden = loaded.model.apply({"params": params}, batch).hidden
        return jax.nn.log_softmax(loaded.model.apply({"params": params}, hidden, method="logits"))

    logp = np.asarray(plain(loaded.params))
    wanted = -np.take_along_axis(logp[:, :-1], ids[:, 1:, None], -1)[..., 0]
    assert found.shape == (3, 11)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_perplexity(loaded, ids, rows=2), wanted.mean(), rtol=1e-5)

"""Gradients of the token loss: equal to PyTorch's for every weight of a Qwen3-VL, finite for both attentions.

The golden GQA model on a conversation with a video and an image. Tolerance 1e-4 of the largest entry of each
tensor's gradient; 4e-6 is seen.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.peers import (
    ATTENTIONS,
    conversation,
    difference,
    random_model,
    tiny_config,
    to_theirs,
    torch_inputs,
)

from iv3jax.checkpoint.load import load
from iv3jax.data.collate import collate
from iv3jax.models.batch import IGNORE_LABEL
from iv3jax.train.loss import cross_entropy, reduced, token_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def loss_and_gradients(model, params, batch):
    """The token loss and its gradients, jitted."""

    def loss(params):
        hidden = model.apply({"params": params}, batch).hidden
        losses = cross_entropy(model, params, hidden, batch.labels)
        return reduced(losses, token_weights(batch.labels, batch.segment_ids, "token"))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.medium
def test_equal_to_torch(golden):
    ours = load(golden / "gqa")
    theirs = transformers.Qwen3VLForConditionalGeneration.from_pretrained(golden / "gqa", dtype=torch.float32)
    sample = conversation(ours.config, [3, ("video", 2, 4, 6), 4, ("image", 1, 6, 4), 9], seed=3)
    batch = collate([[sample]], ours.config, length=len(sample) + 5)
    loss, gradients = loss_and_gradients(ours.model, ours.params, batch)

    logits = theirs(**torch_inputs(ours.config, sample), use_cache=False).logits[0]
    labels = torch.tensor(sample.labels, dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL)
    expected.backward()
    assert abs(float(loss) - expected.item()) <= 1e-5

    got = to_theirs(gradients, ours.config)
    wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = np.abs(gradient).max()
        assert largest > 0, f"{name} has no gradient to compare"
        assert difference(got[name] / largest, gradient / largest) <= 1e-4, name


@pytest.mark.medium
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_finite_with_padding_everywhere(attention):
    """Padded tokens, a row of padding, padded chunks, a sample without labels."""
    model, params = random_model(tiny_config(attention))
    pack = [conversation(model.config, [2, ("image", 1, 4, 4), 5], 1), conversation(model.config, [4], 2)]
    pack[1].labels[:] = IGNORE_LABEL
    batch = collate([pack, []], model.config, length=40, chunks=3, chunk_patches=24)
    batch.input_ids[batch.segment_ids == 0] = 7
    used = set(batch.input_ids[batch.segment_ids != 0])
    assert 7 not in used
    loss, gradients = loss_and_gradients(model, params, batch)
    assert np.isfinite(loss) and loss > 0
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradients))
    by_token = np.abs(gradients["embed_tokens"]["embedding"]).max(axis=1)
    assert by_token[7] == 0 and by_token[batch.input_ids[0, 0]] > 0

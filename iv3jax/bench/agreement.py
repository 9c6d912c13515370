"""How near a cheaper form of a model stays to the model: what the benches of weights and of caches measure.

Two measures on held-out digit videos: how far the next-token distributions move over prompts with their
true answers (no sampling luck in it), and how many questions are still answered right.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.table import Table

from iv3jax.bench.digits import CASES, answers, batches, make_case, scores
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.data.digits import DigitVideo, Question, conversation
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.cache import init_cache
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.typing import Array, DType, Params

TASKS = tuple(case for case in CASES if not case.files)

Asked = list[tuple[DigitVideo, Question]]


def questions(videos: int, seed: int) -> Asked:
    """`videos` held-out questions of each task, the same ones for the same seed."""
    return [make_case(case, [seed, n, i]) for n, case in enumerate(TASKS) for i in range(videos)]


class Observed(NamedTuple):
    """What a model says.

    Attributes:
        texts: its greedy answers.
        log_probs: (n, vocab) fp32 of every next token that is text, over prompts with their true answers.
        answer: (n,) whether that token is an answer's.
        true: (n,) which token it is.
    """

    texts: list[str]
    log_probs: np.ndarray
    answer: np.ndarray
    true: np.ndarray

    @property
    def answer_loss(self) -> float:
        """Mean −log p of the true answers' tokens, in nats."""
        found = np.take_along_axis(self.log_probs, self.true[:, None], axis=-1)[:, 0]
        return -float(found[self.answer].mean())


def observe(model: LoadedModel, asked: Asked, cache_dtype: DType | None = None) -> Observed:
    """Asks everything. With a cache dtype, log-probabilities are taken over a cache of it too."""
    texts = answers(
        model, (conversation(video, [q], answered=False) for video, q in asked), cache_dtype=cache_dtype
    )
    samples = [model.processor(conversation(video, [q], answered=True)) for video, q in asked]
    special = [model.config.image_token_id, model.config.video_token_id]
    values, answer, true = [], [], []
    for batch, count in batches(model, samples):
        ids, segments = np.asarray(batch.input_ids)[:count], np.asarray(batch.segment_ids)[:count]
        following = np.roll(ids, -1, axis=1)
        text = np.zeros(ids.shape, bool)
        text[:, :-1] = (segments[:, 1:] != 0) & ~np.isin(ids[:, 1:], special)
        values.append(np.asarray(_forward(model.model, cache_dtype, model.params, batch))[:count][text])
        answer.append(np.asarray(batch.labels)[:count][text] != IGNORE_LABEL)
        true.append(following[text])
    return Observed(texts, *map(np.concatenate, (values, answer, true)))


@partial(jax.jit, static_argnums=(0, 1))
def _forward(model: InternVideo3, cache_dtype: DType | None, params: Params, batch: Batch) -> Array:
    cache = None
    if cache_dtype is not None:
        rows, length = batch.input_ids.shape
        cache = init_cache(model.config.text_config, rows, length, cache_dtype, model.run.scan_layers)
    hidden = model.apply({"params": params}, batch, None, cache).hidden
    return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))


@dataclass(frozen=True)
class Agreement:
    """One form against the reference. KL and top-1 are means over tokens.

    Attributes:
        answer_kl, text_kl: KL(reference ‖ this) in nats of the next token, over the true answers' tokens
            and over all text of prompts and answers.
        answer_top1, text_top1: share of those tokens whose likeliest next token is the reference's.
        same_answers: share of the questions with the reference's very answer.
        scores: task → exact match, or mean temporal IoU for "when" (bench/digits.py).
    """

    answer_kl: float
    answer_top1: float
    text_kl: float
    text_top1: float
    same_answers: float
    scores: dict[str, float]


def agreement(asked: Asked, reference: Observed, other: Observed) -> Agreement:
    """The figures of one form."""
    same = np.mean([a == b for a, b in zip(other.texts, reference.texts, strict=True)])
    means = scores(asked, other.texts).reshape(len(TASKS), -1).mean(axis=1)
    known = reference.log_probs
    kl = np.sum(np.exp(known) * (known - other.log_probs), axis=-1)
    top1 = known.argmax(axis=-1) == other.log_probs.argmax(axis=-1)
    return Agreement(
        float(kl[reference.answer].mean()),
        float(top1[reference.answer].mean()),
        float(kl.mean()),
        float(top1.mean()),
        float(same),
        {case.name: float(mean) for case, mean in zip(TASKS, means, strict=True)},
    )


def add_columns(table: Table) -> None:
    """The heads of `cells`."""
    heads = ["KL answer", "top-1", "KL text", "top-1", "same answers"]
    for head in heads + [case.name for case in TASKS]:
        table.add_column(head, justify="right")


def cells(row: dict[str, Any]) -> list[str]:
    """A row's figures, from `Agreement` as a dict."""
    return [
        f"{row['answer_kl']:.2e}",
        f"{row['answer_top1']:.2%}",
        f"{row['text_kl']:.2e}",
        f"{row['text_top1']:.2%}",
        f"{row['same_answers']:.1%}",
        *(f"{score:.3f}" for score in row["scores"].values()),
    ]

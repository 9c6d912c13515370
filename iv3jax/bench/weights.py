"""`iv3 bench weights`: what int8 and nf4 weights cost the demo's model, against the same model in bf16.

Two measures on held-out digit videos: how far the next-token distributions move over prompts with their
true answers (no sampling luck in it), and how many questions are still answered right. Bytes are those of
all parameters. Nothing is timed here.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from iv3jax.bench.digits import CASES, answers, batches, make_case, scores
from iv3jax.bench.table import as_text
from iv3jax.checkpoint.load import LoadedModel, load
from iv3jax.data.digits import DigitVideo, Question, conversation
from iv3jax.models.batch import IGNORE_LABEL, Batch
from iv3jax.models.internvideo3 import InternVideo3
from iv3jax.typing import Array, DType, Params

REFERENCE = "bf16"
VARIANTS: dict[str, tuple[DType, str | None]] = {
    "fp32": (jnp.float32, None),
    REFERENCE: (jnp.bfloat16, None),
    "int8": (jnp.bfloat16, "int8"),
    "nf4": (jnp.bfloat16, "nf4"),
}
"""Row → dtype of computing and of what is not quantised, and `weights`."""

TASKS = tuple(case for case in CASES if not case.files)

Asked = list[tuple[DigitVideo, Question]]


@dataclass(frozen=True)
class Row:
    """One way to store the weights. KL and top-1 are means over tokens, against the reference.

    Attributes:
        weight_bytes: bytes of all parameters.
        answer_kl, text_kl: KL(reference ‖ this) in nats of the next token, over the true answers' tokens
            and over all text of prompts and answers.
        answer_top1, text_top1: share of those tokens whose likeliest next token is the reference's.
        same_answers: share of the questions with the reference's very answer.
        scores: task → exact match, or mean temporal IoU for "when" (bench/digits.py).
    """

    name: str
    weight_bytes: int
    answer_kl: float
    answer_top1: float
    text_kl: float
    text_top1: float
    same_answers: float
    scores: dict[str, float]


def bench_weights(folder: str, videos: int = 100, seed: int = 1) -> dict[str, Any]:
    """`videos` held-out questions of each task, the same ones for every row and for the same seed.

    Raises:
        UserError: `load`'s, for the folder.
    """
    asked = [make_case(case, [seed, n, i]) for n, case in enumerate(TASKS) for i in range(videos)]
    reference = load(folder, dtype=VARIANTS[REFERENCE][0])
    expected, known = _texts(reference, asked), _log_probs(reference, asked)
    rows = []
    for name, (dtype, weights) in VARIANTS.items():
        model = load(folder, dtype=dtype, weights=weights)
        texts, log_probs = expected, known
        if name != REFERENCE:
            texts, log_probs = _texts(model, asked), _log_probs(model, asked)
        same = np.mean([a == b for a, b in zip(texts, expected, strict=True)])
        means = scores(asked, texts).reshape(len(TASKS), videos).mean(axis=1)
        kl = np.sum(np.exp(known.values) * (known.values - log_probs.values), axis=-1)
        top1 = known.values.argmax(axis=-1) == log_probs.values.argmax(axis=-1)
        rows.append(
            Row(
                name,
                sum(x.nbytes for x in jax.tree.leaves(model.params)),
                float(kl[known.answer].mean()),
                float(top1[known.answer].mean()),
                float(kl.mean()),
                float(top1.mean()),
                float(same),
                {case.name: float(mean) for case, mean in zip(TASKS, means, strict=True)},
            )
        )
    return {"seed": seed, "videos": videos, "rows": [asdict(row) for row in rows]}


def _texts(model: LoadedModel, asked: Asked) -> list[str]:
    """Greedy answers."""
    return answers(model, (conversation(video, [q], answered=False) for video, q in asked))


class _LogProbs(NamedTuple):
    """(n, vocab) fp32 of every next token that is text, and (n,) whether that is an answer's."""

    values: np.ndarray
    answer: np.ndarray


def _log_probs(model: LoadedModel, asked: Asked) -> _LogProbs:
    """Over prompts with their true answers."""
    samples = [model.processor(conversation(video, [q], answered=True)) for video, q in asked]
    special = [model.config.image_token_id, model.config.video_token_id]
    values, answer = [], []
    for batch, count in batches(model, samples):
        ids, segments = np.asarray(batch.input_ids)[:count], np.asarray(batch.segment_ids)[:count]
        text = np.zeros(ids.shape, bool)
        text[:, :-1] = (segments[:, 1:] != 0) & ~np.isin(ids[:, 1:], special)
        values.append(np.asarray(_forward(model.model, model.params, batch))[:count][text])
        answer.append(np.asarray(batch.labels)[:count][text] != IGNORE_LABEL)
    return _LogProbs(np.concatenate(values), np.concatenate(answer))


@partial(jax.jit, static_argnums=0)
def _forward(model: InternVideo3, params: Params, batch: Batch) -> Array:
    hidden = model.apply({"params": params}, batch).hidden
    return jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"))


def format_table(result: dict[str, Any]) -> str:
    """The rows as a table for people."""
    table = Table(title=f"weights against {REFERENCE}, {result['videos']} held-out videos a task")
    heads = ["weights", "bytes", "KL answer", "top-1", "KL text", "top-1", "same answers"]
    for head in heads + [case.name for case in TASKS]:
        table.add_column(head, justify="left" if head == "weights" else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['weight_bytes']:,}",
            f"{row['answer_kl']:.2e}",
            f"{row['answer_top1']:.2%}",
            f"{row['text_kl']:.2e}",
            f"{row['text_top1']:.2%}",
            f"{row['same_answers']:.1%}",
            *(f"{score:.3f}" for score in row["scores"].values()),
        )
    return as_text(table, 140)

"""`iv3jax.ask`: one question about one video or image, answered."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax

from iv3jax import ops
from iv3jax.checkpoint.load import LoadedModel
from iv3jax.data.collate import collate, round_up_bucket
from iv3jax.data.image import is_picture
from iv3jax.data.sample import Media
from iv3jax.data.tokenizer import StreamDecoder
from iv3jax.errors import UserError
from iv3jax.generate.generate import PREFILL_CHUNK, generate
from iv3jax.generate.sampling import Sampling
from iv3jax.paths import PathArgument, make_path
from iv3jax.typing import DType


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        text: the answer.
        media: which frames were looked at, of how many, at which seconds.
        prompt_tokens, new_tokens: their numbers.
        stopped: whether the model ended the answer itself, rather than the limit on new tokens.
        cache_bytes: bytes of the decoding cache.
        prefill_tokens_per_second, decode_tokens_per_second: without the time to compile.
        kernels: operation → the implementation it took.
    """

    text: str
    media: Media
    prompt_tokens: int
    new_tokens: int
    stopped: bool
    cache_bytes: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    kernels: dict[str, str]


def ask(
    model: LoadedModel,
    path: PathArgument,
    question: str,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    cache_dtype: DType | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Asks a question about a video or an image.

    Args:
        path: a video, or a picture in any format that Pillow reads; local or on a store.
        question: what to ask; it follows the video in the user's turn, without a system message.
        fps, max_frames: frames a second and at most how many; None takes the model folder's.
        max_new_tokens: limit on the answer.
        sampling: None is greedy.
        cache_dtype: of models.cache.CACHE_DTYPES; None takes the model's compute dtype.
        on_text: called with each new piece of text.

    Raises:
        UserError: an empty question, a file that cannot be read, or a prompt too long for the model.
    """
    if not question.strip():
        raise UserError("the question is empty")
    processor = model.processor
    if fps is not None:
        processor = dataclasses.replace(processor, fps=fps)
    if max_frames is not None:
        # Asked for fewer than the folder's least: the person at the keyboard wins.
        least = min(processor.min_frames, max_frames)
        processor = dataclasses.replace(processor, min_frames=least, max_frames=max_frames)
    kind = "image" if is_picture(make_path(path)) else "video"
    content = [{"type": kind, kind: str(path)}, {"type": "text", "text": question}]
    sample = processor([{"role": "user", "content": content}], generation=True)
    # Few shapes, so that a second question does not compile again.
    length = round_up_bucket(len(sample), 64)
    batch = collate(
        [[sample]],
        model.config,
        length=length if length <= PREFILL_CHUNK else -(-len(sample) // PREFILL_CHUNK) * PREFILL_CHUNK,
        chunks=round_up_bucket(sum(t for t, _, _ in sample.grids), 1),
        chunk_patches=max(h * w for _, h, w in sample.grids),
    )
    decoder = StreamDecoder(processor.tokenizer)

    def stream(tokens: list[list[int]]) -> None:
        if on_text is not None and (text := decoder.push(tokens[0])):
            on_text(text)

    with jax.set_mesh(model.mesh):
        result = generate(
            model.model,
            model.params,
            batch,
            max_new_tokens=max_new_tokens,
            stop_ids=processor.tokenizer.stop_ids,
            sampling=sampling,
            capacity=round_up_bucket(len(sample) + max_new_tokens, 256),
            cache_dtype=cache_dtype,
            seed=seed,
            on_tokens=stream,
        )
    if on_text is not None and (text := decoder.flush()):
        on_text(text)
    return Answer(
        processor.tokenizer.decode(result.tokens[0]),
        sample.media[0],
        result.prompt_tokens,
        result.new_tokens,
        result.stopped[0],
        result.cache_bytes,
        result.prompt_tokens / result.prefill_seconds,
        result.new_tokens / result.decode_seconds,
        ops.taken(),
    )

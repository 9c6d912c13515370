"""`iv3 convert`: a GQA model folder → an M²LA one. The steps are in run.py, split.py, metric.py and
latent.py.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from iv3jax.checkpoint.export import Export
from iv3jax.checkpoint.names import tensors
from iv3jax.conversion.assemble import assemble
from iv3jax.conversion.calibration import Calibration, read_calibration
from iv3jax.conversion.config import ConvertConfig, Plan, converted_config, plan
from iv3jax.conversion.latent import REPORT, convert_layer
from iv3jax.conversion.metric import ranks_of, run_metrics
from iv3jax.conversion.report import LayerReport, Report, page, to_json
from iv3jax.conversion.run import Conversion, Say, begin, run_source
from iv3jax.conversion.source import Source
from iv3jax.conversion.split import split_layer
from iv3jax.conversion.stream import Head
from iv3jax.conversion.work import Work, save_arrays
from iv3jax.models.batch import Batch
from iv3jax.models.cache import init_cache
from iv3jax.models.config import ModelConfig
from iv3jax.paths import PathArgument

HELD_OUT = 8
"""One batch of so many is kept from all fits, for the perplexity before and after."""

LOGIT_BYTES = 1 << 28
"""Attention logits that exist at one time for one device."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote: its model folder, and its report (also in the folder)."""

    export: Export
    report: Report


def convert(
    source: PathArgument,
    out_dir: PathArgument,
    config: ConvertConfig,
    calibration: Sequence[PathArgument] | Calibration = (),
    *,
    restart: bool = False,
) -> Converted:
    """Converts a model with grouped-query attention into one with M²LA (SPEC §3).

    Layer by layer; the host holds one layer, the embeddings where they are used, and one batch. What is
    known so far lies in `OUT_DIR.converting`: a run that was stopped goes on where it was, with the same
    bytes at the end.

    Args:
        source: a Qwen3-VL, Qwen3, Qwen2 or Llama model folder, or a hub id.
        out_dir: a local folder that does not exist or is empty.
        config: what is wanted.
        calibration: files of text, conversations, pictures and videos like those the model is for
            (`read_calibration`), or rows that are there already.
        restart: throw away what an earlier run left.

    Raises:
        UserError: what cannot be converted, or not so; calibration that cannot be read or lacks a modality
            that adapters need; an output that is taken; a disk that is full (the same command then goes on).
    """
    opened = Source.open(source)
    what = plan(config, opened.config)
    if not isinstance(calibration, Calibration):
        rows = rows_of(what, config.length)
        calibration = read_calibration(
            calibration,
            opened.folder,
            opened.config,
            tokens=config.tokens,
            length=config.length,
            rows=rows,
            seed=config.seed,
        )
    if config.adapters:
        calibration.require_both()
    prints = {
        "source": str(opened.folder),
        "weights": opened.fingerprint(),
        "calibration": calibration.fingerprint,
        **dataclasses.asdict(config),
    }
    with Work.open(out_dir, prints, restart) as work, _progress(what.text.num_hidden_layers) as say:
        work.require_space(_space(opened, what, calibration))
        stream = begin(opened, calibration, work)
        run = Conversion(opened, config, what, stream, _kept_aside(stream.batches), work)
        prepare(run, say)
        new, reports = convert_layers(run, say)
        before, after, tokens = _perplexities(run)
        report = Report(
            source=str(source),
            method=config.method,
            settings=dataclasses.asdict(config),
            text_tokens=calibration.text_tokens,
            vision_tokens=calibration.vision_tokens,
            dropped=calibration.dropped,
            ranks=tuple(r.rank for r in reports),
            rope_dim=what.rope_dim,
            cache_bytes_source=_cache_bytes(opened.config),
            cache_bytes=_cache_bytes(new),
            parameters_source=_parameters(opened.config),
            parameters=_parameters(new),
            log_perplexity_source=before,
            log_perplexity=after,
            held_out_tokens=tokens,
            layers=reports,
        )
        files = {"conversion.json": to_json(report).encode(), "conversion.html": page(report).encode()}
        steps = [work.path(f"layer_{i}") for i in range(what.text.num_hidden_layers)]
        done = assemble(opened, new, steps, work.out, extra_files=files)
        work.remove()
    return Converted(done, report)


def held_out(batches: int) -> tuple[int, ...]:
    """The batches that no fit sees."""
    return tuple(range(HELD_OUT - 1, batches, HELD_OUT)) or ((batches - 1,) if batches > 1 else ())


def _kept_aside(batches: Sequence[Batch]) -> tuple[int, ...]:
    """`held_out`, or nothing where that would leave the fits no batch with vision, or none without."""
    aside = held_out(len(batches))
    kinds = [batch.patches is None for batch in batches]
    left = {kind for i, kind in enumerate(kinds) if i not in aside}
    return aside if left == set(kinds) else ()


def rows_of(found: Plan, length: int) -> int:
    """Rows of a batch, so that one layer's attention logits stay within LOGIT_BYTES on each device."""
    devices = jax.device_count()
    return devices * max(1, min(8, LOGIT_BYTES // (4 * found.text.num_attention_heads * length**2)))


def prepare(run: Conversion, say: Say) -> None:
    """The steps that no rank decides: the source's pass, the splits and the metrics."""
    run_source(run, say)
    for i in range(run.text.num_hidden_layers):
        if not run.work.done(f"split_{i}"):
            found = split_layer(run, i)
            with run.work.step(f"split_{i}") as folder:
                save_arrays(folder, found)
            say("split", i, "")
    if run.method.metric == "fisher":
        run_metrics(run, say)


def convert_layers(run: Conversion, say: Say) -> tuple[ModelConfig, tuple[LayerReport, ...]]:
    """The steps `layer_i`: the new model's config, and the layers' reports."""
    work, ranks = run.work, ranks_of(run)
    anchors = [work.arrays(f"split_{i}")["anchor"] for i in range(run.text.num_hidden_layers)]
    new = converted_config(
        run.source.config, run.source.target_type, run.plan, ranks, run.config.adapters, anchors
    )
    table = tensors(new, scan_layers=False)
    reports = []
    for i, rank in enumerate(ranks):
        inside = ("language_model", f"layers_{i}", "self_attn")
        if not work.done(f"layer_{i}"):
            expected = [tensor for tensor in table if tensor.path[:3] == inside]
            convert_layer(run, i, new.text_config.of_layer(i), expected, rank)
        data = json.loads((work.path(f"layer_{i}") / REPORT).read_text())
        reports.append(LayerReport(**data | {"energies": tuple(data["energies"])}))
        say("convert", i, f"rank {rank}, output error {reports[-1].output_error:.2e}")
    return new, tuple(reports)


def _perplexities(run: Conversion) -> tuple[float | None, float | None, int]:
    """Log-perplexity of the held-out batches' text in the source and in the converted model, and
    their tokens.
    """
    layers = run.text.num_hidden_layers
    if not run.held_out or run.method.stream != "converted":
        return None, None, 0
    head = Head.of(run.source)
    found = []
    for step in (f"source_{layers}", f"layer_{layers - 1}"):
        hidden = run.hidden(step)
        parts = [head.log_loss(hidden(b), run.stream.batches[b]) for b in run.held_out]
        found.append(sum(loss for loss, _ in parts) / max(1, sum(count for _, count in parts)))
    count = sum(head_count for _, head_count in parts)
    return found[0], found[1], count


def _cache_bytes(config: ModelConfig) -> int:
    """Of one token over all layers, in bf16."""
    return jax.eval_shape(lambda: init_cache(config.text_config, 1, 1, jnp.bfloat16, False)).nbytes


def _parameters(config: ModelConfig) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors(config, scan_layers=False))


def _space(source: Source, found: Plan, calibration: Calibration) -> int:
    """Bytes on the disk: hidden states before every layer and twice more, moments, metrics, the model
    twice.
    """
    text = found.text
    states = sum(np.asarray(batch.input_ids).size for batch in calibration.batches) * text.hidden_size * 4
    moments = 8 * (4 * (4 * found.text.num_key_value_heads * text.head_dim) ** 2)
    return (text.num_hidden_layers + 4) * states + text.num_hidden_layers * moments + 2 * source.nbytes


@contextmanager
def _progress(layers: int) -> Iterator[Say]:
    """A bar on a terminal, else a line a step; on stderr, as stdout is for the result."""
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    if not sys.stderr.isatty():
        yield lambda stage, layer, note: print(
            f"{stage:8} layer {layer + 1} of {layers} {note}".rstrip(), file=sys.stderr, flush=True
        )
        return
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def say(stage: str, layer: int, note: str) -> None:
            # Not one more than before: a run that goes on says nothing of the layers that are there.
            done = layers - layer if stage == "metric" else layer + 1
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=layers, completed=done, note=note)
            bar.update(tasks[stage], completed=done, note=note)

        yield say

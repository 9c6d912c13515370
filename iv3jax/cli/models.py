"""`iv3 ask`, `export`, `sample`, `convert`, `parity` and `shapes`: models and their folders."""

import argparse
import dataclasses
import json
import math
from typing import TYPE_CHECKING

from iv3jax.cli.parse import Command
from iv3jax.cli.source import load_model
from iv3jax.errors import UserError

if TYPE_CHECKING:
    from iv3jax.checkpoint.load import LoadedModel
    from iv3jax.generate.ask import Answer
    from iv3jax.generate.sampling import Sampling

_FILES = "texts (.txt, .md), conversations (.jsonl), pictures and videos like those the model is for"


def add(command: Command) -> None:
    """Adds these commands to the parser."""
    sub = command("ask", _ask, "Ask a question about a video or a picture.")
    sub.add_argument("video", help="a video or picture file")
    sub.add_argument("question")
    sub.add_argument(
        "--model", help="model folder or preset (default: the model that launch/demo.sh trained)"
    )
    sub.add_argument("--random-weights", action="store_true", help="allow a preset, with random weights")
    sub.add_argument("--weights", help="int8 or nf4: store the linear layers so (default: as they are)")
    sub.add_argument(
        "--cache-dtype",
        help="float32, bfloat16, float16, int8, float8_e4m3fn (default: the dtype of computing)",
    )
    sub.add_argument("--fps", type=float, help="frames to sample per second (default: the model folder's)")
    sub.add_argument("--max-frames", type=int, help="most frames to sample (default: the model folder's)")
    sub.add_argument("--max-new-tokens", type=int, default=256)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--top-k", type=int, default=0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--loop",
        metavar="EXPERIMENT",
        help="look again with tools until there is an answer, and print the steps; tools, overview and "
        "budget are the experiment's (no --max-new-tokens), for example rl; 8 frames a second without --fps",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("export", _export, "Write a model as a folder that transformers and iv3 load.")
    sub.add_argument(
        "checkpoint", help="model folder, run folder[@STEP|@best], or preset with --random-weights"
    )
    sub.add_argument("out_dir", help="a new or empty folder, local or on a store (gs://, s3://)")
    sub.add_argument("--dtype", help="bfloat16, float16 or float32 (default: each tensor's own)")
    sub.add_argument("--max-shard-size", default="5GB", help="most bytes of a file of weights (default 5GB)")
    sub.add_argument("--verify", action="store_true", help="compare logits with torch, in fp32")
    sub.add_argument(
        "--adapter", action="store_true", help="write a run's low-rank additions alone, as PEFT does"
    )
    sub.add_argument("--random-weights", action="store_true", help="allow a preset, with random weights")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("sample", _sample, "Write texts that a model samples by itself: calibration of any domain.")
    sub.add_argument("model", help="model folder or hub id")
    sub.add_argument("out", help="a new .jsonl, local or on a store, for `iv3 convert … --calibration`")
    sub.add_argument("--tokens", type=int, default=32768, help="in all (default 32768)")
    sub.add_argument("--length", type=int, default=256, help="most tokens of a text (default 256)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("convert", _convert, "Convert a model with grouped-query attention into one with M²LA.")
    sub.add_argument("source", help="folder of a Qwen3-VL, Qwen3, Qwen2 or Llama model, or a hub id")
    sub.add_argument("out_dir", help="a new or empty local folder")
    sub.add_argument("--rank", type=int, help="of the latent; with a dynamic budget the layers' mean")
    sub.add_argument(
        "--cache-fraction",
        type=float,
        help="size of the cache against the source's, instead of --rank; beside it (dynamic) --rank is the "
        "most of a layer",
    )
    sub.add_argument("--budget", default="uniform", help="uniform (default) or dynamic: ranks by layer")
    sub.add_argument("--qk-norm", default="linear", help="linear (default), cached (kept exactly) or dropped")
    sub.add_argument("--adapters", default="off", help="on: maps of the latent for text and for vision")
    sub.add_argument("--calibration", nargs="+", action="extend", default=[], metavar="FILE", help=_FILES)
    sub.add_argument("--method", default="iv3", help="iv3 (default), or to compare: transmla, care, svd")
    sub.add_argument("--rope-dim", type=int, help="dims of the RoPE key (default: a head's, per component)")
    sub.add_argument("--rope-pairs", help="that keep RoPE: chosen (iv3's default) by each layer, or even")
    sub.add_argument("--rope-components", type=int, default=1, help="of each frequency, of even pairs")
    sub.add_argument("--freqfold", type=int, help="frequencies treated as one (default: as --rope-dim asks)")
    sub.add_argument("--tokens", type=int, default=65536, help="most tokens of calibration (default 65536)")
    sub.add_argument("--length", type=int, default=1024, help="tokens of a calibration row (default 1024)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--restart", action="store_true", help="throw away what an unfinished run left")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("parity", _parity, "Compare a model folder, or the processing, with golden outputs.")
    sub.add_argument("model", nargs="?", help="model folder")
    sub.add_argument("cases", nargs="*", help="golden cases (.safetensors)")
    sub.add_argument("--processing", metavar="FILE.json", help="golden processing tables")
    sub.add_argument("--tolerance", type=float, default=2e-4, help="largest difference that passes")
    sub.add_argument("--implementation", help="xla, tpu or gpu: of M²LA's kernels (default: the chip's)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("shapes", _shapes, "Tensor names and shapes of a model, without making it.")
    sub.add_argument("model", help="preset or model folder")
    sub.add_argument("--weights", help="count the bytes with the linear layers in int8 or nf4")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _ask(args: argparse.Namespace) -> int:
    from iv3jax.generate.ask import ask
    from iv3jax.generate.sampling import Sampling
    from iv3jax.models.cache import CACHE_DTYPES
    from iv3jax.models.presets import PRESETS

    if not args.question.strip():
        raise UserError("the question is empty")
    sampling = Sampling(args.temperature, args.top_p, args.top_k)
    if args.random_weights and args.model in PRESETS and args.model != "tiny":
        raise UserError(f"{args.model}: this preset has no tokenizer, so it cannot be asked; tiny can")
    if args.cache_dtype not in (None, *CACHE_DTYPES):
        raise UserError(f"--cache-dtype {args.cache_dtype} is not one of {', '.join(CACHE_DTYPES)}")
    model = load_model(args.model, args.random_weights, args.weights)
    if args.loop:
        return _reason(args, model, sampling)
    answer = ask(
        model,
        args.video,
        args.question,
        fps=args.fps,
        max_frames=args.max_frames,
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        cache_dtype=args.cache_dtype,
        seed=args.seed,
        on_text=None if args.json else lambda text: print(text, end="", flush=True),
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(answer)))
    else:
        print(f"\n\n{_report(answer)}")
    return 0


def _reason(args: argparse.Namespace, model: "LoadedModel", sampling: "Sampling") -> int:
    from iv3jax.data.tasks.episode import DENSE_FPS
    from iv3jax.mcr.trace import show
    from iv3jax.mcr.video import reason
    from iv3jax.train.config import experiment

    config = experiment(args.loop)
    trace = reason(
        model,
        args.video,
        args.question,
        dataclasses.replace(config.rollout, sampling=sampling, cache_dtype=args.cache_dtype),
        frames=config.collect.frames,
        fps=args.fps or DENSE_FPS,
        max_frames=args.max_frames,
        seed=args.seed,
    )
    print(json.dumps(trace) if args.json else show(trace))
    return 0


def _report(answer: "Answer") -> str:
    """What an answer took, line by line."""
    media = answer.media
    times = ", ".join(f"{t:.2f}" for t in media.times)
    lines = [
        f"frames   {media.frames} of {media.total_frames}, {media.size[1]}x{media.size[0]}, at {times} s",
        f"tokens   {answer.prompt_tokens} prompt, {answer.new_tokens} new",
        f"cache    {answer.cache_bytes:,} bytes",
        f"speed    {answer.prefill_tokens_per_second:,.0f} prompt and "
        f"{answer.decode_tokens_per_second:,.0f} new tokens/s, compiling left out",
        f"kernels  {', '.join(f'{op} {name}' for op, name in answer.kernels.items())}",
    ]
    if not answer.stopped:
        lines.append("the answer was cut at --max-new-tokens")
    return "\n".join(lines)


def _export(args: argparse.Namespace) -> int:
    if args.adapter:
        from iv3jax.checkpoint.load import load
        from iv3jax.checkpoint.lora import save_adapter

        folder = save_adapter(load(args.checkpoint), args.out_dir)
        print(json.dumps({"folder": str(folder)}) if args.json else f"written  {folder}")
        return 0
    from iv3jax.checkpoint.export import export, summary
    from iv3jax.checkpoint.verify import TOLERANCE, require_torch, verify

    if args.verify:
        require_torch(args.out_dir)
    done = export(
        args.checkpoint,
        args.out_dir,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        random_weights=args.random_weights,
    )
    if not args.json:
        print(summary(done), flush=True)
    rows = verify(args.out_dir) if args.verify else []
    failed = not all(row.passed for row in rows)
    if args.json:
        compared = [dataclasses.asdict(row) | {"tolerance": TOLERANCE, "passed": row.passed} for row in rows]
        print(json.dumps({**dataclasses.asdict(done), "verify": compared if args.verify else None}))
        return int(failed)
    for row in rows:
        print(f"{'ok  ' if row.passed else 'FAIL'} {row.difference:9.2e}  {row.prompt}, {row.tokens} tokens")
    if rows:
        worst = max((row.difference for row in rows), key=lambda d: math.inf if d != d else d)
        verdict = "FAILED" if failed else "verified"
        print(f"{verdict} logits in fp32 against PyTorch: at most {worst:.2e} apart, {TOLERANCE:g} allowed")
    return int(failed)


def _sample(args: argparse.Namespace) -> int:
    from rich.progress import Progress

    from iv3jax.generate.own_text import own_texts
    from iv3jax.paths import make_path

    out = make_path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"{out}: the texts are lines of a .jsonl; name it so")
    if out.exists():
        raise UserError(f"{out}: there already; name a new file")
    try:
        # Before the minutes that sampling takes.
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no file can be written there ({error.strerror})") from None
    model = load_model(args.model)
    lines, given = [], 0
    with Progress(transient=True, disable=args.json) as progress:
        task = progress.add_task("tokens", total=args.tokens)
        for text, count in own_texts(model, tokens=args.tokens, length=args.length, seed=args.seed):
            lines.append(json.dumps({"text": text}) + "\n")
            given += count
            progress.update(task, completed=given)
    out.write_text("".join(lines), encoding="utf-8")
    done = {"file": str(out), "texts": len(lines), "tokens": given}
    print(json.dumps(done) if args.json else f"written  {out}: {len(lines)} texts, {given:,} tokens")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from iv3jax.checkpoint.export import summary
    from iv3jax.conversion.config import ConvertConfig
    from iv3jax.conversion.convert import convert
    from iv3jax.conversion.report import summary as report_summary
    from iv3jax.conversion.report import to_json

    if args.adapters not in ("on", "off"):
        raise UserError(f"--adapters {args.adapters}: there are on, off")
    names = {field.name for field in dataclasses.fields(ConvertConfig)} - {"adapters"}
    config = ConvertConfig(adapters=args.adapters == "on", **{name: getattr(args, name) for name in names})
    done = convert(args.source, args.out_dir, config, args.calibration, restart=args.restart)
    if args.json:
        print(json.dumps(dataclasses.asdict(done.export) | {"report": json.loads(to_json(done.report))}))
    else:
        print(f"{report_summary(done.report)}\n\n{summary(done.export)}")
    return 0


def _parity(args: argparse.Namespace) -> int:
    from iv3jax.bench.parity import model_parity, processing_parity

    if args.processing is None and not args.cases:
        raise UserError("nothing to compare; name a model folder and golden cases, or --processing FILE.json")
    rows, failed = [], False
    if args.processing is not None:
        rows += [(row, 0.0) for row in processing_parity(args.processing)]
    if args.cases:
        rows += [(row, args.tolerance) for row in model_parity(args.model, args.cases, args.implementation)]
    results = []
    for row, tolerance in rows:
        # A NaN is no smaller than any tolerance.
        passed = row.difference <= tolerance
        failed |= not passed
        results.append(dataclasses.asdict(row) | {"tolerance": tolerance, "passed": passed})
        if not args.json:
            print(
                f"{'ok  ' if passed else 'FAIL'} {row.difference:9.2e}  {row.quantity:24} "
                f"{'×'.join(map(str, row.shape)):12} {row.case}"
            )
    if args.json:
        print(json.dumps({"passed": not failed, "rows": results}))
    else:
        worst = max((r["difference"] for r in results), default=0.0, key=lambda d: math.inf if d != d else d)
        print(
            f"{'FAILED' if failed else 'passed'}: {len(results)} quantities, largest difference {worst:.2e}"
        )
    return int(failed)


def _shapes(args: argparse.Namespace) -> int:
    from iv3jax.checkpoint.shapes import model_shapes

    shapes = model_shapes(args.model, args.weights)
    if args.json:
        print(json.dumps(dataclasses.asdict(shapes)))
        return 0
    for name, shape in shapes.tensors.items():
        print(f"{'×'.join(map(str, shape)):20} {name}")
    print(f"\n{len(shapes.tensors)} tensors, {shapes.parameters:,} parameters")
    form = "bf16" if args.weights is None else f"{args.weights}, embeddings, norms and biases in bf16"
    print(f"weights: {shapes.weight_bytes:,} bytes in {form}")
    print(f"cache: {shapes.cache_bytes_per_token:,} bytes per token in bf16")
    return 0

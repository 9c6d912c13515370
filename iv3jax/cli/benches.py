"""`iv3 bench`: everything that is measured, each in a file of iv3jax/bench."""

import argparse
import json

from iv3jax.cli.parse import Command
from iv3jax.cli.source import load_model, model_name


def add(command: Command) -> None:
    """Adds the command to the parser."""
    sub = command("bench", _bench, "Measure something, side by side with its control or peer.")
    names = ["digits", "generate", "weights", "cache", "kernels", "tune", "export", "conversion", "train"]
    sub.add_argument("name", choices=names)
    sub.add_argument(
        "--model", help="model folder (default: what launch/demo.sh trained; conversion trains its own)"
    )
    sub.add_argument(
        "--samples", type=int, help="held-out videos per row (default: 500 for digits, else 100)"
    )
    sub.add_argument("--seed", type=int, default=1, help="which held-out videos (default 1)")
    sub.add_argument("--layers", type=int, default=4, help="export: decoder layers (default 4)")
    sub.add_argument("--part", help="conversion: text (real weights) or video (tiny model); default both")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _bench(args: argparse.Namespace) -> int:
    from iv3jax.bench import cache, conversion, digits, export, generate, kernels, train, tune, weights

    if args.name == "export":
        result = export.bench_export(args.layers)
        print(json.dumps(result) if args.json else export.format_table(result))
        return int(not result["passed"])
    if args.name == "conversion":
        samples = 100 if args.samples is None else args.samples
        result = conversion.bench_conversion(args.part, args.model, samples, args.seed)
        print(json.dumps(result) if args.json else conversion.format_table(result))
        return 0
    if args.name in ("generate", "train"):
        result = generate.bench_generate() if args.name == "generate" else train.bench_train()
        module = generate if args.name == "generate" else train
        print(json.dumps(result) if args.json else module.format_table(result))
        return 0
    if args.name in ("weights", "cache"):
        module, measure = {
            "weights": (weights, weights.bench_weights),
            "cache": (cache, cache.bench_cache),
        }[args.name]
        result = measure(model_name(args.model), 100 if args.samples is None else args.samples, args.seed)
        print(json.dumps(result) if args.json else module.format_table(result))
        return 0
    if args.name in ("kernels", "tune"):
        result = kernels.bench_kernels() if args.name == "kernels" else tune.bench_tune()
        module = kernels if args.name == "kernels" else tune
        print(json.dumps(result) if args.json else module.format_table(result))
        return 0
    result = digits.bench_digits(
        load_model(args.model), 500 if args.samples is None else args.samples, args.seed
    )
    print(json.dumps(result) if args.json else digits.format_table(result))
    return 0

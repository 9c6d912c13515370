"""`iv3 bench`: everything that is measured, each in a file of iv3jax/bench."""

import argparse
import json

from iv3jax.cli.parse import Command
from iv3jax.cli.source import digits_name, load_model, model_name
from iv3jax.errors import UserError

NAMES = (
    "digits",
    "generate",
    "weights",
    "cache",
    "kernels",
    "tune",
    "export",
    "conversion",
    "train",
    "stages",
    "rollout",
    "tasks",
)


def add(command: Command) -> None:
    """Adds the command to the parser."""
    sub = command("bench", _bench, "Measure something, side by side with its control or peer.")
    sub.add_argument("name", choices=NAMES)
    sub.add_argument(
        "--model",
        help="model folder (default: runs/digits/model for digits, weights and cache; runs/demo/model for "
        "tasks; rollout takes random weights; the others train or make their own). tasks: one, or "
        "NAME=FOLDER,NAME=FOLDER",
    )
    sub.add_argument(
        "--samples",
        type=int,
        help="held-out videos per row (default: 500 for digits, 1000 for tasks, else 100)",
    )
    sub.add_argument("--seed", type=int, default=1, help="which held-out videos (default 1)")
    sub.add_argument("--layers", type=int, default=4, help="export: decoder layers (default 4)")
    sub.add_argument(
        "--part",
        help="conversion: text (real weights) or video (tiny model); default both. stages: whole leaves out "
        "the rows without a stage",
    )
    sub.add_argument("--row", help="tasks: only this one (chase1, chase2)")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="rollout: fields of rl:tiny to change")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _bench(args: argparse.Namespace) -> int:
    from iv3jax.bench import (
        cache,
        conversion,
        digits,
        export,
        generate,
        kernels,
        rollout,
        stages,
        tasks,
        train,
        tune,
        weights,
    )

    def videos(default: int) -> int:
        return default if args.samples is None else args.samples

    modules = {
        "digits": (
            digits,
            lambda: digits.bench_digits(load_model(digits_name(args.model)), videos(500), args.seed),
        ),
        "generate": (generate, generate.bench_generate),
        "weights": (
            weights,
            lambda: weights.bench_weights(digits_name(args.model), videos(100), args.seed),
        ),
        "cache": (cache, lambda: cache.bench_cache(digits_name(args.model), videos(100), args.seed)),
        "kernels": (kernels, kernels.bench_kernels),
        "tune": (tune, tune.bench_tune),
        "train": (train, train.bench_train),
        "stages": (
            stages,
            lambda: stages.bench_stages(args.model, videos(100), args.seed, part=args.part),
        ),
        "rollout": (rollout, lambda: rollout.bench_rollout(args.model, overrides=tuple(args.overrides))),
        "tasks": (
            tasks,
            lambda: tasks.bench_tasks(_models(args.model), videos(1000), args.seed, args.row),
        ),
        "export": (export, lambda: export.bench_export(args.layers)),
        "conversion": (
            conversion,
            lambda: conversion.bench_conversion(args.part, args.model, videos(100), args.seed),
        ),
    }
    if args.overrides and args.name != "rollout":
        raise UserError(f"iv3 bench {args.name} has no fields to change ({' '.join(args.overrides)})")
    module, measure = modules[args.name]
    result = measure()
    print(json.dumps(result) if args.json else module.format_table(result))
    # Only some have a bound to keep.
    return int(result.get("passed") is False)


def _models(text: str | None) -> dict[str, str]:
    """Folders by name; a folder alone is named by its path."""
    pairs = (part.rpartition("=") for part in model_name(text).split(","))
    return {name or folder: folder for name, _, folder in pairs}

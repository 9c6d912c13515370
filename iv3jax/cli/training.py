"""`iv3 train`, and what prepares it: `plan`, `data`, `doctor`."""

import argparse
import sys

from iv3jax.cli.parse import Command


def add(command: Command) -> None:
    """Adds these commands to the parser."""
    sub = command("train", _train, "Train a model, or go on where a run was stopped.")
    sub.add_argument("--config", required=True, help="experiment: configs/NAME.py as NAME or NAME:VARIANT")
    sub.add_argument("--out", required=True, help="the run's folder; the trained model goes to OUT/model")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the experiment to change")


def _train(args: argparse.Namespace) -> int:
    from iv3jax.train.config import experiment
    from iv3jax.train.loop import Stopped
    from iv3jax.train.run import run

    try:
        folder = run(experiment(args.config, args.overrides), args.out)
    except Stopped as stopped:
        print(f"iv3: {stopped}", file=sys.stderr)
        return stopped.exit_code
    print(f"model written to {folder}")
    return 0

"""`iv3 train`, and what prepares it: `plan`, `data inspect`, `data choose`, `data encode`, `doctor`."""

import argparse
import dataclasses
import json
import sys

from iv3jax.cli.parse import Command
from iv3jax.cli.source import model_name


def add(command: Command) -> None:
    """Adds these commands to the parser."""
    sub = command("train", _train, "Train a model, or go on where a run was stopped.")
    _experiment(sub)
    sub.add_argument("--out", required=True, help="the run's folder; the trained model goes to OUT/model")

    sub = command(
        "plan", _plan, "Compile an experiment's step for chips that are not here, and say if it fits."
    )
    _experiment(sub)
    sub.add_argument("--topology", required=True, help="v5e-256, v5p-128, h100x64, 2*v5p-128, …")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("doctor", _doctor, "What this machine has, and which presets fit.")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    data = command("data", _train, "Look at training data, or encode videos ahead of training.")
    kinds = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    sub = kinds.add_parser("inspect", help="what an experiment would feed", description=_inspect.__doc__)
    sub.set_defaults(run=_inspect)
    _experiment(sub)
    sub.add_argument("--samples", type=int, default=64, help="how many to read (default 64)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub = kinds.add_parser(
        "choose", help="the questions that rl or distill can learn from", description=_choose.__doc__
    )
    sub.set_defaults(run=_choose)
    _experiment(sub)
    sub.add_argument("--out", required=True, help="the file to write, for collect.questions")
    sub.add_argument("--questions", type=int, default=256, help="how many to look at (default 256)")
    sub.add_argument("--answers", type=int, default=8, help="of each model to each question (default 8)")
    sub = kinds.add_parser("encode", help="the tower's outputs of videos", description=_encode.__doc__)
    sub.set_defaults(run=_encode)
    sub.add_argument(
        "videos", nargs="+", help="video files, folders of them, or annotations (.jsonl) naming them"
    )
    sub.add_argument("--store", required=True, help="the store's folder; what is there already is kept")
    sub.add_argument("--model", help="model folder (default: the model that launch/demo.sh trained)")
    sub.add_argument("--media-root", default="", help="folder that an annotation's paths are relative to")
    sub.add_argument("--fps", type=float, help="frames to sample per second (default: the model folder's)")
    sub.add_argument("--max-frames", type=int, help="most frames to sample (default: the model folder's)")
    sub.add_argument("--dtype", help="of the features: bfloat16 (default) or float32")
    sub.add_argument("--host", type=int, default=0, help="this one of --hosts that share the videos")
    sub.add_argument("--hosts", type=int, default=1)
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _experiment(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, help="experiment: configs/NAME.py as NAME or NAME:VARIANT")
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


def _plan(args: argparse.Namespace) -> int:
    from iv3jax.train.config import experiment
    from iv3jax.train.plan import as_json, format_plan, plan

    made = plan(experiment(args.config, args.overrides), args.topology)
    print(json.dumps(as_json(made)) if args.json else format_plan(made))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from iv3jax.train.doctor import doctor

    found = doctor()
    print(json.dumps(dataclasses.asdict(found)) if args.json else found)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    """What an experiment would feed: samples, tokens and frames of each source, what is dropped and why, how
    full the rows are, and one sample with what it trains on marked.
    """
    from iv3jax.train.config import experiment
    from iv3jax.train.run import inspect_data

    report = inspect_data(experiment(args.config, args.overrides), args.samples)
    print(json.dumps(report.to_dict()) if args.json else report.as_text())
    return 0


def _choose(args: argparse.Namespace) -> int:
    """Asks an experiment's model its own questions. For rl those are kept whose answers are sometimes right,
    for distill those that its teacher can answer and it cannot.
    """
    from iv3jax.train.choices import write_choices
    from iv3jax.train.choose import choose
    from iv3jax.train.config import experiment

    found = []
    for one in choose(experiment(args.config, args.overrides), args.questions, args.answers):
        found.append(one)
        kept = sum(choice.kept for choice in found)
        print(f"\rkept {kept} of {len(found)} questions", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    write_choices(args.out, found)
    print(f"{args.out}: {kept} of {len(found)} questions are kept")
    return 0


def _encode(args: argparse.Namespace) -> int:
    """Writes the vision tower's outputs of videos, for training and agents to read instead of decoding.
    Killed, the same command goes on.
    """
    from iv3jax.checkpoint.load import load
    from iv3jax.generate.encode import encode_command

    settings = {
        name: value for name in ("fps", "max_frames", "dtype") if (value := getattr(args, name)) is not None
    }
    done = encode_command(
        load(model_name(args.model)),
        args.videos,
        args.store,
        media_root=args.media_root,
        say=lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True),
        host=args.host,
        hosts=args.hosts,
        **settings,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(done)))
    return 0

"""`iv3 trace show`: what rollouts did, for people."""

import argparse

from iv3jax.cli.parse import Command
from iv3jax.errors import UserError


def add(command: Command) -> None:
    """Adds the command to the parser."""
    trace = command("trace", _show, "Look at what rollouts did.")
    kinds = trace.add_subparsers(title="commands", required=True, metavar="COMMAND")
    sub = kinds.add_parser("show", help="print traces, step by step", description=_show.__doc__)
    sub.set_defaults(run=_show)
    sub.add_argument("file", help="traces, one a line, such as RUN/traces/STEP.jsonl")
    sub.add_argument("--number", type=int, help="only this one, counted from 1 (default: all)")


def _show(args: argparse.Namespace) -> int:
    """Prints the traces of a file: the question, each step's thought, call and observation, the answer and
    what it earned.
    """
    from iv3jax.mcr.trace import read_traces, show

    traces = read_traces(args.file)
    if args.number is not None:
        if not 1 <= args.number <= len(traces):
            raise UserError(f"{args.file}: has traces 1 to {len(traces)}, no number {args.number}")
        traces = traces[args.number - 1 : args.number]
    print("\n\n".join(show(trace) for trace in traces))
    return 0

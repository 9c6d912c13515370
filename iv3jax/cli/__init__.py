"""`iv3`: one short function per subcommand, all of them thin: what they do lives in the package.

Each file here adds some commands; nothing heavy is imported before a command runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from iv3jax.cli import benches, models, trace, training
from iv3jax.cli.parse import Run
from iv3jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a UserError becomes one line on stderr and exit code 2."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        # argparse takes one run of key=value only; those after a later option are here.
        if not hasattr(args, "overrides") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    try:
        return args.run(args)
    except UserError as error:
        print(f"iv3: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output went away (`iv3 shapes … | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="iv3", description="InternVideo3 in JAX: ask a long video.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    for module in (models, training, trace, benches):
        module.add(command)
    return parser

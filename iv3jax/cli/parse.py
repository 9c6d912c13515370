"""How a file of commands adds them: `command(name, function, text)` gives the parser of its arguments."""

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int]
"""What a command does: its arguments → the exit code."""

Command = Callable[[str, Run, str], argparse.ArgumentParser]
"""Its name, what it does, and a line of help → the parser of its arguments."""

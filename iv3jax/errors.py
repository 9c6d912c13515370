"""The one exception a user is meant to read, and the end of its line where a name is unknown."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: one line that names the file, key or field and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, with the one of the known names that is nearest."""
    return f"; did you mean {difflib.get_close_matches(name, list(known), 1, 0.0)[0]!r}?"

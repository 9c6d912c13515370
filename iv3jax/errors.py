"""The one exception a user is meant to read. Nothing else lives here."""


class UserError(Exception):
    """Bad input: one line that names the file, key or field and the way out.

    The command line prints it without a traceback and exits with code 2.
    """

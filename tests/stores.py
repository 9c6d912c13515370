"""Stores for tests, on localhost: a small S3 server written here, and gcp-storage-emulator for gs://.

Both are spoken to over HTTP by the libraries that speak to the real ones. The S3 server knows what the
package asks for (sizes, lists, ranges, uploads in one or several parts, deletes) and checks the access key.
"""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from gcsfs.core import GCSFileSystem
from s3fs import S3FileSystem

from iv3jax import paths

BUCKET = "bucket"
KEY = "test-key"


def free_port() -> int:
    """A port of localhost on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def store(scheme: str) -> Iterator[paths.StorePath]:
    """A running store of that scheme and, in it, an empty bucket."""
    with pytest.MonkeyPatch.context() as patch, _s3() if scheme == "s3" else _gs() as url:
        _point_at(patch, scheme, url)
        yield paths.StorePath(scheme, BUCKET)
    _forget()


def point_at_nothing(patch: pytest.MonkeyPatch, scheme: str) -> None:
    """From now on nobody answers for this scheme."""
    _point_at(patch, scheme, f"http://127.0.0.1:{free_port()}")


def _point_at(patch: pytest.MonkeyPatch, scheme: str, url: str) -> None:
    if scheme == "s3":
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", url)
    else:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
    _forget()


def _forget() -> None:
    """What this process knows of stores: their connections, who answered, and the blocks it read."""
    S3FileSystem.clear_instance_cache()
    GCSFileSystem.clear_instance_cache()
    paths._answered.clear()
    paths._StoreFile._blocks.clear()


@contextmanager
def _gs() -> Iterator[str]:
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@contextmanager
def _s3() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _S3)
    _S3.objects, _S3.parts = {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class _S3(BaseHTTPRequestHandler):
    """One request; objects are kept by key, the parts of an upload by key and number."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    parts: dict[str, dict[int, bytes]]

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_PUT(self) -> None:
        key, query = self._asked()
        data = self._body()
        if key is None:
            return
        if "partNumber" in query:
            self.parts[key][int(query["partNumber"])] = data
        else:
            self.objects[key] = data
        self._answer(200, headers={"ETag": f'"{hash(data):x}"'})

    def do_POST(self) -> None:
        key, query = self._asked()
        self._body()
        if key is None:
            return
        if "uploads" in query:
            self.parts[key] = {}
            self._answer(200, "<R><UploadId>one</UploadId></R>")
        else:
            self.objects[key] = b"".join(data for _, data in sorted(self.parts.pop(key).items()))
            self._answer(200, '<R><ETag>"joined"</ETag></R>')

    def do_DELETE(self) -> None:
        key, _ = self._asked()
        if key is not None:
            self.objects.pop(key, None)
            self._answer(204)

    def _get(self, body: bool) -> None:
        key, query = self._asked()
        if key is None:
            return
        if key == "" or "list-type" in query:
            self._answer(200, self._list(query.get("prefix", ""), query.get("delimiter")))
        elif key not in self.objects:
            self._fail(404, "NoSuchKey", body)
        else:
            data, headers = self.objects[key], {"ETag": f'"{hash(self.objects[key]):x}"'}
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            first, last = 0, len(data) - 1
            if wanted and wanted[1]:
                first, last = int(wanted[1]), int(wanted[2] or last)
            elif wanted:
                first = max(len(data) - int(wanted[2]), 0)
            if wanted and first >= len(data):
                self._fail(416, "InvalidRange", body)
            else:
                if wanted:
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self._answer(206 if wanted else 200, data[first : last + 1], headers, body)

    def _list(self, prefix: str, delimiter: str | None) -> str:
        files, folders = [], set()
        for key in sorted(k for k in self.objects if k.startswith(prefix)):
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                size = len(self.objects[key])
                files.append(f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size></Contents>")
        common = (f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        count = len(files) + len(folders)
        inner = (
            f"<IsTruncated>false</IsTruncated><KeyCount>{count}</KeyCount>{''.join(files)}{''.join(common)}"
        )
        return f"<ListBucketResult>{inner}</ListBucketResult>"

    def _asked(self) -> tuple[str | None, dict[str, str]]:
        """Key and query of the request; key None where it was refused."""
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: value[0] for name, value in parse_qs(url.query, keep_blank_values=True).items()}
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            self._fail(403, "InvalidAccessKeyId", self.command != "HEAD")
            return None, query
        if bucket != BUCKET:
            self._fail(404, "NoSuchBucket", self.command != "HEAD")
            return None, query
        return key, query

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        out = b""
        while size := int(data[: data.index(b"\r\n")].split(b";")[0], 16):
            start = data.index(b"\r\n") + 2
            out, data = out + data[start : start + size], data[start + size + 2 :]
        return out

    def _fail(self, status: int, code: str, body: bool) -> None:
        text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        self._answer(status, text, body=body)

    def _answer(
        self, status: int, text: str | bytes = b"", headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest's output is for tests."""

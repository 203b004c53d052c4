"""A local package index with one wheel, whose answers can be cut off or wrong."""

import base64
import hashlib
import http.server
import io
import threading
import zipfile
from contextlib import contextmanager

NAME, VERSION = "tiny-weights", "1.2"
WHEEL = "tiny_weights-1.2-py3-none-any.whl"
METADATA = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"


def wheel(files: dict[str, bytes]) -> bytes:
    """Return a wheel that holds `files`, with the list of their hashes."""
    content = {**files, "tiny_weights-1.2.dist-info/METADATA": METADATA.encode()}
    content["tiny_weights-1.2.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{name},sha256={_hash(data)},{len(data)}" for name, data in content.items()]
    content["tiny_weights-1.2.dist-info/RECORD"] = "\n".join([*rows, "tiny_weights-1.2.dist-info/RECORD,,"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


class Index:
    """The state of a served index: `breaks` answers end after `cut` bytes; `requests` are (path, Range or None)."""

    def __init__(self, data: bytes):
        self.data, self.sha256 = data, hashlib.sha256(data).hexdigest()
        self.breaks, self.cut, self.gone, self.ranges = 0, 0, False, True
        self.requests: list[tuple[str, str | None]] = []
        self.address = ""

    @property
    def starts(self) -> list[int]:
        """Return where each download of the wheel began."""
        ranges = [wanted for path, wanted in self.requests if path.endswith(".whl")]
        return [int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0 for wanted in ranges]


@contextmanager
def served(index: Index, monkeypatch):
    """Serve an index locally and make it pip's."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            return

        def do_GET(self):  # the name that http.server calls
            index.requests.append((self.path, self.headers.get("Range")))
            if self.path.startswith(f"/simple/{NAME}") and not index.gone:
                metadata = hashlib.sha256(METADATA.encode()).hexdigest()
                link = f'<a href="/files/{WHEEL}#sha256={index.sha256}" data-dist-info-metadata="sha256={metadata}">'
                self.answer(f"<!DOCTYPE html><html><body>{link}{WHEEL}</a></body></html>".encode(), "text/html")
            elif self.path.endswith(".metadata"):
                self.answer(METADATA.encode())
            elif self.path.endswith(".whl"):
                self.wheel()
            else:
                self.send_error(404)

        def answer(self, data, kind="application/octet-stream"):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def wheel(self):
            first = index.starts[-1] if index.ranges else 0
            data = index.data[first:]
            if first and not data:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(index.data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if index.breaks:
                index.breaks -= 1
                data = data[: index.cut]
            self.wfile.write(data)
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.address}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()

"""Downloads of one file by URL: whatever breaks the connection, downloaded bytes are kept and continued."""

import errno
import ssl

import pytest

from lib.errors import UserError
from lib.models.sources import download

WHOLE = bytes(range(100))


class Answer:
    """A server response that sends its content in two blocks; the second may be an error."""

    def __init__(self, content: bytes, status: int, error: OSError | None = None):
        self.headers, self.status = {"Content-Length": str(len(content))}, status
        self.blocks = [content[:11], error or content[11:]]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self, _):
        block = self.blocks.pop(0) if self.blocks else b""
        if isinstance(block, OSError):
            raise block
        return block


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Return a function that serves WHOLE with an error for each of the first tries, and the requested ranges."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    ranges: list = []

    def serve(*errors, at_once=False):
        waiting = [*errors]

        def urlopen(request, timeout):
            ranges.append(request.get_header("Range"))
            first = int(ranges[-1].removeprefix("bytes=").rstrip("-")) if ranges[-1] else 0
            error = waiting.pop(0) if waiting else None
            if error and at_once:
                raise error
            return Answer(WHOLE[first:], 206 if first else 200, error)

        monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)

    return serve, ranges


BREAKS = (ssl.SSLError(1, "bad record mac"), OSError(errno.EHOSTUNREACH, "No route to host"), ConnectionResetError())


@pytest.mark.parametrize("error", BREAKS, ids=["TLS", "no route", "reset"])
def test_any_broken_connection_is_resumed_by_the_next_try(error, served, tmp_path):
    serve, ranges = served
    serve(error)
    place = download.fetch("http://example.invalid/file", tmp_path / "file", None, "file")
    assert place.read_bytes() == WHOLE and ranges == [None, "bytes=11-"]
    serve(error, at_once=True)
    place.unlink()
    assert download.fetch("http://example.invalid/file", place, None, "file").read_bytes() == WHOLE


def test_bytes_read_before_giving_up_are_kept(served, tmp_path):
    serve, _ = served
    serve(*[ssl.SSLError(1, "bad record mac")] * download.TRIES)
    with pytest.raises(UserError, match=r"cannot be downloaded: SSLError; .* the same command resumes"):
        download.fetch("http://example.invalid/file", tmp_path / "file", None, "file")
    assert (tmp_path / "file.part").read_bytes() == WHOLE[: 11 * download.TRIES]

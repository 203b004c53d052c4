"""One file by its address: into a part beside its place, resumed after a break, checked by SHA-256, then renamed.

Proxies and certificates are those of the environment. Knows nothing of what is in the file.
"""

import http.client
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from lib.errors import UserError
from lib.models.sources import store
from lib.models.sources.store import Tell, silent

TRIES = 4  # after a connection that broke off, each from where the last one ended
SECONDS = 30.0  # without a byte
PAUSE_SECONDS = 1.0


class Refused(Exception):
    """The address cannot be read this way: it asks for credentials, or its certificate is not trusted here."""


def fetch(address: str, target: Path, sha256: str | None, what: str, tell: Tell = silent) -> Path:
    """Bring the file at `address` to `target`; return `target`. `sha256`: None where only the caller can check it.

    A part that an earlier call left is continued where the server allows it. Raises Refused for an address that wants
    credentials or is not trusted, UserError where there is no network or no room, where the connection breaks off
    again and again (the part is kept), and where the hash differs from `sha256` (the part is removed).
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _complete(address, part, what, tell)
        if sha256 and (actual := store.sha256(part)) != sha256:
            part.unlink()
            raise UserError(
                f"{what}: the download is damaged: SHA-256 {actual[:12]}…, expected {sha256[:12]}…; it was removed, "
                "call again"
            )
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise store.explained(error, what) from None
    return target


def _complete(address: str, part: Path, what: str, tell: Tell) -> None:
    reason = ""
    for turn in range(TRIES):
        if turn:
            time.sleep(PAUSE_SECONDS * turn)
        try:
            if _continue(address, part, what, tell):
                return
            reason = "the connection broke off"
        except (TimeoutError, http.client.HTTPException, ConnectionError) as error:
            reason = type(error.__cause__ or error).__name__
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 407):
                raise Refused(str(error)) from None
            if error.code == 404:
                raise UserError(f"{what}: is gone from the index (404)") from None
            reason = f"the server answers {error.code}"
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                raise Refused(str(error.reason)) from None
            reason = f"no network ({error.reason})"
    have = part.stat().st_size if part.is_file() else 0
    resumable = f"; {have / 1e6:,.1f} MB are kept, and the same command resumes" if have else ""
    raise UserError(f"{what}: cannot be downloaded: {reason}{resumable}")


def _continue(address: str, part: Path, what: str, tell: Tell) -> bool:
    """Read on from the end of the part; return whether the file is whole now. Raises ConnectionError where the
    connection breaks, OSError for the disk alone.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return True  # the part was whole already
        part.unlink()
        return False
    except urllib.error.URLError:
        raise
    except OSError as error:
        raise ConnectionError(str(error)) from error
    with answer:
        resumed = have and answer.status == 206
        have = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        store.require_room((total or 0) - have, what)
        with part.open("ab" if resumed else "wb") as file:
            while block := _block(answer):
                file.write(block)
                have += len(block)
                tell(what, have, total)
    return total is None or have >= total


def _block(answer: http.client.HTTPResponse) -> bytes:
    """Return the next bytes. Raises ConnectionError for whatever the system says of the connection (a broken record of
    TLS, no route any more), so that it is not taken for a fault of the disk.
    """
    try:
        return answer.read(store.READ_BYTES)
    except OSError as error:
        raise ConnectionError(str(error)) from error

"""Downloads a file into a `.part` file next to its target, resumes after a break, checks the SHA-256 and renames it.

Uses the proxies and certificates of the environment. Knows nothing of what is in the file.
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

TRIES = 4  # each continues where the last one broke off
SECONDS = 30.0  # without a byte, after which a connection counts as broken
PAUSE_SECONDS = 1.0


class Refused(Exception):
    """The address asks for credentials, or its certificate is not trusted here."""


def fetch(address: str, target: Path, sha256: str | None, what: str, tell: Tell = silent) -> Path:
    """Download the file at `address` to `target`; return `target`. `sha256`: None if only the caller can check it.

    Continues a part left by an earlier call if the server allows it. `what`: the name of the file in messages. Raises
    Refused for an address that needs credentials or is not trusted, and UserError without network or room, after TRIES
    broken connections (the part is kept) and if the hash differs from `sha256` (the part is removed).
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
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_SECONDS * attempt)
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
                raise UserError(f"{what}: no longer in the package index (404)") from None
            reason = f"the server answers {error.code}"
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                raise Refused(str(error.reason)) from None
            reason = f"no network ({error.reason})"
    have = part.stat().st_size if part.is_file() else 0
    resumable = f"; {have / 1e6:,.1f} MB are kept, and the same command resumes" if have else ""
    raise UserError(f"{what}: cannot be downloaded: {reason}{resumable}")


def _continue(address: str, part: Path, what: str, tell: Tell) -> bool:
    """Continue at the end of the part; return whether the file is complete.

    Raises ConnectionError for a broken connection; any other OSError concerns the disk.
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return True  # the part was complete already
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
    """Return the next bytes. Raises every OSError of the connection (a broken TLS record, no route) as ConnectionError,
    so that it is not mistaken for an error of the disk.
    """
    try:
        return answer.read(store.READ_BYTES)
    except OSError as error:
        raise ConnectionError(str(error)) from error

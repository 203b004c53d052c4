"""The command `fetch`: brings weights and other data here, or checks what is here already. Runs nothing else."""

import time
from collections.abc import Sequence
from pathlib import Path

from lib.errors import UserError
from lib.models import parameters as parameter_files
from lib.models.sources import fetch as sources
from lib.models.sources import reference
from lib.models.sources.reference import Reference
from lib.suite.plan import fetching, plan


def fetch(texts: Sequence[str]) -> int:
    """Fetch everything that was named, a line for each; return the exit code. Raises UserError for the first fault."""
    for text, source, sha256 in [named(text) for text in texts]:
        began, there = time.monotonic(), sources.local(source)
        if there is not None and (fault := sources.verify(source)):
            print(f"{text}: {fault}; fetching it again", flush=True)
            sources.forget(source)
            there = None
        how = "was here, every file as it came" if there is not None else "fetched"
        place = there or fetching.bring(source, sha256)
        print(f"{text}: {how}, {_bytes(place) / 1e6:,.1f} MB, {time.monotonic() - began:.1f} s: {place}", flush=True)
    return 0


def named(text: str) -> tuple[str, Reference, str | None]:
    """Return (text, what it refers to, the SHA-256 it must have or None): of a model by name, or of a reference."""
    known = [*plan.models(), *parameter_files.registered()]
    if text not in known and not (text.startswith(reference.PACKAGE) or "/" in text or reference.is_path(text)):
        plan.model_named(text)  # raises, with the nearest name
    if text not in known:
        return text, reference.parse(text), None
    description = parameter_files.read(text)
    return text, description.source, description.sha256


def _bytes(place: Path) -> int:
    """Return the size of a file, or of everything in a folder."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    if not files:
        raise UserError(f"{place}: holds no file")
    return sum(path.stat().st_size for path in files)

"""The command `fetch`: downloads weights, benchmarks and data, and checks files already here. Runs nothing else."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.errors import UserError, suggest
from lib.models import parameters as parameter_files
from lib.models.sources import fetch as sources
from lib.models.sources import reference
from lib.models.sources.reference import Reference
from lib.models.tasks.benchmarks import BENCHMARKS
from lib.suite.plan import fetching, plan


@dataclass(frozen=True)
class Wanted:
    """An item to fetch: its title, its source, and the SHA-256 of a single file."""

    title: str
    source: Reference
    sha256: str | None = None


def fetch(texts: Sequence[str]) -> int:
    """Fetch all named items, printing a line each; return the exit code. Raises UserError for the first fault.

    All items are checked before anything is fetched: a changed file is removed with its whole package, which another
    named item may belong to.
    """
    wanted = list(dict.fromkeys(item for text in texts for item in named(text)))
    checked = {item: _checked(item) for item in wanted}
    for item in wanted:
        began, local = time.monotonic(), sources.local(item.source)
        how = f"already here, {sources.checked(item.source)}" if local is not None else "fetched"
        place = fetching.bring(item.source, item.sha256)
        seconds = checked[item] + time.monotonic() - began
        print(f"{item.title}: {how}, {_bytes(place) / 1e6:,.1f} MB, {seconds:.1f} s: {place}", flush=True)
    return 0


def _checked(item: Wanted) -> float:
    """Remove a local copy that has changed, with a message; return the seconds that the check took."""
    began = time.monotonic()
    if sources.local(item.source) is not None and (fault := sources.verify(item.source)):
        print(f"{item.title}: {fault}; fetching it again", flush=True)
        sources.forget(item.source)
    return time.monotonic() - began


def named(text: str) -> list[Wanted]:
    """Return the items of a name or reference; for a model, its weights and the benchmarks among its tasks."""
    if text in BENCHMARKS:
        return [_benchmark(text)]
    known = [*plan.models(), *parameter_files.registered()]
    if text not in known and not (text.startswith(reference.PACKAGE) or "/" in text or reference.is_path(text)):
        names = [*known, *BENCHMARKS]
        hint = suggest(text, names) or f" Known: {', '.join(names)}; or a hub id, a .gguf file, a package."
        raise UserError(f'unknown model or benchmark "{text}".{hint}')
    if text not in known:
        return [Wanted(text, reference.parse(text))]
    description = parameter_files.read(text)
    needed = [_benchmark(task) for task in description.tasks if task in BENCHMARKS]
    return [Wanted(text, description.source, description.sha256), *needed]


def _benchmark(name: str) -> Wanted:
    return Wanted(f"{name} ({BENCHMARKS[name].data})", BENCHMARKS[name].reference)


def _bytes(place: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes. Raises UserError where there is none."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    if not files:
        raise UserError(f"{place}: holds no file")
    return sum(path.stat().st_size for path in files)

"""Fetches the files that a run needs before anything runs, and shows the progress. Independent of runs.

Progress is a bar in a terminal, elsewhere a line per step; both on standard error.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from lib.models import parameters as parameter_files
from lib.models.sources import fetch as sources
from lib.models.sources.reference import Reference
from lib.models.sources.store import Tell


def weights(name: str) -> Path:
    """Return the folder of a model's checkpoint, fetching it with a message if needed. Raises UserError."""
    description = parameter_files.read(name)
    return bring(description.source, description.sha256)


def bring(source: Reference, sha256: str | None = None) -> Path:
    """Return the local path of `source`, fetching it with a message if needed. Raises UserError."""
    if sources.local(source) is not None or source.kind == "folder":
        return sources.fetch(source, sha256=sha256)  # raises if the folder is missing
    sources.require(source)  # raises before the message below
    doing = "not converted yet: converting" if source.kind == "gguf" else "not here yet: fetching"
    print(f"build.py: {source.text} is {doing} it, once", file=sys.stderr, flush=True)
    with shown() as tell:
        return sources.fetch(source, tell, sha256)


@contextlib.contextmanager
def shown() -> Iterator[Tell]:
    """Yield a function that shows the current step, the bytes done and the total."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(what: str, done: int, total: int | None) -> None:
            if what not in seen:
                seen.add(what)
                size = f" ({total / 1e6:,.1f} MB)" if total else ""
                console.print(f"  {what}{size}", markup=False)

        yield line
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=None)

        def move(what: str, done: int, total: int | None) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        yield move

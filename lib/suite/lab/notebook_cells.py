"""The code cells of the notebook that a JupyterLab kernel runs, and how long each took before.

Reads the notebook and the records as plain JSON, so that a kernel starts quickly. Shows nothing.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.files import json_object
from lib.suite.plan import template as templates

PARAMETERS, LAST = "parameters", "environment"  # tags


@dataclass(frozen=True)
class CodeCell:
    """A code cell: its source, the heading above it, its tags, and its index in an executed notebook."""

    source: str
    heading: str
    tags: tuple[str, ...]
    executed: int


def notebook() -> Path | None:
    """Return the notebook that this kernel was started for; None where no Jupyter server started it."""
    name = os.environ.get("JPY_SESSION_NAME")
    if not name:
        return None
    return next((path for path in (Path(name), Path(Path(name).name)) if path.is_file()), None)


def read(path: Path) -> list[CodeCell]:
    """Return the code cells of a notebook; none where it cannot be read.

    Papermill inserts a cell after the one tagged `parameters`; later cells are numbered accordingly.
    """
    try:
        cells = templates.read_cells(path)
    except UserError:
        return []
    code_cells: list[CodeCell] = []
    heading, behind = "", 0
    for index, (kind, source, tags) in enumerate(cells):
        if kind == "code":
            code_cells.append(CodeCell(source.strip(), heading, tags, index + behind))
            behind += PARAMETERS in tags
        for line in source.splitlines() if kind == "markdown" else ():
            if line.startswith("#"):
                heading = line.lstrip("# ").strip()
    return code_cells


def find(cells: Sequence[CodeCell], source: str, after: int) -> int | None:
    """Return the index of the cell with this source: the next one behind the index `after`, else the first, or None."""
    places = [place for place, cell in enumerate(cells) if cell.source == source.strip()]
    return next((place for place in places if place > after), places[0] if places else None)


def expected(cells: Sequence[CodeCell], stored: Iterable[Path], effort: Any) -> list[float | None]:
    """Return the seconds of each cell from the first record in `stored` with this effort; None where unknown."""
    for path in stored:
        record = json_object(path)
        took = (record.get("process") or {}).get("cell_seconds") or {}
        if record.get("effort") == effort and took:
            return [took.get(str(cell.executed)) for cell in cells]
    return [None] * len(cells)

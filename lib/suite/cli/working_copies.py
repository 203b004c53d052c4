"""Copies of the templates for JupyterLab, which saves outputs and edits into what it opens: the product stays as it is.

They lie in `.lab/`, as deep as the templates, so that relative paths mean the same. A copy in which cells were edited
is never overwritten. Knows no JupyterLab.
"""

import json
import shutil
from pathlib import Path

from lib.files import aside, write_atomically
from lib.suite.plan.cache_key import digest
from lib.suite.plan.plan import NOTEBOOKS, ROOT

COPIES = ROOT / ".lab"
MADE_FROM = ".templates.json"


def refresh(templates: Path = NOTEBOOKS, copies: Path = COPIES) -> list[str]:
    """Copy every template that is new or has changed; return a line for each edited copy that was put aside for it."""
    copies.mkdir(exist_ok=True)
    made_from = _read(copies / MADE_FROM)
    said = []
    for template in sorted(templates.glob("*.ipynb")):
        copy, cells = copies / template.name, _cells(template)
        if copy.is_file() and made_from.get(template.name) == cells:
            continue
        if copy.is_file() and _cells(copy) not in (made_from.get(template.name), cells):
            kept = aside(copy)
            copy.rename(kept)
            said.append(f"{template.name} has changed; your edited copy is {kept.relative_to(copies.parent)}")
        shutil.copyfile(template, copy)
        made_from[template.name] = cells
    write_atomically(copies / MADE_FROM, json.dumps(made_from, indent=1) + "\n")
    return said


def _read(path: Path) -> dict[str, str | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _cells(path: Path) -> str | None:
    """Return a hash of a notebook's cells without their outputs, None where it cannot be read."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return digest([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""Copies of the templates for JupyterLab, which saves outputs and edits into the files it opens.

They are in `.lab/`, at the same depth as the templates, so that relative paths work in both. A copy with edited cells
is never overwritten. Files that runs share, such as a search's study, are written next to the copies, not over those of
builds. Knows no JupyterLab.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.files import aside, json_object, visible, write_atomically
from lib.suite.plan import template as templates
from lib.suite.plan.cache_key import digest
from lib.suite.plan.plan import NOTEBOOKS, ROOT, Job

COPIES = ROOT / ".lab"
MADE_FROM = ".templates.json"
OWN_FOLDERS = {"studies": "studies", "stacks": "stacks"}  # parameters of a copy, relative to its folder


def refresh(templates_folder: Path = NOTEBOOKS, copies: Path = COPIES, jobs: Iterable[Job] = ()) -> list[str]:
    """Copy every template that is new or has changed; return a line for each edited copy that was set aside.

    A job gets its own copy, `<optimization>--<model>.ipynb`, with its parameters set in the cell tagged `parameters`.
    """
    copies.mkdir(exist_ok=True)
    made_from: dict[str, str | None] = json_object(copies / MADE_FROM)
    lines = []
    contents = {path.name: _apart(path.read_text(encoding="utf-8")) for path in visible(templates_folder, "*.ipynb")}
    for name, text in {**contents, **{f"{job.stem}.ipynb": _with_parameters(job) for job in jobs}}.items():
        copy, cells = copies / name, _cells(text)
        if copy.is_file() and made_from.get(name) == cells:
            continue
        if copy.is_file() and _cells_of(copy) not in (made_from.get(name), cells):
            set_aside = aside(copy)
            copy.rename(set_aside)
            lines.append(f"{name} has changed; your edited copy is {set_aside.relative_to(copies.parent)}")
        write_atomically(copy, text)
        made_from[name] = cells
    write_atomically(copies / MADE_FROM, json.dumps(made_from, indent=1) + "\n")
    return lines


def _apart(text: str) -> str:
    """Return a template's text with OWN_FOLDERS among its parameters; unchanged if it has none of these."""
    try:
        return _with_values(text, OWN_FOLDERS)
    except (ValueError, KeyError, TypeError, StopIteration):  # not a template (yet)
        return text


def _with_parameters(job: Job) -> str:
    """Return the text of a job's template with the job's parameters in place of the defaults, and with OWN_FOLDERS
    unless the job names others.
    """
    own = {name: folder for name, folder in OWN_FOLDERS.items() if job.parameters.get(name) == ""}
    return _with_values(job.template.path.read_text(encoding="utf-8"), {**job.parameters, **own})


def _with_values(text: str, values: Mapping[str, Any]) -> str:
    """Return a template's text with `values` in the cell tagged `parameters`; unchanged if that changes nothing."""
    content = json.loads(text)
    cell = next(cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", ()))
    before = "".join(cell["source"])
    after = templates.with_values(before, values)
    if after == before:
        return text
    cell["source"] = after.splitlines(keepends=True)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _cells_of(path: Path) -> str | None:
    try:
        return _cells(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _cells(text: str) -> str | None:
    """Return a hash of a notebook's cells without outputs; None where the text is not a notebook."""
    try:
        return digest([[cell["cell_type"], "".join(cell["source"])] for cell in json.loads(text)["cells"]])
    except (ValueError, KeyError, TypeError):
        return None

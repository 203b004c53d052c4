"""Writes the files of the suites from a result set: JSON by the published schema, Markdown, and a plain-text summary.

Each file is computed from the records and replaced atomically. Runs nothing.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.files import write_atomically
from lib.report.analysis import result_set
from lib.report.analysis.result_set import Results
from lib.report.pages.suites import execution_report, suite_pages
from lib.report.pages.suites.file_names import FILES, PARTS

CONTENT = {
    "comprehensive": result_set.comprehensive,
    "enhanced": result_set.enhanced,
    "all": result_set.master,
    "complete": result_set.complete,
}


def write(kind: str, folder: Path, optimizations: Iterable[str] = (), models: Iterable[str] = ()) -> list[Path]:
    """Write the files of the suite `kind` from the records in `folder`; return their paths. Raises OSError.

    `optimizations` and `models` are the expected names, so that missing runs are listed as missing.
    """
    results = result_set.read(folder, optimizations, models)
    kinds = (*PARTS, "complete") if kind == "complete" else (kind,)
    return [path for part in kinds for path in _write(part, results, Path(folder))]


def _write(kind: str, results: Results, folder: Path) -> list[Path]:
    written = []
    for name in FILES[kind]:
        if name.endswith(".json"):
            text = _json(CONTENT[kind](results))
        elif name.endswith(".txt"):
            text = execution_report.text(results)
        else:
            text, pictures = getattr(suite_pages, kind)(results.settled, f"{name.removesuffix('.md')}_files")
            _pictures(folder / f"{name.removesuffix('.md')}_files", pictures)
        written.append(write_atomically(folder / name, text))
    return written


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _pictures(place: Path, pictures: dict[str, bytes]) -> None:
    """Replace the folder of a report's pictures by one with these files (name → PNG)."""
    fresh = place.with_name(f".{place.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    if pictures:
        fresh.mkdir(parents=True)
        for name, content in pictures.items():
            (fresh / name).write_bytes(content)
    shutil.rmtree(place, ignore_errors=True)
    if pictures:
        fresh.rename(place)

"""Renders pages from records: the HTML and Markdown of one run, or of a whole folder. Runs no notebook."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from lib.errors import UserError
from lib.suite.plan import plan
from lib.suite.store.result_folder import Folder, present

log = logging.getLogger(__name__)


def render(folder: Path, stem: str, neighbours: Iterable[tuple[str, str]]) -> str | None:
    """Write the pages of one run (or of the overview); return None, or the reason for a failure in one line."""
    from lib.report.pages import html
    from lib.report.records import record

    where = Folder(Path(folder))
    try:
        run_record = None if stem == plan.OVERVIEW else record.read(where.of(stem, ".json"))
        notebook = where.of(stem, ".ipynb")
        if run_record and run_record.status == "failed":
            notebook = where.failed(stem)
        html.render(notebook, run_record, [(optimization, model) for optimization, model in neighbours], where.path)
    except UserError as error:
        return str(error)
    except Exception as error:  # a failure to render must not lose the result
        log.exception("rendering %s", stem)
        return f"{stem}: the pages could not be rendered: {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def render_all(folder: Folder, say: Callable[[str], None]) -> list[str]:
    """Render every record of the folder again, then the overview; return the faults, one line each."""
    pairs = present(folder)
    faults = []
    stems = [f"{optimization}--{model}" for optimization, model in pairs]
    stems += [plan.OVERVIEW] if folder.of(plan.OVERVIEW, ".ipynb").is_file() else []
    for stem in stems:
        fault = render(folder.path, stem, pairs)
        say(f"{stem}: {fault}" if fault else f"{stem}: rendered")
        faults += [fault] if fault else []
    return faults

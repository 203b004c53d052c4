"""Files computed from all records of a folder: the suites' files, the index, and the archive.

Each is rewritten only if a record, the expected runs, or the code that writes it has changed. Independent of runs.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lib.errors import UserError
from lib.files import write_atomically
from lib.report.pages.suites import file_names
from lib.report.text import commands
from lib.suite.plan import cache_key, plan
from lib.suite.store.result_folder import Folder

log = logging.getLogger(__name__)
REPORT = plan.ROOT / "lib" / "report"
MEASURE = plan.ROOT / "lib" / "measure"  # the basis of the report's verdicts: metrics, margins, floors
KINDS = ("complete", "comprehensive", "enhanced", "coverage", "all")  # the first writes the files of the others too


def finish(folder: Folder, kind: str | None) -> list[str]:
    """Write the files of the suite `kind` and of suites already in the folder, the index and the archive.

    Returns the faults, one line each.
    """
    current = made_from(folder)
    faults = [_make(folder, suite, current, _suite) for suite in KINDS if suite == kind or _present(folder, suite)]
    faults += [_make(folder, "index.html", current + _others(folder), _index)]
    if not any(faults):
        faults += [_make(folder, "report.zip", current + _others(folder), _archive)]
    return [fault for fault in faults if fault]


def made_from(folder: Folder) -> str:
    """Return a fingerprint of all inputs of the files: records, expected runs, code of the reports, and the folder,
    which the commands on the pages name.
    """
    code = [*REPORT.rglob("*.py"), *REPORT.rglob("*.j2"), *REPORT.rglob("*.css"), *MEASURE.rglob("*.py")]
    files = [*folder.path.glob("*--*.json"), *code]
    lead_to = commands.out_of(folder.path)
    return cache_key.digest([_marks(files), plan.optimizations(), plan.models(folder.path.name), lead_to])


def _others(folder: Folder) -> str:
    """Return a fingerprint of the other linked or archived files: pages and the suites' files."""
    endings = ("*.html", "*.md", "*.txt", "*_results*.json")
    files = [*(path for ending in endings for path in folder.path.glob(ending)), *REPORT.rglob("*.js")]
    return cache_key.digest(_marks(path for path in files if path.name != "index.html"))


def _marks(files: Iterable[Path]) -> list:
    existing = (path for path in files if path.is_file())  # a link may be broken
    return sorted([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in existing)


def _present(folder: Folder, kind: str) -> bool:
    return (folder.path / file_names.FILES[kind][-1]).is_file()


def _names(kind: str) -> tuple[str, ...]:
    if kind not in KINDS:
        return (kind,)
    return file_names.files(kind)


def _make(folder: Folder, what: str, mark: str, make: Callable[[Folder, str], None]) -> str | None:
    """Write `what` unless it exists and its fingerprint is unchanged; return None, or the fault in one line."""
    stamp = folder.path / ".cache" / "made" / f"{what}.json"
    try:
        known = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known == mark and all((folder.path / name).is_file() for name in _names(what)):
        return None
    try:
        make(folder, what)
        for suite in KINDS if what == "complete" else (what,):
            write_atomically(stamp.with_name(f"{suite}.json"), json.dumps(mark) + "\n")
    except OSError:
        raise  # a full disk ends the build
    except UserError as error:
        return str(error)
    except Exception as error:  # a failure to render must not lose the results
        log.exception("making %s", what)
        return (
            f"{what} could not be made: {type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}"
        )
    return None


def _suite(folder: Folder, kind: str) -> None:
    from lib.report.pages.suites import suite_files

    suite_files.write(kind, folder.path, plan.optimizations(), plan.models(folder.path.name))


def _index(folder: Folder, _: str) -> None:
    from lib.report.pages import index

    index.write(folder.path, plan.optimizations(), plan.models(folder.path.name))


def refresh_index(folder: Folder, every_seconds: float = 0.0) -> None:
    """Write the index again, unless it was written less than `every_seconds` ago; errors are logged.

    For a build that replaces the runs of a first pass one by one, or is stopped; `finish` writes the final index.
    """
    path = folder.path / "index.html"
    try:
        if not path.is_file() or time.time() - path.stat().st_mtime >= every_seconds:
            _index(folder, path.name)
    except Exception:
        log.exception("making %s", path.name)


def _archive(folder: Folder, _: str) -> None:
    from lib.report.pages import archive

    archive.write(folder.path)


def short_of_curves(folder: Folder) -> list[str]:
    """Return a line for each measured record without an impact curve of three strengths."""
    from lib.report.analysis import strength_curves
    from lib.report.records.record import read_folder

    return [f"{stem}: {why}" for stem, why in strength_curves.short(read_folder(folder.path)[0]).items()]

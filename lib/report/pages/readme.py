"""Writes the results into README.md (a matrix and a picture) and executed/README.md (full tables), from records.

`python -m lib.report.pages.readme` reads `executed/proxy`; `python -m lib.report.pages.readme executed/full` writes the
tables of another scale. The README shows the proxy models and, below them, real models, but no slices. Everything
outside the markers is kept. No number is typed by hand.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib.errors import UserError
from lib.files import write_atomically
from lib.measure.metrics.catalogue import METRICS
from lib.report.analysis.noise import discoveries
from lib.report.analysis.result_set import Results
from lib.report.figures.inline import trade_off_svg
from lib.report.pages import index, result_tables, views
from lib.report.records.record import Record, read_folder

ROOT = Path(__file__).resolve().parents[3]
PICTURE = ".github/results.svg"
SCALES = ("proxy", "slice", "full")
SHOWN = "proxy"  # the scale shown in the README with a picture
REAL = "full"  # the scale shown below it, without a picture
MATRIX, REAL_MATRIX, FIGURE = "results", "real results", "picture"
TABLE = "\n| --- |"


def markers(name: str) -> tuple[str, str]:
    """Return the start and end markers of a generated part of a page."""
    return f"<!-- {name}: start -->", f"<!-- {name}: end -->"


def between(text: str, name: str, page: str = "README.md") -> str:
    """Return the text between the markers of a part. Raises UserError unless there is exactly one pair of them."""
    start, end = markers(name)
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise UserError(f'{page}: expected one "{start}" and, after it, one "{end}"')
    return text.split(start)[1].split(end)[0].strip()


def picture(records: Sequence[Record]) -> tuple[str, str]:
    """Return the picture of quality against speed as SVG, and its alternative text; both empty without a point.

    It shows the runs of the most frequent effort.
    """
    optimizations = tuple(sorted({record.optimization for record in records}))
    models = tuple(sorted({record.model for record in records}))
    results = index.comparable(Results(SHOWN, list(records), {}, optimizations, models))
    points = views.means(results)
    if not points:
        return "", ""
    heading = f"Quality against speed, means over {len({r.model for r in results.measured})} proxy models"
    legend = [(mark, f"{text} ({note})" if note else text) for mark, text, note in views.legend(results)]
    margin = 100 * (METRICS[views.QUALITY].margin or 0)
    return trade_off_svg.picture(points, heading, margin, legend), trade_off_svg.words(points, heading, margin)


def update(root: Path, folder: Path) -> list[str]:
    """Write the results of `folder`, named after its scale, into the pages under `root`; return the changed files.

    Raises UserError for a folder that is not named after a scale, a folder without records although a page shows
    results, a missing page, or missing markers; then nothing changes.
    """
    scale = folder.resolve().name
    if scale not in SCALES:
        raise UserError(f"{folder}: expected a result folder named {', '.join(SCALES)}")
    records = discoveries.settled(read_folder(folder)[0])
    parts: dict[str, dict[str, str]] = {"executed/README.md": {scale: result_tables.section(records)}}
    drawn = ""
    if scale == SHOWN:
        drawn, alt = picture(records)
        shown = f"![{alt.replace('[', '(').replace(']', ')')}]({PICTURE})" if drawn else ""
        above = "\n\n".join(filter(None, [result_tables.about(records), shown]))
        parts["README.md"] = {FIGURE: above, MATRIX: result_tables.matrix(records)}
    if scale == REAL:
        parts["README.md"] = {REAL_MATRIX: result_tables.matrix(records)}
    texts = {page: _replaced(root, page, names) for page, names in parts.items()}
    for page, names in parts.items() if not records else ():
        if any(TABLE in between((root / page).read_text(encoding="utf-8"), name, page) for name in names):
            raise UserError(f"{folder}: holds no record, and {page} shows results; build first, or give their folder")
    texts |= {PICTURE: drawn} if drawn else {}
    return [page for page, text in texts.items() if _write(root / page, text)]


def replace(root: Path, page: str, parts: Mapping[str, str]) -> bool:
    """Write `parts` of a page under `root` between their markers; return whether the page changed.

    Raises UserError for a missing page or missing markers; then nothing changes.
    """
    return _write(root / page, _replaced(root, page, parts))


def _replaced(root: Path, page: str, parts: Mapping[str, str]) -> str:
    path = root / page
    if not path.is_file():
        raise UserError(f"{page}: there is no such file")
    text = path.read_text(encoding="utf-8")
    for name, new in parts.items():
        between(text, name, page)
        start, end = markers(name)
        before, rest = text.split(start)
        text = f"{before}{start}\n{new}\n{end}{rest.split(end)[1]}"
    return text


def _write(path: Path, text: str) -> bool:
    """Write the text unless the file already has this content; return whether it was written."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Update both pages from the command line; return the exit code."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m lib.report.pages.readme", description=summary)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "executed" / SHOWN, help="a result folder")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and executed/README.md are")
    chosen = parser.parse_args(arguments)
    try:
        changed = update(chosen.root, chosen.folder)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"updated: {', '.join(changed) or 'nothing, the pages already show these records'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the README's tables of results, each between its two markers, from the records of a result folder.

Run as `python -m lib.report.pages.readme executed/proxy`. Other scales have markers of their own (`executed/full`:
"results full"). No number in the README is typed by hand. Knows nothing of the rest of that file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.errors import UserError
from lib.files import write_atomically
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.report.records import facts
from lib.report.records.record import Record, read_folder
from lib.report.records.rows import markdown
from lib.report.text.wording import signed, title, words

APART = ("slice", "full")  # scales whose tables have markers of their own


def markers(folder: Path) -> tuple[str, str]:
    """Return what encloses the table of a result folder, which is named after its scale."""
    scale = f" {folder.name}" if folder.name in APART else ""
    return f"<!-- results{scale}: start -->", f"<!-- results{scale}: end -->"


def table(records: Sequence[Record]) -> str:
    """Return the results as Markdown: a line per run, then machine, dates and efforts."""
    if not records:
        return "No results yet: run `python build.py`."
    lines = [_line(record) for record in sorted(records, key=lambda r: (r.optimization, r.model))]
    head = ["optimization", "model", *DIMENSIONS, "in words"]
    return f"{markdown(head, lines)}\n\n{_conditions(records)}"


def _line(record: Record) -> list[str]:
    said = [signed(getattr(record.verdict, name)) for name in DIMENSIONS]
    if record.status != "ok":
        said = [words(record.status), *[""] * (len(DIMENSIONS) - 1)]
    return [title(record.optimization), record.model, *said, record.verdict.sentence or record.reason or ""]


def _conditions(records: Sequence[Record]) -> str:
    machines = sorted({facts.machine(r.environment) for r in records} - {""}) or ["not recorded"]
    days = sorted({facts.day(r.started)[:10] for r in records} - {""}) or ["not recorded"]
    scales, efforts = sorted({r.scale for r in records}), sorted({r.effort for r in records})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Scale {', '.join(scales)}; effort {', '.join(efforts)}; machine: {'; '.join(machines)}; measured: {span}."


def update(readme: Path, folder: Path) -> bool:
    """Put the table of `folder` between the markers of `readme`; return whether the file changed.

    Raises UserError where the file is missing or has no pair of markers.
    """
    if not readme.is_file():
        raise UserError(f"{readme.name}: there is no such file")
    start, end = markers(folder)
    old = readme.read_text(encoding="utf-8")
    if old.count(start) != 1 or old.count(end) != 1 or old.index(start) > old.index(end):
        raise UserError(f'{readme.name}: expected one "{start}" and, after it, one "{end}"')
    before, rest = old.split(start)
    new = f"{before}{start}\n{table(read_folder(folder)[0])}\n{end}{rest.split(end)[1]}"
    if new != old:
        write_atomically(readme, new)
    return new != old


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the README from the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lib.report.pages.readme", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a result folder, such as executed/proxy")
    parser.add_argument("--readme", type=Path, default=Path(__file__).resolve().parents[3] / "README.md")
    chosen = parser.parse_args(arguments)
    try:
        changed = update(chosen.readme, chosen.folder)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{chosen.readme.name}: results {'updated' if changed else 'unchanged'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes `index.html` of a result folder: the matrix of optimizations and models, from the records on disk.

A damaged record is shown as damaged with one line; a run that is not there is shown as missing. Knows nothing of what
should run: the expected names are handed in, and whatever else lies in the folder is shown too.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lib.measure.metrics import DIMENSIONS
from lib.report import page
from lib.report.files import write_atomically
from lib.report.html import TEMPLATES
from lib.report.quantities import duration
from lib.report.record import Record, read_folder
from lib.report.wording import one_line, signed, title

KEY = (
    "better",
    "maintained",
    "equivalent",
    "mixed",
    "inconclusive",
    "worse",
    "not_maintained",
    "invalid",
    "unavailable",
    "failed",
)


def write(folder: Path, optimizations: Iterable[str] = (), models: Iterable[str] = ()) -> Path:
    """Write `<folder>/index.html` from every `*--*.json` in it; return its path. Raises OSError.

    `optimizations` and `models` are the names that are expected, so that what is missing shows as missing.
    """
    folder = Path(folder)
    records, damaged = read_folder(folder)
    return write_atomically(folder / "index.html", text(folder, records, damaged, optimizations, models))


def text(
    folder: Path,
    records: Sequence[Record],
    damaged: dict[str, str],
    optimizations: Iterable[str] = (),
    models: Iterable[str] = (),
) -> str:
    """Return the page."""
    from jinja2 import Environment, FileSystemLoader

    found = {(r.optimization, r.model): r for r in records}
    broken = {tuple(stem.split("--", 1)): fault for stem, fault in damaged.items()}
    known = [*found, *broken]
    shown_models = _ordered(models, (model for _, model in known))
    rows = [
        (title(name), [_cell(folder, name, model, found, broken) for model in shown_models])
        for name in _ordered(optimizations, (name for name, _ in known))
    ]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("matrix.html.j2").render(
        title=f"Results at scale {_distinct(r.scale for r in records) or folder.resolve().name}",
        summary=_summary(records, damaged, len(rows) * len(shown_models)),
        facts=_facts(records),
        links=_links(folder),
        rows=rows,
        models=shown_models,
        key=[(state, signed(state)) for state in KEY],
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
    )


def _ordered(expected: Iterable[str], present: Iterable[str]) -> list[str]:
    """Return the expected names in their order, then the unexpected ones, sorted."""
    first = list(dict.fromkeys(expected))
    return first + sorted(set(present) - set(first))


def _cell(folder: Path, optimization: str, model: str, found: dict, broken: dict) -> dict[str, Any]:
    stem = f"{optimization}--{model}"
    cell = {"model": model, "href": None, "verdicts": [], "note": "", "status": "missing", "status_text": "· not run"}
    if (optimization, model) in broken:
        return cell | {"status": "damaged", "status_text": signed("damaged"), "note": broken[optimization, model]}
    record: Record | None = found.get((optimization, model))
    if record is None:
        return cell
    if (folder / f"{stem}.html").is_file():
        cell["href"] = f"{stem}.html"
    cell |= {"status": record.status, "status_text": signed(record.status)}
    if record.status != "ok":
        return cell | {"note": one_line(record.reason or "no reason was recorded", 200)}
    said = [(name, getattr(record.verdict, name)) for name in DIMENSIONS]
    verdicts = [{"name": name, "state": state, "text": signed(state)} for name, state in said]
    return cell | {"verdicts": verdicts, "note": f"{record.effort}, {page.day(record.started) or 'no date'}"}


def _summary(records: Sequence[Record], damaged: dict[str, str], cells: int) -> str:
    if not records and not damaged:
        return "No run has left a record here yet."
    count = {status: sum(r.status == status for r in records) for status in ("ok", "failed", "not_applicable")}
    parts = [f"{count['ok']} of {cells} runs measured"]
    parts += [f"{count['failed']} failed"] if count["failed"] else []
    parts += [f"{count['not_applicable']} not applicable"] if count["not_applicable"] else []
    parts += [f"{len(damaged)} damaged"] if damaged else []
    missing = cells - len(records) - len(damaged)
    return ", ".join([*parts, *([f"{missing} not run"] if missing > 0 else [])]) + "."


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return machines, days, efforts and the time in all; more than one of a kind is a warning to the reader."""
    machines = _distinct(page.machine(r.environment) for r in records)
    days = sorted({page.day(r.started)[:10] for r in records} - {""})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""
    efforts = _distinct(r.effort for r in records)
    took = sum(r.seconds or 0 for r in records)
    facts = [
        ("Machine", machines),
        ("Measured", span),
        ("Effort", efforts),
        ("Runs took together", duration(took) if took else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _distinct(values: Iterable[str]) -> str:
    return " · ".join(sorted({value for value in values if value}))


def _links(folder: Path) -> list[tuple[str, str]]:
    """Return the pages that lie in the folder beside the runs: the overview and the suites' reports."""
    found = [("Overview", "overview.html")] if (folder / "overview.html").is_file() else []
    others = sorted(p.name for p in folder.glob("*_report*") if p.suffix in (".md", ".txt") and "--" not in p.name)
    return found + [(name, name) for name in others]

"""Writes `index.html` of a result folder: which optimization to use on which model, and, in tabs, comparisons of runs.

Computed from the records on disk. A damaged record is shown as damaged, with one line; an expected run without a record
is shown as missing. The caller names the expected runs; other records in the folder are shown too.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.files import write_atomically
from lib.measure.metrics import settings
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.report.analysis import advice, headlines, result_set, summary
from lib.report.analysis.noise import flips
from lib.report.analysis.result_set import Results
from lib.report.pages import decisions, views
from lib.report.records.record import Record
from lib.report.records.setting import facts, reproduce, stand_in
from lib.report.text import brief, commands, sentence
from lib.report.text.quantities import counted, duration
from lib.report.text.wording import one_line, signed, title

TEMPLATES = Path(__file__).resolve().parent / "templates"  # not imported from `html`: nbformat is slow to load
KEY = (
    "better",
    "maintained",
    "equivalent",
    "inconclusive",
    "worse",
    "not_maintained",
    "not_exercised",
    "invalid",
    "unavailable",
    "failed",
    "damaged",
    "not_applicable",
    "missing",
)


def write(folder: Path, optimizations: Iterable[str] = (), models: Iterable[str] = ()) -> Path:
    """Write `<folder>/index.html` from every `*--*.json` in it; return its path. Raises OSError.

    `optimizations` and `models` are the expected names, so that missing runs are shown as missing.
    """
    folder = Path(folder)
    (folder / "advice.html").unlink(missing_ok=True)  # page of an earlier version, now part of the index
    return write_atomically(folder / "index.html", text(folder, result_set.read(folder, optimizations, models)))


def text(folder: Path, results: Results) -> str:
    """Return the page's HTML; its verdicts are corrected over the whole set."""
    from jinja2 import Environment, FileSystemLoader

    changed: dict[str, dict[str, tuple[str, str]]] = {}
    with suppress(UserError):  # a history that cannot be read is reported when the build ends
        changed = flips.since_last(folder, results.measured)
    results = results.settled
    alike = comparable(results)
    rows = [
        (title(name), [_cell(folder, name, model, results) for model in results.models])
        for name in results.optimizations
    ]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("index.html.j2").render(
        title=_title(results.scales),
        stand_in=stand_in.of_records(results.records),
        summary=_summary(results),
        efforts=efforts(results.records),
        facts=_facts(results.records),
        links=_links(folder),
        decisions=decisions.rows(results.records, changed, folder),
        goals=list(advice.GOALS),
        margins=[(f"{keep:g}", f"{100 * keep:g} points") for keep in decisions.MARGINS],
        usual=f"{advice.KEEP:g}",
        rows=rows,
        models=results.models,
        measured=sorted({r.model for r in results.records}) or results.models,
        dimensions=DIMENSIONS,
        verdicts=[(state, signed(state)) for state in KEY],
        pareto=views.pareto(alike),
        rankings=views.rankings(alike),
        provenance=views.provenance(results),
        curves=views.curves(folder),
        check=commands.at(reproduce.of_set("check", results.scale), folder),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "index.js").read_text(encoding="utf-8"),
    )


def _title(scales: str) -> str:
    """Return the title, which names the scale, or says that the models are stand-ins."""
    if scales == stand_in.PROXY:
        return "Results on proxy models (stand-ins)"
    return f"Results at scale{'s' if ' and ' in scales else ''} {scales}"


def efforts(records: Sequence[Record]) -> str:
    """Return a notice on runs of different effort, as while a first pass is being replaced; empty where all have the
    same.
    """
    counts = Counter(r.effort for r in records)
    if len(counts) < 2:
        return ""
    listed = ", ".join(f"{number} at {effort}" for effort, number in sorted(counts.items(), key=lambda c: c[1]))
    usual = _usual_effort(records)
    only = f" Trade-offs and ranks use only those at {usual}." if usual else ""
    return f"Runs of different effort: {listed}; each line names its own.{only}"


def _usual_effort(records: Sequence[Record]) -> str:
    """Return the most frequent effort among runs with a result, the larger one in a tie; empty without any."""
    counts, order = Counter(r.effort for r in records if r.status == "ok"), [*settings.EFFORTS]
    return max(counts, key=lambda e: (counts[e], order.index(e) if e in order else -1), default="")


def comparable(results: Results) -> Results:
    """Return the runs that charts and ranks may combine: those of the most frequent effort."""
    usual = _usual_effort(results.records)
    return replace(results, records=[r for r in results.records if r.effort == usual])


def _cell(folder: Path, optimization: str, model: str, results: Results) -> dict[str, Any]:
    stem = f"{optimization}--{model}"
    cell: dict[str, Any] = {"model": model, "stem": stem, "href": None, "record": None, "parts": [], "note": ""}
    if stem in results.damaged:
        return cell | _status("damaged") | {"note": results.damaged[stem]}
    record = results.of(optimization, model)
    if record is None:
        command = commands.at(reproduce.of_set(f"run {optimization} --model {model}", results.scale), folder)
        return cell | _status("missing") | {"command": command}
    if (folder / f"{stem}.html").is_file():
        cell["href"] = f"{stem}.html"
    command = commands.at(reproduce.command(record), folder)
    cell |= _status(record.status) | {"record": f"{stem}.json", "command": command}
    if record.status != "ok":
        return cell | {"note": one_line(record.reason or "no reason was recorded", 200)}
    parts = [_part(record, name) for name in DIMENSIONS if name in (record.dimensions or DIMENSIONS)]
    notes = [record.effort]
    notes += [f"{' and '.join(record.dimensions)} only"] if record.dimensions else []
    notes += [why] if (why := summary.short_or_busy(record)) else []
    return cell | {"parts": parts, "note": ", ".join(notes)}


def _status(state: str) -> dict[str, str]:
    return {"status": state, "status_text": signed(state)}


def _part(record: Record, dimension: str) -> dict[str, Any]:
    """Return a dimension of a cell: its verdict, the deciding number, the reason, and the other numbers."""
    state = getattr(record.verdict, dimension)
    members, numbers = headlines.members(record, dimension), headlines.of(record, dimension)
    # Of an invalid run another score may be sound, which must not stand for it.
    carried = state != "invalid" and dimension in record.verdict.carried_by and members
    return {
        "name": dimension,
        "state": state,
        "text": headlines.state(record, dimension),
        "by": _by(members[0]) if carried else "",
        "why": record.verdict.reasons.get(dimension, ""),
        "numbers": [_number(shown, member) for shown, member in zip(numbers, members)],
    }


def _by(member: Any) -> str:
    """Return the deciding measurement of a verdict in a few words."""
    phrase = brief.phrase(member)
    open_number = member.verdict == "inconclusive" and not sentence.same_answers(member)
    shown = brief.number(member) if open_number else ""
    return f"{phrase} ({shown})" if shown else phrase


def _number(shown: headlines.Shown, member: Any) -> dict[str, Any]:
    """Return a number of a cell as text, with its interval or bound, provenance and source."""
    keep = {"what": shown.what, "state": shown.state, "sign": shown.sign, "verdict": shown.verdict}
    keep |= {"provenance": shown.provenance, "source": shown.source}
    return keep | {"value": brief.value(member), "spread": brief.spread(member)}


def _summary(results: Results) -> str:
    records, damaged = results.records, results.damaged
    if not records and not damaged:
        return "There is no record here yet."
    count = {status: sum(r.status == status for r in records) for status in ("ok", "failed", "not_applicable")}
    parts = [f"{count['ok']} of {len(results.optimizations) * len(results.models)} runs measured"]
    parts += [f"{count['failed']} failed"] if count["failed"] else []
    parts += [f"{count['not_applicable']} not applicable"] if count["not_applicable"] else []
    parts += [f"{len(damaged)} damaged"] if damaged else []
    return ", ".join([*parts, *([f"{len(results.missing)} not run"] if results.missing else [])]) + "."


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return machines, days, efforts and total time as (label, text); several machines or efforts warn the reader."""
    machines = _distinct(facts.machine(r.environment) for r in records)
    days = sorted({facts.day(r.started)[:10] for r in records} - {""})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""
    took = sum(r.seconds or 0 for r in records)
    busy = sum(summary.short_or_busy(r) == "busy machine" for r in records)
    rows = [
        ("Machine", machines),
        ("Measured", span),
        ("Effort", _distinct(r.effort for r in records)),
        ("Run time in total", duration(took) if took else ""),
        ("On a busy machine", f"{counted(busy, 'run')}: nothing timed is judged" if busy else ""),
    ]
    return [(name, value) for name, value in rows if value]


def _distinct(values: Iterable[str]) -> str:
    return " · ".join(sorted({value for value in values if value}))


def _links(folder: Path) -> list[tuple[str, str]]:
    """Return the links to the overview and to the suites' files."""
    overview = [("Overview", "overview.html")] if (folder / "overview.html").is_file() else []
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".md", ".txt", ".json") and "--" not in p.name)
    return overview + [(name, name) for name in names if "_report" in name or "_results" in name]

"""The content of one run's report page as plain values for the templates: title, verdict, facts, rows, links.

Computed from the record alone; knows no HTML and runs nothing.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib.report.analysis import headlines
from lib.report.pages import first_screen
from lib.report.records import refutation, relation, rows
from lib.report.records.record import Process, Record
from lib.report.records.setting import reproduce, stand_in
from lib.report.text import commands
from lib.report.text.quantities import duration
from lib.report.text.wording import label, one_line, signed, title, words

Neighbour = tuple[str, str]  # optimization, model
ENDINGS = (".html", ".md")
UNJUDGED = ("informative", "unavailable")  # folded on the page: they decide nothing


def view(record: Record, neighbours: Iterable[Neighbour] = (), out: Path = Path(".")) -> dict[str, Any]:
    """Return the values that both templates (HTML and Markdown) use for the page of one run in the folder `out`."""
    measured, parameters = record.measurements, stand_in.size(record)
    chips = [
        {"name": name, "state": word, "text": headlines.state(record, name), "by": _carried(record, name)}
        for name, word in record.verdict.words().items()
    ]
    if record.status != "ok":
        chips = [{"name": "status", "state": record.status, "text": signed(record.status), "by": ""}]
    answers = refutation.rows(record.refutations)
    judged = [m for m in measured if m.verdict not in UNJUDGED]
    described = [m for m in measured if m.verdict in UNJUDGED]
    first = first_screen.of(record, out)
    return first | {
        "record": True,
        "status": record.status,
        "title": f"{title(record.optimization)} on {stand_in.on(record.scale, record.model, parameters)}",
        "stand_in": stand_in.of_model(record.scale, record.model, parameters),
        "chips": chips,
        "chips_table": rows.markdown(
            [c["name"] for c in chips], [[f"{c['text']} ({c['by']})" if c["by"] else c["text"] for c in chips]]
        ),
        "refutations": [
            {"claim": answer.claim, "state": refutation.state(answer), "text": text, "evidence": answer.evidence}
            for answer, (_, text, _) in zip(record.refutations, answers)
        ],
        "refutations_table": rows.markdown(refutation.COLUMNS, answers),
        "relations": [
            line.model_dump() | {"state": relation.state(line), "text": signed(relation.state(line))}
            for line in record.relations
        ],
        "relations_table": rows.markdown(relation.COLUMNS, relation.rows(record.relations)),
        "facts_table": rows.markdown(["", ""], [*first["setting"], *first["machine"]]),
        "decisions_table": rows.markdown(
            ["goal", "decision", "why"], [[d["goal"], d["decision"], d["reason"]] for d in first["decisions"]]
        ),
        "deciding": _deciding(first["decisions"]),
        "measurements": _present(rows.groups(judged)),
        "described": _present(rows.groups(described)),
        "described_count": len(described),
        "measurements_table": _table(measured),
        "sources_table": _sources(measured),
        "provenance": _provenance(record),
        "controls": [
            {
                "name": c.name,
                "purpose": c.purpose,
                "groups": _present(rows.groups(c.measurements)),
                "table": _table(c.measurements),
            }
            for c in record.controls
        ],
        "more": [(name, items) for name, items in _more(record) if items],
        "log": record.log or "",
        "command": commands.at(reproduce.command(record), out),
        "nav": navigation(neighbours, record.optimization, record.model),
        "footer": f"Record {record.stem}.json, schema {record.schema_version}. This page needs no network.",
    }


def _deciding(decisions: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return each command that could decide an open goal, without duplicates: goals, estimated time, command."""
    goals: dict[tuple[str, str], list[str]] = {}
    for item in decisions:
        if item["command"]:
            goals.setdefault((item["command"], item["took"]), []).append(item["goal"])
    return [{"goals": ", ".join(names), "took": took, "command": line} for (line, took), names in goals.items()]


def _carried(record: Record, dimension: str) -> str:
    """Return a dimension's primary measurement or why there is none, and the losses, as text."""
    carrier = record.verdict.carried_by.get(dimension)
    declared = {str(name): pair for name, pair in record.primaries.items()}.get(dimension)
    parts = [f"{label(carrier.metric)}, {carrier.workload}"] if carrier else []
    if carrier and carrier.reason and declared:
        parts.append(f"instead of {label(declared[0])}, {declared[1]}: {carrier.reason}")
    parts += [reason] if (reason := record.verdict.reasons.get(dimension, "")) else []
    lost = record.verdict.losses_of(dimension)
    parts += ["also " + ", ".join(f"{label(m.metric)} ({m.workload}) {words(m.verdict)}" for m in lost)] if lost else []
    return "; ".join(parts)


def _present(groups: list[tuple[str, list]]) -> list[tuple[str, list]]:
    return [(name, lines) for name, lines in groups if lines]


def _table(measurements: list) -> str:
    columns = ("dimension", *rows.COLUMNS)
    return rows.markdown(columns, ([item[name] for name in columns] for item in rows.rows(measurements)))


def _sources(measurements: list) -> str:
    columns = ("metric", "workload", "provenance", "source", "reason")
    return rows.markdown(columns, ([item[name] for name in columns] for item in rows.rows(measurements)))


def _provenance(record: Record) -> str:
    kinds = [m.provenance for m in record.measurements]
    parts = [
        f"{kinds.count(kind)} {kind}" for kind in ("measured", "derived", "estimated", "unavailable") if kind in kinds
    ]
    return f"{len(kinds)} numbers: {', '.join(parts)}."


def flatten(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return nested values as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{name}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append((name, "–" if value is None else one_line(shown, 200)))
    return pairs


def _more(record: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    return [("Parameters", flatten(record.parameters)), ("Environment", flatten(record.environment))]


def navigation(neighbours: Iterable[Neighbour], optimization: str, model: str) -> list[tuple[str, list[dict]]]:
    """Return the link rows: the index, this optimization on other models, other optimizations on this model.

    The page itself is listed without a link.
    """
    near = {pair for pair in neighbours if pair[0] == optimization or pair[1] == model}
    known = sorted(near | {(optimization, model)})
    top = [{"text": "all results", "href": f"index.html#{optimization}--{model}", "markdown": "index.html"}]
    models = [_link(o, m, m, (o, m) == (optimization, model)) for o, m in known if o == optimization]
    others = [_link(o, m, title(o), (o, m) == (optimization, model)) for o, m in known if m == model]
    return [("Index", top), ("This optimization", models), ("This model", others)]


def _link(optimization: str, model: str, text: str, current: bool) -> dict[str, str | None]:
    html, markdown = (None if current else f"{optimization}--{model}{ending}" for ending in ENDINGS)
    return {"text": text, "href": html, "markdown": markdown}


def process_alt(process: Process) -> str:
    """Return the alternative text of the figure of the process samples."""
    if not process.seconds:
        return "CPU and memory were not sampled."
    cpu = sum(process.cpu_percent) / max(len(process.cpu_percent), 1)
    peak = max(process.memory_bytes, default=0) / 1e6
    limit = f" of {100 * process.cores} % given" if process.cores else ""
    return (
        f"CPU and memory while the notebook ran: {cpu:.0f} % CPU on average{limit}, "
        f"at most {peak:.0f} MB, over {duration(process.seconds[-1])}."
    )

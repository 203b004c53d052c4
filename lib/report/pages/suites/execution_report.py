"""The execution summary as plain text: what ran, where, how long, and what failed. Knows records, but no metric."""

from lib.report.analysis.result_set import Results
from lib.report.records.record import Record
from lib.report.records.setting import facts, stand_in
from lib.report.text.quantities import counted, duration
from lib.report.text.wording import one_line, words

RULE = "-" * 72


def text(results: Results) -> str:
    """Return the summary, with a line per run in the order of execution."""
    records = sorted(results.records, key=lambda record: (record.started or "", record.stem))
    failed = [record for record in records if record.status == "failed"]
    parts = [
        f"Execution of all optimization benchmarks, scale {results.scales}",
        *([about] if (about := stand_in.of_records(results.records)) else []),
        "",
        *_facts(results, records),
        "",
        "WHAT RAN",
        RULE,
        *(_line(record) for record in records),
        *(["nothing"] if not records else []),
        "",
        "WHAT FAILED",
        RULE,
        *(f"{record.stem}: {one_line(record.reason or 'no reason was recorded', 400)}" for record in failed),
        *(f"{stem}: damaged: {fault}" for stem, fault in results.damaged.items()),
        *(f"{stem}: never run" for stem in results.missing),
    ]
    parts += ["nothing"] if not failed and not results.damaged and not results.missing else []
    parts += ["", "WHERE", RULE, *_machines(records)]
    return "\n".join(parts) + "\n"


def _facts(results: Results, records: list[Record]) -> list[str]:
    count = {status: sum(r.status == status for r in records) for status in ("ok", "not_applicable", "failed")}
    expected = len(results.optimizations) * len(results.models)
    days = [record.started for record in records if record.started]
    partial = sum(bool(record.dimensions) for record in records)
    return [
        f"runs expected        {expected}",
        f"measured             {count['ok']}" + (f" ({partial} of them for some dimensions only)" if partial else ""),
        f"not applicable       {count['not_applicable']}",
        f"failed               {count['failed']}",
        f"damaged              {len(results.damaged)}",
        f"never run            {len(results.missing)}",
        f"run time in total    {duration(sum(record.seconds or 0 for record in records))}",
        f"first run started    {facts.day(days[0]) if days else 'unknown'}",
        f"last run started     {facts.day(days[-1]) if days else 'unknown'}",
    ]


def _line(record: Record) -> str:
    process = record.process
    cores = ""
    if process and process.cores:
        cores = f"  {counted(process.cores, 'core')}, {counted(process.jobs_side_by_side or 1, 'job')} side by side"
    took = duration(record.seconds) if record.seconds is not None else "unknown"
    partial = f"  {', '.join(record.dimensions)} only" if record.dimensions else ""
    line = f"{facts.day(record.started) or 'unknown time':18}{words(record.status):15}{record.stem:58}"
    return f"{line}{took:>12}  {record.effort:9}{cores}{partial}".rstrip()


def _machines(records: list[Record]) -> list[str]:
    """Return a line for each combination of machine and software, with its number of runs."""
    names = ("operating_system", "python", "commit")
    counts: dict[str, int] = {}
    for record in records:
        card = record.environment
        packages = card.get("packages") or {}
        parts = [facts.machine(card) or "machine not recorded"]
        parts += [f"{name.replace('_', ' ')} {card[name]}" for name in names if card.get(name)]
        parts += [f"{name} {packages[name]}" for name in ("torch", "transformers") if packages.get(name)]
        line = "; ".join(parts)
        counts[line] = counts.get(line, 0) + 1
    return [f"{counted(number, 'run')}: {line}" for line, number in counts.items()] or ["nowhere"]

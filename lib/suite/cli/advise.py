"""The command `advise`: which optimizations to use on a model for a goal, from a folder's records. Runs nothing."""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.errors import UserError, suggest
from lib.models import yaml_file
from lib.report.text import commands
from lib.suite.plan import declared, plan
from lib.suite.store import result_folder

if TYPE_CHECKING:
    from lib.report.analysis.advice import Advice
    from lib.report.records.record import Record

RECOMMENDED = ("use", "use if")
ALONE = "each of these was measured alone; a stack of several has its own line if it was measured"


def advise(
    folder: Path,
    models: Sequence[str],
    goals: Sequence[str],
    keep: float,
    as_json: bool = False,
    out: str | None = None,
) -> int:
    """Print the advice; return 0. Raises UserError where there are no records, or for an unknown goal or model.

    `out` is the value of `--out`, which the printed commands repeat.
    """
    from lib.report.analysis import advice
    from lib.report.analysis.noise import discoveries
    from lib.report.records.record import read_folder
    from lib.report.records.setting import stand_in
    from lib.report.text import quantities

    if not 0 <= keep < 1:
        raise UserError(f"--keep {keep}: expected a share from 0 to 1, such as 0.02 for two points")
    wanted = [advice.goal(text) for text in goals or advice.GOALS]
    result_folder.require_records(folder)
    records, damaged = read_folder(folder)
    first = next(iter(damaged.values()), "")
    if not records:
        raise UserError(f"{folder}: holds no record that can be read ({first})")
    if damaged:
        print(f"build.py: {quantities.counted(len(damaged), 'record')} left out: {first}", file=sys.stderr)
    known = sorted({record.model for record in records})
    for model in models:
        if model not in known:
            raise UserError(
                f'no record of "{model}" in {folder}.{suggest(model, known) or " Known: " + ", ".join(known)}'
            )
    records = discoveries.settled(records)
    advice_by_model = {model: advice.advise(records, model, wanted, keep) for model in models or known}
    if as_json:
        plain = {model: [as_plain(row, folder, out) for row in rows] for model, rows in advice_by_model.items()}
        print(json.dumps(plain, indent=1))
        for model in advice_by_model:
            for line in _never_run(model, [record for record in records if record.model == model], out):
                print(f"{model}: {line.strip()}", file=sys.stderr)  # not in the JSON, which lists measured runs
        return 0
    if about := stand_in.of_records(r for r in records if r.model in advice_by_model):
        print(about)
    for model, rows in advice_by_model.items():
        scales = sorted({record.scale for record in records if record.model == model})
        print(f"{model}, scale {' and '.join(scales)}")
        for goal, group in groupby(rows, key=lambda row: row.goal):
            print(f"  {goal}")
            of_goal = list(group)
            for row in of_goal:
                for line in _lines(row, folder, out):
                    print(f"    {line}")
            if sum(row.decision in RECOMMENDED and not _stacked(row) for row in of_goal) > 1:
                print(f"    {ALONE}")
        for line in _never_run(model, [record for record in records if record.model == model], out):
            print(f"  {line}")
    return 0


def _never_run(model: str, records: Sequence["Record"], out: str | None) -> list[str]:
    """Return two lines: the optimizations without a record of the model, which get no advice, and the command that runs
    them; an empty list where all have one.
    """
    from lib.report.records.setting import reproduce

    names = [name for name in plan.optimizations() if name not in {record.optimization for record in records}]
    if not names:
        return []
    command = reproduce.of_set(f"run {' '.join(names)} --model {model}", records[0].scale)
    return [f"no record: {', '.join(names)}", f"  to run them: {commands.leading_to(command, out)}"]


def as_plain(row: "Advice", folder: Path, out: str | None = None) -> dict[str, Any]:
    """Return one piece of advice as plain JSON; `folder` has the records, `out` is the value of `--out`."""
    plain: dict[str, Any] = {
        "optimization": row.optimization,
        "goal": row.goal,
        "decision": row.decision,
        "reason": row.reason,
        "command": commands.leading_to(row.command, out),
        "seconds": row.seconds,
        "apply": commands.leading_to(applying(row, folder), out, "--results"),
    }
    if row.evidence:
        from lib.report.records.setting import stack

        m = row.evidence.measurement
        plain["evidence"] = {
            "metric": m.metric, "workload": m.workload, "ratio": m.ratio, "ci": m.ci, "verdict": m.verdict,
            "provenance": m.provenance, "record": f"{row.evidence.record.stem}.json", "where": row.evidence.where,
        }  # fmt: skip
        steps = stack.steps(row.evidence.record)
        plain["stack"] = [{"optimization": name, "knobs": knobs} for name, knobs in steps]
    from lib.report.analysis import advice

    plain["keep"] = row.keep
    plain["quality"] = [
        {name: getattr(m, name) for name in ("metric", "workload", "baseline", "optimized", "bound")}
        | {"verdict": advice.judged_with(m, row.keep)}
        for m in row.quality
    ]
    return plain


def applying(row: "Advice", folder: Path) -> str | None:
    """Return the command that saves the checkpoint of a recommended optimization; None where it is not recommended or
    cannot be saved. A stack needs the recipe that its search wrote next to the records.
    """
    from lib.report.records.setting import reproduce, stack

    if row.decision not in RECOMMENDED or row.evidence is None:
        return None
    record = row.evidence.record
    if not _stacked(row):
        return reproduce.applying(record) if declared.savable(record.optimization) else None
    written = result_folder.Folder(folder).stacks / f"{record.model}.yaml"
    return reproduce.applying(record, str(written)) if _holds(written, stack.steps(record)) else None


def _holds(written: Path, steps: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    """Return whether the recipe `written` exists, has these steps, and all of them can be saved in a checkpoint."""
    try:
        chosen = yaml_file.content_of(written, ("stack",)).get("stack") or ()
        same = [(step["optimization"], step.get("knobs") or {}) for step in chosen] == [(n, dict(k)) for n, k in steps]
    except (UserError, TypeError, KeyError, AttributeError):
        return False  # missing or unreadable: there is nothing to save
    return same and all(declared.savable(name) for name, _ in steps)


def _stacked(row: "Advice") -> bool:
    from lib.report.records.setting import stack

    return row.evidence is not None and bool(stack.steps(row.evidence.record))


def _lines(row: "Advice", folder: Path, out: str | None = None) -> list[str]:
    """Return one piece of advice in a few lines."""
    from lib.report.records.setting import stack
    from lib.report.text import quantities
    from lib.report.text.wording import title

    lines = [f"{row.decision}: {title(row.optimization)}: {row.reason}"]
    if row.evidence:
        lines.append(f"  {row.evidence.text}")
        if steps := stack.in_words(row.evidence.record):
            lines.append(f"  the stack: {steps}")
    names = [m.metric for m in row.quality]
    if scores := [_score(m, names.count(m.metric) > 1, row.keep) for m in row.quality]:
        lines.append(f"  {'; '.join(scores)}")
    if command := commands.leading_to(applying(row, folder), out, "--results"):
        lines.append(f"  to save it: {command}")
    if command := commands.leading_to(row.command, out):
        took = quantities.about(row.seconds)
        lines.append(f"  to decide{f', {took}' if took else ''}: {command}")
    return lines


def _score(measurement: Any, several: bool, keep: float) -> str:
    """Return a score as text: its verdict with the margin `keep`, its change, and the bound compared with the margin;
    with its workload if there are `several` scores of its name.
    """
    from lib.report.analysis import advice
    from lib.report.text import brief
    from lib.report.text.wording import label

    name = f"{label(measurement.metric)} [{measurement.workload}]" if several else label(measurement.metric)
    words = f"{name} {advice.judged_with(measurement, keep).replace('_', ' ')}"
    if measurement.optimized is None or not (change := brief.number(measurement)):
        return words
    bound = brief.spread(measurement)
    return f"{words}, {change}{f' ({bound})' if bound else ''}"

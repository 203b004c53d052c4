"""The command `advise`: what to use on a model for a goal, from the records of a result folder. Runs nothing."""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lib.errors import UserError, suggest
from lib.suite.store import result_folder
from lib.suite.store.result_folder import Folder


def advise(folder: Path, models: Sequence[str], goals: Sequence[str], keep: float, as_json: bool = False) -> int:
    """Print the advice; return 0. Raises UserError where there are no records, or for an unknown goal or model."""
    from lib.report.analysis import advice
    from lib.report.analysis.noise import discoveries
    from lib.report.records import stand_in
    from lib.report.records.record import read_folder

    if not 0 <= keep < 1:
        raise UserError(f"--keep {keep}: expected a share from 0 to 1, such as 0.02 for two points")
    wanted = [advice.goal(text) for text in goals or advice.GOALS]
    if not result_folder.present(Folder(folder)):
        raise UserError(f"{folder}: holds no record; build first: python build.py")
    records, _ = read_folder(folder)
    known = sorted({record.model for record in records})
    for model in models:
        if model not in known:
            raise UserError(
                f'no record of "{model}" in {folder}.{suggest(model, known) or " Known: " + ", ".join(known)}'
            )
    records = discoveries.settled(records)
    found = {model: advice.advise(records, model, wanted, keep) for model in models or known}
    if as_json:
        print(json.dumps({model: [as_plain(row) for row in rows] for model, rows in found.items()}, indent=1))
        return 0
    if about := stand_in.several(folder.name, stand_in.sizes(r for r in records if r.model in found)):
        print(about)
    for model, rows in found.items():
        print(f"{model}, scale {folder.name}")
        for goal, group in groupby(rows, key=lambda row: row.goal):
            print(f"  {goal}")
            for row in group:
                for line in _lines(row):
                    print(f"    {line}")
    return 0


def as_plain(row) -> dict[str, Any]:
    """Return one piece of advice as plain JSON."""
    plain: dict[str, Any] = {
        "optimization": row.optimization,
        "goal": row.goal,
        "decision": row.decision,
        "reason": row.reason,
        "command": row.command,
        "seconds": row.seconds,
    }
    if row.evidence:
        m = row.evidence.measurement
        plain["evidence"] = {
            "metric": m.metric, "workload": m.workload, "ratio": m.ratio, "ci": m.ci, "verdict": m.verdict,
            "provenance": m.provenance, "record": f"{row.evidence.record.stem}.json", "where": row.evidence.where,
        }  # fmt: skip
    plain["quality"] = [
        {"metric": m.metric, "baseline": m.baseline, "optimized": m.optimized, "bound": m.bound, "verdict": m.verdict}
        for m in row.quality
    ]
    return plain


def _lines(row) -> list[str]:
    """Return one piece of advice in two or three lines."""
    from lib.report.text import quantities
    from lib.report.text.sentence import gain, ratio
    from lib.report.text.wording import label, title

    lines = [f"{row.decision}: {title(row.optimization)}: {row.reason}"]
    if row.evidence:
        m = row.evidence.measurement
        shown, ends = ratio(*gain(m))
        ends = f" ({ends})" if ends else ""
        lines.append(f"  {label(m.metric)} [{m.workload}] {shown}{ends}, {m.verdict}; {row.evidence.where}")
    scores = [f"{label(m.metric)} {m.verdict.replace('_', ' ')}" for m in row.quality]
    if scores:
        lines.append(f"  {', '.join(scores)}")
    if row.command:
        took = quantities.about(row.seconds)
        lines.append(f"  to decide{f', {took}' if took else ''}: {row.command}")
    return lines

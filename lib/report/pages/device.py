"""Writes the results of a session on a lent device into executed/README.md: `python -m lib.report.pages.device OUT`.

OUT holds `index.json` (what ran, what did not, and why), `records.jsonl` (a record per line) and `log.txt`. The section
names the machine and the day, so that it stays true when another machine measures the same. Everything outside the
markers is kept. With `--records FOLDER` the records are also written there, one file each, as a build writes them.
Independent of how a session runs.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.measure.metrics.digits import DASH
from lib.report.analysis.noise import discoveries
from lib.report.pages import readme, result_tables
from lib.report.records import record as records
from lib.report.records.record import Record
from lib.report.records.rows import markdown
from lib.report.text.wording import one_line, title

PAGE, MARKER = "executed/README.md", "device"
WORDS = {
    "finished": "finished",
    "not_applicable": "not applicable",
    "failed": "failed",
    "stopped": "stopped: too slow",
    "left_out": "left out",
}


def read(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Return the index and the records of a session. Raises UserError for a damaged file, naming it, and for a
    rehearsal, whose tiny models have the names of the real ones.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a session") from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(index, dict) or not isinstance(index.get("steps"), list):
        raise UserError(f'{path}: expected a JSON object with "steps"; give the folder of a session')
    if index.get("device") == "cpu":
        raise UserError(f"{path}: a rehearsal with tiny models on a CPU; give the folder of a session on a GPU")
    lines = folder / "records.jsonl"
    read_records = []
    # Split bytes: `splitlines` would also break at characters that JSON does not escape, such as U+2028.
    for number, line in enumerate(lines.read_bytes().split(b"\n") if lines.is_file() else (), 1):
        if not line:
            continue
        try:
            content = json.loads(line)
        except ValueError:
            raise UserError(f"{lines}: line {number} is not JSON: remove it, or copy the file here again") from None
        read_records.append(records.from_json(content, f"{lines.name}, line {number}"))
    return index, read_records


def section(index: Mapping[str, Any], session_records: Sequence[Record]) -> str:
    """Return the section as Markdown: machine and day, steps, tests, and the tables of the records."""
    steps = [step for step in index["steps"] if isinstance(step, dict)]
    parts = [_heading(index, steps), "#### What ran", _steps(steps)]
    if tests := [test for step in steps for test in step.get("tests", ())]:
        parts += [_tests(tests)]
    if session_records:
        parts.append(result_tables.section(discoveries.settled(session_records)))
    return "\n\n".join(parts)


def _heading(index: Mapping[str, Any], steps: Sequence[Mapping]) -> str:
    ran = [step for step in steps if step.get("status") != "left_out"]
    finished = sum(step.get("status") == "finished" for step in ran)
    packages = ", ".join(f"{name} {version}" for name, version in (index.get("packages") or {}).items())
    spent = index.get("spent_seconds", sum(step.get("seconds", 0.0) for step in ran))
    seconds_lent, commit = index.get("seconds", 0), index.get("commit") or "not recorded"
    machine, day = one_line(str(index.get("machine", "not recorded")), 90), str(index.get("started", ""))[:10]
    return (
        f"**{machine}, {day}**: {finished} of {len(steps)} steps finished, {len(steps) - len(ran)} left out; "
        f"{spent:.0f} s of {seconds_lent:.0f} s given. {packages}; commit {commit}."
    )


def _steps(steps: Sequence[Mapping]) -> str:
    lines = []
    for step in steps:
        name = title(step["optimization"]) if step.get("optimization") else str(step.get("step"))
        slowest = max((step.get("cell_seconds") or {}).items(), key=lambda cell: cell[1], default=None)
        load = step.get("load_seconds")
        lines.append(
            [
                name,
                step.get("model") or DASH,
                WORDS.get(str(step.get("status")), str(step.get("status"))),
                DASH if step.get("status") == "left_out" else f"{step.get('seconds', 0.0):.0f}",
                DASH if load is None else f"{load:.0f}",
                DASH if slowest is None else f"{slowest[0]}: {slowest[1]:.0f} s",
                one_line(str(step.get("reason") or ""), 160),
            ]
        )
    return markdown(["step", "model", "outcome", "seconds", "of these loading", "slowest cell", "why"], lines)


def _tests(tests: Sequence[Mapping]) -> str:
    counts = Counter(str(test.get("outcome")) for test in tests)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    failed = [test for test in tests if test.get("outcome") == "failed"]
    line = f"Tests of the device: {outcomes}."
    if not failed:
        return line
    rows = [[str(test.get("name")), one_line(str(test.get("reason", "")), 160)] for test in failed]
    return f"{line}\n\n{markdown(['test that failed', 'last line'], rows)}"


def update(root: Path, folder: Path) -> bool:
    """Write the section of a session into the page under `root`; return whether the page changed.

    Raises UserError for a damaged file, a missing page or missing markers; then nothing changes.
    """
    return readme.replace(root, PAGE, {MARKER: section(*read(folder))})


def unpack(folder: Path, target: Path) -> list[Path]:
    """Write each record of a session into `target`, one file each, as a build does; return the paths."""
    return [records.write(record, target / f"{record.stem}.json") for record in read(folder)[1]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Update the page from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.report.pages.device", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="the folder that came back from the device")
    parser.add_argument("--records", type=Path, help="also write the records there, one file each")
    parser.add_argument("--root", type=Path, default=readme.ROOT, help="where executed/README.md is")
    chosen = parser.parse_args(arguments)
    try:
        changed = update(chosen.root, chosen.folder)
        written = unpack(chosen.folder, chosen.records) if chosen.records else []
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(
        f"{PAGE}: {'updated' if changed else 'shows this session already'}; {len(written)} records written\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

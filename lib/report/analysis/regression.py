"""One record against earlier builds of the same run: what got worse, or why nothing can be compared.

Reads the history of builds (`lib.report.records.history`) and compares with `lib.report.analysis.compare`; computes and
judges no number itself.
"""

from dataclasses import dataclass
from pathlib import Path

from lib.files import results_folder
from lib.report.analysis import compare
from lib.report.analysis.compare import Change
from lib.report.records import history
from lib.report.records.record import Record


@dataclass(frozen=True)
class Earlier:
    """The builds that contain this run, newest first, and the changes since the newest comparable one (`against`).

    `summary` is a sentence on what was compared, or on why nothing could be.
    """

    builds: list[str]
    against: str | None
    changes: list[Change]
    summary: str

    def rows(self) -> list[dict]:
        """Return the judged changes as plain rows: metric, workload, verdict, ratio (above 1 is better), interval."""
        return [
            {"metric": change.metric, "workload": change.workload, "verdict": change.verdict, "ratio": change.ratio}
            | {"low": change.low, "high": change.high, "primary": change.primary}
            for change in self.changes
            if change.verdict != "not comparable"
        ]

    @property
    def decided(self) -> int:
        """How many primary metrics were decided: better, worse or equivalent."""
        return sum(change.primary and change.verdict in ("better", "worse", "equivalent") for change in self.changes)

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]


def against(record: Record, path: Path | None = None) -> Earlier:
    """Return `record` compared with the newest comparable run of the same optimization and model in the history at
    `path`, by default the history next to the results.

    A run of another scale, effort or machine is not compared, and the summary says so. Raises UserError where the file
    is not a history.
    """
    path = path or results_folder(record.scale).parent / history.NAME
    builds = history.builds(path)
    runs, known = [], set()
    for build in reversed(builds):
        for earlier in history.records(path, build):
            identity = (earlier.started, earlier.key)
            if (earlier.optimization, earlier.model) == (record.optimization, record.model) and identity not in known:
                known.add(identity)
                runs.append((build, earlier))
    if not runs:
        name = f"{record.optimization} on {record.model}"
        return Earlier(
            [],
            None,
            [],
            f"No earlier run of {name} in the {len(builds)} builds of the history: there is nothing to compare with.",
        )
    refused: list[str] = []
    for build, earlier in runs:
        changes = compare.compare([earlier], [record])
        comparable = [change for change in changes if change.verdict != "not comparable"]
        if comparable:
            counts = compare.counts(comparable)
            summary = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            skipped = f"; {len(refused)} newer ones are not comparable ({refused[0]})" if refused else ""
            return Earlier([str(b) for b, _ in runs], str(build), changes, f"Against {build}: {summary}{skipped}.")
        refused.append(next((change.reason for change in changes if change.reason), "nothing in common"))
    text = f"{len(runs)} earlier runs, none comparable: {refused[0]}."
    return Earlier([str(build) for build, _ in runs], None, [], text)

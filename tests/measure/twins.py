"""Compares builds of the same commit: no cell may be better in one build and worse in another, and in any two builds at
least 95 % of the judged measurements must have the same verdict.

    python tests/measure/twins.py FOLDER FOLDER [FOLDER …]

Prints, for every build, how many A/A controls were called better or worse (at most one in twenty may be), and which
share of the verdicts another build of the same commit would share if all intervals are right and nothing else differs:
effects near a threshold fall on either side of it. For any two builds it prints the share that agrees, by metric and by
notebook, all contradictions, and all regressions that `build.py compare` reports in either order. Exit code 1 if a
requirement is not met.
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.measure.metrics.catalogue import DIMENSIONS  # noqa: E402
from lib.measure.metrics.decision import decide  # noqa: E402
from lib.measure.metrics.paired_stats import MINIMUM_PROCESSES, NORMAL  # noqa: E402
from lib.report.analysis import compare as comparison  # noqa: E402
from lib.report.records import record  # noqa: E402
from lib.report.records.record import Record  # noqa: E402

NOT_JUDGED = {"informative", "unavailable"}
LOST = {"worse", "not_maintained"}
AGREEMENT = 0.95
Key = tuple[str, str, str]  # run, metric or dimension, workload


def verdicts(records: Mapping[str, Record]) -> dict[Key, str]:
    """Return the verdict of every measurement."""
    return {
        (stem, measured.metric, measured.workload): measured.verdict
        for stem, recorded in records.items()
        for measured in recorded.measurements
    }


def cells(records: Mapping[str, Record]) -> dict[Key, str]:
    """Return the verdict of every run in every dimension."""
    return {
        (stem, name, ""): getattr(recorded.verdict, name) for stem, recorded in records.items() for name in DIMENSIONS
    }


def contradict(one: str, other: str) -> bool:
    """Return whether two verdicts contradict each other."""
    pair = {one, other}
    return ("better" in pair and bool(pair & LOST)) or pair == {"maintained", "not_maintained"}


def hold(one: Mapping[Key, str], other: Mapping[Key, str]) -> tuple[dict[Key, tuple[str, str]], int]:
    """Return the differing verdicts among keys judged in either build, and the number of those keys."""
    judged = [key for key in one.keys() & other.keys() if {one[key], other[key]} - NOT_JUDGED]
    return {key: (one[key], other[key]) for key in sorted(judged) if one[key] != other[key]}, len(judged)


def table(differing: Mapping[Key, tuple[str, str]], judged: Iterable[Key], part: int) -> list[str]:
    """Return one line per metric (`part` 1) or notebook (`part` 0) with a difference."""

    def name(key: Key) -> str:
        return key[part].split("--")[0]

    total, words = Counter(name(key) for key in judged), defaultdict(Counter)
    for key, pair in differing.items():
        words[name(key)][" / ".join(sorted(pair))] += 1
    rows = sorted(words.items(), key=lambda row: -sum(row[1].values()))
    return [
        f"  {who}: {sum(kinds.values())} of {total[who]} differ ({', '.join(f'{n} {k}' for k, n in kinds.items())})"
        for who, kinds in rows
    ]


def compare(one: Mapping[str, Record], other: Mapping[str, Record]) -> tuple[list[str], bool]:
    """Return the report lines on two builds, and whether they meet the requirements."""
    lines, holds = [], True
    for what, words in (("cells", cells), ("measurements", verdicts)):
        first, second = words(one), words(other)
        differing, judged = hold(first, second)
        opposite = {key: pair for key, pair in differing.items() if contradict(*pair)}
        share = 1 - len(differing) / judged if judged else 1.0
        holds &= not opposite and (what == "cells" or share >= AGREEMENT)
        lines.append(f"{what}: {judged} judged, {share:.1%} the same, {len(opposite)} contradictions")
        lines += [f"  CONTRADICTION {' '.join(key)}: {pair[0]} / {pair[1]}" for key, pair in opposite.items()]
        keys = [key for key in first.keys() & second.keys() if {first[key], second[key]} - NOT_JUDGED]
        lines += table(differing, keys, 1) + (table(differing, keys, 0) if what == "measurements" else [])
    called = regressions(one, other)
    return [*lines, f"regressions called in either order: {len(called)}", *called], holds and not called


def regressions(one: Mapping[str, Record], other: Mapping[str, Record]) -> list[str]:
    """Return one line per regression that `build.py compare` finds between two builds, in either order."""
    changes = [c for old, new in ((one, other), (other, one)) for c in comparison.compare(old.values(), new.values())]
    return [
        f"  REGRESSION {c.optimization}--{c.model} {c.metric} {c.workload}: {c.how}" for c in changes if c.regression
    ]


def controls(records: Mapping[str, Record]) -> tuple[list[str], bool]:
    """Return the lines on the A/A controls of a build, and whether at most one in twenty was called."""
    judged = [
        (stem, measured)
        for stem, recorded in records.items()
        for control in recorded.controls
        if control.name == "A/A"
        for measured in control.measurements
        if measured.verdict not in NOT_JUDGED
    ]
    called = [(stem, measured) for stem, measured in judged if measured.verdict in ("better", "worse")]
    lines = [f"A/A: {len(called)} of {len(judged)} called"]
    lines += [f"  {stem} {m.metric} {m.workload}: {m.verdict} at {m.ratio:.3f}" for stem, m in called]
    return lines, len(called) <= max(1, len(judged) // 20)


def expected(records: Mapping[str, Record], draws: int = 40, seed: int = 0) -> tuple[float, float, int]:
    """Return the expected agreement of two builds: (share of all judged measurements, share of the timed ones, number
    of timed ones). Each timed effect is drawn twice around its measured value, by its interval, and decided again.
    Counted numbers and quality are the same in every build.
    """
    random, agreed, timed, others = np.random.default_rng(seed), 0.0, 0, 0
    for measured in (m for recorded in records.values() for m in recorded.measurements if m.verdict not in NOT_JUDGED):
        rule = measured.noise_floor, measured.margin, measured.ci, measured.ratio
        if measured.dimension == "accuracy" or None in rule or not measured.ratio or measured.ci[0] <= 0:
            others += 1
            continue
        low, high = (math.log(end) for end in measured.ci)
        several = measured.processes if (measured.processes or 0) >= MINIMUM_PROCESSES else None
        fields = {"n": measured.n or 0, "processes": several, "higher_is_better": measured.higher_is_better}

        def drawn(low=low, high=high, m=measured, fields=fields) -> str:
            by = random.normal(0, (high - low) / 2 / NORMAL)
            effect = math.log(m.ratio) + by
            return decide(effect, low + by, high + by, floor=m.noise_floor, margin=m.margin, **fields).verdict

        agreed += sum(drawn() == drawn() for _ in range(draws)) / draws
        timed += 1
    judged = timed + others
    return (agreed + others) / judged if judged else 1.0, agreed / timed if timed else 1.0, timed


def main(folders: list[str]) -> int:
    """Print the comparison of every pair of folders; return the exit code."""
    if len(folders) < 2:
        print(__doc__)
        return 2
    builds = {name: {item.stem: item for item in record.read_folder(Path(name))[0]} for name in folders}
    if empty := [name for name, records in builds.items() if not records]:
        print(f"{empty[0]}: no records in this folder, nothing can be compared; name the folder of a scale")
        return 2
    good = True
    for name, records in builds.items():
        lines, holds = controls(records)
        print(f"{name}, {len(records)} records, {'hold' if holds else 'DO NOT HOLD'}")
        print("\n".join(lines))
        share, timed_share, timed = expected(records)
        print(f"expected of a twin by the intervals: {share:.1%} the same, {timed_share:.1%} of the {timed} timed ones")
        good &= holds
    for one, other in combinations(folders, 2):
        lines, holds = compare(builds[one], builds[other])
        print(f"{one} and {other}: {'hold' if holds else 'DO NOT HOLD'}")
        print("\n".join(lines))
        good &= holds
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

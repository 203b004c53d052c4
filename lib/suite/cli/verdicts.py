"""The commands that judge a result set: `check` it against its criteria, `compare` two of them. Runs nothing."""

from pathlib import Path

from lib.suite.plan import plan
from lib.suite.store import build_history, result_folder

SHOWN = 40


def check(folder: Path, everything: bool = False) -> int:
    """Print the table of criteria; return 0 if all hold, else 1."""
    from lib.report.analysis import acceptance as checks
    from lib.report.records.setting import stand_in

    result_folder.require_records(folder)
    if about := stand_in.of_folder(folder):
        print(about)
    points = checks.check(folder, plan.optimizations(), plan.models(folder.name))
    for line in checks.table(points, most=10**6 if everything else 4):
        print(line)
    short = [point for point in points if not point.holds]
    print(f"{len(points) - len(short)} of {len(points)} criteria hold" + ("" if short else ": nothing falls short"))
    return 1 if short else 0


def compare(old: str, new: str, folder: Path, everything: bool = False) -> int:
    """Print the changes between two result sets; return 1 if a primary metric got worse, else 0."""
    from lib.report.analysis import compare as comparing
    from lib.report.records.setting import stand_in

    (old_title, before), (new_title, after) = (
        build_history.result_set(old, folder),
        build_history.result_set(new, folder),
    )
    changes = comparing.compare(before, after)
    if about := stand_in.of_records([*before, *after]):
        print(about)
    print(f"old: {old_title}\nnew: {new_title}")
    known = [c for c in changes if c.reason or c.verdict]
    shown = [c for c in known if everything or c.verdict in ("worse", "better", "inconclusive")]
    for change in shown if everything else shown[:SHOWN]:
        print(f"  {_line(change)}")
    if not everything and len(shown) > SHOWN:
        print(f"  … and {len(shown) - SHOWN} more; --all shows them")
    for reason, number in _reasons(changes):
        print(f"  not comparable, {number}: {reason}")
    print(", ".join(f"{number} {word}" for word, number in comparing.counts(changes).items() if number) or "nothing")
    worse = [c for c in changes if c.regression]
    compared = sum(c.primary and not c.reason for c in changes)
    if worse:
        print(f"{len(worse)} of {compared} primary comparisons are a regression (Holm-corrected)")
    elif compared:
        print(f"no regression in {compared} primary comparisons (Holm-corrected)")
    else:
        print("no primary measurement could be compared, so this says nothing about regressions")
    return 1 if worse else 0


def _line(change) -> str:
    from lib.report.text.sentence import ratio
    from lib.report.text.wording import label, signed

    name = f"{change.optimization}--{change.model}: {label(change.metric)} [{change.workload}]"
    if change.reason:
        return f"· not comparable  {name}: {change.reason}"
    p = "" if change.p is None else f", p {change.p:.3g}{' corrected' if change.primary else ''}"
    shown, ends = ratio(change.ratio, *((None, None) if change.low == change.high else (change.low, change.high)))
    return f"{signed(change.verdict):15} {name}: {shown}{f' ({ends})' if ends else ''}{p}; {change.how}"


def _reasons(changes) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for change in changes:
        if change.reason:
            counts[change.reason] = counts.get(change.reason, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])[:8]

"""Effects of known size, planted end to end in real models: does the workbench detect them, and nothing else?

    python tests/measure/planted.py [NUMBER …] [--short] [--model NAME] [--jobs N] [--keep FOLDER]

Runs the experiments with these numbers (default: all), each repetition in a fresh process, and prints the expected and
observed results. `--short` repeats less. `--jobs N` runs N repetitions in parallel, each on separate cores, as in a
build. `--keep FOLDER` stores finished repetitions there, and resumes from them when called again. Exit code 1 if an
experiment fails. Run it on a machine without other work.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import queue
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from lib.measure.metrics import busy, paired_stats  # noqa: E402

MODEL = "qwen3-4b-instruct-2507"
CALLED = {"better", "worse"}
NOTHING = 0.005  # share of a call's time that a no-op hook takes
HELD_IN = ("peak_memory_bytes", "peak_memory_above_start_bytes", "peak_tensor_bytes")
Rows = list[dict[str, Any]]  # measurements as JSON
ATTEMPTS = 3  # per repetition, while it finds the machine busy
KEPT: Path | None = None  # folder with the rows of each finished repetition
JOBS: queue.Queue[set[int]] = queue.Queue()  # core sets of the runs that may run in parallel, as in a build


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was planted, expected and observed, and whether it holds."""

    planted: str
    expected: str
    seen: str
    holds: bool


@dataclass(frozen=True)
class Size:
    """How often experiments are repeated, and at which effort."""

    times: int
    draws: int
    effort: str


NEIGHBOUR = """
import time
import numpy
block = numpy.ones(2**24)
while True:
    until = time.time() + 0.25
    while time.time() < until:
        block.copy()
    time.sleep(0.25)
"""
# With 200 draws, of which 3.9 % lose no answer among 160 items, one set in six exceeds 5 %.
LONG, SHORT = Size(20, 2000, "standard"), Size(3, 60, "quick")


def nothing_removed(size: Size, model: str) -> list[Finding]:
    """1. Pruning with ratio 0: at most one verdict in twenty is better or worse, quality is identical."""
    runs = repeat("pruned_by_nothing", size.times, model=model, effort=size.effort)
    findings = []
    for metric in sorted({row["metric"] for rows in runs for row in rows}):
        words = Counter(row["verdict"] for rows in runs for row in rows if row["metric"] == metric)
        called = sum(words[word] for word in (*CALLED, "not_maintained"))
        total = sum(words.values())
        seen = ", ".join(f"{count} {word}" for word, count in words.most_common())
        findings.append(Finding(metric, f"at most {most(total)} of {total} called", seen, called <= most(total)))
    scores = [row for rows in runs for row in rows if row["dimension"] == "accuracy" and row["optimized"] is not None]
    equal = sum(math.isclose(row["optimized"], row["baseline"], rel_tol=1e-6, abs_tol=1e-6) for row in scores)
    identical = 0 < equal == len(scores)
    return [*findings, Finding("quality", "identical", f"{equal} of {len(scores)} the same", identical)]


def more_work(size: Size, model: str) -> Iterator[Finding]:
    """2. Extra matrix work, equal in every repetition: intervals contain the truth, 5 and 10 % are detected, 0 % never.
    Arms are timed in several fresh processes and, like models that no file describes, in one process.
    """
    products = _products(size, model, [0.03, 0.05, 0.10])
    for share, alone in ((0.0, False), (0.03, False), (0.05, False), (0.10, False), (0.0, True), (0.05, True)):
        options = {"products": products.get(share, {}), "alone": alone}
        runs = repeat("slowed", size.times, model=model, effort=size.effort, **options)
        for workload in ("prefill", "decode"):
            rows = [row for rows in runs for row in rows if row["workload"] == workload and row["unit"] == "tokens/s"]
            effects = [math.log(row["ratio"]) for row in rows]
            truth = float(np.mean(effects))
            inside = sum(math.log(row["ci"][0]) <= truth <= math.log(row["ci"][1]) for row in rows)
            words = Counter(row["verdict"] for row in rows)
            least = len(rows) - most(len(rows))
            required = {0.0: 0, 0.03: 0, 0.05: least, 0.10: len(rows)}[share]
            good = inside >= least and words["worse"] >= required and not words["better"]
            good &= share > 0 or not words["worse"]
            expected = f"worse at least {required} times" if share else "never called"
            seen = f"{math.expm1(-truth):+.1%}; {inside} of {len(rows)} intervals hold it; {_listed(words)}"
            planted = f"{share:.0%} more work, {workload}" + (", one process" if alone else "")
            yield Finding(planted, f"{least} hold; {expected}", seen, good)
            if not share:  # the only share whose true effect is known beforehand
                low, high = paired_stats.student_interval(effects, 0.99)
                none = low <= NOTHING and high >= -NOTHING
                expected = f"within {NOTHING:.1%} of none, as far as its 99 % interval tells"
                yield Finding(f"{planted}, mean of all", expected, f"{math.expm1(-truth):+.2%}", none)


def held_memory(size: Size, model: str) -> list[Finding]:
    """3. A block of memory held in every child: found within 1 MB; without a block, judged peaks are equivalent."""
    findings = []
    for megabytes in (0, 5, 20, 40):
        rows = repeat("holding", 1, model=model, effort=size.effort, megabytes=megabytes)[0]
        expected = "within 1 MB" if megabytes else "within 1 MB, equivalent"
        for row in (row for row in rows if row["metric"] in HELD_IN):
            planted = f"{megabytes} MB, {row['metric']}"
            if row["optimized"] is None or row["baseline"] is None:
                findings.append(Finding(planted, expected, f"no number: {row['reason']}", False))
                continue
            added = (row["optimized"] - row["baseline"]) / 2**20
            good = abs(added - megabytes) <= 1 and (megabytes > 0 or row["verdict"] in ("equivalent", "informative"))
            findings.append(Finding(planted, expected, f"{added:+.2f} MB, {row['verdict']}", good))
    return findings


def lost_answers(size: Size, model: str) -> list[Finding]:
    """4. Answers changed so that the true loss is the margin: maintained in at most 5 % of the draws."""
    rows = repeat("losing", 1, model=model, draws=size.draws)[0]
    findings = []
    for row in rows:
        allowed = most(row["draws"])
        seen = f"{row['maintained']} of {row['draws']} maintained"
        findings.append(Finding(row["metric"], f"at most {allowed}", seen, row["maintained"] <= allowed))
    return findings


def ten_processes(size: Size, model: str) -> list[Finding]:
    """5. One record in ten processes: the intervals contain the pooled mean, also for memory peaks and CPU time."""
    runs = repeat("slowed", max(3, size.times // 2), model=model, effort=size.effort, memory=True)
    findings = []
    for key in sorted({(row["metric"], row["workload"]) for rows in runs for row in rows if row["ci"]}):
        rows = [row for rows in runs for row in rows if (row["metric"], row["workload"]) == key and row["ci"]]
        truth = float(np.mean([math.log(row["ratio"]) for row in rows]))
        inside = sum(math.log(row["ci"][0]) <= truth <= math.log(row["ci"][1]) for row in rows)
        least = len(rows) - most(len(rows))
        findings.append(Finding(" ".join(key), f"{least} of {len(rows)} hold", f"{inside} hold", inside >= least))
    return findings


def a_neighbour(size: Size, model: str) -> list[Finding]:
    """7. A neighbor that streams memory half of the time: two equal arms are never called better or worse."""
    beside = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(2)]
    try:
        runs = repeat("slowed", max(3, size.times // 2), quiet=False, model=model, effort=size.effort)
    finally:
        for process in beside:
            process.kill()
    words = Counter(row["verdict"] for rows in runs for row in rows if row["noise_floor"] is not None)
    called = words["better"] + words["worse"]
    return [Finding("a neighbour in memory", "never better or worse", _listed(words), called == 0)]


def swapped(size: Size, model: str) -> list[Finding]:
    """8. Arms swapped: ratios inverted, verdicts mirrored, on the same times and on new ones."""
    options = {"products": _products(size, model, [0.3])[0.3]}
    there = repeat("slowed", 1, model=model, effort=size.effort, **options)[0]
    back = repeat("slowed", 1, model=model, effort=size.effort, **options, swap=True)[0]
    mirrored = {"better": "worse", "worse": "better"}
    findings = []
    for before, after in zip(there, back):
        if before["noise_floor"] is None:
            continue
        product = math.log(before["ratio"]) + math.log(after["ratio"])
        wide = sum(math.log(row["ci"][1] / row["ci"][0]) / 2 for row in (before, after))
        good = after["verdict"] == mirrored.get(before["verdict"], before["verdict"]) and abs(product) <= wide
        seen = f"{before['ratio']:.3f} {before['verdict']}, {after['ratio']:.3f} {after['verdict']}"
        findings.append(Finding(f"swapped, {before['metric']}", "inverted and mirrored", seen, good))
    return findings


EXPERIMENTS: dict[int, Callable[[Size, str], Iterable[Finding]]] = {
    1: nothing_removed,
    2: more_work,
    3: held_memory,
    4: lost_answers,
    5: ten_processes,
    7: a_neighbour,
    8: swapped,
}  # 6, the twin builds: tests/measure/twins.py


def most(count: int) -> int:
    """Return how many of `count` may fail: one in twenty, at least one, but none of three or fewer."""
    return max(1, count // 20) if count > 3 else 0


def _products(size: Size, model: str, shares: list[float]) -> dict[float, dict[str, int]]:
    """Return, for each share, the number of products that slows a call down by that share, by the shape of its ids."""
    [rows] = repeat("work_for", 1, model=model, effort=size.effort, shares=shares)
    return {share: {row["ids"]: row["products"] for row in rows if row["share"] == share} for share in shares}


def _listed(words: Counter) -> str:
    return ", ".join(f"{count} {word}" for word, count in words.most_common())


def repeat(arm: str, times: int, *, quiet: bool = True, **options: Any) -> list[Rows]:
    """Run `planted_arms.<arm>` in `times` fresh processes, as many in parallel as there are `JOBS`; return the rows of
    each. A repetition that found the machine busy judges nothing: if `quiet`, it is taken again, up to ATTEMPTS times
    in all.
    """

    def once(number: int) -> Rows:
        request = json.dumps({"arm": arm, "number": number, **options})
        for attempt in range(ATTEMPTS if quiet else 1):
            rows = _repetition(request, attempt)
            if not any(busy.says_busy(row.get("reason")) for row in rows):
                break
        return rows

    with ThreadPoolExecutor(JOBS.qsize()) as side_by_side:
        return list(side_by_side.map(once, range(times)))


def _repetition(request: str, attempt: int) -> Rows:
    """Return the rows of one process, from KEPT if it finished there before."""
    name = hashlib.sha256(f"{request}{attempt or ''}".encode()).hexdigest()[:16]
    place = KEPT / f"{name}.json" if KEPT else None
    if place and place.exists():
        return json.loads(place.read_text())
    command = [sys.executable, "-m", "tests.measure.planted_arms", request]
    cores = JOBS.get()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, cores),
        )
    finally:
        JOBS.put(cores)
    if done.returncode:
        raise RuntimeError(f"{request}: {done.stderr.strip().splitlines()[-1]}")
    if place:
        place.write_text(done.stdout.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Run the requested experiments and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="*", choices=[*EXPERIMENTS, []], metavar="NUMBER")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if options.keep:
        global KEPT
        KEPT = options.keep
        KEPT.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    for first in range(options.jobs):
        JOBS.put(set(cores[first :: options.jobs]) or set(cores))
    good = True
    print("| planted | expected | seen | holds |\n|---|---|---|---|")
    for number in options.numbers or EXPERIMENTS:
        for finding in EXPERIMENTS[number](SHORT if options.short else LONG, options.model):
            word = "yes" if finding.holds else "**no**"
            print(f"| {number}. {finding.planted} | {finding.expected} | {finding.seen} | {word} |", flush=True)
            good &= finding.holds
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Measures how much faster two single-core workers finish a set of runs than one, and whether results stay honest.

By hand: `python tests/suite/cluster_speedup.py [OPTIMIZATION …] [--effort quick] [--model M …]`. Starts a scheduler and
workers on this machine, each worker pinned to its own core; runs the same jobs on one worker, then on two, into fresh
folders; prints both times, their ratio, and how many comparisons of the baseline with itself (A/A) called a difference
in each case. Exits with 1 below 1.7×, or if such false calls exceed 5 % plus the slack for so few trials (one-sided
binomial test).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import workbench
from clusters import Cluster
from scipy.stats import binomtest

LEAST_SPEEDUP, MOST_FALSE = 1.7, 0.05


def main() -> int:
    """Return 0 if two workers are fast enough and no less honest, else 1."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("optimizations", nargs="*")
    options.add_argument("--effort", default="quick")
    options.add_argument("--model", action="append", default=[])
    parsed = options.parse_args()
    arguments = ["run", *parsed.optimizations, "--effort", parsed.effort]
    for name in parsed.model:
        arguments += ["--model", name]
    seconds, faults = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        for workers in (1, 2):
            folder = Path(temporary) / str(workers)
            folder.mkdir()
            seconds[workers], fault = timed(folder, workers, arguments)
            faults += [fault] if fault else []
            called, trials = false_calls(folder / "out" / "proxy")
            print(f"{workers} worker(s): {seconds[workers]:.0f} s; A/A: {called} of {trials} called", flush=True)
            if trials and binomtest(called, trials, MOST_FALSE, "greater").pvalue < 0.05:
                faults.append(f"{workers} worker(s): {called} of {trials} A/A comparisons are called a difference")
    ratio = seconds[1] / seconds[2]
    print(f"two workers finish {ratio:.2f}× as fast as one")
    if ratio < LEAST_SPEEDUP:
        faults.append(f"{ratio:.2f}× as fast; expected at least {LEAST_SPEEDUP}×")
    print("\n".join(faults) or "fast enough, and honest")
    return 1 if faults else 0


def timed(folder: Path, workers: int, arguments: list[str]) -> tuple[float, str]:
    """Run the jobs on the given number of workers; return the build's seconds and its errors."""
    cluster = Cluster(folder, workbench.ROOT)
    try:
        address = cluster.address
        for number in range(workers):
            cluster.worker(f"w{number}", cores=str(number))
        cluster.meet(workers)
        start = time.monotonic()
        command = [*arguments, "--cluster", address, "--out", str(folder / "out")]
        ended = workbench.build(workbench.ROOT, *command, timeout=6 * 3600)
        took = time.monotonic() - start
    finally:
        cluster.end()
    return took, (ended.stdout + ended.stderr).strip()[-500:] if ended.returncode else ""


def false_calls(results: Path) -> tuple[int, int]:
    """Return how many A/A comparisons of a result folder are called better or worse, and their total."""
    verdicts = []
    for path in results.glob("*--*.json"):
        for control in json.loads(path.read_text(encoding="utf-8"))["controls"]:
            if control["name"] == "A/A":
                verdicts += [m["verdict"] for m in control["measurements"]]
    return sum(verdict in ("better", "worse") for verdict in verdicts), len(verdicts)


if __name__ == "__main__":
    sys.exit(main())

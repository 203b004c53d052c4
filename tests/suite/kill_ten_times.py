"""Kills a build outright at random moments, ten times, and shows that nothing finished is lost or run twice.

By hand: `python tests/suite/kill_ten_times.py [--kills 10] [--seed 0]`. Works in a temporary copy with tiny templates.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import workbench

WORK = """import time

time.sleep(1)"""
TEMPLATES = ("one", "two", "three", "four")


def main() -> int:
    """Return 0 if the final set is complete and no finished run was run again, else 1."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder), given.kills, random.Random(given.seed))


def _finished(root: Path) -> dict[str, str]:
    """Return the finished runs, each with the time at which it started."""
    found = {}
    for path in (root / "executed/proxy").glob("*--*.json"):
        found[path.name.removesuffix(".json")] = workbench.record(root, path.name.removesuffix(".json"))["started"]
    return found


def _run(folder: Path, kills: int, chance: random.Random) -> int:
    root = workbench.project(folder / "project")
    for name in TEMPLATES:
        workbench.notebook(root / "notebooks" / f"{name}.ipynb", [("Work", WORK), ("Record", workbench.RECORD)])
    faults, finished = [], {}
    for number in range(kills):
        process = workbench.begin(root)
        time.sleep(chance.uniform(0.5, 25))
        workbench.kill(process, signal.SIGKILL)
        workbench.wait_for(lambda: not workbench.running(root), 30)
        now = _finished(root)
        faults += [f"{stem}: lost or run again" for stem, started in finished.items() if now.get(stem) != started]
        finished = now
        print(f"kill {number + 1}: {len(finished)} of {2 * len(TEMPLATES)} finished", flush=True)
    ended = workbench.build(root, timeout=600)
    print(ended.stdout.strip())
    now = _finished(root)
    faults += [f"{stem}: lost or run again" for stem, started in finished.items() if now.get(stem) != started]
    expected = {f"{name}--{model}" for name in TEMPLATES for model in workbench.MODELS}
    faults += [f"{stem}: missing" for stem in expected - set(now)] + [ended.stderr] * (ended.returncode != 0)
    print("\n".join(faults) or "complete; nothing that was finished was lost or run again")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

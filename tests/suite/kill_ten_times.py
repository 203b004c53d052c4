"""Kills a build outright at random moments, ten times, and shows that no finished run is lost or repeated.

By hand: `python tests/suite/kill_ten_times.py [OPTIMIZATION …] [--kills 10] [--seed 0]`. Works in a temporary copy,
with tiny templates, or with those of the named optimizations at effort quick.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import workbench

WORK = """import time

time.sleep(1)"""
TEMPLATES = ("one", "two", "three", "four")
LONGEST = {False: 25, True: 60}  # seconds until a kill, with tiny templates and with real ones


def main() -> int:
    """Return 0 if the final set is complete and no finished run was run again, else 1."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("optimizations", nargs="*")
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = _real(Path(folder), arguments.optimizations) if arguments.optimizations else _tiny(Path(folder))
        return _run(root, arguments.optimizations, arguments.kills, random.Random(arguments.seed))


def _tiny(folder: Path) -> Path:
    root = workbench.project(folder / "project")
    for name in TEMPLATES:
        workbench.notebook(root / "notebooks" / f"{name}.ipynb", [("Work", WORK), ("Record", workbench.RECORD)])
    return root


def _real(folder: Path, optimizations: list[str]) -> Path:
    root = folder / "project"
    for name in ("lib", "parameters"):
        shutil.copytree(workbench.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("build.py", "requirements.txt"):
        shutil.copy(workbench.ROOT / name, root / name)
    (root / "notebooks").mkdir()
    for name in optimizations:
        shutil.copy(workbench.ROOT / "notebooks" / f"{name}.ipynb", root / "notebooks")
    return root


def _finished(root: Path) -> dict[str, str]:
    """Return the finished runs with their start times."""
    by_name = {}
    for path in (root / "executed/proxy").glob("*--*.json"):
        by_name[path.name.removesuffix(".json")] = workbench.record(root, path.name.removesuffix(".json"))["started"]
    return by_name


def _run(root: Path, real: list[str], kills: int, chance: random.Random) -> int:
    arguments = ["run", *(["--effort", "quick"] if real else [])]
    models = [path.stem for path in (root / "parameters").glob("*.yaml")]
    expected = {f"{name}--{model}" for name in real or TEMPLATES for model in models}
    faults, finished = [], {}
    for number in range(kills):
        process = workbench.begin(root, *arguments)
        time.sleep(chance.uniform(0.5, LONGEST[bool(real)]))
        workbench.kill(process, signal.SIGKILL)
        workbench.wait_for(lambda: not workbench.running(root), 30)
        now = _finished(root)
        faults += [f"{stem}: lost or run again" for stem, started in finished.items() if now.get(stem) != started]
        finished = now
        print(f"kill {number + 1}: {len(finished)} of {len(expected)} finished", flush=True)
    ended = workbench.build(root, *arguments, timeout=3600)
    print(ended.stdout.strip())
    now = _finished(root)
    faults += [f"{stem}: lost or run again" for stem, started in finished.items() if now.get(stem) != started]
    faults += [f"{stem}: missing" for stem in expected - set(now)] + [ended.stderr] * (ended.returncode != 0)
    print("\n".join(faults) or "complete; nothing that was finished was lost or run again")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Ten thousand results: how long planning, `list`, `check`, `compare` and the overview take, and how that grows.

Run by hand: `python tests/report/many_results.py [--models 25 50 100] [--optimizations 100]`. Makes a workbench with
that many models and templates and a record for each pair, runs every command in its own process, and prints seconds,
peak memory, and the growth: the exponent k of time ~ records^k between the smallest and the largest set. Exits with 1
if the largest set takes more than 20 seconds or 2 GB, or if a time grows faster than linearly.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent / "suite")]

MOST_SECONDS, MOST_BYTES, MOST_GROWTH = 20.0, 2 * 2**30, 1.25
MIME = "application/scrapbook.scrap.json+json"
PLANNING = """
from pathlib import Path
from lib.suite import build
from lib.suite.plan import plan
from lib.suite.store.result_folder import Folder
planned = plan.plan(plan.Request(effort="quick"))
states = [state.kind for *_, state in build.survey(Folder(Path("executed/proxy").resolve()), planned)]
assert set(states) == {"finished"}, set(states)
"""
OVERVIEW = """
import tempfile
from pathlib import Path
from lib.suite.run import overview
from lib.suite.plan import plan
from lib.suite.store.result_folder import Folder
folder = Folder(Path("executed/proxy").resolve())
fault = overview.execute(folder, plan.NOTEBOOKS / "overview.ipynb", [0], Path(tempfile.mkdtemp()))
assert fault is None, fault
"""
SITE = """
from pathlib import Path
from lib.suite.store import site
from lib.suite.store.result_folder import Folder
faults = site.finish(Folder(Path("executed/proxy").resolve()), "complete")
assert not faults, faults
"""


def project(root: Path, models: int, optimizations: int) -> Path:
    """Make a workbench with the given numbers of models and templates."""
    import workbench

    workbench.project(root)
    for name in workbench.MODELS:
        (root / "parameters" / f"{name}.yaml").unlink()
        shutil.rmtree(root / "parameters" / "proxies" / name)
    for number in range(models):
        workbench.model_file(root, f"model-{number:03}")
    for number in range(optimizations):
        path = root / "notebooks" / f"optimization_{number:03}.ipynb"
        workbench.notebook(path, [("Set-up", "x = ratio"), ("Record", workbench.RECORD)])
    shutil.copy(ROOT / "notebooks" / "overview.ipynb", root / "notebooks" / "overview.ipynb")
    return root


def fill(root: Path, name: str) -> None:
    """Write the record of every planned run, with its key, pages and notebook, so that all count as finished."""
    import samples

    from lib.report.records import record
    from lib.suite.plan import cache_key, dependencies, plan

    folder = root / name / "proxy"
    (folder / ".cache").mkdir(parents=True, exist_ok=True)
    reached, hashes = {}, cache_key.Hashes()
    for number, job in enumerate(plan.plan(plan.Request(effort="quick"))):
        reached.setdefault(job.optimization, dependencies.reached(job.template))
        parts = cache_key.parts(job, hashes, reached)
        gain, lost = 0.8 + 0.01 * (number % 70), 0.001 * (number % 30)
        filled = samples.whole(job.optimization, job.model, gain, lost, seed=number % 50 + 50 * (name == "older"))
        started = f"2026-01-{30 if name == 'older' else 31}T14:05:00+00:00"
        about = {"key": cache_key.of(parts), "parameters": dict(job.parameters), "started": started}
        filled = filled.model_copy(update=about)
        record.write(filled, folder / f"{job.stem}.json")
        (folder / f"{job.stem}.ipynb").write_text(executed(record.to_json(filled)), encoding="utf-8")
        for ending in (".html", ".md"):
            (folder / f"{job.stem}{ending}").write_text("a page", encoding="utf-8")
        (folder / ".cache" / f"{job.stem}.json").write_text(json.dumps(parts), encoding="utf-8")


def executed(glued: dict) -> str:
    """Return a notebook with one cell that glued a record."""
    mark = {"scrapbook": {"name": "record", "data": True, "display": False}}
    scrap = {"name": "record", "data": glued, "encoder": "json", "version": 1}
    output = {"output_type": "display_data", "metadata": mark, "data": {MIME: scrap}}
    cell = {"cell_type": "code", "metadata": {}, "source": "", "execution_count": 1, "outputs": [output]}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4})


def measured(root: Path, command: list[str]) -> tuple[float, float, int, str]:
    """Run a command; return its seconds, its processor seconds, the peak memory of all its processes, and its output if
    it failed.
    """
    from lib.suite.run.sampling import Tree

    began, before = time.monotonic(), processor()
    with tempfile.TemporaryFile("w+") as out:  # an unread pipe would block a command with much output
        process = subprocess.Popen(command, cwd=root, stdout=out, stderr=subprocess.STDOUT, env=surroundings())
        tree, peak = Tree(process.pid), 0
        while process.poll() is None:
            peak = max(peak, resident([tree.root, *tree._descendants()]))
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        out.seek(0)
        output = out.read()
    failed = process.returncode not in (0, 1) or "Traceback" in output
    return time.monotonic() - began, processor() - before, peak, output if failed else ""


def processor() -> float:
    """Return the processor seconds of this process's children that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def resident(processes: list) -> int:
    """Return the total resident bytes of processes."""
    import psutil

    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def surroundings() -> dict[str, str]:
    """Return the environment of a command."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WORKBENCH_", "PYTHONPATH"))}
    return variables | {"OMP_NUM_THREADS": "1"}


def commands() -> dict[str, list[str]]:
    """Return the timed commands. `check` and `compare` may find faults and changes, and then exit with 1."""
    build = [sys.executable, "build.py"]
    return {
        "planning": [sys.executable, "-c", PLANNING],
        "list": [*build, "list", "--effort", "quick"],
        "check": [*build, "check"],
        "compare": [*build, "compare", "executed/proxy", "older/proxy"],
        "overview": [sys.executable, "-c", OVERVIEW],
        "site": [sys.executable, "-c", SITE],
    }


def main() -> int:
    """Return 0 if everything stays below the limits, else 1."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--models", type=int, nargs="+", default=[25, 50, 100])
    options.add_argument("--optimizations", type=int, default=100)
    options.add_argument("--only", nargs="+", default=list(commands()), choices=list(commands()))
    options.add_argument("--keep", help="make the workbenches in this folder and leave them there")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return _run(Path(chosen.keep or temporary), chosen)


def _run(base: Path, chosen: argparse.Namespace) -> int:
    times: dict[str, dict[int, tuple[float, int]]] = {name: {} for name in chosen.only}
    faults = []
    for models in chosen.models:
        root, number = base / f"{models}", models * chosen.optimizations
        if not root.exists():
            project(root, models, chosen.optimizations)
            for name in ("executed", "older"):
                program = f"import sys; sys.path.insert(0, {str(HERE)!r}); import many_results; "
                program += f"sys.path.insert(0, {str(root)!r}); "
                program += f"many_results.fill(many_results.Path({str(root)!r}), {name!r})"
                subprocess.run([sys.executable, "-c", program], cwd=root, env=surroundings(), check=True)
        for name in chosen.only:
            seconds, worked, peak, fault = measured(root, commands()[name])
            times[name][number] = seconds, peak
            faults += [f"{name} at {number}: {fault.strip().splitlines()[-1]}"] if fault else []
            used = f"{seconds:7.2f} s  (processor {worked:7.2f} s)"
            print(f"{number:6} records  {name:9} {used}  {peak / 2**20:6.0f} MB", flush=True)
    for name, by_number in times.items():
        (least, (first, _)), (most, (last, peak)) = min(by_number.items()), max(by_number.items())
        growth = math.log(last / first) / math.log(most / least) if most > least else 0.0
        print(f"{name:9} grows as records^{growth:.2f} from {least} to {most}")
        faults += [f"{name}: {last:.1f} s, expected at most {MOST_SECONDS:g}"] if last > MOST_SECONDS else []
        faults += [f"{name}: {peak / 2**20:.0f} MB, expected at most 2048"] if peak > MOST_BYTES else []
        faults += [f"{name}: grows as records^{growth:.2f}"] if growth > MOST_GROWTH else []
    print("\n".join(faults) or "everything stays below its limit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

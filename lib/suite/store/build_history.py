"""Earlier builds: appends a finished build to the history, and resolves the name of an earlier build."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lib.errors import UserError
from lib.files import expanded, visible
from lib.suite.plan import cache_key, plan
from lib.suite.store.result_folder import Folder


def keep(folder: Folder, command: str) -> list[str]:
    """Append the folder's records to the history next to it; return the faults. Fast if nothing is new."""
    files = [path for path in visible(folder.path, "*--*.json") if path.is_file()]
    store = store_of(folder.path)
    mark = cache_key.digest([[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files])
    stamp = folder.path / ".cache" / "made" / "history.json"
    if not files or (store.is_file() and _read(stamp) == mark):
        return []
    from lib.files import write_atomically
    from lib.report.records import history
    from lib.report.records.record import read_folder

    try:
        history.keep(store, read_folder(folder.path)[0], folder.path.name, command, _commit())
    except UserError as error:
        return [str(error)]
    write_atomically(stamp, json.dumps(mark) + "\n")
    return []


def store_of(folder: Path) -> Path:
    """Return the path of a result folder's history, next to the folders of all scales."""
    return folder.parent / "history.sqlite"


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _commit() -> str:
    """Return the commit of this repository; empty where there is none."""
    git = ["git", "-C", str(plan.ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        ended = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""


def result_set(name: str, folder: Path) -> tuple[str, Sequence]:
    """Return a title and the records that `name` refers to: a result folder, a result file, or an earlier build.

    `folder` is the result folder whose history is searched. Raises UserError if `name` refers to nothing.
    """
    from lib.report.records import history
    from lib.report.records.record import from_json, read_folder
    from lib.report.text.quantities import counted

    path = expanded(name)
    if path.is_dir():
        inside = path if visible(path, "*--*.json") else path / folder.name
        records, damaged = read_folder(inside)
        if not records:
            raise UserError(f"{name}: holds no record" + (f" ({next(iter(damaged.values()))})" if damaged else ""))
        if not damaged:
            return name, records
        return f"{name} ({counted(len(damaged), 'damaged record')} left out: {next(iter(damaged.values()))})", records
    if path.is_file():
        content = _read(path)
        listed = content.get("records") if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise UserError(f"{name}: expected a file with records, such as complete_benchmark_suite_results.json")
        return name, [from_json(record, path.name) for record in listed]
    store = store_of(folder)
    if not store.is_file():
        raise UserError(f"{name}: no such folder or file, and there is no {store.name} with earlier builds yet")
    build = history.find(store, name, folder.name)
    return str(build), history.records(store, build)

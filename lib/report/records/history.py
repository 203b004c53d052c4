"""Results of earlier builds in one SQLite file: every run's record, and the set of runs at the end of each build.

A run is identified by its start time and its key, so it is stored once, however many builds include it. A build is
written in one transaction, and named by a prefix of its date (`2026-01-31`, `2026-01-31T14:05`) or of its commit.
Independent of how builds are run and compared.
"""

import contextlib
import datetime
import json
import re
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.report.records import migration
from lib.report.records.record import Record, from_json, to_json
from lib.report.records.setting import facts
from lib.report.text import sentence

NAME = "history.sqlite"
TABLES = """
CREATE TABLE IF NOT EXISTS runs (started TEXT, key TEXT, optimization TEXT, model TEXT, scale TEXT, effort TEXT,
    status TEXT, seconds REAL, machine TEXT, record BLOB, PRIMARY KEY (started, key));
CREATE TABLE IF NOT EXISTS numbers (started TEXT, key TEXT, metric TEXT, workload TEXT, gain REAL, low REAL, high REAL,
    verdict TEXT, PRIMARY KEY (started, key, metric, workload));
CREATE TABLE IF NOT EXISTS builds (id INTEGER PRIMARY KEY, ended TEXT, scale TEXT, command TEXT, revision TEXT);
CREATE TABLE IF NOT EXISTS kept (build INTEGER, started TEXT, key TEXT, PRIMARY KEY (build, started, key));
"""
COMMIT = re.compile(r"[0-9a-f]{4,40}")
PLACES = ("checkpoints", "history", "studies", "stacks")  # parameters that are paths and leave the results alone


@dataclass(frozen=True)
class Build:
    """A finished build: its end time, scale, command and commit, and its number of runs."""

    id: int
    ended: str
    scale: str
    command: str
    commit: str
    runs: int

    def __str__(self) -> str:
        return f"{self.ended[:16]} {self.commit or 'no commit'} ({self.scale}, {self.runs} runs)"


@contextlib.contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the history database, creating it if needed. Raises UserError where `path` is not a usable database."""
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=30)
        connection.executescript(TABLES)
        with connection:  # one transaction
            yield connection
    except sqlite3.Error as error:
        raise UserError(f"{path.name}: cannot be used as the history of builds ({error}); move it away") from None
    finally:
        if connection is not None:
            connection.close()


def _identity(record: Record) -> tuple[str, str]:
    return record.started or "", record.key or record.stem


def keep(path: Path, records: Sequence[Record], scale: str, command: str, commit: str = "") -> bool:
    """Store the records of a finished build; return whether its set of runs differs from the previous build's.

    An unchanged or empty set is not stored again.
    """
    identities = sorted(_identity(record) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open(path) as connection:
        last = connection.execute("SELECT max(id) FROM builds WHERE scale = ?", [scale]).fetchone()[0]
        known = connection.execute("SELECT started, key FROM kept WHERE build = ?", [last]).fetchall()
        if not identities or sorted(known) == identities:
            return False
        for record in records:
            _insert(connection, record)
        ended = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        row = [ended, scale, command, commit]
        inserted = connection.execute("INSERT INTO builds (ended, scale, command, revision) VALUES (?, ?, ?, ?)", row)
        connection.executemany(
            "INSERT INTO kept VALUES (?, ?, ?)", [(inserted.lastrowid, *identity) for identity in identities]
        )
    return True


def _insert(connection: sqlite3.Connection, record: Record) -> None:
    """Store a run unless it is known, without its process samples and log, which stay in its own file."""
    started, key = _identity(record)
    bare = to_json(record.model_copy(update={"process": None, "log": None}))
    packed = zlib.compress(json.dumps(bare, ensure_ascii=False).encode())
    identity = [started, key, record.optimization, record.model, record.scale, record.effort]
    row = [*identity, record.status, record.seconds, facts.machine(record.environment), packed]
    if not connection.execute(f"INSERT OR IGNORE INTO runs VALUES ({', '.join('?' * 10)})", row).rowcount:
        return
    numbers = [(started, key, m.metric, m.workload, *sentence.gain(m), m.verdict) for m in record.measurements]
    connection.executemany(f"INSERT OR IGNORE INTO numbers VALUES ({', '.join('?' * 8)})", numbers)


def builds(path: Path, scale: str | None = None) -> list[Build]:
    """Return the builds of `scale` (None: of all scales), oldest first; empty where there is no history."""
    if not path.is_file():
        return []
    with _open(path) as connection:
        rows = connection.execute(
            "SELECT id, ended, scale, command, revision, count(*) FROM builds JOIN kept ON build = id "
            "WHERE scale = coalesce(?, scale) GROUP BY id ORDER BY id",
            [scale],
        ).fetchall()
    return [Build(*row) for row in rows]


def find(path: Path, name: str, scale: str | None = None) -> Build:
    """Return the last build whose date or commit begins with `name`. Raises UserError, naming the known builds."""
    known = builds(path, scale)
    date = name.replace(" ", "T", 1)
    matching = [build for build in known if len(date) >= 4 and build.ended.startswith(date)]
    if not matching and COMMIT.fullmatch(name):
        matching = [build for build in known if build.commit.startswith(name[: len(build.commit) or None])]
    if not matching:
        listed = "; ".join(str(build) for build in known[-5:]) or "none yet"
        which = f'no build in {path.name} has a date or commit that begins with "{name}"'
        raise UserError(f"{name}: no such folder or file, and {which}. Known: {listed}")
    return matching[-1]


def records(path: Path, build: Build) -> list[Record]:
    """Return the records of a stored build, sorted by stem."""
    query = "SELECT record FROM runs JOIN kept USING (started, key) WHERE build = ?"
    with _open(path) as connection:
        rows = connection.execute(query, [build.id]).fetchall()
    stored = [from_json(_unpacked(packed, path), path.name) for (packed,) in rows]
    return sorted(stored, key=lambda record: record.stem)


def _unpacked(packed: bytes, path: Path) -> Any:
    """Return the plain JSON of a stored run. Raises UserError where it is damaged, which SQLite does not detect."""
    try:
        return json.loads(zlib.decompress(packed))
    except (zlib.error, ValueError, TypeError) as error:
        raise UserError(f"{path.name}: a run in the history of builds is damaged ({error}); move it away") from None


def words_before(path: Path, records: Sequence[Record]) -> dict[str, tuple[str, dict[str, str]]]:
    """Return stem → (start time, dimension → verdict) of the newest earlier run of the same optimization, model, scale
    and effort in the history, on the same machine. Runs without one are left out, and so are runs whose earlier run had
    another value of a parameter: that is a different experiment, so its verdict may differ. Only dimensions that both
    runs measured.
    """
    if not path.is_file():
        return {}
    with _open(path) as connection:
        known = connection.execute(
            "SELECT DISTINCT optimization, model, scale, effort, started, key, machine FROM runs "
            "JOIN kept USING (started, key) WHERE status = 'ok' ORDER BY started"
        ).fetchall()
        earlier: dict[str, tuple[str, str]] = {}
        by_name = {(r.optimization, r.model, r.scale, r.effort): r for r in records if r.status == "ok"}
        for optimization, model, scale, effort, started, key, machine in known:
            record = by_name.get((optimization, model, scale, effort))
            if record is None or not key or machine != facts.machine(record.environment):
                continue
            if started < (record.started or ""):
                earlier[record.stem] = (started, key)
        query = "SELECT record FROM runs WHERE started = ? AND key = ?"
        packed = {stem: connection.execute(query, identity).fetchone()[0] for stem, identity in earlier.items()}
    stored = {stem: _unpacked(blob, path) for stem, blob in packed.items()}
    now = {record.stem: record for record in by_name.values()}
    alike = {stem: run for stem, run in stored.items() if _set_alike(run.get("parameters") or {}, now[stem].parameters)}
    return {stem: (earlier[stem][0], _words(run, now[stem])) for stem, run in alike.items()}


def _words(earlier: dict, now: Record) -> dict[str, str]:
    """Return the verdicts of a stored run, as plain JSON, on the dimensions that both runs measured."""
    words = earlier.get("verdict") or {}
    both = {*(earlier.get("dimensions") or DIMENSIONS)} & {*(now.dimensions or DIMENSIONS)}
    return {name: words[name] for name in DIMENSIONS if name in words and name in both}


def _set_alike(earlier: dict, now: dict) -> bool:
    """Return whether all parameters that both runs have are equal; paths (PLACES) are ignored."""
    return all(earlier[name] == now[name] for name in earlier.keys() & now.keys() if name not in PLACES)


def over_time(path: Path, scale: str) -> list[dict]:
    """Return a row per build, run and metric with a ratio: `build` (its date), `optimization`, `model`, `effort`,
    `machine`, `metric`, `workload`, `gain` (above 1 is better), `low`, `high`, `verdict`.
    """
    names = ["build", "optimization", "model", "effort", "machine", "metric", "workload"]
    names += ["gain", "low", "high", "verdict"]
    query = (
        "SELECT ended, optimization, model, effort, machine, metric, workload, gain, low, high, verdict FROM builds "
        "JOIN kept ON build = id JOIN runs USING (started, key) JOIN numbers USING (started, key) "
        "WHERE builds.scale = ? AND gain IS NOT NULL ORDER BY id, optimization, model"
    )
    if not path.is_file():
        return []
    with _open(path) as connection:
        numbers = [dict(zip(names, row)) for row in connection.execute(query, [scale])]
    return [row | {"metric": migration.METRICS.get(row["metric"], row["metric"])} for row in numbers]

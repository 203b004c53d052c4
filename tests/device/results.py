"""The results of a session: records, an index and a log, written as steps end, and small.

`index.json` lists what ran, what was left out and why; `records.jsonl` holds one record per line; `log.txt` is the
output of the processes. A record that is too large loses samples first, evenly, then its largest details; the index
says which. `lib.report.pages.device` reads them. This module knows nothing of clocks and processes.
"""

import json
import os
from pathlib import Path
from typing import Any

from lib.errors import UserError
from tests.device.schedule import Ended

RECORD_BYTES, RECORDS_BYTES, LOG_BYTES = 400 * 2**10, 10 * 2**20, 2**20
SAMPLES = (256, 64, 16)  # numbers kept per list, tried in turn until the record is small enough
INDEX, RECORDS, LOG = "index.json", "records.jsonl", "log.txt"


class Results:
    """The results of one session in `folder`. `about`: the index's description of the machine and the code."""

    def __init__(self, folder: Path, about: dict[str, Any], records_bytes: int = RECORDS_BYTES):
        self.folder, self.about, self.records_bytes = folder, about, records_bytes
        self.entries: list[dict[str, Any]] = []
        self.bytes = 0
        earlier = folder / RECORDS
        if earlier.is_file() and earlier.stat().st_size:
            raise UserError(f"{folder}: holds the records of an earlier session; give another folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        earlier.write_bytes(b"")
        self._write_index()

    @property
    def log(self) -> Path:
        """The log file that processes write to."""
        return self.folder / LOG

    def keep(self, ended: Ended) -> None:
        """Write the record and the index line of a step that has ended. Both are on disk when this returns."""
        step = ended.step
        entry: dict[str, Any] = {"step": step.name, "status": ended.status, "reason": ended.reason}
        entry |= {"seconds": round(ended.seconds, 2), "load_seconds": ended.load_seconds}
        entry |= {"model": step.model, "optimization": step.optimization, "cell_seconds": ended.cell_seconds}
        entry |= {"tests": ended.tests} if ended.tests else {}
        if ended.record is not None:
            entry |= self._keep_record(ended.record)
        self.entries.append({name: value for name, value in entry.items() if value not in (None, "", {}, [])})
        self._write_index()

    def _keep_record(self, record: dict[str, Any]) -> dict[str, Any]:
        thinned, notes = thin(record, RECORD_BYTES)
        line = json.dumps(thinned, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if self.bytes + len(line) > self.records_bytes:
            return {"record": f"left out: {len(line)} bytes, {self.records_bytes - self.bytes} are free"}
        with (self.folder / RECORDS).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.bytes += len(line)
        return {"record": "kept", **notes}

    def finish(self, **about: Any) -> None:
        """Complete the index's description of the session, write it, and cut the log to its last part."""
        self.about |= about
        self._write_index()
        if self.log.is_file() and self.log.stat().st_size > LOG_BYTES:
            with self.log.open("rb") as file:
                file.seek(-LOG_BYTES, os.SEEK_END)
                tail = file.read()
            self.log.write_bytes(b"(the beginning is left out)\n" + tail)

    def _write_index(self) -> None:
        part = self.folder / f".{INDEX}.part"
        part.write_text(json.dumps(self.about | {"steps": self.entries}, indent=1, ensure_ascii=False), "utf-8")
        os.replace(part, self.folder / INDEX)


def thin(record: dict[str, Any], most_bytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record in at most `most_bytes` where possible, and notes on what was removed."""
    size = _bytes(record)
    if size <= most_bytes:
        return record, {}
    notes: dict[str, Any] = {"whole_bytes": size}
    for most in SAMPLES:
        record, notes["samples_at_most"] = _thin_lists(record, most), most
        if _bytes(record) <= most_bytes:
            return record, notes
    details = dict(record.get("details") or {})
    dropped: list[str] = []
    for name in sorted(details, key=lambda name: -_bytes(details[name])):
        if _bytes(record) <= most_bytes:
            break
        del details[name]
        dropped.append(name)
        record = record | {"details": details}
    return record, notes | {"details_left_out": dropped}


def _bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _thin_lists(value: Any, most: int) -> Any:
    """Return `value` with every list of more than `most` numbers thinned evenly, first and last kept."""
    if isinstance(value, dict):
        return {key: _thin_lists(entry, most) for key, entry in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) > most and all(isinstance(entry, (int, float)) for entry in value):
        return [value[round(at * (len(value) - 1) / (most - 1))] for at in range(most)]
    return [_thin_lists(entry, most) for entry in value]

"""Child processes that open a model, read a prompt and decode on request, each in its own memory control group and with
its own copy of the weights, whose pages are charged to that group.

Independent of what the programs do (`serving` is their side).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import psutil

from lib.errors import UserError
from lib.measure.timing import disturbance
from lib.measure.timing.disturbance import Reading
from lib.optimizations.streaming_computation.limited.control_group import ControlGroup
from lib.optimizations.streaming_computation.limited.serving import GO

ROOT = Path(__file__).resolve().parents[4]
SLACK = 2**23  # bytes by which a process's own memory varies from call to call
LONGEST_SECONDS = 600.0  # timeout of an answer


@dataclass
class Child:
    """A decoding process, as an arm to be timed.

    `private_bytes`: bytes of weights in its own memory rather than in the page cache. `answers`: one per call.
    """

    process: "subprocess.Popen[str]"
    errors: IO[str]
    group: ControlGroup | None = None
    private_bytes: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self) -> None:
        self.answers.append(self.ask(GO))

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and return the answer. Raises UserError if the process fails, ends or takes too long."""
        assert self.process.stdin is not None and self.process.stdout is not None
        too_slow = threading.Event()

        def end() -> None:
            too_slow.set()
            self.process.kill()

        guard = threading.Timer(LONGEST_SECONDS, end)
        guard.start()
        try:
            with suppress(BrokenPipeError):
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()
            answer = self.process.stdout.readline()
        finally:
            guard.cancel()
        if not answer and too_slow.is_set():
            self.process.wait()
            raise UserError(f"the decoding process gave no answer within {LONGEST_SECONDS:g} s and was ended")
        if not answer:
            raise UserError(f"the decoding process ended with {self.process.wait()}{self._last_words()}")
        content = json.loads(answer)
        if "failed" in content:
            raise UserError(f"the decoding process failed: {content['failed']}")
        return content

    def limit(self, allowance_bytes: int) -> int:
        """Limit its group to the process's memory without weights plus `allowance_bytes` of weights; return the limit.

        The weights may be in private memory or page cache. Raises UserError if the limit cannot be set.
        """
        assert self.group is not None, "a child without a group has no limit"
        if self.private_bytes > allowance_bytes:
            raise UserError(
                f"{self.private_bytes / 1e6:.0f} MB of weights are in private memory, more than the allowance of "
                f"{allowance_bytes / 1e6:.0f} MB"
            )
        limit = self.group.private_bytes() - self.private_bytes + allowance_bytes + SLACK
        self.group.limit(limit)
        return limit

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of the process so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return f" ({lines[-1][:200]})" if lines else ", under its limit or before"


@contextmanager
def started(program: Sequence[str], request: Mapping[str, Any], group: ControlGroup | None = None) -> Iterator[Child]:
    """Yield a process that has answered its first `request`, in `group` if given. Raises UserError if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [*program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            child = Child(process, errors, group)
            members = None if group is None else str(group.members)
            child.private_bytes = child.ask(json.dumps({**request, "members": members}))["private_bytes"]
            yield child
        finally:
            process.kill()
            process.communicate()


def watch(arms: Sequence[Child]) -> Callable[[], str | None]:
    """Open a watch as `lib.measure.timing.disturbance` does, counting the CPU time of `arms` as our own."""

    def read() -> Reading | None:
        reading = disturbance.reading()
        return reading and replace(reading, own=reading.own + sum(child.cpu_seconds() for child in arms))

    return disturbance.watch(read)


def module(name: str) -> list[str]:
    """Return the command that runs a module of this package as a program."""
    return [sys.executable, "-m", f"{__package__}.{name}"]


@contextmanager
def folder_on_disk() -> Iterator[Path]:
    """Yield a temporary folder. Raises UserError if temporary folders lie in memory."""
    with tempfile.TemporaryDirectory(prefix="limited-") as place:
        if in_memory(place):
            raise UserError(f"{place} lies in memory, not on a disk; set TMPDIR to a folder on a disk")
        yield Path(place)


def copy(source: Path, target: Path) -> Path:
    """Copy a file or folder and drop the copy from the page cache; return the copy. Raises UserError if this fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    except OSError as error:
        raise UserError(f"{source}: cannot be copied to {target.parent} ({error.strerror or error})") from None
    drop(target)
    return target


def drop(path: Path) -> None:
    """Drop a file, or all files of a folder, from the page cache, so that their pages are charged to the next reader.

    Raises UserError on a system that cannot do so.
    """
    if not hasattr(os, "posix_fadvise"):
        raise UserError("this system cannot drop pages from its page cache")
    for file in [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_memory(place: str) -> bool:
    """Return whether a folder lies in a file system held in memory (tmpfs, ramfs)."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    real = Path(os.path.realpath(place))  # a temporary folder may be a link into memory
    holding = [(point, kind) for point, kind in mounts if real.is_relative_to(point)]
    return max(holding, key=lambda pair: len(pair[0]), default=("", ""))[1] in ("tmpfs", "ramfs")

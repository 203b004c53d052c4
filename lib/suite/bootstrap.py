"""The environment: finds one that satisfies `requirements.txt`, or creates `.venv`, and restarts the program inside it.

Needs the standard library only, and is imported before anything is installed. Independent of what the packages do.

`.venv/.workbench` holds the hash of the installed `requirements.txt`. It is written last, and marks a running
installation until then. The next call recreates an environment whose installation was interrupted; it keeps a working
one into which pip failed to install updates.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements.txt"
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / ".workbench"
LOG = ROOT / ".venv.log"
INSTALLING = "installing"
WAIT_SECONDS = 3600.0
RESTARTS = "WORKBENCH_RESTARTS"


@dataclass(frozen=True)
class Requirement:
    """A line of `requirements.txt`: the versions accepted in an existing environment, and whether it may be absent."""

    name: str
    accepted: str
    optional: bool = False


def requirements(text: str) -> list[Requirement]:
    """Return the requirements in `text`. `torch==2.13.0  # accept >=2.11`: installs 2.13.0, is satisfied by 2.11;
    `playwright>=1.49  # accept absence`: installs it, is satisfied without it.
    """
    wanted_packages = []
    for line in text.splitlines():
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*([^#;]*)(?:#\s*accept\s+(\S+))?", line.split(";")[0])
        if match:
            optional = match[3] == "absence"
            accepted = match[2] if optional else match[3] or match[2]
            wanted_packages.append(Requirement(match[1], accepted.replace(" ", ""), optional))
    return wanted_packages


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: `2.13.0+cpu` is (2, 13); trailing zeros do not count."""
    numbers = [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfies(version: str, bounds: str) -> bool:
    """Return whether `version` lies within `bounds` such as `>=2.6,<3` (releases only; no wildcard)."""
    compare = {
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for bound in filter(None, bounds.split(",")):
        operator, limit = re.findall(r"(==|!=|>=|<=|>|<)(.+)", bound)[0]
        if not compare[operator](_release(version), _release(limit)):
            return False
    return True


def unmet(text: str) -> list[str]:
    """Return the requirements in `text` that this environment misses: `torch (2.9.1, needs >=2.11)`, `optuna`."""
    lacking = []
    for requirement in requirements(text):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if not requirement.optional:
                lacking.append(requirement.name)
            continue
        if version is None or not satisfies(version, requirement.accepted):
            lacking.append(f"{requirement.name} ({version}, needs {requirement.accepted})")
    return lacking


def _fingerprint() -> str:
    return hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()


def _stamp() -> str | None:
    try:
        return STAMP.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _python() -> Path:
    windows = os.name == "nt"
    return ENVIRONMENT / ("Scripts" if windows else "bin") / ("python.exe" if windows else "python")


def _inside() -> bool:
    return ENVIRONMENT.exists() and Path(sys.prefix).resolve() == ENVIRONMENT.resolve()


def _say(line: str) -> None:
    print(f"build.py: {line}", file=sys.stderr, flush=True)


def python_path() -> str:
    """Return PYTHONPATH for a child program: the repository first, then its present value."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def enter() -> None:
    """Return inside an environment that satisfies `requirements.txt`, creating one first if there is none.

    Does not return where it has to restart the program in another environment. Exits with 2 and one line on failure.
    """
    if not REQUIREMENTS.is_file():
        _say("requirements.txt is missing next to build.py; restore it")
        sys.exit(2)
    outdated = _inside() and _stamp() not in (None, _fingerprint())
    if not outdated and not unmet(REQUIREMENTS.read_text(encoding="utf-8")):
        os.environ.pop(RESTARTS, None)
        return
    if _inside():
        # The environment cannot be recreated from inside itself.
        _restart(Path(getattr(sys, "_base_executable", sys.executable)))
    if not _ready():
        try:
            _make()
        except OSError as error:
            _say(f"cannot set up .venv: {error}")
            sys.exit(2)
    _restart(_python())


def _ready() -> bool:
    """Return whether `.venv` is usable: its stamp is current, or it has none but satisfies the requirements."""
    stamp = _stamp()
    if stamp is not None:
        return stamp == _fingerprint() and _runs("import sys")
    return _runs(
        "import sys; from pathlib import Path; from lib.suite import bootstrap; "
        "sys.exit(bool(bootstrap.unmet(bootstrap.REQUIREMENTS.read_text(encoding='utf-8'))))"
    )


def _runs(program: str) -> bool:
    """Return whether the environment's own Python runs `program` with exit code 0."""
    try:
        ended = subprocess.run([_python(), "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0


def _make() -> None:
    """Create `.venv` and install into it, one process at a time; the others wait."""
    with _alone() as handle:
        if _ready():
            return
        broken = _stamp() == INSTALLING or not _runs("import pip")
        lacking = [item.split()[0] for item in unmet(REQUIREMENTS.read_text(encoding="utf-8"))]
        if ENVIRONMENT.exists() and not broken:
            _say("updating .venv to requirements.txt, once; this takes minutes")
        else:
            missing = ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
            _say(f"setting up .venv from requirements.txt, once; this takes minutes (missing: {missing})")
            shutil.rmtree(ENVIRONMENT, ignore_errors=True)
            _step([sys.executable, "-m", "venv", ENVIRONMENT], "python -m venv", handle)
        before, worked = _stamp(), ENVIRONMENT.exists() and not broken
        STAMP.write_text(INSTALLING, encoding="utf-8")
        pip = [_python(), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-r", REQUIREMENTS]
        _step(pip, "pip install -r requirements.txt", handle, (lambda: _put_back(before)) if worked else None)
        fresh = STAMP.with_name(STAMP.name + ".part")
        fresh.write_text(_fingerprint(), encoding="utf-8")
        os.replace(fresh, STAMP)
        LOG.unlink(missing_ok=True)


def _put_back(stamp: str | None) -> None:
    """Restore the stamp of an environment that worked before pip failed to install into it, so that the next call tries
    again there and deletes nothing.
    """
    if stamp is None:
        STAMP.unlink(missing_ok=True)
    else:
        STAMP.write_text(stamp, encoding="utf-8")


@contextlib.contextmanager
def _alone() -> Iterator[int]:
    """Hold the lock on `.venv.lock` inside the block; wait while another process has it, and exit with 2 and one line
    after WAIT_SECONDS. Yields the file descriptor: a child process that inherits it keeps the lock while it lives.

    `lib.files.locked` cannot be used: it needs filelock, which is not installed yet.
    """
    path, about = ROOT / ".venv.lock", ROOT / ".venv.lock.holder"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by child processes
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        waiting = False
        while not _take(handle):
            if not waiting:
                _say("another process is setting up .venv; waiting for it")
                waiting = True
            if time.monotonic() >= deadline:
                holder = about.read_text(encoding="utf-8") if about.is_file() else "unknown"
                _say(f"process {holder} has been setting up .venv for an hour; end it or wait")
                sys.exit(2)
            time.sleep(0.2)
        about.write_text(str(os.getpid()), encoding="utf-8")
        yield handle
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    """Try to lock the open file; return False where another process holds the lock."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _step(arguments: list, what: str, handle: int, undo: Callable[[], None] | None = None) -> None:
    """Run one step of the set-up with its output in `.venv.log`. Exits with 2 and one line on failure; `undo` is called
    first if the step ended by itself, but not if it was killed, which may leave anything behind.

    The step inherits the lock: if this process is killed, the next call waits until the step has ended too.
    """
    with LOG.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [str(part) for part in arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=() if os.name == "nt" else (handle,),
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            _say("stopped; the next call sets up .venv again")
            sys.exit(130)
    if code > 0 and undo is not None:
        undo()
    if code:
        _say(f"{what} failed: {_reason()} (full output: {LOG.name})")
        sys.exit(2)


def _reason() -> str:
    """Return the last line of the log that mentions an error, else its last line."""
    lines = [line.strip() for line in LOG.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error|not available", line, re.IGNORECASE)]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def _restart(python: Path) -> None:
    """Start the program again under `python`, with the same arguments; never returns."""
    restarts = int(os.environ.get(RESTARTS, 0))
    if restarts == 3:
        _say(f"{python} still lacks the packages that were installed into it; remove .venv and call again")
        sys.exit(2)
    os.environ[RESTARTS] = str(restarts + 1)
    os.environ.pop("PYTHONHOME", None)
    arguments = [str(python), str(ROOT / "build.py"), *sys.argv[1:]]
    if os.name == "nt":
        sys.exit(subprocess.call(arguments))
    sys.stdout.flush()
    os.execv(str(python), arguments)

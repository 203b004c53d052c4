"""Environments of the peers: one each, made once outside the tree, and reused for the same request.

A peer's pins may conflict with the workbench's torch or transformers, so several ways to install it are tried in turn.
Each of them uses the workbench's release of torch. Contains nothing specific to a peer.
"""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lib.files import write_atomically

READY = "ready.json"
SECONDS = 1800  # limit for one pip call
REASON_CHARACTERS = 160


@dataclass(frozen=True)
class Way:
    """One way to install a peer: requirements, and packages installed without dependencies, whose pins are
    overridden.
    """

    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()


class Impossible(Exception):
    """An environment cannot be made, or an arm does not run; the message gives the reason in one line."""


def release(package: str) -> str:
    """Return the installed release of a package as a requirement, without its build tag (`+cpu`)."""
    return f"{package}=={importlib.metadata.version(package).partition('+')[0]}"


def place(folder: Path, name: str, way: Way) -> Path:
    """Return the path of a peer's environment: one for each way and each Python."""
    identity = json.dumps([way.requirements, way.bare, sys.version])
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"


def python(environment: Path) -> Path:
    """Return the interpreter of an environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def ensure(folder: Path, name: str, way: Way) -> Path:
    """Return the interpreter of a peer's environment, creating it if it is missing. Raises Impossible."""
    environment = place(folder, name, way)
    interpreter = python(environment)
    if (environment / READY).is_file():
        return interpreter
    _run([sys.executable, "-m", "venv", "--clear", str(environment)])
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
    constraints = write_atomically(environment / "constraints.txt", release("torch") + "\n")
    if way.requirements:
        _run([*pip, "--constraint", str(constraints), *way.requirements])
    if way.bare:
        _run([*pip, "--no-deps", *way.bare])
    write_atomically(environment / READY, json.dumps([way.requirements, way.bare]) + "\n")
    return interpreter


def _run(command: list[str]) -> None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Impossible(f"{command[-1]}: {type(error).__name__}") from None
    if ended.returncode:
        raise Impossible(reason(ended.stderr or ended.stdout))


def reason(output: str) -> str:
    """Return the most informative line of a failed command's output: the first error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error:", "because ", "the conflict"))]
    chosen = (errors or lines[-1:] or ["it gives no reason"])[0]
    return chosen[:REASON_CHARACTERS]

"""Finds the packages that a bare machine lacks, fetches them as wheels beforehand and unpacks them there. Standard
library only.

`missing` names the required packages that this environment lacks. `fetch` downloads their wheels and dependencies for
another machine, and refuses a total above MOST_BYTES. `unpack` puts them into a folder for `sys.path`: a wheel is an
archive of the files to install. torch, transformers and the driver's libraries are used as installed on the machine.
"""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Sequence
from email.parser import HeaderParser
from pathlib import Path

from lib.errors import UserError
from lib.suite.bootstrap import REQUIREMENTS, requirements, satisfies

MOST_BYTES = 64 * 2**20
# What device tests and notebooks import, from requirements.txt or its dependencies.
NEEDED = (
    "accelerate", "filelock", "gguf", "ipython", "matplotlib", "numpy", "nvidia-ml-py", "packaging", "pandas", "pillow",
    "psutil", "pydantic", "pytest", "pyyaml", "rich", "safetensors", "scikit-learn", "scipy", "seaborn", "tokenizers",
    "torch", "transformers", "zeus",
)  # fmt: skip
AS_FOUND = ("torch", "transformers", "triton", "nvidia-")
SMALL = ("nvidia-ml-py",)  # named like the driver's libraries but not one of them: it queries them
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def normal(name: str) -> str:
    """Return a package's name in the normalized form that indexes compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds() -> dict[str, str]:
    """Return the accepted versions of each package of requirements.txt: name → bounds."""
    text = REQUIREMENTS.read_text(encoding="utf-8")
    return {normal(requirement.name): requirement.accepted for requirement in requirements(text)}


def missing(
    names: Sequence[str] = NEEDED, version: Callable[[str], str] = importlib.metadata.version
) -> dict[str, str]:
    """Return the packages of `names` that are missing here or at a version that requirements.txt refuses, and why."""
    lacking, accepted = {}, bounds()
    for name in names:
        try:
            present = version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking[name] = "not installed"
            continue
        if not satisfies(present, accepted.get(normal(name), "")):
            lacking[name] = f"{present}, needs {accepted[normal(name)]}"
    return lacking


def name_of(wheel: Path) -> str:
    """Return the package name in a wheel's file name."""
    return normal(wheel.name.split("-")[0])


def needs_of(wheel: Path, python: str) -> list[str]:
    """Return a wheel's requirements for Python `python` on Linux, without extras."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(path).decode())
    about = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    about |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    needed = (Requirement(line) for line in metadata.get_all("Requires-Dist") or ())
    return [
        f"{requirement.name}{requirement.specifier}"
        for requirement in needed
        if requirement.marker is None or requirement.marker.evaluate(about)
    ]


def download(requirement: str, folder: Path, python: str) -> None:
    """Download one wheel without its dependencies. Raises UserError with pip's last line."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--implementation", "cp", "--python-version", python, "-d", str(folder), requirement]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"{requirement}: {(ended.stderr.strip().splitlines() or ['pip failed'])[-1]}")


def fetch(
    folder: Path,
    present: Collection[str],
    python: str = "3.12",
    get: Callable[[str, Path, str], None] = download,
    most_bytes: int = MOST_BYTES,
) -> list[Path]:
    """Download into `folder` the wheels that a machine with the packages `present` (NAME, or NAME==VERSION) lacks or
    has at a version that requirements.txt does not accept, with their dependencies; return the wheels.

    Raises UserError if they exceed `most_bytes` in total, or if a package is missing that has to be preinstalled on the
    machine (AS_FOUND).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        if not fits(wheel, python):  # of an earlier call, for another Python
            wheel.unlink()
    accepted = bounds()
    have = {name for name, version in map(_entry, present) if not version or satisfies(version, accepted.get(name, ""))}
    waiting = [name + accepted.get(normal(name), "") for name in NEEDED]
    while waiting:
        requirement = waiting.pop(0)
        name = normal(re.split(r"[<>=!~;\[ (]", requirement, maxsplit=1)[0])
        if name in have:
            continue
        if name.startswith(AS_FOUND) and name not in SMALL:
            needed = accepted.get(name) or "any version"
            raise UserError(f"{name}: has to be on the machine ({needed}); it is too large to be carried")
        have.add(name)
        if not any(name_of(wheel) == name for wheel in folder.glob("*.whl")):
            get(requirement, folder, python)
        waiting += [
            need for wheel in folder.glob("*.whl") if name_of(wheel) == name for need in needs_of(wheel, python)
        ]
    wheels = sorted(folder.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    if total > most_bytes:
        largest = max(wheels, key=lambda wheel: wheel.stat().st_size)
        raise UserError(
            f"{folder}: the wheels take {total / 2**20:.1f} MiB, more than {most_bytes / 2**20:.0f}; the largest is "
            f"{largest.name}, {largest.stat().st_size / 2**20:.1f} MiB"
        )
    return wheels


def _entry(present: str) -> tuple[str, str]:
    """Return the name and version of NAME==VERSION; the version is empty for a name alone."""
    name, _, version = present.partition("==")
    return normal(name), version


def python_of(present: Collection[str]) -> str:
    """Return the version of Python in a list of packages, such as 3.11. Raises UserError if it names none."""
    for name, version in map(_entry, present):
        if name == "python" and version:
            return ".".join(version.split(".")[:2])
    raise UserError("the list of packages names no Python: write it there again (present), or give --python 3.12")


def fits(wheel: Path, python: str) -> bool:
    """Return whether Python `python` can import the packages of a wheel, by the tags in its name."""
    tags, abi = wheel.stem.split("-")[-3:-1]
    own = "cp" + "".join(python.split(".")[:2])
    return any(
        tag == own or tag.startswith("py3") or ("abi3" in abi and tag.startswith("cp3")) for tag in tags.split(".")
    )


def unpack(folder: Path, target: Path, lacking: Collection[str] | None = None) -> list[str]:
    """Unpack into `target` the wheels of `folder` whose package is missing here or named in `lacking`; return their
    names. `target` then belongs at the front of `sys.path`.
    """
    wanted = {normal(name) for name in (missing() if lacking is None else lacking)}
    unpacked = []
    for wheel in sorted(folder.glob("*.whl")):
        name = name_of(wheel)
        if name in wanted or (name not in map(normal, NEEDED) and _absent(name)):
            here = f"{sys.version_info[0]}.{sys.version_info[1]}"
            if not fits(wheel, here):
                raise UserError(
                    f"{wheel.name}: not for Python {here}, which runs here; fetch again with --python {here}"
                )
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            unpacked.append(name)
    return unpacked


def _absent(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False

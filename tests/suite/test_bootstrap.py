"""Environment setup: what satisfies the requirements, how it is made, how an interruption is repaired. Offline."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import workbench
from packaging.requirements import Requirement

from lib.suite import bootstrap


def test_requirements_are_parsed_with_their_accepted_versions():
    text = "# why\ntorch==2.13.0  # accept >=2.11\npapermill>=2.6,<3\nsix\n--no-index\n"
    text += "playwright>=1.49  # accept absence\n"
    parsed = [(item.name, item.accepted, item.optional) for item in bootstrap.requirements(text)]
    assert parsed == [
        ("torch", ">=2.11", False), ("papermill", ">=2.6,<3", False), ("six", "", False), ("playwright", ">=1.49", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("version", "bounds", "expected"),
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.11.0a0+git1", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("5.17", ">=5.17,<6", True),
        ("6.0.0", ">=5.17,<6", False),
        ("2.10", ">=2.9", True),
        ("1", "", True),
    ],
)
def test_bounds(version, bounds, expected):
    assert bootstrap.satisfies(version, bounds) is expected


def test_this_environment_satisfies_the_requirements():
    assert bootstrap.unmet((workbench.ROOT / "requirements.txt").read_text(encoding="utf-8")) == []


def test_unmet_names_missing_requirements():
    assert bootstrap.unmet("no-such-package-here\npytest>=9999\n")[0] == "no-such-package-here"
    assert bootstrap.unmet("pytest>=9999\n")[0].endswith("needs >=9999)")
    assert bootstrap.unmet("no-such-package-here>=1  # accept absence\n") == []
    assert bootstrap.unmet("pytest>=9999  # accept absence\n")[0].endswith("needs >=9999)")


def _wheel(folder: Path, name: str = "tinypackage", version: str = "1.0") -> None:
    """Write an installable package, so that setup needs no network."""
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Return a project that requires only a package beside it, and whose program prints where it runs."""
    root = tmp_path_factory.mktemp("bare")
    (root / "lib" / "suite" / "cli").mkdir(parents=True)
    for name in (
        "build.py",
        "lib/__init__.py",
        "lib/suite/__init__.py",
        "lib/suite/cli/__init__.py",
        "lib/suite/bootstrap.py",
    ):
        shutil.copy(workbench.ROOT / name, root / name)
    (root / "lib/suite/cli/command.py").write_text(
        "import sys\ndef main(arguments):\n    print(sys.prefix, *arguments)\n    return 7\n", encoding="utf-8"
    )
    _wheel(root)
    (root / "requirements.txt").write_text(f"--no-index\n--find-links {root}\ntinypackage==1.0\n", encoding="utf-8")
    return root


def _call(root: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess:
    python = getattr(sys, "_base_executable", sys.executable)
    return subprocess.run(
        [python, root / "build.py", *arguments],
        env=workbench.surroundings(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_the_first_use_creates_the_environment_and_runs_in_it(bare):
    shutil.rmtree(bare / ".venv", ignore_errors=True)  # left by other tests, in whichever order they run
    ended = _call(bare, "list", "-x")
    assert ended.returncode == 7, ended.stdout + ended.stderr
    assert ended.stdout.strip() == f"{bare / '.venv'} list -x"
    assert len(ended.stderr.strip().splitlines()) == 1 and "setting up .venv from requirements.txt" in ended.stderr
    again = _call(bare)
    assert again.returncode == 7 and not again.stderr


@pytest.mark.parametrize("damage", ["installing", "broken python"])
def test_an_interrupted_setup_is_repaired(bare, damage):
    environment = bare / ".venv"
    assert _call(bare).returncode == 7
    if damage == "installing":
        (environment / ".workbench").write_text("installing", encoding="utf-8")
        (environment / "left-over").touch()
    else:
        (environment / "bin" / "python").unlink()
        (environment / "left-over").touch()
    ended = _call(bare)
    assert ended.returncode == 7 and "setting up" in ended.stderr, ended.stdout + ended.stderr
    assert not (environment / "left-over").exists()


def test_changed_requirements_are_installed(bare):
    assert _call(bare).returncode == 7
    _wheel(bare, version="1.1")
    text = (bare / "requirements.txt").read_text(encoding="utf-8")
    (bare / "requirements.txt").write_text(text.replace("==1.0", "==1.1"), encoding="utf-8")
    try:
        inside = subprocess.run(
            [bare / ".venv/bin/python", bare / "build.py"], env=workbench.surroundings(), capture_output=True, text=True
        )
        assert inside.returncode == 7 and "updating .venv to requirements.txt" in inside.stderr, inside.stderr
    finally:
        (bare / "requirements.txt").write_text(text, encoding="utf-8")


def test_a_failed_setup_gets_one_line(bare):
    path = bare / "requirements.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "nothing-of-this-name==1\n", encoding="utf-8")
    try:
        ended = _call(bare)
        *_, line = ended.stderr.strip().splitlines()
        assert ended.returncode == 2 and "pip install -r requirements.txt failed" in line
        assert "nothing-of-this-name" in line and "Traceback" not in ended.stderr
    finally:
        path.write_text(text, encoding="utf-8")
    assert _call(bare).returncode == 7


def test_the_environment_survives_a_failed_installation(bare):
    assert _call(bare).returncode == 7
    path, kept = bare / "requirements.txt", bare / ".venv" / "kept"
    text = path.read_text(encoding="utf-8")
    kept.touch()
    path.write_text(text + "nothing-of-this-name==1\n", encoding="utf-8")
    try:
        for _ in range(2):  # e.g. without a network
            ended = _call(bare)
            assert ended.returncode == 2 and "updating .venv to requirements.txt" in ended.stderr, ended.stderr
    finally:
        path.write_text(text, encoding="utf-8")
    again = _call(bare)
    assert again.returncode == 7 and kept.exists() and not again.stderr
    kept.unlink()


@pytest.mark.skipif(os.name != "posix", reason="needs signals and locks of POSIX")
def test_ctrl_c_while_another_process_sets_up_gets_one_line(bare):
    import fcntl

    assert _call(bare).returncode == 7
    stamp = bare / ".venv" / ".workbench"
    before = stamp.read_text(encoding="utf-8")
    stamp.write_text("of another time", encoding="utf-8")
    try:
        with (bare / ".venv.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            program = [getattr(sys, "_base_executable", sys.executable), bare / "build.py"]
            process = subprocess.Popen(
                program,
                env=workbench.surroundings(),
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=workbench.heed_ctrl_c,
            )
            assert "another process is setting up .venv; waiting for it" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30)[1] == "\nbuild.py: stopped\n" and process.returncode == 130
    finally:
        stamp.write_text(before, encoding="utf-8")


def test_a_killed_setup_is_repaired(bare):
    shutil.rmtree(bare / ".venv", ignore_errors=True)
    python = getattr(sys, "_base_executable", sys.executable)
    process = subprocess.Popen([python, bare / "build.py"], env=workbench.surroundings(), stderr=subprocess.DEVNULL)
    workbench.wait_for((bare / ".venv" / "pyvenv.cfg").is_file)
    workbench.kill(process, signal.SIGKILL)
    ended = _call(bare)
    assert ended.returncode == 7, ended.stdout + ended.stderr


def test_tested_versions_satisfy_the_requirements():
    text = (workbench.ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    tested = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    for wanted in bootstrap.requirements((workbench.ROOT / "requirements.txt").read_text(encoding="utf-8")):
        version = tested[re.sub(r"[-_.]+", "-", wanted.name).lower()]
        assert bootstrap.satisfies(version, wanted.accepted), f"{wanted.name} {version}"


def test_tested_versions_can_be_installed_together():
    """Tested versions that are installed here have requirements that the other tested versions satisfy."""
    text = (workbench.ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    tested = {name: version for name, version in re.findall(r"^([a-z0-9-]+)==(.+)$", text, re.M)}
    lines = (workbench.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    asked = [Requirement(wanted) for line in lines if (wanted := line.split("#")[0].strip())]
    seen: set[tuple[str, str]] = set()
    while asked:
        wanted = asked.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(tested[name], prereleases=True), f"{wanted}, but {name}=={tested[name]}"
        for extra in {"", *wanted.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            surroundings = {"extra": extra, "python_version": "3.11", "python_full_version": "3.11.9"}
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                distribution = importlib.metadata.distribution(name)
                if distribution.version.partition("+")[0] == tested[name]:
                    needs = map(Requirement, distribution.requires or ())
                    asked += [need for need in needs if need.marker is None or need.marker.evaluate(surroundings)]
    assert {name for name, _ in seen} > {"torch", "transformers", "papermill", "python-dateutil"}


def test_an_older_python_is_refused():
    program = "import sys; sys.version_info = (3, 9, 2); exec(open('build.py').read())"
    ended = subprocess.run([sys.executable, "-c", program], cwd=workbench.ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr == "build.py: Python 3.10 or newer is needed, this is 3.9\n"


def test_the_commit_hook_uses_the_tested_ruff_version():
    tested = (workbench.ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    hooks = (workbench.ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    [version] = re.findall(r"^ruff==(.+)$", tested, re.M)
    assert re.findall(r"ruff-pre-commit\n    rev: v(.+)$", hooks, re.M) == [version]

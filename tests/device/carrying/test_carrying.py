"""Wheels and pieces: packages that a bare machine lacks are found, fetched and unpacked; files are split and joined."""

import importlib.metadata
import json
import sys
import zipfile
from pathlib import Path

import pytest

from lib.errors import UserError
from tests.device import full_size
from tests.device.carrying import pieces, wheels

HAVE = {"numpy": "2.1.0", "torch": "2.11.0+cu130", "transformers": "5.17.0", "pandas": "1.0"}


def _version(name: str) -> str:
    if name not in HAVE:
        raise importlib.metadata.PackageNotFoundError(name)
    return HAVE[name]


def _wheel(folder: Path, name: str, needs=(), size: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace("-", "_")
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{stem}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}"
        )
        archive.writestr(f"{stem}/__init__.py", "#" * size)
    return path


def test_missing_and_outdated_packages_are_named_but_not_device_image_ones():
    lacking = wheels.missing(("numpy", "torch", "transformers", "pandas", "pydantic"), _version)
    assert set(lacking) == {"pandas", "pydantic"}
    assert lacking["pydantic"] == "not installed" and lacking["pandas"].startswith("1.0, needs >=")


def test_nothing_is_missing_in_the_test_environment():
    assert wheels.missing() == {}


def test_fetch_adds_dependencies_but_no_installed_packages(tmp_path):
    fetched_names = []

    def get(requirement: str, folder: Path, python: str) -> None:
        fetched_names.append(requirement)
        name = requirement.split(">")[0].split("<")[0].split("=")[0]
        needs = {
            "pydantic": ["pydantic-core>=2", 'colorama; sys_platform == "win32"', 'email; extra == "email"', "numpy"],
            "pydantic-core": ["typing-extensions>=4"],
        }
        _wheel(folder, name, needs.get(name, ()))

    present = [name for name in wheels.NEEDED if name != "pydantic"]
    fetched = wheels.fetch(tmp_path, present, get=get)
    assert [wheels.name_of(path) for path in fetched] == ["pydantic", "pydantic-core", "typing-extensions"]
    assert fetched_names[0].startswith("pydantic>=") and fetched_names[1:] == [
        "pydantic-core>=2",
        "typing-extensions>=4",
    ]
    fetched_names.clear()
    wheels.fetch(tmp_path, present, get=get)
    assert fetched_names == [], "what lies there already is not fetched again"


def test_outdated_and_small_packages_are_fetched(tmp_path):
    """Otherwise `missing` would refuse them on the device, while its time is already running."""
    fetched_names = []

    def get(requirement: str, folder: Path, python: str) -> None:
        fetched_names.append(requirement.split(">")[0])
        _wheel(folder, fetched_names[-1])

    present = [name for name in wheels.NEEDED if name not in ("nvidia-ml-py", "pandas", "torch")]
    wheels.fetch(tmp_path, [*present, "pandas==1.0", "torch==2.11.0+cu130"], get=get)
    assert sorted(fetched_names) == ["nvidia-ml-py", "pandas"]
    with pytest.raises(UserError, match=r"torch: has to be on the machine \(>="):
        wheels.fetch(tmp_path, [*present, "torch==1.0"], get=get)


def test_wheels_above_the_limit_are_refused_by_name(tmp_path):
    def get(requirement: str, folder: Path, python: str) -> None:
        _wheel(folder, "zeus", size=50_000)

    with pytest.raises(UserError, match=r"more than 0; the largest is zeus-1\.0"):
        wheels.fetch(tmp_path, [name for name in wheels.NEEDED if name != "zeus"], get=get, most_bytes=10_000)


def test_torch_must_already_be_installed(tmp_path):
    with pytest.raises(UserError, match="torch: has to be on the machine"):
        wheels.fetch(tmp_path, [name for name in wheels.NEEDED if name != "torch"], get=lambda *_: None)


def test_unpacked_packages_are_importable_and_others_stay(tmp_path, monkeypatch):
    _wheel(tmp_path / "wheels", "carried-along")
    _wheel(tmp_path / "wheels", "numpy")
    target = tmp_path / "target"
    assert wheels.unpack(tmp_path / "wheels", target, lacking=()) == ["carried-along"]
    monkeypatch.syspath_prepend(target)
    import carried_along

    assert Path(carried_along.__file__).is_relative_to(target)
    assert importlib.metadata.version("carried-along") == "1.0"
    sys.modules.pop("carried_along")


def test_pieces_join_to_the_same_bytes(tmp_path):
    file = tmp_path / "weights.zip"
    file.write_bytes(bytes(range(256)) * 41)
    parts = pieces.split(file, tmp_path / "pieces", 4096)
    assert [piece.stat().st_size for piece in parts] == [4096, 4096, 2304]
    assert pieces.join(tmp_path / "pieces", tmp_path / "joined").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("damage", ["missing", "flipped", "other description"])
def test_a_damaged_piece_is_named_and_no_partial_file_is_left(tmp_path, damage):
    file = tmp_path / "weights.zip"
    file.write_bytes(b"abc" * 3000)
    parts = pieces.split(file, tmp_path / "pieces", 4096)
    about = tmp_path / "pieces" / "weights.zip.json"
    if damage == "missing":
        parts[1].unlink()
    elif damage == "flipped":
        parts[1].write_bytes(b"x" + parts[1].read_bytes()[1:])
    else:
        about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match=r"weights\.zip"):
        pieces.join(tmp_path / "pieces", tmp_path / "joined")
    assert list((tmp_path / "joined").iterdir()) == []


def test_checkpoint_pieces_become_a_model_folder(tmp_path):
    archive = tmp_path / "small.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("any-name/config.json", "{}")
        opened.writestr("any-name/model.safetensors", "weights")
    pieces.split(archive, tmp_path / "pieces", 64)
    folders = full_size._checkpoints([f"small={tmp_path / 'pieces'}"], tmp_path / "log")
    folder = Path(folders["small"]) / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("arguments", [[], ["--weights", "no-equals", "--out", "x"]])
def test_an_invalid_request_gives_a_one_line_error(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert full_size.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wheels_are_fetched_for_the_python_of_the_machine(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(wheels, "fetch", lambda folder, names, python: asked.append(python) or [])
    assert full_size.main(["present"]) == 0
    (tmp_path / "PRESENT").write_text(capsys.readouterr().out)
    assert full_size.main(["wheels", str(tmp_path / "w"), "--present", str(tmp_path / "PRESENT")]) == 0
    assert asked == [f"{sys.version_info[0]}.{sys.version_info[1]}"]


def test_a_wheel_for_another_python_is_refused_before_time_runs(tmp_path):
    other = _wheel(tmp_path / "wheels", "carried-along")
    other.rename(other.with_name("carried_along-1.0-cp37-cp37m-manylinux2014_x86_64.whl"))
    with pytest.raises(UserError, match=r"carried_along-1\.0-cp37"):
        wheels.unpack(tmp_path / "wheels", tmp_path / "target", lacking=())

"""Control groups in planted folders: what they count, the limit they take, and why there is none."""

from pathlib import Path

import pytest

from lib.errors import UserError
from lib.optimizations.streaming_computation.limited import control_group

MIB = 2**20


def _planted(monkeypatch, tmp_path: Path, version: control_group.Version) -> Path:
    """Plant a group of this process whose new groups have the files of `version`."""
    parent = tmp_path / "own"
    parent.mkdir()
    monkeypatch.setattr(control_group, "candidates", lambda: [(parent, version)])
    make = Path.mkdir

    def mkdir(folder, *arguments, **options):
        make(folder, *arguments, **options)
        if folder.parent == parent:
            (folder / version.limit).write_text("max")
            (folder / version.usage).write_text(str(50 * MIB))
            (folder / "memory.stat").write_text(f"{version.cached[0]} {20 * MIB}\nother 3\n")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return parent


@pytest.mark.parametrize("version", [control_group.ONE, control_group.TWO])
def test_a_group_excludes_page_cache_and_takes_a_limit(monkeypatch, tmp_path, version):
    _planted(monkeypatch, tmp_path, version)
    made = control_group.make()
    assert (made.private_bytes(), made.cached_bytes()) == (30 * MIB, 20 * MIB)
    made.limit(33 * MIB)
    assert (made.folder / version.limit).read_text() == str(33 * MIB)
    assert made.folder != control_group.make().folder, "two groups at a time"


@pytest.mark.parametrize("version", [control_group.ONE, control_group.TWO])
def test_a_limited_group_no_longer_swaps(monkeypatch, tmp_path, version):
    """If swap is limited after memory, what the memory limit evicts is already in swap."""
    _planted(monkeypatch, tmp_path, version)
    made = control_group.make()
    (made.folder / version.swap).write_text("60")
    write, written = Path.write_text, []
    monkeypatch.setattr(Path, "write_text", lambda file, text: (written.append(file.name), write(file, text)))
    made.limit(33 * MIB)
    assert written == [version.swap, version.limit] and (made.folder / version.swap).read_text() == "0"


def test_a_missing_group_is_explained_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(control_group, "candidates", lambda: [])
    with pytest.raises(UserError, match=r"no control groups with memory\); run it in a group .* Delegate=yes"):
        control_group.make()
    parent = tmp_path / "own"
    parent.mkdir()
    monkeypatch.setattr(control_group, "candidates", lambda: [(parent, control_group.TWO)])
    with pytest.raises(UserError, match="its groups have no limit of memory"):
        control_group.make()
    assert list(parent.iterdir()) in ([], [parent / "cgroup.subtree_control"])

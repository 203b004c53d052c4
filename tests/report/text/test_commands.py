"""Commands shown beside results point to those results."""

import pytest

from lib.report.text import commands


@pytest.mark.parametrize(
    ("place", "out"),
    [
        ("executed/proxy", None),
        ("executed/full", None),
        ("mine/proxy", "mine"),
        ("slice", "."),
        ("executed/elsewhere", None),  # not named after a scale: no --out reaches it
    ],
)
def test_paths_in_the_project_are_relative_to_it(place, out):
    assert commands.out_of(commands.ROOT / place) == out


def test_a_command_names_a_folder_elsewhere(tmp_path):
    folder = tmp_path / "my results" / "proxy"
    assert commands.at("python build.py check", folder) == f"python build.py check --out '{folder.parent}'"
    assert commands.at("python build.py check", None) == "python build.py check"
    assert commands.leading_to(None, "somewhere") is None and commands.leading_to("x", "") == "x"

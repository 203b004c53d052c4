"""Commands lead to the results that they stand beside."""

import pytest

from lib.report.text import commands


@pytest.mark.parametrize(
    ("place", "out"),
    [
        ("executed/proxy", None),
        ("executed/full", None),
        ("mine/proxy", "mine"),
        ("slice", "."),
        ("executed/elsewhere", None),  # named after no scale: no --out leads there
    ],
)
def test_what_lies_in_the_project_is_named_as_it_is_seen_from_there(place, out):
    assert commands.out_of(commands.ROOT / place) == out


def test_a_command_names_a_folder_elsewhere(tmp_path):
    folder = tmp_path / "my results" / "proxy"
    assert commands.at("python build.py check", folder) == f"python build.py check --out '{folder.parent}'"
    assert commands.at("python build.py check", None) == "python build.py check"
    assert commands.leading_to(None, "somewhere") is None and commands.leading_to("x", "") == "x"

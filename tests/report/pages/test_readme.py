"""The README's table comes from records, between its markers, and nothing else is touched."""

from pathlib import Path

import pytest

from lib.errors import UserError
from lib.report.pages import readme
from lib.report.records import record
from tests.report import samples

START, END = readme.markers(Path("proxy"))


def _readme(path, between: str = "old"):
    path.write_text(f"# Workbench\n\nBefore.\n\n{START}\n{between}\n{END}\n\nAfter.\n")
    return path


def test_the_table_replaces_only_what_lies_between_the_markers(tmp_path):
    found = samples.made()
    record.write(found, tmp_path / f"{found.stem}.json")
    page = _readme(tmp_path / "README.md")
    assert readme.update(page, tmp_path)
    text = page.read_text()
    assert text.startswith("# Workbench\n\nBefore.\n") and text.endswith("\nAfter.\n")
    assert "old" not in text
    assert "| Structured pruning | qwen3-4b-instruct-2507 | ▲ better | ? inconclusive | ▲ better | ▲ better |" in text
    assert "machine: Example Processor 9000, 2 cores given; measured: 2026-01-31" in text
    assert not readme.update(page, tmp_path)  # the same records, the same file


def test_real_sizes_have_a_table_of_their_own(tmp_path):
    found = samples.made()
    record.write(found, tmp_path / "full" / f"{found.stem}.json")
    page = _readme(tmp_path / "README.md")
    with pytest.raises(UserError, match="results full: start"):
        readme.update(page, tmp_path / "full")
    first, last = readme.markers(tmp_path / "full")
    page.write_text(f"{page.read_text()}\n{first}\n{last}\n")
    assert readme.update(page, tmp_path / "full")
    above, below = page.read_text().split(first)
    assert "old" in above and "| Structured pruning |" in below
    assert not readme.update(page, tmp_path / "full")


def test_without_records_it_says_so(tmp_path):
    page = _readme(tmp_path / "README.md")
    readme.update(page, tmp_path)
    assert "No results yet" in page.read_text()


def test_failed_runs_are_shown(tmp_path):
    found = samples.without_result("failed", "cell 3: RuntimeError")
    assert "| failed |" in readme.table([found])


@pytest.mark.parametrize("text", ["nothing", f"{END} {START}", f"{START} {START} {END}"])
def test_missing_markers_are_named(text, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(UserError, match=r"README\.md: expected one"):
        readme.update(page, tmp_path)
    assert page.read_text() == text


def test_the_command(tmp_path, capsys):
    page = _readme(tmp_path / "README.md")
    assert readme.main([str(tmp_path), "--readme", str(page)]) == 0
    assert "results updated" in capsys.readouterr().out
    assert readme.main([str(tmp_path), "--readme", str(tmp_path / "none.md")]) == 2
    assert "no such file" in capsys.readouterr().err

"""The report calls of a template in a real kernel: figure, table and record reach the pages. Also the overview."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lib.report.pages import html
from lib.report.records import record
from tests.report import samples

ROOT = Path(__file__).resolve().parents[3]
CELLS = [
    "from lib.report import tables\nfrom lib.report.figures import style\nfrom lib.report.records import record\n"
    "from tests.report import samples\nfound = samples.run()",
    "style.show(style.forest(tables.tidy(found)), 'Prefill is faster,\\n F1 stays.')",
    "tables.show(tables.measurements(found, 'performance'), 'Speed')",
    "record.glue(found)\ntables.show_text(found.verdict.sentence, strong=True)",
]


def test_figure_table_and_record_reach_the_pages(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    nbformat.write(notebook, tmp_path / "run.ipynb")

    glued = record.from_notebook(tmp_path / "run.ipynb")
    assert record.to_json(glued) == record.to_json(samples.run())
    pages = html.render(tmp_path / "run.ipynb", glued, (), tmp_path)
    page, text = (path.read_text(encoding="utf-8") for path in pages)
    assert page.count('alt="Prefill is faster, F1 stays."') == 1
    assert "![Prefill is faster, F1 stays.](" in text
    assert "<caption>Speed</caption>" in page and "*Speed*" in text
    assert "| prefill rate | prefill | 812 tokens/s |" in text
    assert text.count(glued.verdict.sentence) == 2 and f"**{glued.verdict.sentence}**" in text
    assert "scrapbook" not in page


def _overview(folder: Path, scale: str = "proxy") -> str:
    """Run the overview's cells in this process, as a kernel would, and return only what it defined."""
    source = nbformat.read(ROOT / "notebooks" / "overview.ipynb", as_version=4)
    names: dict = {}
    for cell in source.cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= {"folder": str(folder), "scale": scale}
    return names


@pytest.fixture
def in_notebooks(monkeypatch):
    """The working directory of a kernel."""
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr("sys.path", list(os.sys.path))


@pytest.mark.parametrize("count", [0, 1, 6])
def test_the_overview_handles_any_number_of_records(count, tmp_path, in_notebooks, capsys):
    for index in range(count):
        run = samples.run(f"optimization_{index // 4}", samples.MODELS[index % 4])
        record.write(run, tmp_path / f"{run.stem}.json")
    failed = samples.without_result("failed", "cell 3: RuntimeError")
    record.write(failed, tmp_path / f"{failed.stem}.json")
    (tmp_path / "a--b.json").write_text("{")
    names = _overview(tmp_path)
    output = capsys.readouterr().out
    assert len(names["measured"]) == count
    assert f"Records in {tmp_path.name}: {count + 1}; {count} measured, 1 without a result, 1 damaged." in output
    assert "Damaged: a--b.json: not a record" in output and "build it again.</p>" in output
    assert len(names["points"]) == count
    assert ("No record has prefill rate." in output) == (count == 0)


def test_the_overview_counts_machines_by_cores_and_device_first(tmp_path, in_notebooks, capsys):
    for model, change in zip(samples.MODELS, ({}, {"cores_given": 64}, {"device": "cuda:0"}, {})):
        run = samples.run("structured_pruning", model)
        run = run.model_copy(update={"environment": run.environment | change})
        record.write(run, tmp_path / f"{run.stem}.json")
    _overview(tmp_path)
    assert ": '<p>Combinations of scale, effort and machine: 3." in capsys.readouterr().out


def test_the_overview_reads_the_results_that_jupyterlab_has_opened(tmp_path, in_notebooks, monkeypatch):
    """`build.py lab --out DIR` shows the results below DIR on its start page; the overview reads the same ones."""
    run = samples.run("structured_pruning", samples.MODELS[0])
    record.write(run, tmp_path / "proxy" / f"{run.stem}.json")
    monkeypatch.setenv("WORKBENCH_RESULTS", str(tmp_path))
    assert [r.stem for r in _overview("")["measured"]] == [run.stem]


def test_the_overview_of_records_without_a_result(tmp_path, in_notebooks, capsys):
    run = samples.without_result("not_applicable", "no experts")
    record.write(run, tmp_path / f"{run.stem}.json")
    _overview(tmp_path)
    assert "No record has F1 (macro)" not in capsys.readouterr().err

"""JupyterLab kernels: quiet libraries, progress of a slow cell, comparison with the last run.

Other kernels have none of these.
"""

import json
from pathlib import Path

import pytest
import workbench

from lib.report.records import record
from lib.suite.lab import cell_progress, jupyterlab, notebook_cells
from lib.suite.lab.cell_progress import Place
from lib.suite.run import kernel_process
from tests.report import samples

ROOT = Path(__file__).resolve().parents[3]
PARAMETERS = f"""model: str = "{samples.MODELS[1]}"  # the model
scale: str = "proxy"  # the scale
effort: str = "quick"  # the effort"""
NOISE = """import logging, sys, warnings
warnings.warn_explicit("of a library", FutureWarning, "torch.py", 1, "torch.nn")
warnings.warn_explicit("of a library", UserWarning, "torch.py", 1, "torch.nn")
logging.getLogger("transformers.utils").warning("of a library")
warnings.warn("of mine")
logging.getLogger("lib.models").warning("of the project")"""
CELLS = [
    ("Noise", NOISE),
    ("Slow", "import time\ntime.sleep(2.5)"),
    ("Record", "from tests.report import samples\nresult = samples.run(ratio=float(1.5))"),
    ("Environment", "card = 1"),
]


@pytest.fixture
def notebook(tmp_path):
    """Return a notebook like a template's copy; its last cell is tagged."""
    (tmp_path / ".lab").mkdir()
    path = workbench.notebook(tmp_path / ".lab" / "structured_pruning.ipynb", CELLS, PARAMETERS)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"][-1]["metadata"]["tags"] = ["environment"]
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def in_jupyterlab(path: Path, folder: Path, results: Path) -> dict[str, str]:
    """Return the environment of a kernel that JupyterLab starts for a notebook."""
    return {"JPY_SESSION_NAME": str(path), **jupyterlab.environment(folder, results)}


def in_a_build(folder: Path) -> dict[str, str]:
    """Return the environment of a build's kernel."""
    return {"JUPYTER_PATH": str(kernel_process.write_kernel(folder))}


def played(path: Path, folder: Path, environment: dict[str, str]) -> list[list[str]]:
    """Run all code cells; return the displayed output of each as text, in its final state."""
    from jupyter_client.manager import KernelManager

    environment = workbench.surroundings(PYTHONPATH=str(ROOT), **environment)
    environment |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    (folder / "ipython").mkdir(parents=True)
    described = Path(environment["JUPYTER_PATH"]) / "kernels" / "python3" / "kernel.json"
    manager = KernelManager()
    assert manager.kernel_spec is not None
    manager.kernel_spec.argv = json.loads(described.read_text(encoding="utf-8"))["argv"]
    manager.start_kernel(env=environment, cwd=str(path.parent))
    client = manager.client()
    client.start_channels()
    shown: list[list[str]] = []
    try:
        client.wait_for_ready(timeout=60)
        for cell in notebook_cells.read(path):
            outputs: dict[str, str] = {}

            def collect(message, outputs=outputs):
                content = message["content"]
                if message["msg_type"] == "stream":
                    outputs[f"stream {len(outputs)}"] = content["text"]
                elif message["msg_type"] in ("display_data", "update_display_data"):
                    name = content.get("transient", {}).get("display_id") or f"display {len(outputs)}"
                    outputs[name] = content["data"]["text/plain"]
                elif message["msg_type"] == "error":
                    outputs["error"] = "\n".join(content["traceback"])

            client.execute_interactive(cell.source, output_hook=collect, timeout=60)
            shown.append(list(outputs.values()))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return shown


def test_a_run_in_jupyterlab(notebook, tmp_path):
    results = tmp_path / "executed"
    built = samples.run(ratio=1.2)
    record.write(built, results / "proxy" / f"{built.stem}.json")
    session = in_jupyterlab(notebook, tmp_path / "session", results)
    parameters, noise, slow, recorded, last = played(notebook, tmp_path / "first", session)
    assert all(shown.startswith("cell ") for shown in [*parameters, *recorded]), "nothing else is said where nothing is"
    assert "of mine" in "".join(noise) and "of the project" in "".join(noise)
    assert "of a library" not in "".join(noise)
    [line] = slow
    assert line.startswith("cell 3 of 5 · Slow · ") and line.endswith(" s"), line
    table = last[-1]
    assert "this run" in table and "last build" in table and "last run here" not in table
    prefill = next(row for row in table.splitlines() if "prefill rate" in row)
    assert prefill.index("1.50") < prefill.index("1.20"), prefill
    kept = record.read(notebook.parent / ".runs" / "proxy" / f"{built.stem}.json")
    assert kept.process is not None and kept.process.cell_seconds["6"] >= 2.5
    table = played(notebook, tmp_path / "second", session)[-1][-1]
    assert "last run here" in table and "last build" in table


def test_a_build_has_no_jupyterlab_features(notebook, tmp_path, monkeypatch):
    shown = played(notebook, tmp_path / "plain", in_a_build(tmp_path / "build"))
    assert shown[2] == [] == shown[4] and "of a library" in "".join(shown[1])
    assert not (notebook.parent / ".runs").exists()
    monkeypatch.setenv("JPY_SESSION_NAME", "the notebook in which somebody started a build")
    assert "JPY_SESSION_NAME" not in kernel_process.surroundings(tmp_path)


def test_cells_are_located_in_the_notebook(notebook):
    cells = notebook_cells.read(notebook)
    assert [cell.heading for cell in cells] == ["structured_pruning", "Noise", "Slow", "Record", "Environment"]
    assert [cell.executed for cell in cells] == [1, 4, 6, 8, 10]
    twice = [cells[0], cells[1], cells[0]]
    assert notebook_cells.find(twice, cells[0].source + "\n", 0) == 2
    assert notebook_cells.find(twice, cells[0].source, 2) == 0
    assert notebook_cells.find(twice, "edited since", 0) is None
    assert notebook_cells.read(notebook.with_name("gone.ipynb")) == []


def test_the_text_of_a_line():
    place = Place(3, 9, "Apply", 40.0, 100.0)
    text = "cell 3 of 9 · Apply · 12 s of about 40 s · about 2 min 08 s to the end"
    assert cell_progress.text(place, 12.0, False) == text
    assert cell_progress.text(place, 50.0, False) == "cell 3 of 9 · Apply · 50 s · about 1 min 40 s to the end"
    assert cell_progress.text(place, 50.0, True) == "cell 3 of 9 · Apply · 50 s"
    assert cell_progress.text(Place(None, 0, "", None, None), 3.0, False) == "cell · 3 s"
    bar = cell_progress.as_html(place, "<b>")
    assert 'value="2" max="9"' in bar and "<b>" not in bar


def test_times_come_from_a_run_of_the_same_effort(notebook, tmp_path):
    run = samples.run()
    paths = [record.write(run.model_copy(update={"effort": "standard"}), tmp_path / "a.json"), tmp_path / "b.json"]
    process = samples.process().model_copy(update={"cell_seconds": {"4": 7.0}})
    record.write(run.model_copy(update={"process": process}), paths[1])
    cells = notebook_cells.read(notebook)
    assert notebook_cells.expected(cells, paths, "quick") == [None, 7.0, None, None, None]
    assert notebook_cells.expected(cells, [tmp_path / "c.json"], "quick") == [None] * 5

"""Tests in JupyterLab itself: `python build.py lab` opens the start page, Run All completes a template with its
figures, shows progress, compares the run with the last one and writes to no template; the overview is interactive.
"""

import json
import shutil
import socket
import subprocess
import sys
import urllib.request

import nbformat
import psutil
import pytest

from lib.measure.metrics.catalogue import DIMENSIONS
from lib.report.records import history, record
from lib.suite.cli.nbval_at_preview import DEFAULT, PREVIEW
from lib.suite.plan import plan
from tests.report import samples
from tests.suite import workbench

TOKEN = "browser-test"
# One template without a model (exact figure count), one that prunes a proxy model (minimum count).
TEMPLATES = {"overview": 2 + len(DIMENSIONS), "structured_pruning": 5}
SETTINGS = {
    # The whole notebook is kept in the page, so that all of it can be checked.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture
def lab(browser, tmp_path):
    """JupyterLab on a copy of the project with the templates and a result set; returns its address."""
    root = workbench.project(tmp_path / "project")
    shutil.rmtree(root / "parameters")
    shutil.copytree(plan.ROOT / "parameters", root / "parameters")
    for name in TEMPLATES:
        text = (plan.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
        text = text.replace(*(json.dumps(line)[1:-1] for line in (DEFAULT, PREVIEW)))
        (root / "notebooks" / f"{name}.ipynb").write_text(text, encoding="utf-8")
    (root / "executed" / "proxy").mkdir(parents=True)
    samples.mixed(root / "executed" / "proxy")
    history.keep(root / "executed" / history.NAME, record.read_folder(root / "executed" / "proxy")[0], "proxy", "run")
    own = {name: str(tmp_path / name.lower()) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR",
           "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}  # fmt: skip
    for name, settings in SETTINGS.items():
        path = tmp_path / "jupyterlab_settings_dir" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    log = (tmp_path / "lab.log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(root / "build.py"), "lab", *options],
        cwd=root, env=workbench.surroundings(**own), stdout=log, stderr=log,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    templates = {path: path.read_bytes() for path in (root / "notebooks").iterdir()}

    def answers():
        assert process.poll() is None, (tmp_path / "lab.log").read_text()
        try:
            return urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=5).status == 200
        except OSError:
            return False

    try:
        workbench.wait_for(answers, seconds=120)
        yield address
        assert {path: path.read_bytes() for path in (root / "notebooks").iterdir()} == templates
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        for survivor in psutil.wait_procs(started, timeout=5)[1]:
            survivor.kill()
        log.close()


def test_jupyterlab_opens_on_the_start_page(lab, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(90_000)
    page.goto(f"{lab}/?token={TOKEN}")
    table = page.locator(".jp-RenderedMarkdown table").first
    table.wait_for()
    assert table.locator("tbody tr").count() == len(TEMPLATES) - 1
    page.screenshot(path=tmp_path / "start.png")
    row = table.locator("tbody tr").first.inner_text()
    assert "Structured pruning" in row and " min" in row and "(2026-" in row, row
    table.get_by_role("link", name="Structured pruning").click()
    page.locator(".jp-NotebookPanel .jp-CodeCell").first.wait_for()
    page.get_by_text("(workbench) | Idle").wait_for()  # JupyterLab shuts down slowly while a kernel starts
    page.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_runs_in_jupyterlab(name, lab, browser, tmp_path):
    from playwright.sync_api import TimeoutError

    path = plan.NOTEBOOKS / f"{name}.ipynb"
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(90_000)
    page.goto(f"{lab}/lab/tree/{path.name}?token={TOKEN}&reset")
    page.get_by_text("(workbench) | Idle").wait_for()  # the kernel is ready; anything run before that is lost
    page.locator(".jp-Notebook .jp-CodeCell").nth(len(code) - 1).wait_for(state="attached")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    wanted = [f"[{number}]:" for number in range(1, len(code) + 1)]
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map((one) => one.textContent.trim())"
    try:
        page.wait_for_function(f"(wanted) => {prompts}.join() === wanted.join()", arg=wanted, timeout=900_000)
    except TimeoutError:
        page.screenshot(path=tmp_path / "unfinished.png")
        raise AssertionError(f"not all cells ran: {page.evaluate(prompts)}") from None
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    figures = page.locator(".jp-RenderedImage img")
    # JupyterLab does not show an image's `alt`.
    assert figures.count() == TEMPLATES[name] if name == "overview" else figures.count() >= TEMPLATES[name]
    assert all(width > 600 for width in figures.evaluate_all("(all) => all.map((one) => one.naturalWidth)"))
    warned = page.locator("[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
    assert not warned, warned
    assert page.locator("table.dataframe").count() > 2
    figures.last.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "lab.png")
    if name == "overview":
        _choose(page, figures, tmp_path)
    else:
        _followed(page, tmp_path)
    page.close()


def _followed(page, tmp_path):
    """Check that a slow cell shows its position and time, and that the last cell compares this run with the last
    build's.
    """
    lines = page.locator(".jp-OutputArea small").all_inner_texts()
    assert any(line.strip().startswith("cell ") and " · " in line for line in lines), lines
    beside = page.locator("table.dataframe").last
    assert "this run" in beside.inner_text() and "last build" in beside.inner_text()
    beside.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "beside.png")


def _choose(page, figures, tmp_path):
    """Check that the selection is drawn below the widgets, and that the margin decides which arms keep quality."""
    before = figures.count()
    model = page.locator(".widget-dropdown select").first
    model.select_option(index=1)
    page.wait_for_function("(count) => document.querySelectorAll('.jp-RenderedImage img').length > count", arg=before)
    margin = page.locator(".widget-text input[type=number]").first
    margin.fill("50")
    margin.press("Enter")
    label = page.get_by_text("within 50 points")
    label.wait_for()
    label.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "chosen.png")

"""JupyterLab itself: `python build.py lab` serves, a template opens, Run All finishes, its figure appears."""

import re
import socket
import subprocess
import sys
import urllib.request

import pytest

from tests.suite import workbench

CODE = """import sys

sys.path.insert(0, "..")

import pandas as pd

from lib.report import figures

frame = pd.DataFrame({"arm": ["baseline", "optimized"], "value": [1.0, 1.3]})
figures.show(figures.bars(frame, y_label="tokens/s"), "The optimized arm is faster.")"""
TOKEN = "browser-test"


@pytest.fixture
def lab(browser, tmp_path):
    """JupyterLab on a copy of the project with one tiny template; returns its address."""
    root = workbench.project(tmp_path / "project")
    workbench.notebook(root / "notebooks" / "tiny.ipynb", [("Figure", CODE), ("Sum", "print(1 + ratio)")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(tmp_path / name.lower()) for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR",
           "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}  # fmt: skip
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    options += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url="]
    log = (tmp_path / "lab.log").open("w")
    process = subprocess.Popen(
        [sys.executable, str(root / "build.py"), "lab", *options],
        cwd=root, env=workbench.surroundings(**own), stdout=log, stderr=log,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert process.poll() is None, (tmp_path / "lab.log").read_text()
        try:
            return urllib.request.urlopen(f"{address}/api/status?token={TOKEN}", timeout=5).status == 200
        except OSError:
            return False

    try:
        workbench.wait_for(answers, seconds=120)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


def test_a_template_runs_in_jupyterlab(lab, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    page.goto(f"{lab}/lab/tree/tiny.ipynb?token={TOKEN}&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-OutputArea-output", has_text=re.compile(r"^\s*1\.25\s*$")).wait_for()  # the last cell
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()
    assert [prompt.strip() for prompt in prompts] == ["[1]:", "[2]:", "[3]:"]
    figure = page.locator(".jp-RenderedImage img")
    assert figure.count() == 1 and figure.evaluate("(image) => image.naturalWidth") > 1000
    assert page.locator(".jp-mod-error, [data-mime-type='application/vnd.jupyter.error']").count() == 0
    page.close()

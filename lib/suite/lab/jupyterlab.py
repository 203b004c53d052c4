"""The start of JupyterLab: on the start page, with the kernel of this environment, without fetching news.

Writes JupyterLab's files into a temporary folder; the user's own settings override these defaults.
"""

import json
from pathlib import Path

from lib.files import RESULTS
from lib.suite.lab import kernel, start_page
from lib.suite.run.kernel_process import write_kernel

# "Run All" jumps to the last cell: the status bar counts the cells, and its button leads to the running one.
PROGRESS = {"showOnStatusBar": True, "showProgress": True, "showJumpToRecentExecutionButton": True}
SETTINGS = {
    "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}},
    "@jupyterlab/notebook-extension:tracker": {"kernelStatus": PROGRESS},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


def arguments(root: Path, folder: Path) -> list[str]:
    """Return JupyterLab's arguments: `root` is the folder that it shows; default settings are written to `folder`."""
    settings = folder / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    return [str(root), f"--LabApp.app_settings_dir={settings}", f"--LabApp.default_url=/lab/tree/{start_page.NAME}"]


def environment(folder: Path, results: Path) -> dict[str, str]:
    """Return the environment variables of JupyterLab and its kernels, with the folder of the results."""
    return {"JUPYTER_PATH": str(write_kernel(folder, kernel.__name__)), RESULTS: str(results)}

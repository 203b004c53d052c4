"""The IPython extension of the kernels of `build.py lab`: silences libraries, shows the run's progress in the running
cell, and after the last cell shows this run next to the previous one.

A build's kernels do not load it, and templates do not depend on it.
"""

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

from lib.files import RESULTS
from lib.suite.lab import notebook_cells
from lib.suite.lab.cell_progress import Place, ProgressLine
from lib.suite.lab.notebook_cells import LAST, CodeCell
from lib.suite.plan import template as templates

RUNS = ".runs"  # folder next to the copies, with the last run of each
OURS = r"(__main__|lib)(\.|$)"
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def load_ipython_extension(shell: Any) -> None:
    """Silence libraries, and follow the cells of the notebook that this kernel was started for."""
    silence()
    path = notebook_cells.notebook()
    if path is not None:
        follower = CellFollower(shell, path, Path(os.environ.get(RESULTS) or "executed"))
        shell.events.register("pre_run_cell", follower.before)
        shell.events.register("post_run_cell", follower.after)


def silence() -> None:
    """Show only warnings of the notebook and of this project, and of the libraries' logs only errors."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module=OURS)
    if logging.lastResort is not None:
        logging.lastResort.addFilter(lambda r: r.levelno >= logging.ERROR or r.name.startswith(("lib.", "__main__")))


class CellFollower:
    """Follows the cells that a person runs in one notebook."""

    def __init__(self, shell: Any, path: Path, results: Path):
        self.shell, self.path, self.results = shell, path, results
        self.cells: list[CodeCell] = []
        self.at: int | None = None
        self.line: ProgressLine | None = None
        self.began = 0.0
        self.took: dict[int, float] = {}
        self.shown: tuple[Any, Any] = (None, None)  # the stored record, and the previous one

    def before(self, info: Any) -> None:
        """Begin a cell: find it in the notebook, and show the run's progress if it takes longer than a second."""
        source, behind = info.raw_cell or "", -1 if self.at is None else self.at
        self.at = notebook_cells.find(self.cells, source, behind)
        if self.at is None:  # the first cell, or an edited one
            self.cells = notebook_cells.read(self.path)
            self.at = notebook_cells.find(self.cells, source, behind)
        self.began = time.monotonic()
        self.line = ProgressLine(self._place())
        self.line.start()

    def after(self, outcome: Any) -> None:
        """End a cell; after the last cell has succeeded, show this run next to the previous one."""
        if self.line is None:
            return
        seconds = self.line.finish()
        self.line = None
        if self.at is None or not outcome.success:
            return
        self.took[self.at] = seconds
        if LAST in self.cells[self.at].tags:
            self._show_beside_earlier()

    def _place(self) -> Place:
        if self.at is None:
            return Place(None, len(self.cells), "", None, None)
        namespace = self.shell.user_ns
        seconds = notebook_cells.expected(self.cells, self._stored(namespace), namespace.get("effort"))
        behind = [duration for duration in seconds[self.at + 1 :] if duration is not None]
        return Place(
            self.at + 1,
            len(self.cells),
            self.cells[self.at].heading,
            seconds[self.at],
            sum(behind) if any(duration is not None for duration in seconds) else None,
        )

    def _stored(self, about: Any) -> list[Path]:
        """Return the paths of the notebook's last records: of the last run here, and of the last build."""
        stem = self.path.name.removesuffix(".ipynb").partition("--")[0]
        scale, model = about.get("scale"), about.get("model")
        if not isinstance(scale, str) or not isinstance(model, str):
            return []  # the parameters cell has not run
        name = f"{stem}--{model}.json"
        return [self.path.parent / RUNS / scale / name, self.results / scale / name]

    def _show_beside_earlier(self) -> None:
        from lib.report import earlier_runs  # slow to import

        run = earlier_runs.record_of(self.shell.user_ns)
        if run is None:
            return
        here, built = self._stored({"scale": run.scale, "model": run.model})
        declared = templates.read(self.path).parameters
        requested = earlier_runs.as_requested(run, self.shell.user_ns, declared)
        if self.shown[0] is not run:
            seconds = {self.cells[place].executed: seconds for place, seconds in self.took.items()}
            self.shown = (run, earlier_runs.keep(requested, here, seconds))
        earlier_runs.show(requested, self.shown[1], earlier_runs.stored(built))

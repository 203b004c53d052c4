"""The request of `build.py lab`: its own options, and the arguments passed on to JupyterLab."""

import argparse
from pathlib import Path
from typing import NoReturn

from lib.errors import UserError, suggest
from lib.files import expanded
from lib.suite.plan import plan
from lib.suite.plan.plan import Job, Request

EFFORT = "quick"  # as in the templates: a person waits


class Options(argparse.ArgumentParser):
    """An argument parser with one-line errors; unknown arguments are passed on to JupyterLab."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser(description: str) -> Options:
    """Return the parser of `build.py lab`'s own options."""
    own = Options(
        prog="build.py lab",
        usage="build.py lab [--model M] [--scale S] [--effort E] [--out DIR] [JUPYTERLAB ARGUMENT …]",
        description=description,
        allow_abbrev=False,
    )
    what = "make copies that are set to this model: a name, a checkpoint folder, a .gguf file, a hub id (repeatable)"
    own.add_argument("--model", action="append", default=[], metavar="M", help=what)
    scale = f"{'|'.join(plan.SCALES)} (default: proxy; full for a model that has no proxy model)"
    own.add_argument("--scale", metavar="S", help=scale)
    own.add_argument("--effort", default=EFFORT, metavar="E", help=f"{'|'.join(plan.EFFORTS)} (default: {EFFORT})")
    own.add_argument("--out", metavar="DIR", help="the results to show are in DIR/<scale> (default: executed)")
    return own


def jobs(options: argparse.Namespace) -> list[Job]:
    """Return a job for each optimization and requested model, for which copies are made; none without a model.

    Fetches weights and data. Raises UserError for a wrong name, or where something cannot be fetched.
    """
    for name, choices in (("scale", plan.SCALES), ("effort", plan.EFFORTS)):
        value = getattr(options, name)
        if value is not None and value not in choices:
            raise UserError(f"--{name} {value}: expected one of {', '.join(choices)}.{suggest(value, choices)}")
    if options.out == "":  # a variable of the shell that is not set
        raise UserError("--out: expected a path, got nothing")
    if not options.model:
        if options.scale or options.effort != EFFORT:
            raise UserError("lab --scale and --effort set the copies of a model; give --model too")
        return []
    models = tuple(plan.model_named(text) for text in options.model)
    scale = options.scale or plan.implied_scale(models)
    return plan.plan(Request(models=models, scale=scale, effort=options.effort))


def results(options: argparse.Namespace) -> Path:
    """Return the folder with a result folder per scale."""
    return expanded(options.out) if options.out else plan.ROOT / "executed"

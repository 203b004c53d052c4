"""The commands that reproduce a record, or the checkpoint that it measured, from the record alone. Knows no default and
no template.
"""

import shlex
from collections.abc import Sequence

from lib.report.records.record import Record

OPTIONS = ("model", "scale", "effort", "device", "checkpoints", "random_weights")


def command(record: Record) -> str:
    """Return the command line that repeats a run, with every parameter written out, in case a default changes."""
    dimensions = [part for dimension in record.dimensions or () for part in ("--dimension", dimension)]
    return shlex.join([*_parts("run", record, dimensions), "--force"])


def of_set(command: str, scale: str) -> str:
    """Return the command line that runs `command` (with its arguments) on the results of `scale`."""
    return f"python build.py {command}" + (f" --scale {scale}" if scale in ("slice", "full") else "")


def applying(record: Record, stack: str = "") -> str:
    """Return the command line that saves a record's optimized checkpoint: its optimization, or the recipe `stack`."""
    named = ["--stack", stack] if stack else []
    return shlex.join([*_parts("apply", record, named), "--out", "DIR"])


def _parts(verb: str, record: Record, more: Sequence[str]) -> list[str]:
    parts = ["python", "build.py", verb, record.optimization, "--model", record.model, "--effort", record.effort]
    parameters = record.parameters
    parts += ["--scale", record.scale] if record.scale != "proxy" else []
    parts += ["--device", str(parameters["device"])] if parameters.get("device", "cpu") != "cpu" else []
    parts += ["--checkpoints", "DIR"] if parameters.get("checkpoints") else []
    parts += ["--random-weights"] if parameters.get("random_weights") else []
    parts += more
    for name, value in parameters.items():
        if name not in OPTIONS:
            parts += ["-p", f"{name}={'none' if value is None else value}"]
    return parts

"""The command that makes a record again, from what the record itself says. Knows no default and no template."""

import shlex

from lib.report.records.record import Record

OPTIONS = ("model", "scale", "effort", "device", "checkpoints", "random_weights")


def command(record: Record) -> str:
    """Return the command line; every parameter of the run stands in it, so that defaults may change later."""
    parts = ["python", "build.py", "run", record.optimization, "--model", record.model, "--effort", record.effort]
    parameters = record.parameters
    parts += ["--scale", record.scale] if record.scale != "proxy" else []
    parts += ["--device", str(parameters["device"])] if parameters.get("device", "cpu") != "cpu" else []
    parts += ["--checkpoints", "DIR"] if parameters.get("checkpoints") else []
    parts += ["--random-weights"] if parameters.get("random_weights") else []
    for dimension in record.dimensions or ():
        parts += ["--dimension", dimension]
    for name, value in parameters.items():
        if name not in OPTIONS:
            parts += ["-p", f"{name}={'none' if value is None else value}"]
    return shlex.join([*parts, "--force"])

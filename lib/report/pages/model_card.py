"""The model card of an optimized checkpoint: what was done to which model, what was measured of it, how to load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.report.records import facts, record, reproduce
from lib.report.text.wording import title


def text(name: str, job: Any, stems: Sequence[str], usage: str, results: Path) -> str:
    """Return the card as Markdown. `job` names model, scale and parameters, `stems` are the steps, `usage` is the
    Python that loads the folder, `results` the result folder of the record that is quoted.
    """
    lines = [
        f"# {job.model}: {title(job.optimization)}",
        "",
        f"Made from `{job.model}` at scale `{job.scale}` by {_done(name, stems)}.",
        "",
        "## What was measured",
        "",
        *_measured(job, results),
        "",
        "## How to load it",
        "",
        "```python",
        usage,
        "```",
        "",
        "## Parameters",
        "",
        *(f"- `{key}`: `{value}`" for key, value in job.parameters.items() if key not in reproduce.OPTIONS),
    ]
    return "\n".join(lines) + "\n"


def usage(folder: str, plain: str | None) -> str:
    """Return three lines of Python that load the folder; `plain` is the class of transformers that reads it, if any."""
    if plain:
        return (
            f"from transformers import {plain}, AutoTokenizer\n"
            f'model = {plain}.from_pretrained("{folder}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
        )
    return (
        "from lib.models.checkpoints import io  # transformers alone does not know what this folder holds\n"
        "from transformers import AutoTokenizer\n"
        f'model, tokenizer = io.load_folder("{folder}"), AutoTokenizer.from_pretrained("{folder}")'
    )


def _done(name: str, stems: Sequence[str]) -> str:
    return f"`{name}`" if len(stems) < 2 else f"the stack {' → '.join(stems)} of `{name}`"


def _measured(job: Any, results: Path) -> list[str]:
    """Return what the record of the same run says, or how to make one."""
    path = results / f"{job.stem}.json"
    command = f"`python build.py run {job.optimization} --model {job.model} --scale {job.scale}`"
    try:
        stored = record.read(path)
    except UserError:
        return [f"Nothing was measured yet; {command} does."]
    differing = sorted(
        key
        for key, value in job.parameters.items()
        if key not in reproduce.OPTIONS and key in stored.parameters and stored.parameters[key] != value
    )
    where = f"{facts.machine(stored.environment)}, {facts.day(stored.started)}, effort {stored.effort}"
    if differing:
        return [
            f"The record `{path.name}` ({where}) was made with other parameters ({', '.join(differing)}), so nothing "
            f"is claimed of this checkpoint; {command} with the parameters below does."
        ]
    return [f"> {stored.verdict.sentence}", "", f"Record: `{path.name}`, {where}."]

"""The model card of an optimized checkpoint: model and optimization, measurements, and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.report.records import record
from lib.report.records.setting import facts, reproduce, stand_in
from lib.report.text import commands
from lib.report.text.wording import title


def text(job: Any, stack: str | None, saved: Mapping[str, Any], folder: str, results: Path, key: str) -> str:
    """Return the card as Markdown.

    `job` has model, scale, effort and parameters; `stack` is the path of a recipe, if any; `saved` has `steps`,
    `loads`, `tokenizer`, `dtype`, `weights_hash`, `by_blocks`, `remark`, `latent`, `chosen_for`, `effort` (a
    recipe's, which replaces the job's) and `unfit`; `folder` is the checkpoint's name; `results` is the result folder
    with the record to quote; `key` is the cache key that a run of `job` would have now.
    """
    about = _about(job)
    effort = saved.get("effort") or job.effort
    measured = (
        _by_blocks(saved.get("remark", ""))
        if saved.get("by_blocks")
        else _measured(job, effort, stack, saved, results, key)
    )
    lines = [
        f"# {_name(job)}: {title(job.optimization)}",
        "",
        *([about, ""] if about else []),
        f"Made from `{job.model}` at scale `{job.scale}`, effort `{effort}`, by {_done(job, stack, saved)}. "
        f"The weights are stored as they were applied, in `{saved['dtype']}`.",
        "",
        "## What was measured",
        "",
        *measured,
        "",
        "## How to load it",
        "",
        "```python",
        usage(folder, saved["loads"], saved["tokenizer"], saved["latent"]),
        "```",
        *(["", _absorbed()] if saved["latent"] else []),
        "",
        "## Parameters",
        "",
        *(f"- `{key}`: `{value}`" for key, value in job.parameters.items() if key not in reproduce.OPTIONS),
    ]
    return "\n".join(lines) + "\n"


def _name(job: Any) -> str:
    """Return the model's name for the title; a stand-in or a slice is called one."""
    name = stand_in.on(job.scale, job.model, None)
    return name if name == job.model else f"{name[:1].upper()}{name[1:]}"


def _about(job: Any) -> str:
    """Return the notice on a stand-in, a slice or random weights; empty for the real model."""
    random = bool(job.parameters.get("random_weights"))
    bare = "Its weights are random: shapes and bytes are the model's, and its answers mean nothing." if random else ""
    return stand_in.of_model(job.scale, job.model, None) or bare


def usage(folder: str, plain: str | None, tokenizer: bool, latent: bool) -> str:
    """Return the Python code that loads the folder; `plain` is the transformers class that can read it, if any,
    `tokenizer` whether there is one, `latent` whether latent attention must be absorbed, as it was when measured.
    """
    more, path = ", AutoTokenizer" if tokenizer else "", json.dumps(folder, ensure_ascii=False)  # also a Windows path
    if plain:
        lines = [f"from transformers import {plain}{more}", f"model = {plain}.from_pretrained({path})"]
    else:
        lines = ["from lib.models.checkpoints import io  # transformers alone cannot read this folder"]
        lines += ["from transformers import AutoTokenizer"] if tokenizer else []
        lines += [f"model = io.load_folder({path})"]
    if latent:
        lines += ["from lib.models.decoding import mla_absorption", "mla_absorption.absorb(model)"]
    return "\n".join([*lines, *([f"tokenizer = AutoTokenizer.from_pretrained({path})"] if tokenizer else [])])


def _absorbed() -> str:
    return (
        "Latent attention decodes absorbed here, as in all speed measurements of this workbench. Without these two "
        "lines it expands its whole cache at every token: the same answers, but slower."
    )


def _done(job: Any, stack: str | None, saved: Mapping[str, Any]) -> str:
    if stack is None:
        return f"`{job.optimization}`"
    elsewhere = list(saved["chosen_for"]) != [job.model, job.scale]
    of = f", which was chosen for {saved['chosen_for'][0]} at scale {saved['chosen_for'][1]}" if elsewhere else ""
    of = of or (f" ({saved['unfit']})" if saved.get("unfit") else "")
    return f"the stack {' → '.join(saved['steps'])} of `{Path(stack).name}`{of}"


def _by_blocks(remark: str) -> list[str]:
    text = (
        "Nothing: the machine that optimized the model had too little memory for several copies of it. It was changed "
        "block by block, from file to file, and each block was read back and compared."
    )
    return [text, *(["", remark] if remark else [])]


def _measured(job: Any, effort: str, stack: str | None, saved: Mapping[str, Any], results: Path, key: str) -> list[str]:
    """Return the verdict of the record of the same run, if it measured these weights, or how to measure them."""
    path = results / f"{job.stem}.json"
    options = f"--model {job.model} --scale {job.scale} --effort {effort}"
    device = job.parameters.get("device", "cpu")
    options += f" --device {device}" if device != "cpu" else ""
    options += " --checkpoints DIR" if job.parameters.get("checkpoints") else ""
    options += " --random-weights" if job.parameters.get("random_weights") else ""
    command = f"`{commands.at(f'python build.py run {job.optimization} {options}', results)}`"
    measures = f"{command} searches for a stack again" if stack else f"{command} with the parameters below measures it"
    if not path.exists():
        return [f"Nothing was measured yet; {measures}."]
    try:
        stored = record.read(path)
    except UserError as error:
        return [f"{error} Until then nothing is claimed about this checkpoint; {measures}."]
    where = f"{facts.machine(stored.environment)}, {facts.day(stored.started)}, effort {stored.effort}"
    quoted = [f"> {stored.verdict.sentence}", "", f"Record: `{path.name}`, {where}."]
    if stored.environment.get("weights_hash") == saved["weights_hash"]:
        return [*quoted, "It measured exactly these weights: their hashes are equal."]
    differing = sorted(
        name
        for name, value in job.parameters.items()
        if name not in reproduce.OPTIONS and name in stored.parameters and stored.parameters[name] != value
    )
    differing += ["effort"] if stored.effort != effort else []
    if differing:
        how = f"was made with other parameters ({', '.join(differing)})"
    elif stack:
        how = "was made with other weights"
    elif stored.status != "ok":
        how = "has no result"
    elif stored.key != key:
        how = "was made with other weights, options or code"
    else:
        return [*quoted, "It measured weights that were made in the same way; their last digits differ."]
    return [f"The record `{path.name}` ({where}) {how}, so nothing is claimed about this checkpoint; {measures}."]

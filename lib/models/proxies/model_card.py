"""The history of a proxy model: `training.json` next to its weights, with an entry per phase, and its README.

Knows the summaries of phases and the names of scores, but nothing of training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lib.errors import UserError
from lib.models import parameters
from lib.models.proxies.evaluation import RETRIEVAL_PROMPTS, WINDOW
from lib.models.tasks import tasks


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the summaries in `training.json` of the checkpoint in `folder`, one per phase.

    Raises UserError if the file is missing or damaged.
    """
    path = folder / "training.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); train {folder.name} from scratch") from None


def write_history(folder: Path, phases: list[dict[str, Any]]) -> None:
    """Write `training.json` into `folder`: the summary of each phase (`loop.TrainingRun.summary`), in order."""
    (folder / "training.json").write_text(json.dumps(phases, indent=1) + "\n", encoding="utf-8")


def readme(name: str, model: nn.Module, phases: list[dict[str, Any]], scores: Mapping[str, float]) -> str:
    """Return the README of a proxy model, from its history and its scores."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return page(name, f"Class `{type(model).__name__}`, {size:,} parameters, bfloat16.", phases, scores)


def page(name: str, structure: str, phases: list[dict[str, Any]], scores: Mapping[str, float]) -> str:
    """Return the text of the README; `structure` is its sentence about class and size."""
    description = parameters.read(name)
    text = ", ".join(sorted({tasks.CORPUS[task] for task in description.tasks if task in tasks.CORPUS}))
    pictures = "; scikit-learn's bundled digits, those of the split `train`" if "digits" in description.tasks else ""
    values = {key: f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" for key, value in scores.items()}
    legend = (
        "`_f1_macro`: split `final`, label by log-likelihood; `_cross_entropy`: the same, in nats over the labels. "
        f"`perplexity`: per token, in windows of {WINDOW} tokens of held-out text. `retrieval_N`: share of "
        f"{RETRIEVAL_PROMPTS} values of {tasks.VALUE} random letters and digits reproduced exactly after N tokens of "
        "text."
    )
    if "least_expert_share" in scores:
        legend += (
            " `least_expert_share`: tokens of the least used expert of any block over its fair share, on held-out text."
        )
    lines = [
        f"# Proxy model of {description.name}",
        "",
        f"{structure} Dimensions and training configuration: `parameters/{name}.yaml`. "
        f"Train it again: `python build.py proxies --model {name}`. This page is written by that command.",
        "",
        f"- Data: `parameters/evaluation/{text}-train.jsonl.xz`{pictures}; "
        "random letters and digits for key-value retrieval.",
        *(phase_line(phase, place) for phase, place in zip(phases, ("first", "second"))),
        "",
        "| held-out score | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in values.items()),
        "",
        legend,
        "",
    ]
    return "\n".join(lines)


def phase_line(phase: Mapping[str, Any], place: str) -> str:
    """Return the README's line about one training phase; `place`: "first" or "second"."""
    extended = ", then ".join(map(str, phase["plans"]))
    plans = "" if len(phase["plans"]) == 1 else f" (extended: planned for {extended})"
    notes = ""
    if place == "second":
        notes += " It started from the first phase's weights, rounded to bfloat16."
        notes += " The stored weights are a moving average." if phase["averaged"] else ""
    elif phase["start_from"]:
        when = f", {phase['start_note']}" if phase.get("start_note") else ""
        notes += f" It started from the proxy model of {phase['start_from']}{when}."
    if phase.get("teacher"):
        notes += " Prompts were answered by labels and by a linear classifier fitted to the same text."
    if phase["revised"]:
        steps = ", ".join(map(str, phase["revised"]))
        notes += f" The training batches were changed at step {steps}: the steps before followed another configuration."
    return (
        f"- Training, {place} phase: {phase['steps']:,} steps{plans}, {phase['tokens']:,} tokens, "
        f"{phase['seconds'] / 60:.0f} minutes on {phase['threads']} thread of a shared processor, "
        f"seed {phase['seed']}.{notes}"
    )

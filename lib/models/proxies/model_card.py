"""How a stand-in came to be: `training.json` beside its weights, one entry per phase, and the README made from it.

Knows what a phase tells of itself and which scores there are; knows nothing of models or of training.
"""

import json
from pathlib import Path

from lib.errors import UserError
from lib.models import parameters
from lib.models.tasks import tasks

RECALL_PROMPTS, WINDOW = 64, 512  # what the scores of the README are taken from


def history(folder: Path) -> list[dict]:
    """Return what `training.json` tells of the checkpoint in `folder`, phase by phase."""
    path = folder / "training.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); train {folder.name} from nothing") from None


def keep_history(folder: Path, phases: list[dict]) -> None:
    """Write `training.json` into `folder`: what each phase tells of itself (`training.Run.told`), in order."""
    (folder / "training.json").write_text(json.dumps(phases, indent=1) + "\n", encoding="utf-8")


def readme(name: str, model, phases: list[dict], found: dict[str, float]) -> str:
    """Return the README of a stand-in, from how it was trained, phase by phase, and from its scores."""
    description = parameters.read(name)
    size = sum(parameter.numel() for parameter in model.parameters())
    text = ", ".join(sorted({tasks.CORPUS[task] for task in description.tasks if task in tasks.CORPUS}))
    pictures = "; scikit-learn's bundled digits, those of the split `train`" if "digits" in description.tasks else ""
    values = {key: f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" for key, value in found.items()}
    legend = (
        "`_f1_macro`: split `final`, label by log-likelihood; `_cross_entropy`: the same, in nats over the labels. "
        f"`perplexity`: per token, in windows of {WINDOW} tokens of held-out text. `recall_N`: share of "
        f"{RECALL_PROMPTS} values of {tasks.VALUE} random letters and digits reproduced exactly after N tokens of text."
    )
    if "least_expert_share" in found:
        legend += (
            " `least_expert_share`: tokens of the least used expert of any block over its fair share, on held-out text."
        )
    lines = [
        f"# Stand-in for {description.name}",
        "",
        f"Class `{type(model).__name__}`, {size:,} parameters, bfloat16. Dimensions and recipe: "
        f"`parameters/{name}.yaml`. Train again: `python build.py proxies --model {name}`. "
        "This page is written by that command.",
        "",
        f"- Data: `parameters/evaluation/{text}-train.jsonl.xz`{pictures}; random letters and digits for recall.",
        *(told(phase, place) for phase, place in zip(phases, ("first", "second"))),
        "",
        "| held-out score | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in values.items()),
        "",
        legend,
        "",
    ]
    return "\n".join(lines)


def told(phase: dict, place: str) -> str:
    """Return the line of a README about one phase of a training."""
    plans = ", then ".join(map(str, phase["plans"]))
    plans = "" if len(phase["plans"]) == 1 else f" (prolonged: planned for {plans})"
    revised = ""
    if phase["revised"]:
        revised = f" The lessons were revised at step {', '.join(map(str, phase['revised']))}: the steps before did "
        revised += "not follow the recipe as it stands."
    start = f" It started from the stand-in of {phase['start_from']}" if phase["start_from"] else ""
    start += f", {phase['start_note']}." if phase.get("start_note") else "." if start else ""
    if place == "second":
        start = " It started from the first phase's weights, rounded to bfloat16."
        start += " The averaged weights are kept." if phase["averaged"] else ""
    if phase.get("advised"):
        start += " Questions were answered by labels and by a linear classifier fitted to the same text."
    return (
        f"- Training, {place} phase: {phase['steps']:,} steps{plans}, {phase['tokens']:,} tokens, "
        f"{phase['seconds'] / 60:.0f} minutes on {phase['threads']} thread of a shared processor, "
        f"seed {phase['seed']}.{start}{revised}"
    )

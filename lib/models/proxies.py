"""Train the stand-ins: `python -m lib.models.proxies [--model M ...]`.

From a parameter file and the frozen text to an ordinary checkpoint folder, `parameters/proxies/<model>`, with a README
whose every number is measured by this command. A training that was stopped goes on from its last saved state. Knows
files and scores; what is learned and how stand in `lessons` and `training`.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.metrics import f1_score
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lib.errors import UserError
from lib.models import loading, parameters, tasks, tokenizer
from lib.models.anatomy import anatomy
from lib.models.inheritance import inherit
from lib.models.lessons import Lessons
from lib.models.recipe import Recipe
from lib.models.training import Balance, Run

LOG = logging.getLogger(__name__)
CACHE = Path(os.environ.get("WORKBENCH_CACHE", Path.home() / ".cache" / "workbench"))
SAVE_EVERY, REPORT_EVERY = 50, 10  # steps
DISTANCES = (256, 512, 1024, 2048)  # tokens between a value and the question for it
EMBEDDING_SIZE = 0.5
RECALL_PROMPTS, WINDOW = 64, 512


@dataclass
class Student:
    """What lessons and tasks need of a model before it is a checkpoint."""

    model: torch.nn.Module
    tokenizer: object
    processor: object | None
    parameters: parameters.ModelParameters
    device: str = "cpu"


def student(name: str) -> Student:
    """Return an untrained stand-in of model `name`. Raises UserError for an unknown model or key of its recipe."""
    description = parameters.read(name)
    config, recipe = description.config("proxy"), recipe_of(name)
    text = config.get("text_config", config)
    vocabulary = tokenizer.train(text["vocab_size"])
    endings = {key: vocabulary.convert_tokens_to_ids("<|endoftext|>") for key in ("eos_token_id", "pad_token_id")}
    if "text_config" in config:
        config = config | {"text_config": text | endings}
    else:
        config = config | endings | {"bos_token_id": None}
    model = spread(loading.build(config, description.architecture, seed=recipe.seed))
    processor = picture_processor(config["vision_config"]) if "vision_config" in config else None
    return Student(model, vocabulary, processor, description)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Make the embeddings of a new model as large as what its blocks soon add to them; return the model.

    As built (0.02 each) the tokens drown in the first block's output, and a later head cannot find them to copy them.
    Where the head is tied to the embeddings, the last norm makes up for their size.
    """
    view = anatomy(model)
    with torch.no_grad():
        view.embeddings.weight.mul_(EMBEDDING_SIZE / view.embeddings.weight.std())
        if view.head.weight is view.embeddings.weight:
            view.final_norm.weight.fill_(0.075 / EMBEDDING_SIZE)
        for block in view.blocks:
            part = block.feed_forward
            ends = [block.attention.output.weight, part.down.weight if part.down is not None else None]
            for weight in [*ends, part.experts.down if part.experts is not None else None]:
                if weight is not None:
                    weight.mul_(0.3)
    return model


def recipe_of(name: str) -> Recipe:
    """Return the training recipe of a parameter file. Raises UserError for a key that no recipe has."""
    try:
        return Recipe(**parameters.read(name).proxy.training)
    except TypeError as error:
        raise UserError(f"parameters/{name}.yaml: section proxy.training: {error}") from None


def picture_processor(vision: dict) -> Qwen2VLImageProcessorPil:
    """Return the processor of pictures for a vision tower: their size is kept, values go to [-1, 1]."""
    return Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        size={"shortest_edge": tasks.PICTURE**2, "longest_edge": tasks.PICTURE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def identity(name: str) -> str:
    """Return a hash of everything that decides what is learned, except for how long."""
    description = parameters.read(name)
    recipe = {key: value for key, value in description.proxy.training.items() if key != "steps"}
    digest = hashlib.sha256(json.dumps([description.config("proxy"), recipe], sort_keys=True).encode())
    for path in sorted((parameters.PARAMETERS / "evaluation").glob("*-train.jsonl.xz")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def prepare(name: str) -> Run:
    """Return the training of model `name`: new, or taken up where it was stopped."""
    recipe = recipe_of(name)
    learner = student(name)
    lessons = Lessons(learner, recipe)
    if recipe.start_from:
        inherit(learner.model, parameters.PARAMETERS / "proxies" / recipe.start_from)
    run = Run(learner.model, lessons, recipe, identity(name))
    if run.resume(state_file(name)):
        LOG.info("%s: going on from step %d of %d", name, run.step, recipe.steps)
    if run.plans[-1:] != [recipe.steps]:
        run.plans.append(recipe.steps)
    return run


def state_file(name: str) -> Path:
    """Return where the state of an unfinished training lies."""
    return CACHE / "proxies" / f"{name}.pt"


def train(name: str, folder: Path | None = None) -> Path:
    """Train the stand-in of model `name` to the end and write its folder; return the folder."""
    run = prepare(name)
    while run.step < run.recipe.steps:
        seen = run.advance()
        if run.step % REPORT_EVERY == 0:
            shown = "  ".join(f"{key} {value:.3f}" for key, value in seen.items())
            LOG.info("%s  step %d of %d  %.0f s  %s", name, run.step, run.recipe.steps, run.seconds, shown)
        if run.step % SAVE_EVERY == 0 or run.step == run.recipe.steps:
            run.save(state_file(name))
    return publish(name, run, folder or parameters.PARAMETERS / "proxies" / name)


def publish(name: str, run: Run, folder: Path) -> Path:
    """Write checkpoint, tokenizer, processor and README beside `folder`, then put them in its place."""
    run.balance.close()
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model = run.model.eval().requires_grad_(False)
    half = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).load_state_dict(half)
    model.save_pretrained(beside)
    run.lessons.loaded.tokenizer.save_pretrained(beside)
    if run.lessons.loaded.processor is not None:
        run.lessons.loaded.processor.save_pretrained(beside)
    model = loading.load_folder(beside, dtype=torch.float32)
    found = scores(Student(model, run.lessons.loaded.tokenizer, run.lessons.loaded.processor, parameters.read(name)))
    (beside / "README.md").write_text(readme(name, run, found), encoding="utf-8")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    beside.rename(folder)
    LOG.info("%s: %s", name, found)
    return folder


@torch.no_grad()
def scores(loaded, limit: int | None = None, prompts: int = RECALL_PROMPTS) -> dict[str, float]:
    """Return the final scores: macro-F1 per task, recall by distance, perplexity, the least used expert's share."""
    found = {}
    balance = Balance(anatomy(loaded.model))
    for task in loaded.parameters.tasks:
        if task in tasks.CLASSIFY:
            asked = tasks.items(task, "final", limit)
            names = tasks.class_labels(task)
            chosen = tasks.label_scores(loaded, task, asked).argmax(1).tolist()
            answers = [names[choice] for choice in chosen]
            found[f"{task}_f1_macro"] = f1_score([item.label for item in asked], answers, average="macro")
            found[f"{task}_items"] = len(asked)
    windows_NT = tasks.text_windows(loaded, "final", 64, WINDOW)
    balance.reset()
    loss = [_loss(loaded, rows_BT) for rows_BT in windows_NT.split(8)]
    found["perplexity"] = float(torch.cat(loss).mean().exp())
    if balance.blocks:
        found["least_expert_share"] = min(min(shares) for shares in balance.shares().values())
    balance.close()
    for distance in DISTANCES:
        found[f"recall_{distance}"] = recall(loaded, distance, prompts)
    return found


def _loss(loaded, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTC = loaded.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits_BTC.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def recall(loaded, distance: int, count: int, seed: int = 1) -> float:
    """Return the share of values reproduced exactly. Greedy generation gives the value if and only if every token of
    it is the likeliest one after the tokens before it, which one forward pass shows."""
    ids_BT, target_BV = tasks.recall_prompts(loaded, distance, count, seed)
    right = 0
    for ids, target in zip(ids_BT.split(4), target_BV.split(4)):
        width = target.shape[1]
        logits = loaded.model(input_ids=torch.cat([ids, target], 1), use_cache=False, logits_to_keep=width + 1).logits
        right += int((logits[:, :-1].argmax(-1) == target).all(1).sum())
    return right / count


def readme(name: str, run: Run, found: dict[str, float]) -> str:
    """Return the README of a stand-in, from its training and its scores."""
    description, recipe = parameters.read(name), run.recipe
    size = sum(parameter.numel() for parameter in run.model.parameters())
    text = ", ".join(sorted({tasks.CORPUS[task] for task in description.tasks if task in tasks.CORPUS}))
    pictures = "; scikit-learn's bundled digits, those of the split `train`" if "digits" in description.tasks else ""
    plans = "" if len(run.plans) == 1 else f" (prolonged: planned for {', then '.join(map(str, run.plans))} steps)"
    if run.revised:
        plans += f" (the lessons were revised at step {', '.join(map(str, run.revised))}; these are not what the "
        plans += "first steps followed)"
    values = {key: f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" for key, value in found.items()}
    legend = (
        "`_f1_macro`: split `final`, label by log-likelihood. `perplexity`: per token, in windows of "
        f"{WINDOW} tokens of held-out text. `recall_N`: share of {RECALL_PROMPTS} values of {tasks.VALUE} random "
        "letters and digits reproduced exactly after N tokens of text."
    )
    if "least_expert_share" in found:
        legend += (
            " `least_expert_share`: tokens of the least used expert of any block over its fair share, on held-out text."
        )
    start = f" It started from the stand-in of {recipe.start_from}." if recipe.start_from else ""
    lines = [
        f"# Stand-in for {description.name}",
        "",
        f"Class `{type(run.model).__name__}`, {size:,} parameters, bfloat16. Dimensions and recipe: "
        f"`parameters/{name}.yaml`. Train again: `python build.py proxies --model {name}`. "
        "This page is written by that command.",
        "",
        f"- Data: `parameters/evaluation/{text}-train.jsonl.xz`{pictures}; random letters and digits for recall.",
        f"- Training: {run.step} of {recipe.steps} steps{plans}, {run.tokens:,} tokens, "
        f"{run.seconds / 60:.0f} minutes on {recipe.threads} thread of a shared processor, seed {recipe.seed}.{start}",
        "",
        "| held-out score | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in values.items()),
        "",
        legend,
        "",
    ]
    return "\n".join(lines)


def in_order(names: list[str]) -> list[str]:
    """Return the models such that one that starts from another's stand-in comes after it."""
    return sorted(names, key=lambda name: (bool(recipe_of(name).start_from), names.index(name)))


def main(arguments: list[str] | None = None) -> int:
    """Train the stand-ins asked for, all by default; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lib.models.proxies", description="Train the stand-ins again.")
    parser.add_argument("--model", action="append", metavar="M", help="only this model; may be repeated")
    chosen = parser.parse_args(arguments).model
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        for name in in_order(chosen or parameters.names()):
            torch.set_num_threads(recipe_of(name).threads)
            train(name)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

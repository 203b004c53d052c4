"""Train the stand-ins: `python -m lib.models.proxies.train [--model M ...]`.

From a parameter file and the frozen text to an ordinary checkpoint folder, `parameters/proxies/<model>`, with a README
whose every number is measured by this command, and `training.json`, how the weights came to be. A recipe has one phase
or two; `--refine` does the second alone, from the checkpoint that is there. A training that was stopped goes on from
its last saved state. Knows files and scores; what is learned and how stand in `lessons` and `training`.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lib.errors import UserError
from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.proxies import tokenizer
from lib.models.proxies.batches import Lessons
from lib.models.proxies.config import Recipe
from lib.models.proxies.loop import Balance, Run
from lib.models.proxies.model_card import RECALL_PROMPTS, WINDOW, history, keep_history, readme
from lib.models.proxies.upcycling import inherit
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks

LOG = logging.getLogger(__name__)
CACHE = Path(os.environ.get("WORKBENCH_CACHE", Path.home() / ".cache" / "workbench"))
SAVE_EVERY, REPORT_EVERY, WATCH_EVERY = 50, 10, 100  # steps
DISTANCES = (256, 512, 1024, 2048)  # tokens between a value and the question for it
EMBEDDING_SIZE = 0.5


@dataclass
class Student:
    """What lessons and tasks need of a model before it is a checkpoint."""

    model: torch.nn.Module
    tokenizer: object
    image_processor: object | None
    parameters: parameters.ModelParameters
    device: str = "cpu"
    scale: str = "proxy"


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
    model = spread(io.build(config, description.architecture, seed=recipe.seed))
    image_processor = make_image_processor(config["vision_config"]) if "vision_config" in config else None
    return Student(model, vocabulary, image_processor, description)


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


def make_image_processor(vision: dict) -> Qwen2VLImageProcessorPil:
    """Return the image_processor of pictures for a vision tower: their size is kept, values go to [-1, 1]."""
    return Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        size={"shortest_edge": tasks.PICTURE**2, "longest_edge": tasks.PICTURE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def identity(name: str) -> str:
    """Return a hash of everything that decides what the first phase learns, except for how long."""
    description = parameters.read(name)
    recipe = {key: value for key, value in description.proxy.training.items() if key not in ("steps", "refine")}
    digest = hashlib.sha256(json.dumps([description.config("proxy"), recipe], sort_keys=True).encode())
    for path in sorted((parameters.PARAMETERS / "evaluation").glob("*-train.jsonl.xz")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def prepare(name: str) -> Run:
    """Return the first phase of the training of model `name`: new, or taken up where it was stopped."""
    recipe = recipe_of(name)
    learner = student(name)
    lessons = Lessons(learner, recipe)
    if recipe.start_from:
        inherit(learner.model, parameters.PARAMETERS / "proxies" / recipe.start_from)
    run = Run(learner.model, lessons, recipe, identity(name))
    return taken_up(name, run, "first")


def prepare_refinement(name: str, model: torch.nn.Module, before: list[dict]) -> Run:
    """Return the second phase: from the weights of `model`, rounded as a checkpoint keeps them, or taken up.

    `before` tells of the phases that `model` has behind it. Raises UserError where the recipe has no second phase.
    """
    if not recipe_of(name).refine:
        raise UserError(f"parameters/{name}.yaml: section proxy.training: no second phase; add the key refine")
    recipe = recipe_of(name).refined()
    learner = student(name)
    learner.model.load_state_dict(rounded(model))
    lasting = {key: value for key, value in asdict(recipe).items() if key != "steps"}
    digest = hashlib.sha256((identity(name) + json.dumps(lasting, sort_keys=True)).encode())
    for value in learner.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    run = Run(learner.model, Lessons(learner, recipe), recipe, digest.hexdigest(), before=before)
    return taken_up(name, run, "second")


def rounded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of `model` in float32, with the values that they have in bfloat16."""
    return {key: value.to(torch.bfloat16).float() for key, value in model.state_dict().items()}


def taken_up(name: str, run: Run, phase: str) -> Run:
    """Return `run` at its last saved state, if there is one; note what is planned now."""
    if run.resume(state_file(name, phase)):
        LOG.info("%s: going on from step %d of %d of the %s phase", name, run.step, run.recipe.steps, phase)
    if run.plans[-1:] != [run.recipe.steps]:
        run.plans.append(run.recipe.steps)
    return run


def state_file(name: str, phase: str = "first") -> Path:
    """Return where the state of an unfinished training lies."""
    return CACHE / "proxies" / f"{name}-{phase}.pt"


def train(name: str, folder: Path | None = None, only_refine: bool = False) -> Path:
    """Train the stand-in of model `name` to the end and write its folder; return the folder.

    `only_refine`: start from the checkpoint that is in `folder`, and do the second phase alone.
    """
    folder = folder or parameters.PARAMETERS / "proxies" / name
    if only_refine:
        before = history(folder)
        if len(before) != 1:
            raise UserError(f"{folder}: has its second phase behind it; train {name} from nothing instead")
        model = io.load_folder(folder, dtype=torch.float32)
    else:
        run = prepare(name)
        follow(name, run, "first")
        if not run.recipe.refine:
            return publish(name, run, folder)
        run.settle()
        model, before = run.model, [run.told()]
    run = prepare_refinement(name, model, before)
    follow(name, run, "second")
    return publish(name, run, folder)


def follow(name: str, run: Run, phase: str) -> None:
    """Do the steps that are left, saving the state and telling the losses now and then."""
    while run.step < run.recipe.steps:
        seen = run.advance()
        if run.step % REPORT_EVERY == 0:
            shown = "  ".join(f"{key} {value:.3f}" for key, value in seen.items())
            LOG.info("%s  step %d of %d  %.0f s  %s", name, run.step, run.recipe.steps, run.seconds, shown)
        if run.step % SAVE_EVERY == 0 or run.step == run.recipe.steps:
            run.save(state_file(name, phase))
        if phase == "second" and (run.step % WATCH_EVERY == 0 or run.step == run.recipe.steps):
            LOG.info("%s  step %d  split search: %s", name, run.step, watch(run))


def watch(run: Run) -> dict[str, float]:
    """Return the scores of the averaged weights on the split `search`, by which recipes are chosen."""
    present = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.model.load_state_dict(run.average)
    run.model.eval()
    run.balance.keep_N = None  # there is another batch to look at
    found = classified(run.lessons.loaded, "search")
    run.model.load_state_dict(present)
    return {key: round(value, 4) for key, value in found.items()}


def publish(name: str, run: Run, folder: Path) -> Path:
    """Write checkpoint, tokenizer, image_processor and README beside `folder`, then put them in its place."""
    run.settle()
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    model = run.model.eval().requires_grad_(False)
    half = rounded(model)
    model.config.dtype = torch.bfloat16
    model.to(torch.bfloat16).load_state_dict(half)
    model.save_pretrained(beside)
    run.lessons.loaded.tokenizer.save_pretrained(beside)
    if run.lessons.loaded.image_processor is not None:
        run.lessons.loaded.image_processor.save_pretrained(beside)
    keep_history(beside, [*run.before, run.told()])
    describe(name, beside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    beside.rename(folder)
    return folder


def describe(name: str, folder: Path) -> None:
    """Score the checkpoint of model `name` in `folder` and write its README."""
    model, description = io.load_folder(folder, dtype=torch.float32), parameters.read(name)
    image_processor = io.load_image_processor(folder) if "vision_config" in description.config("proxy") else None
    found = scores(Student(model, AutoTokenizer.from_pretrained(folder), image_processor, description))
    (folder / "README.md").write_text(readme(name, model, history(folder), found), encoding="utf-8")
    LOG.info("%s: %s", name, found)


@torch.no_grad()
def scores(loaded, limit: int | None = None, prompts: int = RECALL_PROMPTS) -> dict[str, float]:
    """Return the final scores: macro-F1 per task, recall by distance, perplexity, the least used expert's share."""
    found = {}
    balance = Balance(anatomy(loaded.model))
    found |= classified(loaded, "final", limit)
    windows_NT = tasks.text_windows(loaded, "final", 64, WINDOW)
    balance.reset()
    loss = [_loss(loaded, rows_BT) for rows_BT in windows_NT.split(8)]
    found["perplexity"] = float(torch.cat(loss).mean().exp())
    if balance.blocks:
        found["least_expert_share"] = min(min(shares) for shares in balance.shares().values())
    balance.close()
    for distance in DISTANCES:
        found[f"retrieval_{distance}"] = retrieval(loaded, distance, prompts)
    return found


@torch.no_grad()
def classified(loaded, split: str, limit: int | None = None) -> dict[str, float]:
    """Return macro-F1, cross-entropy over the labels (nats) and number of items of each classification task."""
    found = {}
    for task in loaded.parameters.tasks:
        if task in tasks.CLASSIFY:
            asked, names = tasks.items(task, split, limit), tasks.class_labels(task)
            right_N = torch.tensor([names.index(item.label) for item in asked])
            scores_NL = tasks.label_scores(loaded, task, asked)
            found[f"{task}_f1_macro"] = f1_score(right_N, scores_NL.argmax(1), average="macro")
            found[f"{task}_cross_entropy"] = float(cross_entropy(scores_NL.log_softmax(1), right_N))
            found[f"{task}_items"] = len(asked)
    return found


def _loss(loaded, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTC = loaded.model(input_ids=ids_BT, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits_BTC.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def retrieval(loaded, distance: int, count: int, seed: int = 1) -> float:
    """Return the share of values reproduced exactly. Greedy generation gives the value if and only if every token of
    it is the likeliest one after the tokens before it, which one forward pass shows."""
    ids_BT, target_BV = tasks.retrieval_prompts(loaded, distance, count, seed)
    right = 0
    for ids, target in zip(ids_BT.split(4), target_BV.split(4)):
        width = target.shape[1]
        logits = loaded.model(input_ids=torch.cat([ids, target], 1), use_cache=False, logits_to_keep=width + 1).logits
        right += int((logits[:, :-1].argmax(-1) == target).all(1).sum())
    return right / count


def in_order(names: list[str]) -> list[str]:
    """Return the models such that one that starts from another's stand-in comes after it."""
    return sorted(names, key=lambda name: (bool(recipe_of(name).start_from), names.index(name)))


def main(arguments: list[str] | None = None) -> int:
    """Train the stand-ins asked for, all by default; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.models.proxies.train", description="Train the stand-ins again."
    )
    parser.add_argument("--model", action="append", metavar="M", help="only this model; may be repeated")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--refine", action="store_true", help="the second phase alone, from the kept checkpoint")
    only.add_argument("--describe", action="store_true", help="score the kept checkpoint again and rewrite its README")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        for name in in_order(given.model or parameters.names()):
            torch.set_num_threads(recipe_of(name).threads)
            if given.describe:
                describe(name, parameters.PARAMETERS / "proxies" / name)
            else:
                train(name, only_refine=given.refine)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

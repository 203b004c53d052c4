"""Trains the proxy models: `python -m lib.models.proxies.train [--model M ...]`.

From a parameter file and the frozen text, writes an ordinary checkpoint folder, `parameters/proxies/<model>`, with a
README whose every number is measured by this command, and `training.json`, the history of the weights. Training has one
or two phases; `--refine` runs only the second, from the stored checkpoint. An interrupted training resumes from its
last saved state. A published training starts again, or continues if more steps are planned than it has done.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel

from lib.errors import UserError
from lib.files import cache_folder
from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.proxies.evaluation import classification_scores, scores
from lib.models.proxies.loop import TrainingRun
from lib.models.proxies.model_card import read_history, readme, write_history
from lib.models.proxies.proxy_model import ProxyModel, training_config, untrained_proxy
from lib.models.proxies.training_data.batches import TrainingBatches
from lib.models.proxies.upcycling import copy_weights

LOG = logging.getLogger(__name__)
CACHE = cache_folder()
PHASES = ("first", "second")
SAVE_EVERY, REPORT_EVERY, SCORE_EVERY = 50, 10, 100  # steps


def identity(name: str) -> str:
    """Return a hash of everything that determines the first phase, except the number of steps."""
    description = parameters.read(name)
    training = {key: value for key, value in description.training().items() if key not in ("steps", "refine")}
    digest = hashlib.sha256(json.dumps([description.config("proxy"), training], sort_keys=True).encode())
    for path in sorted((parameters.PARAMETERS / "evaluation").glob("*-train.jsonl.xz")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def first_phase(name: str) -> TrainingRun:
    """Return the first phase of the training of model `name`, new or resumed."""
    config = training_config(name)
    proxy = untrained_proxy(name)
    batches = TrainingBatches(proxy, config)
    if config.start_from:
        copy_weights(proxy.model, parameters.PARAMETERS / "proxies" / config.start_from)
    return resumed(name, TrainingRun(proxy.model, batches, config, identity(name)), "first")


def second_phase(name: str, model: torch.nn.Module, earlier_phases: list[dict[str, Any]]) -> TrainingRun:
    """Return the second phase, new or resumed; it starts from the weights of `model`, rounded as in a checkpoint.

    `earlier_phases`: the summaries of the earlier phases of `model`. Raises UserError if no second phase is configured.
    """
    if not training_config(name).refine:
        raise UserError(f"parameters/{name}.yaml: section proxy.training: no second phase; add the key refine")
    config = training_config(name).second_phase()
    proxy = untrained_proxy(name)
    proxy.model.load_state_dict(rounded(model))
    settings = {key: value for key, value in asdict(config).items() if key != "steps"}
    digest = hashlib.sha256((identity(name) + json.dumps(settings, sort_keys=True)).encode())
    for value in proxy.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    batches = TrainingBatches(proxy, config)
    run = TrainingRun(proxy.model, batches, config, digest.hexdigest(), earlier_phases=earlier_phases)
    return resumed(name, run, "second")


def rounded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of `model` in float32, rounded to bfloat16."""
    return {key: value.to(torch.bfloat16).float() for key, value in model.state_dict().items()}


def resumed(name: str, run: TrainingRun, phase: str) -> TrainingRun:
    """Return `run` in its last saved state, if there is one, with the planned number of steps added to its plans.

    A published state is used only if more steps are planned than it has done.
    """
    if run.resume(state_file(name, phase)) or run.resume(published_state(name, phase), below=run.config.steps):
        LOG.info("%s: resumed the %s phase at step %d of %d", name, phase, run.step, run.config.steps)
    if run.plans[-1:] != [run.config.steps]:
        run.plans.append(run.config.steps)
    return run


def state_file(name: str, phase: str = "first") -> Path:
    """Return the path of the state of an unfinished training."""
    return CACHE / "proxies" / f"{name}-{phase}.pt"


def published_state(name: str, phase: str) -> Path:
    """Return the path of the last state of a training whose checkpoint was published."""
    return CACHE / "proxies" / f"{name}-{phase}-published.pt"


def train(name: str, folder: Path | None = None, only_refine: bool = False) -> Path:
    """Train the proxy model `name` to the end and write its folder; return the folder.

    `only_refine`: run only the second phase, from the checkpoint in `folder`.
    """
    folder = folder or parameters.PARAMETERS / "proxies" / name
    publish(name, _to_end(name, folder, only_refine), folder)
    for phase in PHASES[1:] if only_refine else PHASES:
        if state_file(name, phase).is_file():
            state_file(name, phase).replace(published_state(name, phase))
    return folder


def _to_end(name: str, folder: Path, only_refine: bool) -> TrainingRun:
    """Run all phases, or only the second, to the end; return the last phase."""
    if only_refine:
        history = read_history(folder)
        if len(history) != 1:
            raise UserError(f"{folder}: already refined; train {name} from scratch instead")
        model = io.load_folder(folder, dtype=torch.float32)
    else:
        run = first_phase(name)
        run_to_end(name, run, "first")
        if not run.config.refine:
            return run
        run.finish()
        model, history = run.model, [run.summary()]
    run = second_phase(name, model, history)
    run_to_end(name, run, "second")
    return run


def run_to_end(name: str, run: TrainingRun, phase: str) -> None:
    """Run the remaining steps; save the state and log the losses at intervals."""
    while run.step < run.config.steps:
        losses = run.advance()
        last = run.step == run.config.steps
        if run.step % REPORT_EVERY == 0:
            values = "  ".join(f"{key} {value:.3f}" for key, value in losses.items())
            LOG.info("%s  step %d of %d  %.0f s  %s", name, run.step, run.config.steps, run.seconds, values)
        if run.step % SAVE_EVERY == 0 or last:
            run.save(state_file(name, phase))
        if phase == "second" and (run.step % SCORE_EVERY == 0 or last):
            LOG.info("%s  step %d  split search: %s", name, run.step, search_scores(run))


def search_scores(run: TrainingRun) -> dict[str, float]:
    """Return the scores of the averaged weights on the split `search`, used to choose configurations."""
    current = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.model.load_state_dict(run.average)
    run.model.eval()
    run.balance.keep_N = None  # the mask belongs to the last training batch
    values = classification_scores(run.batches.loaded, "search")
    run.model.load_state_dict(current)
    return {key: round(value, 4) for key, value in values.items()}


def publish(name: str, run: TrainingRun, folder: Path) -> Path:
    """Write checkpoint, tokenizer, image processor and README next to `folder`, then replace `folder`; return it."""
    run.finish()
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model = cast(PreTrainedModel, run.model.eval().requires_grad_(False))
    weights = rounded(model)
    model.config.dtype = torch.bfloat16
    run.model.to(torch.bfloat16).load_state_dict(weights)
    model.save_pretrained(part)
    run.batches.loaded.tokenizer.save_pretrained(part)
    if run.batches.loaded.image_processor is not None:
        run.batches.loaded.image_processor.save_pretrained(part)
    write_history(part, [*run.earlier_phases, run.summary()])
    describe(name, part)
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)  # also the leftover of a run that was killed between the renames
    return folder


def describe(name: str, folder: Path) -> None:
    """Score the checkpoint of model `name` in `folder` and write its README."""
    model, description = io.load_folder(folder, dtype=torch.float32), parameters.read(name)
    image_processor = io.load_image_processor(folder) if "vision_config" in description.config("proxy") else None
    values = scores(ProxyModel(model, AutoTokenizer.from_pretrained(folder), image_processor, description))
    (folder / "README.md").write_text(readme(name, model, read_history(folder), values), encoding="utf-8")
    LOG.info("%s: %s", name, values)


def in_order(names: list[str]) -> list[str]:
    """Return the names of the models, with those that start from another proxy model's weights last."""
    return sorted(names, key=lambda name: (bool(training_config(name).start_from), names.index(name)))


def main(arguments: list[str] | None = None) -> int:
    """Train the requested proxy models, or all by default; return the exit code."""
    parser = argparse.ArgumentParser(prog="build.py proxies", description="Train the proxy models again.")
    parser.add_argument("--model", action="append", metavar="M", help="only this model; may be repeated")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--refine", action="store_true", help="only the second phase, from the stored checkpoint")
    only.add_argument("--describe", action="store_true", help="score the stored checkpoint and rewrite its README")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        for name in in_order(options.model or parameters.names_at("proxy")):
            torch.set_num_threads(training_config(name).threads)
            if options.describe:
                describe(name, parameters.PARAMETERS / "proxies" / name)
            else:
                train(name, only_refine=options.refine)
    except UserError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

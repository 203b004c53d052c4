"""The command `apply`: an optimization, or a stack of them, becomes a checkpoint folder of its own, with a model card.

What was saved is loaded again and compared before the folder appears: by the project's own loader always, by plain
transformers where it can read the folder. Runs no notebook and measures nothing; the card quotes the record.
"""

import inspect
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.models import loading
from lib.models.checkpoints import io
from lib.models.loading import Loaded
from lib.models.structure.signature import signature
from lib.models.tasks import tasks
from lib.optimizations.common import recipe
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import method as composing
from lib.report.pages import model_card
from lib.suite.plan.plan import Job

WINDOWS, TOKENS = 2, 64  # of text, on which what was saved is compared
NEAR = 1e-4  # relative difference of logits that another order of sums explains


def apply(job: Job, stack: Path | None, out: Path, results: Path) -> int:
    """Apply the job's optimization (or the recipe in `stack`) to its model and save it in `out`; return the exit code.

    `results` is the result folder whose record the card quotes. Raises UserError where the optimization changes no
    weights, is refused, or cannot be saved; `out` then does not exist.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"--out {out}: is there already; give a folder that does not exist")
    values = job.parameters
    loaded = loading.load(
        job.model,
        job.scale,
        device=values["device"],
        checkpoints=values["checkpoints"] or None,
        random_weights=values["random_weights"],
    )
    steps = recipe.read(stack).stack if stack else [RecipeStep(optimization=job.optimization)]
    optimized = _optimized(loaded, steps, values if stack is None else {}, job.effort)
    if signature(optimized) == signature(loaded.model) and io.weights_hash(optimized) == io.weights_hash(loaded.model):
        raise UserError(
            f"{job.optimization}: changes no weights of {job.model} with these parameters, so there is nothing to save"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        place = Path(folder) / "checkpoint"
        io.save(optimized, place, tokenizer=loaded.tokenizer, image_processor=loaded.image_processor)
        plain = _check(optimized, place, loaded)
        usage = model_card.usage(out.name, plain)
        card = model_card.text(job.optimization if stack is None else stack.name, job, steps, usage, results)
        (place / "README.md").write_text(card, encoding="utf-8")
        shutil.move(place, out)
    print(f"{out}: saved, loaded again, and equal to what was applied")
    print(model_card.usage(str(out), plain))
    return 0


def _optimized(loaded: Loaded, steps: Sequence[RecipeStep], values: Mapping[str, Any], effort: str) -> nn.Module:
    """Return the optimized model: one step takes every parameter of the template that it knows, a stack its recipe."""
    size = settings.read(effort, loaded.scale)
    seed = int(values.get("seed", 0))
    calibration = tasks.calibration(loaded, size.calibration_sequences, size.calibration_tokens, seed)
    if not values:
        return composing.compose(loaded.model, calibration, steps, seed=seed).model
    (step,) = steps
    module = composing.module_of(step.optimization)
    accepted = inspect.signature(module.apply).parameters
    known = {name: value for name, value in values.items() if name in accepted and name != "model"}
    if reason := module.applies_to(loaded.model):
        raise UserError(f"{step.optimization}: {reason}")
    return module.apply(loaded.model, calibration, **known)


@torch.inference_mode()
def _check(optimized: nn.Module, place: Path, loaded: Loaded) -> str | None:
    """Return the class by which plain transformers reads the folder as the same model, or None. Raises UserError where
    our own loader does not.
    """
    dtype = next(parameter.dtype for parameter in optimized.parameters() if parameter.is_floating_point())
    again = io.load_folder(place, dtype=dtype, device=loaded.device)
    if signature(again) != signature(optimized):
        raise UserError("the optimized model is more than a checkpoint can hold (hooks, another attention or cache)")
    if loaded.tokenizer is None:
        ids_BT = torch.randint(0, optimized.config.get_text_config().vocab_size, (WINDOWS, TOKENS))
    else:
        ids_BT = tasks.text_windows(loaded, "final", WINDOWS, TOKENS, 0)
    expected = _logits(optimized, ids_BT)
    if not _near(_logits(again, ids_BT), expected):
        raise UserError("what was saved answers otherwise when it is loaded again; nothing was kept")
    return _plain(place, dtype, ids_BT, expected)


def _plain(place: Path, dtype: torch.dtype, ids_BT: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Return the class by which transformers alone loads the folder, without a missing or unexpected tensor, to equal
    logits; None where there is none.
    """
    from transformers import AutoConfig

    from lib.models.structure.architecture import auto_class

    try:
        kind = auto_class(AutoConfig.from_pretrained(place))
        model, report = kind.from_pretrained(place, dtype=dtype, output_loading_info=True)
        if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
            return None
        return kind.__name__ if _near(_logits(model.eval(), ids_BT), expected) else None
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError, TypeError):
        return None  # another architecture than transformers knows: factors, sparse matrices, uneven blocks


def _logits(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= NEAR * other.abs().max())

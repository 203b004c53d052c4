"""An optimization, or a stack of them, as a checkpoint folder of its own: applied, saved, loaded again and compared.

By the project's own loader always, by plain transformers where it can read the folder. Measures nothing. As a program
(`python -m lib.optimizations.modular_components.saving`) it reads the request as JSON from standard input and answers
with {"loads": class or null, "steps": stems} or {"refused": why}.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.models import loading
from lib.models.checkpoints import io
from lib.models.loading import Loaded
from lib.models.structure.architecture import auto_class
from lib.models.structure.signature import signature
from lib.models.tasks import tasks
from lib.optimizations.common import recipe
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import method as composing

WINDOWS, TOKENS = 2, 64  # of text, on which what was saved is compared
NEAR = 1e-4  # relative difference of logits that another order of sums explains


def save(model: str, steps: Sequence[RecipeStep], parameters: Mapping[str, Any], place: Path) -> str | None:
    """Apply `steps` to `model` and save it in the folder `place`; return the class by which plain transformers reads
    it, or None where only `lib.models.checkpoints.io.load_folder` does.

    `parameters` are those of a run: scale, effort, device and so on; a single step takes from them every one that it
    knows, a stack its own. Raises UserError where no weights change, a step is refused, or the model is more than a
    checkpoint can hold.
    """
    loaded = loading.load(
        model,
        parameters["scale"],
        device=parameters["device"],
        checkpoints=parameters["checkpoints"] or None,
        random_weights=parameters["random_weights"],
    )
    optimized = _optimized(loaded, steps, parameters)
    if signature(optimized) == signature(loaded.model) and io.weights_hash(optimized) == io.weights_hash(loaded.model):
        stems = ", ".join(step.optimization for step in steps)
        raise UserError(f"{stems}: changes no weights of {model} with these parameters, so there is nothing to save")
    io.save(optimized, place, tokenizer=loaded.tokenizer, image_processor=loaded.image_processor)
    return _check(optimized, place, loaded)


def _optimized(loaded: Loaded, steps: Sequence[RecipeStep], parameters: Mapping[str, Any]) -> nn.Module:
    size = settings.read(parameters["effort"], loaded.scale)
    seed = int(parameters.get("seed", 0))
    calibration = tasks.calibration(loaded, size.calibration_sequences, size.calibration_tokens, seed)
    if len(steps) != 1 or steps[0].knobs:
        return composing.compose(loaded.model, calibration, steps, seed=seed).model
    module = composing.module_of(steps[0].optimization)
    if reason := module.applies_to(loaded.model):
        raise UserError(f"{steps[0].optimization}: {reason}")
    accepted = inspect.signature(module.apply).parameters
    own = {name: value for name, value in parameters.items() if name in accepted and name != "model"}
    known = {name: _settled(steps[0].optimization, name, value, loaded) for name, value in own.items()}
    return module.apply(loaded.model, calibration, **known)


def _settled(stem: str, name: str, value: Any, loaded: Loaded) -> Any:
    """Return a parameter's value; where it is -1, "by scale", what the notebook's protocol makes of it."""
    if isinstance(value, bool) or value != -1:
        return value
    protocol = importlib.import_module(f"lib.optimizations.{stem}.experiment")
    if name == "finetune_steps":
        return protocol.steps_of(loaded, value)
    return getattr(protocol, f"default_{name}")(loaded.scale)


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
        config: Any = optimized.config
        ids_BT = torch.randint(0, config.get_text_config().vocab_size, (WINDOWS, TOKENS))
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


def main() -> None:
    """Answer one request: model, optimization, stack (a recipe's path, or null), parameters, place."""
    request = json.load(sys.stdin)
    try:
        stack = request["stack"]
        steps = recipe.read(stack).stack if stack else [RecipeStep(optimization=request["optimization"])]
        loads = save(request["model"], steps, request["parameters"], Path(request["place"]))
        answer: dict[str, Any] = {"loads": loads, "steps": [step.optimization for step in steps]}
    except UserError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

"""The workbench's pruning, as a notebook applies it: `method=sparsegpt` or `method=wanda`, with `from=file` block by
block from file to file; or `channels=RULE`: `activation`, `magnitude`, or `refitted` (by activation, the rest fitted).
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import probe
import torch

from lib.models import loading
from lib.models.structure.anatomy import anatomy
from lib.models.tasks.tasks import TOKENS_AT_ONCE
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks import out_of_core
from lib.optimizations.structured_pruning import method as structured

setting, options = probe.read()
probe.use_threads(setting["threads"])
rows_NT = torch.tensor(setting["calibration"])
text = [{"input_ids": part_BT} for part_BT in rows_NT.split(max(1, TOKENS_AT_ONCE // rows_NT.shape[1]))]
kept: dict[str, Any] = {"sparsity": setting["sparsity"], "method": options.get("method"), "execute": "dense"}


def channels(model: Any, rule: str) -> Any:
    """Return the model without the setting's share of feed-forward channels."""
    parts = [block.feed_forward.down for block in anatomy(model).blocks]
    share = 3 * sum(part.weight.numel() for part in parts) / structured.decoder_parameters(model)
    by = "magnitude" if rule == "magnitude" else "activation"
    chosen: dict[str, Any] = {"ratio": setting["channels"] * share, "granularity": "channels", "saliency": by}
    return structured.apply(model, text, **chosen, compensate=rule == "refitted")


def loaded() -> Any:
    """Return the model as the workbench loads it."""
    return loading.load(setting["model"], "full", dtype=setting["dtype"]).model


if options.get("from") == "file":
    target = Path(sys.argv[2]).with_suffix(".pruned")
    shutil.rmtree(target, ignore_errors=True)
    watch = probe.Stopwatch()
    out_of_core.apply_to_file(setting["folder"], target, text, **kept)
else:
    model = loaded()
    watch = probe.Stopwatch()
    pruned = sparse.apply(model, text, **kept) if "method" in options else channels(model, options["channels"])
values = watch.read() | {"peak_mb": probe.peak_megabytes()}
if options.get("from") == "file":
    model, pruned = loaded(), probe.load(setting | {"folder": str(target)})
    shutil.rmtree(target)
if "method" in options:
    values["zeros"] = probe.zeros(pruned)
else:
    values["channels_left"] = sum(block.feed_forward.down.in_features for block in anatomy(pruned).blocks)
    values["weights_mb"] = probe.stored_bytes(pruned) / 1e6
dense = probe.sample_perplexity(model, setting["windows"])
values["perplexity"] = probe.perplexity(pruned, setting["windows"])
probe.write(values, ["torch", "transformers"], f"dense {dense:.3f} on a short sample")

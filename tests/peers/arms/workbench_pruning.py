"""The workbench's pruning, as a notebook applies it: `method=sparsegpt`, `method=wanda`, or `channels=RULE`, which is
`activation`, `magnitude`, or `refitted` (by activation, the rest fitted to what left).
"""

import time

import probe
import torch

from lib.models import loading
from lib.models.structure.anatomy import anatomy
from lib.models.tasks.tasks import TOKENS_AT_ONCE
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.structured_pruning import method as structured

setting, options = probe.read()
probe.use_threads(setting["threads"])
loaded = loading.load(setting["model"], "full", dtype=setting["dtype"])
rows_NT = torch.tensor(setting["calibration"])
text = [{"input_ids": part_BT} for part_BT in rows_NT.split(max(1, TOKENS_AT_ONCE // rows_NT.shape[1]))]
start = time.perf_counter()
if "method" in options:
    pruned = sparse.apply(loaded.model, text, sparsity=setting["sparsity"], method=options["method"], execute="dense")
else:
    parts = [block.feed_forward.down for block in anatomy(loaded.model).blocks]
    share = 3 * sum(part.weight.numel() for part in parts) / structured.decoder_parameters(loaded.model)
    rule = options["channels"]
    pruned = structured.apply(
        loaded.model,
        text,
        ratio=setting["channels"] * share,
        granularity="channels",
        saliency="magnitude" if rule == "magnitude" else "activation",
        compensate=rule == "refitted",
    )
values = {"minutes": (time.perf_counter() - start) / 60, "peak_mb": probe.peak_megabytes()}
if "method" in options:
    values["zeros"] = probe.zeros(pruned)
else:
    blocks = anatomy(pruned).blocks
    values["channels_left"] = sum(block.feed_forward.down.in_features for block in blocks)
    values["weights_mb"] = probe.stored_bytes(pruned) / 1e6
dense = probe.sample_perplexity(loaded.model, setting["windows"])
values["perplexity"] = probe.perplexity(pruned, setting["windows"])
probe.write(values, ["torch", "transformers"], f"dense {dense:.3f} on a short sample")

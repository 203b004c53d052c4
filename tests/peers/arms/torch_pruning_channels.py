"""Torch-Pruning's channels: the same share of every feed-forward part, chosen by group magnitude (`rule=magnitude`) or
by the Taylor expansion of the loss on the calibration text (`rule=taylor`).

It follows the autograd graph to dependent weights: a channel is removed from gate, up and down projection at once.
"""

import probe
import torch
import torch_pruning
from torch import nn

RULES = {"magnitude": "MagnitudeImportance", "taylor": "TaylorImportance"}

setting, options = probe.read()
probe.use_threads(setting["threads"])
model = probe.load(setting, attn_implementation="eager")
model.requires_grad_(True)
watch = probe.Stopwatch()
others = [
    module
    for name, module in model.named_modules()
    if isinstance(module, (nn.Linear, nn.Embedding)) and not name.endswith(("gate_proj", "up_proj"))
]
pruner = torch_pruning.pruner.BasePruner(
    model,
    example_inputs=torch.tensor([setting["windows"][0][:16]]),
    importance=getattr(torch_pruning.importance, RULES[options["rule"]])(),
    pruning_ratio=setting["channels"],
    ignored_layers=others,
    forward_fn=lambda whole, ids_1T: whole(input_ids=ids_1T, use_cache=False).logits,
)
if options["rule"] == "taylor":
    for row in setting["calibration"]:
        ids_1T = torch.tensor([row])
        model(input_ids=ids_1T, labels=ids_1T, use_cache=False).loss.backward()
pruner.step()
model.zero_grad(set_to_none=True)
values = watch.read() | {"peak_mb": probe.peak_megabytes()}
left = sum(module.out_features for name, module in model.named_modules() if name.endswith("gate_proj"))
values |= {
    "channels_left": left,
    "weights_mb": probe.stored_bytes(model) / 1e6,
    "perplexity": probe.perplexity(model, setting["windows"]),
}
probe.write(
    values,
    ["torch-pruning", "torch", "transformers"],
    "reads no text" if options["rule"] == "magnitude" else "reads the calibration text",
)

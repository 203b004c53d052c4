"""A stopwatch: stock transformers and one clock around one call. Any other figure has to agree with it."""

import probe
import torch

setting, _ = probe.read()
probe.use_threads(setting["threads"])
model = probe.load(setting)
prompt_1T = torch.tensor([setting["prompt"]])


@torch.inference_mode()
def first_token() -> int:
    """Return the first greedy token after the prompt."""
    return int(model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())


values = {"prefill_ms": 1000 * probe.median_seconds(first_token, setting["rounds"]), "peak_mb": probe.peak_megabytes()}
probe.write(values, ["torch", "transformers"])

"""The workbench's rates, as a notebook reads them: `bits=16` as loaded, `bits=8` and `bits=4` weight-only."""

import statistics

import probe
import torch

from lib.measure.timing import interleaved, workloads
from lib.models import loading
from lib.optimizations.common.compression.weight_only import weight_only

setting, options = probe.read()
probe.use_threads(setting["threads"])
bits = int(options.get("bits", 16))
loaded = loading.load(setting["model"], "full", dtype=setting["dtype"])
model = loaded.model if bits == 16 else weight_only(loaded.model, bits)
loaded.model = model  # frees the weights that were quantized
prompt_1T = torch.tensor([setting["prompt"]])
work = {
    "prefill": workloads.prefill(model, prompt_1T),
    "decode": workloads.steps(model, prompt_1T, setting["new_tokens"]),
}
timed = interleaved.rounds(work, setting["rounds"], fewest=1, repeats=0)
seconds = {name: statistics.median(values) for name, values in timed.seconds.items()}
busy = {name: statistics.median(values) for name, values in timed.cpu_seconds.items()}
values = {f"{name}_tokens_per_cpu_second": work[name].tokens / busy[name] for name in work}
values |= {f"{name}_tokens_per_second": work[name].tokens / seconds[name] for name in work}
values |= {
    "prefill_ms": 1000 * seconds["prefill"],
    "bits_per_weight": 8 * probe.stored_bytes(model) / setting["parameters"],
    "peak_mb": probe.peak_megabytes(),
}
probe.write(values, ["torch", "transformers"])

"""Code shared by all arms: read the setting, load stock models, time, read the peak, score windows, write the result.

An arm is a script `ARM.py SETTING.json RESULT.json [KEY=VALUE …]` that runs in its own environment. This file has to
run in each of them, so it does not depend on the workbench, any peer, or the release of transformers.
"""

import importlib.metadata
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def read() -> tuple[dict[str, Any], dict[str, str]]:
    """Return the setting and the KEY=VALUE options of the command line; set the threads."""
    setting = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return setting, dict(option.split("=", 1) for option in sys.argv[3:])


def write(values: dict[str, float], packages: Sequence[str], note: str = "") -> None:
    """Write the arm's result: one number per metric, the package versions, and notes for the reader."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = {"values": values, "versions": versions, "note": note}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def use_threads(count: int) -> None:
    """Let torch compute with `count` threads, whatever the environment says."""
    import torch

    torch.set_num_threads(count)


def load(setting: dict[str, Any], **options: Any) -> Any:
    """Return the checkpoint as stock transformers loads it, in the setting's dtype."""
    import torch
    import transformers

    folder = setting["folder"]
    config = transformers.AutoConfig.from_pretrained(folder)
    stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    theta = stored.get("rope_parameters", {}).get("rope_theta")
    if theta and not hasattr(config, "rope_parameters"):  # before transformers 5 it had its own key
        config.rope_theta = theta
    dtype = getattr(torch, setting["dtype"])  # the argument's name differs between releases
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, **options).to(dtype).eval()


class Stopwatch:
    """Minutes since creation, in wall-clock time and in processor time of this process (all threads). On a busy machine
    the latter says more.
    """

    def __init__(self) -> None:
        self.start, self.busy = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both times as result values."""
        wall, busy = time.perf_counter() - self.start, time.process_time() - self.busy
        return {"minutes": wall / 60, "cpu_minutes": busy / 60}


def median_seconds(call: Callable[[], object], rounds: int, warmup: int = 1) -> float:
    """Return the median seconds of `rounds` calls, after `warmup` calls that are not timed."""
    seconds = []
    for turn in range(warmup + rounds):
        start = time.perf_counter()
        call()
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_megabytes() -> float:
    """Return the peak memory of this process so far, in MB (10⁶ bytes): its resident set, including libraries."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")) / 1e6
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most * (1 if sys.platform == "darwin" else 1024) / 1e6


def perplexity(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of windows of token ids, each read independently, with losses in float32."""
    import torch

    losses = []
    with torch.inference_mode():
        for window in windows:
            ids_1T = torch.tensor([window])
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits_TV[:-1], ids_1T[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def sample_perplexity(model: Any, windows: Sequence[Sequence[int]]) -> float:
    """Return the perplexity of two short pieces of the windows. It shows that two environments load the same model, and
    its few logits do not raise the peak.
    """
    return perplexity(model, [window[:64] for window in windows[:2]])


def decoder_matrices(model: Any) -> list[Any]:
    """Return the weights of all linear layers but the head."""
    import torch

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [module.weight for name, module in linear if not name.endswith("lm_head")]


def zeros(model: Any) -> float:
    """Return the share of zeros among the weights of the decoder's matrices."""
    weights = decoder_matrices(model)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


def stored_bytes(model: Any) -> int:
    """Return the bytes of all parameters and buffers, counting shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

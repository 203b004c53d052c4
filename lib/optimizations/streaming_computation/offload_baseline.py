"""accelerate's offloading, the usual alternative to streaming, timed against a streamed model.

Offloading to the disk keeps every weight in its own file and loads it before its module runs, one after the other.
Offloading to the CPU keeps weights in main memory behind the same hooks; on a CPU this moves nothing and shows the cost
of the hooks. Independent of how streaming works.
"""

import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from lib.measure.metrics import measurement, paired_samples
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.timing import disturbance, interleaved, workloads
from lib.measure.timing.workloads import Workload
from lib.models.checkpoints import io, placement
from lib.models.decoding import mla_absorption
from lib.models.structure.anatomy import anatomy
from lib.optimizations.streaming_computation import read_bound
from lib.optimizations.streaming_computation.limited import children

METRIC = "decode_tokens_per_second"
BLOCKS = 6
KINDS = ("disk", "cpu")


def place() -> str:
    """Return a phrase for where the offloaded weights lie: temporary folders may be in memory."""
    return "files in memory" if children.in_memory(tempfile.gettempdir()) else "the disk"


def disk(model: nn.Module, folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Offload `model` to `folder` with accelerate, in place, to compute on `device`; return the model."""
    disk_offload(model, str(folder), execution_device=torch.device(device), preload_module_classes=_whole(model))
    return model


def cpu(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Offload `model` to main memory with accelerate, in place, to compute on `device`; return the model."""
    cpu_offload(model, execution_device=torch.device(device), preload_module_classes=_whole(model))
    return model


def _whole(model: nn.Module) -> list[str] | None:
    """Return the classes whose weights must be loaded together: absorbed attention uses a matrix without calling the
    module that holds it.
    """
    attentions = (block.attention.module for block in anatomy(model).blocks if block.attention.kind == "latent")
    return sorted({type(module).__name__ for module in attentions}) or None


def compare(
    model: nn.Module, folder: Path | str, prompt_BT: torch.Tensor, steps: int
) -> tuple[dict[str, Measurement], bool]:
    """Return the decoding rate of a streamed `model` against each kind of offloading, and whether all tokens are equal.

    The baseline of each measurement is accelerate's offloading of the checkpoint in `folder`. The noise floor comes
    from an A/A control: the streamed model against itself in the same rounds. Unavailable, with the reason, if there
    is no room for it.
    """
    names = {kind: f"decode, against accelerate, {kind}" for kind in KINDS}
    if reason := no_room(read_bound.stream_of(model).plan.total_bytes):
        return {kind: measurement.unavailable(METRIC, name, reason) for kind, name in names.items()}, True
    work, dtype = workloads.steps(model, prompt_BT, steps), next(model.parameters()).dtype
    measurements, all_same = {}, True
    for kind in KINDS:
        pairs, control, same = pairs_with(work, folder, kind, dtype, prompt_BT)
        measurements[kind] = paired_samples.from_pairs(METRIC, names[kind], pairs, work.new_tokens, control)
        all_same &= same
    return measurements, all_same


def no_room(total: int) -> str:
    """Return why weights of `total` bytes cannot be offloaded; empty if they can.

    accelerate first loads them whole, in addition to everything else in memory, and writes them to the temporary disk.
    """
    free, place = placement.free_bytes("cpu"), tempfile.gettempdir()
    if total > placement.WEIGHTS_SHARE * free:
        return f"accelerate loads the whole model first: {total / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB free"
    if total > (disk := shutil.disk_usage(place).free):
        return f"another {total / 1e9:.1f} GB of weights do not fit into the {disk / 1e9:.1f} GB free in {place}"
    return ""


def pairs_with(
    work: Workload, folder: Path | str, kind: str, dtype: torch.dtype, prompt_BT: torch.Tensor, blocks: int = BLOCKS
) -> tuple[Pairs, Pairs, bool]:
    """Return the pairs of accelerate's offloading of the checkpoint in `folder` against `work`, the pairs of `work`
    against itself in the same rounds, and whether tokens are equal.

    `kind`: "disk" or "cpu". The offloaded model decodes latents absorbed. Offloading to the disk takes another copy of
    the weights there during the call.
    """
    model = mla_absorption.absorb(io.load_folder(folder, dtype=dtype))
    device = str(work.conditions["device"])
    with tempfile.TemporaryDirectory(prefix="offloaded-") as place:
        model = disk(model, place, device) if kind == "disk" else cpu(model, device)
        offloaded = workloads.steps(model, prompt_BT, work.new_tokens)
        arms = {"offloaded": offloaded, "streamed": work, "again": work}
        watched: dict[str, Any] = {"repeats": blocks, "disturbance": disturbance.watch}
        timed = interleaved.rounds(arms, blocks, synchronize=work.synchronize, **watched)
    outputs = [arm.output_BN.cpu() for arm in (offloaded, work) if arm.output_BN is not None]
    same = len(outputs) == 2 and torch.equal(*outputs)
    del model, offloaded
    gc.collect()  # models hold reference cycles
    return timed.pairs("offloaded", "streamed"), timed.pairs("streamed", "again"), same

"""Decoding under a real memory limit: streamed weights, a plain mapping of the same file, and accelerate's offloading.

Each runs in a separate process. Its control group may hold the process's memory without weights, plus the allowance of
weights, in private memory or in the page cache. Without such a limit, a warm page cache holds the model whatever a
process is allowed. Independent of how weights are streamed.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lib import memory_limits
from lib.errors import UserError
from lib.measure.metrics import measurement, paired_samples, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.timing import interleaved
from lib.models.checkpoints.folder import weight_files
from lib.optimizations.streaming_computation.limited import children, control_group
from lib.optimizations.streaming_computation.limited.child import OFFLOADED
from lib.optimizations.streaming_computation.limited.children import SLACK, Child

METRIC, WORKLOAD = "decode_tokens_per_second", "decode within the allowance, page cache included"
OFFLOADING = "decode within the allowance, against accelerate, disk"
BLOCKS = 6
ANSWERED = "tokens", "disk_bytes"
AGAIN = "again"  # the A/A arm: the baseline in a second process with its own copy, if there is room
SECOND_PROCESS = "a second process of the plain mapping"
LEFT_OUT = ("memory_ratio", "page_cache", "device")  # set per arm, always on a CPU


@dataclass(frozen=True)
class LimitedDecoding:
    """Decoding with streamed against plainly mapped weights under one limit.

    `details`: the limits and the bytes from the disk, or the reason if nothing was decoded. `control`: the A/A control.
    `control_is`: what the control compares, a second process of the plain mapping or, without room for one, its only
    process again. `offloading`: streamed against accelerate's offloading to the disk under the same limit.
    """

    rate: Measurement
    details: dict[str, Any] = field(default_factory=dict)
    same_tokens: bool | None = None
    control: list[Measurement] = field(default_factory=list)
    control_is: str = SECOND_PROCESS
    offloading: list[Measurement] = field(default_factory=list)

    def reading(self) -> str:
        """Return sentences on the rates under the limit, and on an inconclusive verdict; or the reason for no rates."""
        if self.rate.ratio is None or self.rate.baseline is None or self.rate.optimized is None:
            return f"Under a limit that counts page cache, nothing was decoded. The reason: {self.rate.reason}."
        share = 100 * self.details["allowance_bytes"] / self.details["weights_bytes"]
        undecided = " This run does not tell the first two apart." if self.rate.verdict == "inconclusive" else ""
        return (
            f"If page cache counts and {share:.0f} % of the weights fit, streaming decodes "
            f"{self.rate.optimized:.3g} tokens per second. A plain mapping of the same file decodes "
            f"{self.rate.baseline:.3g}{self._offloaded()}.{undecided}"
        )

    def _offloaded(self) -> str:
        rates = [row.baseline for row in self.offloading if row.baseline is not None]
        return f", accelerate's offloading {rates[0]:.3g}" if rates else ""


def compare(
    folder: Path,
    prompt_1T: torch.Tensor,
    steps: int,
    memory_ratio: float,
    options: Mapping[str, Any],
    *,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> LimitedDecoding:
    """Return decoding of `steps` tokens, streamed (optimized) against plainly mapped (baseline), in turns.

    The A/A control is a second process of the baseline, if there is room for it. `options` are those of
    `method.open_folder` without the memory; the baseline always decodes latents absorbed. Each arm reads its own copy
    of the checkpoint, whose pages are charged to its own group. Unavailable, with the reason, if no group can be
    created.
    """
    if not settings.wants("performance"):
        return _unavailable(settings.why_left_out())
    if torch.device(str(options.get("device", "cpu"))).type != "cpu":
        return _unavailable("weights on a device are not held by page cache")
    options = {name: value for name, value in options.items() if name not in LEFT_OUT}
    try:
        return _compared(folder, prompt_1T, steps, memory_ratio, options, blocks, seed)
    except UserError as error:
        return _unavailable(str(error))


def _unavailable(reason: str) -> LimitedDecoding:
    return LimitedDecoding(measurement.unavailable(METRIC, WORKLOAD, reason), {"reason": reason})


def _compared(
    folder: Path,
    prompt_1T: torch.Tensor,
    steps: int,
    memory_ratio: float,
    options: Mapping[str, Any],
    blocks: int,
    seed: int,
) -> LimitedDecoding:
    total = weights_bytes(folder)
    allowance = round(memory_ratio * total)
    require_binding(total, allowance)
    arms = _arms(options, "mapped", memory_ratio)
    if not (short := no_room(len(arms) + 1, total, allowance)):
        arms[AGAIN] = arms["baseline"]
    with ExitStack() as stack:
        arm = {name: stack.enter_context(_child(folder, prompt_1T, steps, chosen)) for name, chosen in arms.items()}
        limits = {name: child.limit(allowance) for name, child in arm.items()}
        watch = partial(children.watch, [*arm.values()])
        turns = {AGAIN: arm["baseline"], **arm}
        timed = interleaved.rounds(turns, blocks, seed=seed, disturbance=watch)
        groups = {name: child.group for name, child in arm.items() if child.group is not None}
        cached = {name: group.cached_bytes() for name, group in groups.items()}
        read = {name: child.answers[-1]["disk_bytes"] for name, child in arm.items()}
        require_counted(cached.get("baseline", allowance), read["baseline"], allowance)
        own = {name: group.private_bytes() for name, group in groups.items()}
        private = {name: child.private_bytes for name, child in arm.items()}
        same = arm["baseline"].answers[-1]["tokens"] == arm["optimized"].answers[-1]["tokens"]
    control = timed.pairs("baseline", AGAIN)
    rate = paired_samples.from_pairs(METRIC, WORKLOAD, timed.pairs("baseline", "optimized"), steps, control)
    details = {"weights_bytes": total, "allowance_bytes": allowance, "limit_bytes": limits}
    details |= {"weights_in_private_memory_bytes": private, "page_cache_bytes": cached}
    details["private_memory_bytes"] = own
    details |= {"disk_bytes_of_a_call": read, "baseline": "plain mapping"}
    control_is = f"the process of the plain mapping, timed a second time: {short}" if short else SECOND_PROCESS
    details |= {"control": control_is}
    repeated = [paired_samples.from_pairs(METRIC, WORKLOAD, control, steps, 0.0)]
    return LimitedDecoding(rate, details, same, repeated, control_is)


def _arms(options: Mapping[str, Any], rival: str, memory_ratio: float) -> dict[str, dict[str, Any]]:
    """Return the options of both arms: the `rival`, which decodes latents absorbed, and the streamed model."""
    return {
        "baseline": {**options, "absorbed": True, rival: True},
        "optimized": {**options, "memory_ratio": memory_ratio},
    }


def against_offloading(
    folder: Path,
    prompt_1T: torch.Tensor,
    steps: int,
    memory_ratio: float,
    options: Mapping[str, Any],
    *,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> tuple[Measurement, dict[str, Any]]:
    """Return decoding of `steps` tokens, streamed (optimized) against accelerate's offloading to the disk (baseline),
    in turns under the limit of `compare`, and its details.

    The noise floor is that of the streamed process against itself in the same rounds. Unavailable, with the reason, if
    there is no room for it or no group can be created.
    """
    options = {name: value for name, value in options.items() if name not in LEFT_OUT}
    total = weights_bytes(folder)
    allowance = round(memory_ratio * total)
    arms = _arms(options, OFFLOADED, memory_ratio)
    try:
        require_binding(total, allowance)
        if short := no_room(3, total, total):  # a third copy: accelerate's own files; it first loads the model whole
            raise UserError(short)
        with ExitStack() as stack:
            arm = {name: stack.enter_context(_child(folder, prompt_1T, steps, own)) for name, own in arms.items()}
            limits = {name: child.limit(allowance) for name, child in arm.items()}
            turns, watch = {**arm, AGAIN: arm["optimized"]}, partial(children.watch, [*arm.values()])
            timed = interleaved.rounds(turns, blocks, seed=seed, repeats=blocks, disturbance=watch)
            tokens, read = ({name: each.answers[-1][key] for name, each in arm.items()} for key in ANSWERED)
            if (group := arm["baseline"].group) is not None:
                require_counted(group.cached_bytes(), read["baseline"], allowance)
    except UserError as error:
        return measurement.unavailable(METRIC, OFFLOADING, str(error)), {"reason": str(error)}
    control = timed.pairs("optimized", AGAIN)
    rate = paired_samples.from_pairs(METRIC, OFFLOADING, timed.pairs("baseline", "optimized"), steps, control)
    same = tokens["baseline"] == tokens["optimized"]
    return rate, {"limit_bytes": limits, "disk_bytes_of_a_call": read, "same_tokens": same}


def no_room(copies: int, total: int, allowance: int) -> str:
    """Return why there is no room for `copies` processes at once, or an empty string.

    Each needs its own copy of the weights (`total` bytes) on disk and memory for the allowance.
    """
    place = tempfile.gettempdir()
    disk, memory = shutil.disk_usage(place).free, memory_limits.free_memory_bytes()
    if disk < copies * total:
        return f"{copies} copies of {total / 1e9:.1f} GB do not fit into the {disk / 1e9:.1f} GB free in {place}"
    if memory < copies * (allowance + SLACK):
        return f"{copies} times {allowance / 1e9:.1f} GB do not fit into the {memory / 1e9:.1f} GB of free memory"
    return ""


def weights_bytes(folder: Path) -> int:
    """Return the bytes of the weight files that are read from a checkpoint."""
    return sum(file.stat().st_size for file in weight_files(folder))


def require_binding(total: int, allowance: int) -> None:
    """Raise UserError if the weights exceed the allowance, in bytes, by so little that a limit would not bind."""
    if total - allowance < 4 * SLACK:
        raise UserError(
            f"weights of {total / 1e6:.0f} MB exceed the allowance by so little that a limit would not bind: a "
            f"process's own memory varies by {SLACK / 1e6:.0f} MB"
        )


def require_counted(cached: int, read: int | None, allowance: int) -> None:
    """Raise UserError if the pages of mapped weights are not charged to their process's group, so no limit evicts them.

    That is so if the group caches almost none of them (`cached`, in bytes) and a call rereads almost none from the disk
    (`read`). If a call does read them from the disk, the process's own memory took the allowance.
    """
    if max(cached, read or 0) < min(SLACK, allowance // 2):
        raise UserError(
            f"the pages of mapped weights are counted in no control group here ({cached / 1e6:.1f} MB in that of their "
            "process), so a limit does not apply to them; set TMPDIR to a folder on another disk"
        )


@contextmanager
def _child(folder: Path, prompt_1T: torch.Tensor, steps: int, options: Mapping[str, Any]) -> Iterator[Child]:
    """Yield a process that has read the prompt, in its own group and with its own copy of the checkpoint."""
    with control_group.group() as group, children.folder_on_disk() as place:
        copied = children.copy(folder, place / "checkpoint")
        request = {"path": str(copied), "options": dict(options), "steps": steps}
        request |= {"prompt": prompt_1T.cpu().tolist(), "threads": torch.get_num_threads()}
        with children.started(children.module("child"), request, group) as child:
            yield child

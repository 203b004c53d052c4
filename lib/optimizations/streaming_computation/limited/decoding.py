"""Decoding where memory is really limited: streamed weights, a plain mapping of the same file, and accelerate's
offloading, each in a separate process whose control group may hold what it needs without weights, plus the allowance of
weights, whether in its own memory or in the page cache.

With a warm page cache the machine holds the model whatever a process is allowed; here it does not. Knows nothing of how
weights are streamed.
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
AGAIN = "again"  # the arm that does what the baseline does: where it fits, in a process and on a copy of its own
SECOND_PROCESS = "a second process of the plain mapping"
LEFT_OUT = ("memory_ratio", "page_cache", "device")  # each arm has its own memory, on a CPU


@dataclass(frozen=True)
class LimitedDecoding:
    """Streamed against plainly mapped weights under one limit; `reason` says why there is none of it. `details` hold
    the limits and what came from the disk, `control` the A/A control, and `control_is` what that is: a second process
    of the plain mapping, or where there is no room for one its only process once more. `offloading`: streamed against
    accelerate's offloading to the disk under the same limit, a row for each arm that was asked for.
    """

    rate: Measurement
    details: dict[str, Any] = field(default_factory=dict)
    same_tokens: bool | None = None
    control: list[Measurement] = field(default_factory=list)
    control_is: str = SECOND_PROCESS
    offloading: list[Measurement] = field(default_factory=list)

    def reading(self) -> str:
        """Return sentences: the rates under the limit, and that no verdict tells the first two apart; or why there are
        none.
        """
        if self.rate.ratio is None or self.rate.baseline is None or self.rate.optimized is None:
            return f"Under a limit that counts page cache nothing was decoded. The reason: {self.rate.reason}."
        share = 100 * self.details["allowance_bytes"] / self.details["weights_bytes"]
        undecided = " This run does not tell the first two apart." if self.rate.verdict == "inconclusive" else ""
        return (
            f"Where page cache counts, and {share:.0f} % of the weights fit, streaming decodes "
            f"{self.rate.optimized:.3g} tokens a second. A plain mapping of the same file decodes "
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
    """Return decoding of `steps` tokens streamed (optimized) against plainly mapped (baseline), in turns, with a second
    process of the baseline as the A/A control where there is room for it.

    `options` are those of `method.open_folder` beside the memory; the baseline decodes latents absorbed in any case.
    Each arm reads a copy of the checkpoint of its own, whose pages its own group pays for. Unavailable, with the
    reason, where no group can be made.
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
    """Return the options of both arms: the rival's, which decodes latents absorbed, and the streamed one's."""
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
    """Return decoding of `steps` tokens streamed (optimized) against accelerate's offloading to the disk (baseline)
    under the limit of `compare`, in turns, and its details. The noise floor is that of the streamed process against
    itself in the same rounds. Unavailable, with the reason, where there is no room for it or no group can be made.
    """
    options = {name: value for name, value in options.items() if name not in LEFT_OUT}
    total = weights_bytes(folder)
    allowance = round(memory_ratio * total)
    arms = _arms(options, OFFLOADED, memory_ratio)
    try:
        require_binding(total, allowance)
        if short := no_room(3, total, total):  # its files beside the checkpoint; before, it loads the model whole
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
    """Return why so many processes, each with a copy of the weights (`total` bytes) of its own and with memory for the
    allowance, have no room beside each other; empty where they have.
    """
    place = tempfile.gettempdir()
    disk, memory = shutil.disk_usage(place).free, memory_limits.free_memory_bytes()
    if disk < copies * total:
        return f"{copies} copies of {total / 1e9:.1f} GB do not fit into the {disk / 1e9:.1f} GB free in {place}"
    if memory < copies * (allowance + SLACK):
        return f"{copies} times {allowance / 1e9:.1f} GB do not fit into the {memory / 1e9:.1f} GB of free memory"
    return ""


def weights_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weight files, of those that are read."""
    return sum(file.stat().st_size for file in weight_files(folder))


def require_binding(total: int, allowance: int) -> None:
    """Raise UserError where so little lies beyond the allowance, in bytes, that a limit would not bind."""
    if total - allowance < 4 * SLACK:
        raise UserError(
            f"of weights of {total / 1e6:.0f} MB so little lies beyond the allowance that a limit would not bind: a "
            f"process's own memory scatters by {SLACK / 1e6:.0f} MB"
        )


def require_counted(cached: int, read: int | None, allowance: int) -> None:
    """Raise UserError where the group of mapped weights holds next to nothing of them (`cached`, in bytes) and a call
    reads next to nothing again from the disk (`read`): then their pages are counted elsewhere, and no limit drives them
    out. Where they come from the disk at every call, the process's own memory took the allowance.
    """
    if max(cached, read or 0) < min(SLACK, allowance // 2):
        raise UserError(
            f"the pages of mapped weights are counted in no control group here ({cached / 1e6:.1f} MB in that of their "
            "process), so that a limit does not hold for them; set TMPDIR to a folder on another disk"
        )


@contextmanager
def _child(folder: Path, prompt_1T: torch.Tensor, steps: int, options: Mapping[str, Any]) -> Iterator[Child]:
    """Yield a process that has read the prompt, in a group of its own and with a copy of the checkpoint of its own."""
    with control_group.group() as group, children.folder_on_disk() as place:
        copied = children.copy(folder, place / "checkpoint")
        request = {"path": str(copied), "options": dict(options), "steps": steps}
        request |= {"prompt": prompt_1T.cpu().tolist(), "threads": torch.get_num_threads()}
        with children.started(children.module("child"), request, group) as child:
            yield child

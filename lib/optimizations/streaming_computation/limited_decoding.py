"""Decoding where memory is really limited: streamed weights and a plain mapping of the same file, each in a separate
process whose control group may hold what it needs without weights, plus the allowance of weights in page cache.

With a warm page cache the machine holds the model whatever a process is allowed; here it does not. Knows nothing of how
weights are streamed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.timing import disturbance, interleaved
from lib.models.checkpoints.weight_file import WeightFile
from lib.optimizations.streaming_computation import control_group
from lib.optimizations.streaming_computation.control_group import ControlGroup

ROOT = Path(__file__).resolve().parents[3]
METRIC, WORKLOAD = "decode_tokens_per_second", "decode within the allowance, page cache included"
BLOCKS = 6
SLACK = 2**23  # bytes by which a process's own memory scatters from call to call
MAPPED = {"memory_ratio": 1.0, "page_cache": "keep"}  # every weight mapped and none given back: the system decides


@dataclass(frozen=True)
class LimitedDecoding:
    """Streamed against plainly mapped weights under one limit; `reason` says why there is none of it. `details` hold
    the limits and what came from the disk.
    """

    rate: Measurement
    details: dict[str, Any] = field(default_factory=dict)
    same_tokens: bool | None = None

    def reading(self) -> str:
        """Return two sentences: the rates under the limit, or why there are none."""
        if self.rate.ratio is None or self.rate.baseline is None or self.rate.optimized is None:
            return f"Under a limit that counts page cache nothing was decoded. The reason: {self.rate.reason}."
        share = 100 * self.details["allowance_bytes"] / self.details["weights_bytes"]
        return (
            f"Where page cache counts, and {share:.0f} % of the weights fit, streaming decodes "
            f"{self.rate.optimized:.3g} tokens a second. A plain mapping of the same file decodes "
            f"{self.rate.baseline:.3g}."
        )


@dataclass
class Child:
    """A process that decodes in its group, as an arm to be timed. `disk_bytes` and `tokens` are of its last call."""

    process: subprocess.Popen
    group: ControlGroup
    disk_bytes: list[int | None] = field(default_factory=list)
    tokens: list | None = None

    def __call__(self) -> None:
        answer = self.ask("go")
        self.disk_bytes.append(answer["disk_bytes"])
        self.tokens = answer["tokens"]

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line and return the answer. Raises UserError where the process has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise UserError(f"the process in the control group ended with {code}, under its limit or before")
        return json.loads(answer)


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
    """Return decoding of `steps` tokens streamed (optimized) against plainly mapped (baseline), in turns.

    `options` are those of `method.open_folder` beside the memory. Each arm reads a copy of the checkpoint of its own,
    whose pages its own group pays for. Unavailable, with the reason, where no group can be made.
    """
    if not settings.wants("performance"):
        return _unavailable(settings.why_left_out())
    options = {name: value for name, value in options.items() if name not in MAPPED}
    if torch.device(str(options.get("device", "cpu"))).type != "cpu":
        return _unavailable("weights on a device are not held by page cache")
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
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    allowance = round(memory_ratio * total)
    if total - allowance < 4 * SLACK:
        raise UserError(
            f"of weights of {total / 1e6:.0f} MB so little lies beyond the allowance that a limit would not bind: a "
            f"process's own memory scatters by {SLACK / 1e6:.0f} MB"
        )
    arms = {"baseline": {**options, **MAPPED}, "optimized": {**options, "memory_ratio": memory_ratio}}
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(_child(folder, prompt_1T, steps, chosen)) for name, chosen in arms.items()
        }
        limits = {name: child.group.private_bytes() + allowance + SLACK for name, child in children.items()}
        for name, child in children.items():
            child.group.limit(limits[name])
        turns = {**children, "again": children["baseline"]}
        timed = interleaved.rounds(turns, blocks, seed=seed, disturbance=disturbance.watch)
        cached = {name: child.group.cached_bytes() for name, child in children.items()}
        read = {name: child.disk_bytes[-1] for name, child in children.items()}
        same = children["baseline"].tokens == children["optimized"].tokens
    control = timed.pairs("baseline", "again")
    rate = measurement.from_pairs(METRIC, WORKLOAD, timed.pairs("baseline", "optimized"), steps, control)
    details = {"weights_bytes": total, "allowance_bytes": allowance, "limit_bytes": limits}
    details |= {"page_cache_bytes": cached, "disk_bytes_of_a_call": read, "baseline": "plain mapping"}
    return LimitedDecoding(rate, details, same)


@contextmanager
def _child(folder: Path, prompt_1T: torch.Tensor, steps: int, options: Mapping[str, Any]) -> Iterator[Child]:
    """Yield a process that has read the prompt, in a group of its own and with a copy of the checkpoint of its own."""
    with control_group.group() as group, tempfile.TemporaryDirectory(prefix="limited-") as place:
        if _in_memory(place):
            raise UserError(f"{place} lies in memory, not on a disk; set TMPDIR to a folder on a disk")
        copied = _copy(folder, Path(place) / "checkpoint")
        request = {"members": str(group.members), "folder": str(copied), "options": dict(options), "steps": steps}
        request |= {"prompt": prompt_1T.cpu().tolist(), "threads": torch.get_num_threads()}
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.limited_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            child = Child(process, group)
            child.ask(json.dumps(request))
            yield child
        finally:
            process.kill()
            process.communicate()


def _copy(folder: Path, target: Path) -> Path:
    """Copy a checkpoint and drop the copy from the page cache, so that whoever reads it pays for its pages."""
    shutil.copytree(folder, target)
    file = WeightFile(target)
    file.forget()
    file.close()
    return target


def _in_memory(place: str) -> bool:
    """Return whether a folder lies in a file system that is memory itself."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    holding = [(point, kind) for point, kind in mounts if Path(place).is_relative_to(point)]
    return max(holding, key=lambda pair: len(pair[0]), default=("", ""))[1] in ("tmpfs", "ramfs")

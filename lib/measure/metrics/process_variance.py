"""The standard deviation τ of a paired effect between processes, for timings in a single process.

Memory placement and huge pages are fixed for the life of a process, and shift a ratio by several per cent that no
repetition inside the process shows. τ is pooled, per machine, kind of device and workload, from the A/A controls (the
baseline against a separately allocated copy of itself) of *other* runs: each process of a control is one draw. Without
draws a stated prior holds, and it keeps the weight of a few draws afterwards.

The suite pools the records of this machine before a build, writes the pool next to the result set and names its file in
`WORKBENCH_PROCESS_VARIANCE`; a notebook that is run by itself uses the prior.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from lib.files import write_atomically
from lib.measure.metrics.digits import percent

VARIABLE = "WORKBENCH_PROCESS_VARIANCE"
NAME = "process-variance.json"
# Prior standard deviation of ln(ratio) between processes, and how many draws it counts as.
PRIOR_SIGMA = 0.01
PRIOR_DRAWS = 6
# Prior for one part of a model (attention or feed-forward) that is timed by itself in one process. Between two builds
# of the same commit such times differed by 3 to 5 %, of which 2.6 and 3.9 % were not covered by any interval.
PART_SIGMA = 0.03
LEAST_SIGMA = 0.002  # lower bound, for a pool of draws that happen to agree
# End of the reason why a control is not a separate copy of the baseline; such a control cannot show how copies differ.
SAME_OBJECT = "the control is the same object"


@dataclass(frozen=True)
class Draw:
    """One A/A control in one process: kind of device (cpu, cuda), workload, effect ln(copy / baseline), and the
    standard error of the effect within the process.
    """

    device: str
    workload: str
    effect: float
    error: float


@dataclass(frozen=True)
class Pooled:
    """A pooled standard deviation between processes, and the number of draws behind it (processes, not runs)."""

    sigma: float
    draws: int

    @property
    def source(self) -> str:
        """The origin of the value, as a phrase."""
        if not self.draws:
            return f"prior of {percent(self.sigma, 1)} between processes"
        return (
            f"{percent(self.sigma, 2)} between processes, pooled from {self.draws} controls of one process each in "
            "other runs"
        )


def pool(draws: Iterable[Draw]) -> Pooled:
    """Return τ by the weighted method of moments (DerSimonian and Kacker 2007, Random-effects model for meta-analysis
    of clinical trials): the mean over draws of effect² − error², with the prior counted as PRIOR_DRAWS draws.

    A single disturbed run must neither widen nor narrow all later intervals. Effects are therefore clipped at five
    times the deviation expected from prior and error, and a draw of large error weighs less: (σ² / (σ² + error²))²,
    the inverse of the variance of its effect².
    """
    total, weights, count = PRIOR_DRAWS * PRIOR_SIGMA**2, float(PRIOR_DRAWS), 0
    for draw in draws:
        expected = PRIOR_SIGMA**2 + draw.error**2
        weight = (PRIOR_SIGMA**2 / expected) ** 2
        total += weight * (min(draw.effect**2, 25 * expected) - draw.error**2)
        weights, count = weights + weight, count + 1
    return Pooled(max(LEAST_SIGMA, math.sqrt(max(total / weights, 0.0))), count)


def table(draws: Iterable[Draw]) -> dict[str, dict[str, Pooled]]:
    """Return device → workload → pooled τ; the workload "*" pools all draws of a device."""
    by_device: dict[str, dict[str, list[Draw]]] = {}
    for draw in draws:
        workloads = by_device.setdefault(draw.device, {})
        for name in (draw.workload, "*"):
            workloads.setdefault(name, []).append(draw)
    return {device: {name: pool(group) for name, group in groups.items()} for device, groups in by_device.items()}


def write(path: Path, pooled: Mapping[str, Mapping[str, Pooled]]) -> Path:
    """Write the pool as JSON, atomically; return `path`."""
    content = {device: {name: asdict(value) for name, value in row.items()} for device, row in pooled.items()}
    return write_atomically(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def between_processes(workload: str) -> Pooled:
    """Return τ for a workload on this machine: pooled for that workload, else over all workloads, else the prior."""
    path = os.environ.get(VARIABLE)
    rows = _read(path).get(_device(), {}) if path else {}
    row = rows.get(workload) or rows.get("*")
    return Pooled(float(row["sigma"]), int(row["draws"])) if row else Pooled(PRIOR_SIGMA, 0)


def _device() -> str:
    """Return the kind of device that this process computes on (a machine with a GPU may run on its CPU)."""
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_initialized() else "cpu"


@lru_cache
def _read(path: str) -> dict[str, dict[str, dict[str, float]]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

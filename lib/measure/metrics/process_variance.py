"""How much a paired effect differs from process to process, for timings in a single process.

Memory placement and huge pages are fixed for the life of a process, and shift a ratio by percents that no repetition
inside the process shows. Here that standard deviation τ is pooled, per machine, kind of device and workload, from the
A/A controls (the baseline against a separately allocated copy of itself) of *other* runs: each process of a control is
one draw. Before there are draws a stated prior holds, and it keeps the weight of a few draws afterwards.

The suite pools the records of this machine before a build, writes the pool beside the result set and names its file in
`WORKBENCH_PROCESS_VARIANCE`; a notebook that is run alone has the prior.
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
# Prior standard deviation of ln(ratio) between processes, and the number of draws that it weighs.
PRIOR_SIGMA = 0.01
PRIOR_DRAWS = 6
# Of one part of a model (an attention, a feed-forward part) that is timed by itself in one process. Between two builds
# of one commit such times differed by 3 to 5 %, of which 2.6 and 3.9 % were in no interval.
PART_SIGMA = 0.03
LEAST_SIGMA = 0.002  # a pool of lucky draws never claims less
# How the reason ends why a control is no copy of the baseline: it shows nothing of what differs between two copies.
SAME_OBJECT = "the control is the same object"


@dataclass(frozen=True)
class Draw:
    """One A/A control of one process: the kind of device (cpu, cuda), the workload, the effect ln(copy / baseline), and
    its standard error within the process.
    """

    device: str
    workload: str
    effect: float
    error: float


@dataclass(frozen=True)
class Pooled:
    """A pooled standard deviation between processes and the number of draws behind it: processes, not runs."""

    sigma: float
    draws: int

    @property
    def source(self) -> str:
        """Where it comes from, as a phrase."""
        if not self.draws:
            return f"prior of {percent(self.sigma, 1)} between processes"
        return (
            f"{percent(self.sigma, 2)} between processes, pooled from {self.draws} controls of one process each in "
            "other runs"
        )


def pool(draws: Iterable[Draw]) -> Pooled:
    """Return τ by the method of moments with weights (DerSimonian and Kacker 2007, Random-effects model for
    meta-analysis of clinical trials): the mean over draws of effect² − error², the prior counted as some draws.

    One disturbed run must neither widen all later intervals nor narrow them. Effects are cut at five times what prior
    and error allow; a draw counts the less, the further its error exceeds the prior: (σ² / (σ² + error²))², as the
    variance of its effect² asks.
    """
    total, weights, count = PRIOR_DRAWS * PRIOR_SIGMA**2, float(PRIOR_DRAWS), 0
    for draw in draws:
        expected = PRIOR_SIGMA**2 + draw.error**2
        weight = (PRIOR_SIGMA**2 / expected) ** 2
        total += weight * (min(draw.effect**2, 25 * expected) - draw.error**2)
        weights, count = weights + weight, count + 1
    return Pooled(max(LEAST_SIGMA, math.sqrt(max(total / weights, 0.0))), count)


def table(draws: Iterable[Draw]) -> dict[str, dict[str, Pooled]]:
    """Return device → workload → pooled τ; the workload "*" pools all of the device's."""
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
    """Return τ for a workload on this machine: of that workload, else of all, else the prior."""
    path = os.environ.get(VARIABLE)
    rows = _read(path).get(_device(), {}) if path else {}
    row = rows.get(workload) or rows.get("*")
    return Pooled(float(row["sigma"]), int(row["draws"])) if row else Pooled(PRIOR_SIGMA, 0)


def _device() -> str:
    """Return the kind of device that this process computes on: a run on a CPU may have a GPU beside it, unused."""
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_initialized() else "cpu"


@lru_cache
def _read(path: str) -> dict[str, dict[str, dict[str, float]]]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

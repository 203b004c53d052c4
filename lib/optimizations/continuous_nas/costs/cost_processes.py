"""Measure the costs of replacements as the mean over several fresh processes.

Within one process a part is consistently fast or slow, depending on where its weights lie in memory. More samples do
not help, and the programme solved with the times of one process may choose another architecture in the next.

Shapes: P prompt tokens.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lib.measure.compare import replication, saved
from lib.measure.timing import children
from lib.measure.timing.children import Arm
from lib.measure.timing.processes import ChildFailed
from lib.models.checkpoints import io
from lib.optimizations.continuous_nas.costs import request_costs
from lib.optimizations.continuous_nas.costs.request_costs import RequestProfile
from lib.optimizations.continuous_nas.replacement_library import Library

PROCESSES = 3


def measure(
    model: nn.Module,
    library: Library,
    saliency: Sequence[Mapping],
    options: Mapping[str, Sequence[str]] | None,
    profile: RequestProfile,
    prompt_BP: torch.Tensor,
    *,
    rounds: int,
    processes: int = PROCESSES,
    seed: int = 0,
) -> dict:
    """Return the seconds of every replacement under `profile`, as `request_costs.measure` does: the mean over
    `processes` fresh processes of half the `rounds` each.

    Each loads the model from a file and builds `library` from `saliency` and `options`, as it was built here. With one
    process, or if `replication.unfit` gives a reason, this process measures itself. Raises ChildFailed.
    """
    if processes == 1 or replication.unfit([model]):
        return request_costs.measure(model, library, profile, prompt_BP, rounds=rounds, seed=seed)
    weight = next(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        place, scores = Path(folder) / "model", Path(folder) / "saliency.pt"
        io.save(model, place)
        torch.save([dict(of_block) for of_block in saliency], scores)
        dtype = str(weight.dtype).removeprefix("torch.")
        arm = Arm(folder=str(place), dtype=dtype, transform=saved.transform(model))
        job = {
            "arms": [asdict(arm)],
            "saliency": str(scores),
            "options": options,
            "profile": asdict(profile),
            "prompt": prompt_BP.tolist(),
            "rounds": math.ceil(rounds / 2),
            "seed": seed,
        }
        program = "lib.optimizations.continuous_nas.costs.cost_child"
        answers = children.run(program, [{**job, "process": number} for number in range(processes)])
    if failed := next((answer["failed"] for answer in answers if "failed" in answer), None):
        raise ChildFailed(f"costs of parts: {failed}")
    return mean([answer["times"] for answer in answers])


def mean(tables: Sequence[Mapping]) -> dict:
    """Return the mean of the fields of several `BlockTimes`, entry by entry."""
    times: dict = {
        kind: {
            slot: {option: float(np.mean([table[kind][slot][option] for table in tables])) for option in options}
            for slot, options in tables[0][kind].items()
        }
        for kind in ("prefill", "decode")
    }
    return times | {rest: float(np.mean([table[rest] for table in tables])) for rest in ("prefill_rest", "decode_rest")}

"""The program of a child process of `lib.measure.timing.processes`: loads the arms, times each workload in a few
balanced rounds, and answers with all times.
"""

import random
from typing import Any

import torch
from torch import nn

from lib.measure.timing import child, disturbance, interleaved, workloads
from lib.measure.timing.children import Arm


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return {"workloads": name → fields of a `processes.Replicate`}, measured in this process."""
    number = job["seed"] + job["process"]
    heap = child.move_heap(number)
    baseline, optimized = (Arm(**fields) for fields in job["arms"])
    arms = {"baseline": baseline, "optimized": optimized, "copy": baseline}
    loaded = load_order(list(arms), number)
    models = {name: child.load(arms[name]) for name in loaded}
    for model in models.values():
        child.make_present(model)
    place = {"loaded": loaded, "addresses": {name: _address(models[name]) for name in arms}}
    timed = {name: _time(name, {arm: models[arm] for arm in arms}, job) | place for name in job["names"]}
    del heap  # must be kept until here
    return {"workloads": timed}


def load_order(arms: list[str], number: int) -> list[str]:
    """Return the order in which process `number` loads its arms. It is drawn independently of the order of the first
    round; otherwise the arm that is loaded first would always have the first turn.
    """
    return random.Random(f"loaded in process {number}").sample(arms, len(arms))


def order_of_rounds(job: dict[str, Any]) -> dict[str, Any]:
    """Return seed and mirroring of a process's rounds. Every second process mirrors the one before it, so that the two
    together are balanced even if a process has an odd number of rounds.
    """
    return {"seed": job["seed"] + job["process"] // 2, "mirrored": job["process"] % 2 == 1}


def _time(name: str, models: dict[str, nn.Module], job: dict[str, Any]) -> dict[str, Any]:
    prompt_BT = torch.tensor(job["prompt"])
    works = {
        arm: workloads.standard(name, model, prompt_BT, job["new_tokens"], job["batch"])
        for arm, model in models.items()
    }
    workloads.assert_same_conditions(works["baseline"], works["optimized"], except_for=tuple(job["except_for"]))
    if interleaved.warm_up(*works.values()) < interleaved.LONG_SECONDS:
        interleaved.warm_up(*works.values())
    count, iterations = job["rounds"][name], interleaved.rounds_for(works)[1]
    for work in works.values():
        if work.restart:
            work.restart()
    timed = interleaved.rounds(
        works,
        count,
        iterations=iterations,
        warmup=0,
        **order_of_rounds(job),
        repeats=count,
        fewest=1,
        disturbance=disturbance.watch,
    )
    return {
        "wall": timed.seconds,
        "cpu": timed.cpu_seconds,
        "disturbed": timed.disturbed,
        "orders": timed.orders,
        "iterations": timed.iterations,
        "set_aside": timed.set_aside,
        "outputs": {arm: workloads.output_hash(work) for arm, work in works.items()},
    }


def _address(model: nn.Module) -> int:
    return next(parameter for parameter in model.parameters() if not parameter.is_meta).data_ptr()

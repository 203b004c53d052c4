"""The program in a child process of `lib.measure.timing.processes`: loads the arms, times each workload in a few
balanced rounds, and answers with every time.
"""

import random
from typing import Any

import torch
from torch import nn

from lib.measure.timing import child, disturbance, interleaved, workloads
from lib.measure.timing.children import Arm
from lib.measure.timing.workloads import Workload

TURN_SECONDS = 0.03  # what a turn lasts at least


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return {"workloads": name → the fields of a `processes.Replicate`} of one process."""
    number = job["seed"] + job["process"]
    heap = child.move_heap(number)
    baseline, optimized = (Arm(**fields) for fields in job["arms"])
    arms = {"baseline": baseline, "optimized": optimized, "copy": baseline}
    loaded = random.Random(number).sample(list(arms), len(arms))
    models = {name: child.load(arms[name]) for name in loaded}
    for model in models.values():
        child.make_present(model)
    place = {"loaded": loaded, "addresses": {name: _address(models[name]) for name in arms}}
    timed = {name: _time(name, {arm: models[arm] for arm in arms}, job, number) | place for name in job["names"]}
    del heap  # kept until here
    return {"workloads": timed}


def _time(name: str, models: dict[str, nn.Module], job: dict[str, Any], seed: int) -> dict[str, Any]:
    prompt_BT = torch.tensor(job["prompt"])
    works = {
        arm: workloads.standard(name, model, prompt_BT, job["new_tokens"], job["batch"])
        for arm, model in models.items()
    }
    workloads.assert_same_conditions(works["baseline"], works["optimized"], except_for=tuple(job["except_for"]))
    timed = interleaved.rounds(
        works,
        job["rounds"],
        iterations=_iterations(works),
        warmup=0,
        seed=seed,
        repeats=job["rounds"],
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


def _iterations(works: dict[str, Workload]) -> int:
    """Call every arm once to warm up; return how many calls make a turn of TURN_SECONDS."""
    if interleaved.warm_up(*works.values()) > interleaved.LONG_SECONDS:
        return 1
    return max(interleaved.iterations_for(works[arm], TURN_SECONDS, warm=True) for arm in ("baseline", "optimized"))


def _address(model: nn.Module) -> int:
    return next(parameter for parameter in model.parameters() if not parameter.is_meta).data_ptr()


if __name__ == "__main__":
    child.serve(run)

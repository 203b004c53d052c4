"""Child process of `cost_processes`: load the model, build the library, time every replacement."""

from typing import Any

import torch

from lib.measure.timing import child
from lib.measure.timing.children import Arm
from lib.optimizations.continuous_nas import replacement_library
from lib.optimizations.continuous_nas.costs import request_costs
from lib.optimizations.continuous_nas.costs.request_costs import RequestProfile


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return {"times": the fields of a `BlockTimes`} measured in this process."""
    number = job["seed"] + job["process"]
    heap = child.move_heap(number)
    model = child.load(Arm(**job["arms"][0]))
    library = replacement_library.build(model, torch.load(job["saliency"]), job["options"])
    for part in (model, *library.ordered.values()):
        child.make_present(part)
    profile, prompt_BP = RequestProfile(**job["profile"]), torch.tensor(job["prompt"])
    times = request_costs.measure(model, library, profile, prompt_BP, rounds=job["rounds"], seed=number)
    del heap  # kept until here
    return {"times": times}

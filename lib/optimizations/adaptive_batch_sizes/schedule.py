"""Record the engine calls that a policy makes on a trace, and repeat them on the real model.

A schedule comes from the simulation without jitter, so it is the same in every process that repeats it. Memory is thus
measured on what a server really does (its prompts and batches, rows that join and leave) rather than on one pass over
the largest batch, and a slow spell of the machine does not change the result.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lib.measure.serving.engine import ModelEngine
from lib.measure.serving.policy_comparison import PolicyFactory, ServingSetup
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.simulator import SimulatedEngine
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import ServingRequest, Trace
from lib.measure.timing.workloads import Workload
from lib.models.structure.anatomy import anatomy

Call = list[Any]  # the name of an engine method, then its arguments as plain JSON


class Recorder(SimulatedEngine):
    """A simulated engine that records its calls."""

    def __init__(self, times: StepTimes):
        super().__init__(times, jitter=False)
        self.calls: list[Call] = []
        self.inside = False  # whether a shared step, which also decodes, is running

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        self.calls.append(["prefill", [_plain(request) for request in requests]])
        return super().prefill(requests)

    def decode(self) -> float:
        if not self.inside:
            self.calls.append(["decode"])
        return super().decode()

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float:
        self.calls.append(["shared", [[_plain(request), count] for request, count in parts]])
        self.inside = True
        seconds = super().shared(parts)
        self.inside = False
        return seconds

    def leave(self, ids: Sequence[int]) -> float:
        self.calls.append(["leave", list(ids)])
        return super().leave(ids)


def record(setup: ServingSetup, trace: Trace, make_policy: PolicyFactory) -> tuple[list[Call], float]:
    """Return the calls that a policy makes on a trace, without jitter, and the peak bytes of the cache."""
    engine = Recorder(setup.times)
    served = serve(trace, make_policy(), engine, VirtualClock(), setup.limits, batching=setup.batching)
    return engine.calls, served.peak_bytes


def largest(setup: ServingSetup, traces: Sequence[Trace], make_policy: PolicyFactory) -> tuple[list[Call], float]:
    """Return the calls on the trace with the largest cache, and the peak bytes of that cache."""
    return max((record(setup, trace, make_policy) for trace in traces), key=lambda recorded: recorded[1])


def _plain(request: ServingRequest) -> list[int]:
    return [request.id, request.prompt_tokens, request.new_tokens]


def _request(plain: Sequence[int]) -> ServingRequest:
    return ServingRequest(plain[0], 0.0, plain[1], plain[2])


def workload(model: nn.Module, calls: Sequence[Call]) -> Workload:
    """Return the workload that makes `calls` on the real model, with a synthetic prompt for each request."""
    vocabulary = anatomy(model).vocabulary

    def prompt_of(request: ServingRequest) -> torch.Tensor:
        return (torch.arange(request.prompt_tokens) * 31 + request.id * 7919) % vocabulary

    def run(_: Workload) -> None:
        engine = ModelEngine(model, prompt_of)
        for name, *arguments in calls:
            if name == "prefill":
                engine.prefill([_request(plain) for plain in arguments[0]])
            elif name == "shared":
                engine.shared([(_request(plain), count) for plain, count in arguments[0]])
            elif name == "leave":
                engine.leave(arguments[0])
            else:
                engine.decode()

    requests = [plain for name, *arguments in calls if name == "prefill" for plain in arguments[0]]
    return Workload("serve", run, sum(new for *_, new in requests), 0, 0, 0, {})

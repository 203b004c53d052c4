"""Times two models in several fresh processes, which load their saved files, or states why this is impossible.

This works only for models that their files describe completely. Hooks, replaced methods or another attention are lost
on loading unless `saved` restores them. The files are therefore loaded once here and their structure compared with the
models in memory, and so are the tokens that every process produces. Knows nothing about how the models differ.
"""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lib.errors import UserError
from lib.measure.compare.saved import saved
from lib.measure.metrics import pairs, settings
from lib.measure.metrics.pairs import Pairs
from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.measure.timing import child, children, interleaved, processes, workloads
from lib.measure.timing.children import Arm
from lib.measure.timing.workloads import Workload
from lib.models.offload import streamer
from lib.models.structure.signature import signature

LARGEST_BYTES = 2**30  # of one model: each process loads three
ROUNDS, SHORT_ROUNDS = 2, 12  # in each process; three at an effort of many blocks, one at few (long calls)
FEW_BLOCKS, MANY_BLOCKS = 6, 24
ARM_SECONDS = 6.0  # of each arm, in all processes together, unless SHORT_ROUNDS in each take less
# Seconds of timing per block of the effort: rounds are added until they take this long. Small efforts take a share of
# it. Tests that only execute notebook cells set it to zero through the variable.
BLOCK_SECONDS = 0.5
VARIABLE = "WORKBENCH_BLOCK_SECONDS"

Arms = tuple[Workload, Workload]


def in_processes(
    models: tuple[nn.Module, nn.Module],
    arms: Mapping[str, Arms],
    prompt_BT: torch.Tensor,
    effort: Effort,
    *,
    seed: int = 0,
    except_for: Sequence[str] = (),
) -> tuple[dict[str, tuple[Pairs, Pairs]], str | None]:
    """Return (pairs, None), with the pairs (baseline, optimized) and (baseline, its copy) of every workload of `arms`;
    or ({}, the reason) where the models cannot be timed in separate processes.

    The `arms` must have been called once: their tokens are compared with those of the processes.
    """
    if reason := unfit(models):
        return {}, reason
    expected_models = [signature(model) for model in models]
    counts = {name: _count(works, effort) for name, works in arms.items()}
    try:
        with saved(*models) as places:
            for place, expected_model in zip(places, expected_models):
                if _loaded_signature(place) != expected_model:
                    return {}, "a model's files do not hold all of it: hooks, replaced methods or another attention"
            replicates = processes.replicate(
                *places,
                list(arms),
                prompt_BT=prompt_BT,
                new_tokens=effort.new_tokens,
                batch=effort.batch,
                rounds=counts,
                processes=effort.blocks // rounds(effort),
                seed=seed,
                except_for=except_for,
            )
    except (UserError, ValueError, RuntimeError, OSError) as error:  # refused, or a process that failed
        return {}, str(error) or type(error).__name__
    for name, works in arms.items():
        expected = [workloads.output_hash(work) for work in works]
        for replicate in replicates[name]:
            if [replicate.outputs["baseline"], replicate.outputs["optimized"]] != expected:
                return {}, f"{name}: the saved models produce other tokens than those in memory"
    return {name: _joined(parts) for name, parts in replicates.items()}, None


def _loaded_signature(place: Arm) -> str:
    model = child.load(place)
    stream = streamer.streamer(model)
    try:
        return signature(model)
    finally:
        if stream:
            stream.close()


def _count(works: Arms, effort: Effort) -> int:
    """Return how many rounds of a workload each process times: the same in all, from the time of calls in this one."""
    arms = {"baseline": works[0], "optimized": works[1], "copy": works[0]}
    total, least = block_seconds(effort) * rounds(effort), rounds(effort)
    if total:
        least = least_in_each(interleaved.warm_up(*works), effort)
    return interleaved.rounds_for(arms, total, least)[0]


def least_in_each(call_seconds: float, effort: Effort) -> int:
    """Return the fewest rounds in each process: SHORT_ROUNDS for short calls, for long calls as many as fit into the
    share of ARM_SECONDS. With two short rounds a model of 100 million parameters differs from its copy by a tenth.
    """
    most = max(rounds(effort), round(_share(effort) * SHORT_ROUNDS))
    if call_seconds < interleaved.LONG_SECONDS:
        return most
    each = _share(effort) * ARM_SECONDS / (effort.blocks // rounds(effort))
    return max(rounds(effort), min(most, int(each / call_seconds)))


def rounds_alone(work: Workload, effort: Effort) -> int:
    """Return the fewest rounds in a single process, from the time of a warm call of `work`: as many as fit into
    ARM_SECONDS, at least the effort's blocks, at most the number that short calls take in several processes. With six
    turns of two tokens a model of a hundred million parameters differs from its copy by 15 %.
    """
    if not block_seconds(effort):
        return effort.blocks
    call_seconds = interleaved.warm_up(work)
    most = round(_share(effort) * SHORT_ROUNDS) * (effort.blocks // rounds(effort))
    fitting = min(most, int(_share(effort) * ARM_SECONDS / max(call_seconds, 1e-9)))
    return max(effort.blocks, fitting // interleaved.STEP * interleaved.STEP)


def _share(effort: Effort) -> float:
    """Return the share of ARM_SECONDS and SHORT_ROUNDS that an effort uses: all of both from effort quick upwards."""
    return min(1.0, effort.timing_share / settings.EFFORTS["quick"].timing_share)


def block_seconds(effort: Effort) -> float:
    """Return the seconds of timing per block of the effort. Raises UserError if the variable does not hold a number."""
    value = os.environ.get(VARIABLE)
    try:
        seconds = BLOCK_SECONDS if value is None else float(value)
    except ValueError:
        raise UserError(f'{VARIABLE}: "{value}" is not a number of seconds') from None
    return seconds * effort.timing_share


def shortened() -> dict[str, object]:
    """Return a detail for the record stating the seconds per block that the variable sets; empty if it is not set."""
    seconds = os.environ.get(VARIABLE)
    if seconds is None:
        return {}
    source = f"the variable {VARIABLE}: seconds of a block, for tests of cells"
    return {"timed briefly": {"value": float(seconds), "provenance": "derived", "source": source}}


def rounds(effort: Effort) -> int:
    """Return the fewest rounds in each process: one at an effort of few blocks, so that six processes share them.

    Effort quick uses three processes, whose intervals are 1.7 times as wide (Student's quantile). Effort preview, which
    says next to nothing about speed, times all blocks in one process and assumes the deviation between processes.
    """
    if effort.preview:
        return effort.blocks
    if effort.blocks <= FEW_BLOCKS and effort.timing_share >= 1:
        return 1
    return ROUNDS if effort.blocks < MANY_BLOCKS else ROUNDS + 1


def _joined(parts: Sequence[processes.Replicate]) -> tuple[Pairs, Pairs]:
    rounds_by_process = [part.rounds for part in parts]
    optimized = pairs.join([part.pairs("baseline", "optimized") for part in rounds_by_process])
    return optimized, pairs.join([part.pairs("baseline", "copy") for part in rounds_by_process])


def unfit(models: Sequence[nn.Module]) -> str | None:
    """Return why models must not be timed in separate processes; None where they can be."""
    if reason := children.why_none():
        return reason
    if any(parameter.device.type != "cpu" for model in models for parameter in model.parameters()):
        return "only models in CPU memory are timed in separate processes"
    if not are_small(models):
        return f"models of more than {LARGEST_BYTES / 2**30:.0f} GiB are timed in one process"
    return None


def are_small(models: Sequence[nn.Module]) -> bool:
    """Return whether the models are in CPU memory and small: three copies fit, and their place in memory matters."""
    on_cpu = all(parameter.device.type == "cpu" for model in models for parameter in model.parameters())
    return on_cpu and max(cost_model.weights_bytes(model) for model in models) <= LARGEST_BYTES

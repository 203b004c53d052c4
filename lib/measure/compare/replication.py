"""Times two models in several fresh processes, through their saved files; where that cannot be done, says why.

Only a model that can be made again from its files can be timed this way: one with hooks, replaced methods or a
different attention would be loaded as something else, but for what `saved` puts back. Its files are therefore
loaded once here and compared, and so are the tokens that every process produces. Knows nothing of how the models
differ.
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
ROUNDS, SHORT_ROUNDS = 2, 12  # in each process; of many blocks three, of few (long calls) one
FEW_BLOCKS, MANY_BLOCKS = 6, 24
ARM_SECONDS = 6.0  # of each arm, in all processes together, unless SHORT_ROUNDS in each take less
# Seconds that the rounds of a workload take for each block of the effort, where that makes more of them; a share of it
# at small efforts. Where only cells are tested, the variable brings it down to nothing.
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
    """Return, for every workload of `arms`, the pairs of (baseline, optimized) and of (baseline, its copy), and None;
    or nothing, and why the models cannot be timed in processes of their own.

    `arms` have been called once: their tokens are compared with those of the processes.
    """
    if reason := unfit(models):
        return {}, reason
    expected_models = [signature(model) for model in models]
    counts = {name: _count(works, effort) for name, works in arms.items()}
    try:
        with saved(*models) as places:
            for place, expected_model in zip(places, expected_models):
                if _loaded_signature(place) != expected_model:
                    return {}, "a model is more than its files hold: hooks, replaced methods or another attention"
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
                return {}, f"{name}: the saved models do not answer as those in memory do"
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
    """Return the rounds of a workload in each process: the same in all of them, by calls in this one."""
    arms = {"baseline": works[0], "optimized": works[1], "copy": works[0]}
    total, least = block_seconds(effort) * rounds(effort), rounds(effort)
    if total:
        least = least_in_each(interleaved.warm_up(*works), effort)
    return interleaved.rounds_for(arms, total, least)[0]


def least_in_each(call_seconds: float, effort: Effort) -> int:
    """Return the fewest rounds in each process. Of short calls SHORT_ROUNDS: with two, a model of a hundred million
    parameters differs from its copy by a tenth. Of long ones as many as fit into the share of ARM_SECONDS.
    """
    most = max(rounds(effort), round(_share(effort) * SHORT_ROUNDS))
    if call_seconds < interleaved.LONG_SECONDS:
        return most
    each = _share(effort) * ARM_SECONDS / (effort.blocks // rounds(effort))
    return max(rounds(effort), min(most, int(each / call_seconds)))


def rounds_alone(work: Workload, effort: Effort) -> int:
    """Return the fewest rounds in a single process, by a call of an arm that is warm: as many as fit into ARM_SECONDS,
    at least the effort's blocks, at most what short calls have in several processes. Six turns of two tokens let a
    model of a hundred million parameters differ from its copy by 15 %.
    """
    if not block_seconds(effort):
        return effort.blocks
    call_seconds = interleaved.warm_up(work)
    most = round(_share(effort) * SHORT_ROUNDS) * (effort.blocks // rounds(effort))
    fitting = min(most, int(_share(effort) * ARM_SECONDS / max(call_seconds, 1e-9)))
    return max(effort.blocks, fitting // interleaved.STEP * interleaved.STEP)


def _share(effort: Effort) -> float:
    """Return the share of ARM_SECONDS and SHORT_ROUNDS that an effort takes: all of them from quick on."""
    return min(1.0, effort.timing_share / settings.EFFORTS["quick"].timing_share)


def block_seconds(effort: Effort) -> float:
    """Return the seconds that rounds take for each block. Raises UserError where the variable holds no number."""
    value = os.environ.get(VARIABLE)
    try:
        seconds = BLOCK_SECONDS if value is None else float(value)
    except ValueError:
        raise UserError(f'{VARIABLE}: "{value}" is no number of seconds') from None
    return seconds * effort.timing_share


def shortened() -> dict[str, object]:
    """Return, for a record's details, that the variable sets the seconds of a block; nothing where it does not."""
    seconds = os.environ.get(VARIABLE)
    if seconds is None:
        return {}
    source = f"the variable {VARIABLE}: seconds of a block, for tests of cells"
    return {"timed briefly": {"value": float(seconds), "provenance": "derived", "source": source}}


def rounds(effort: Effort) -> int:
    """Return the fewest rounds in each process: one where few blocks were asked for, so that six processes share them.
    Three, which effort quick makes do with, have intervals 1.7 times as wide (Student's quantile). At effort preview,
    which tells next to nothing of speed, all are in one process, whose deviation from others is then assumed.
    """
    if effort.preview:
        return effort.blocks
    if effort.blocks <= FEW_BLOCKS and effort.timing_share >= 1:
        return 1
    return ROUNDS if effort.blocks < MANY_BLOCKS else ROUNDS + 1


def _joined(parts: Sequence[processes.Replicate]) -> tuple[Pairs, Pairs]:
    of_processes = [part.rounds for part in parts]
    optimized = pairs.join([part.pairs("baseline", "optimized") for part in of_processes])
    return optimized, pairs.join([part.pairs("baseline", "copy") for part in of_processes])


def unfit(models: Sequence[nn.Module]) -> str | None:
    """Return why models are not to be timed in processes of their own, or None where they can be."""
    if reason := children.why_none():
        return reason
    if any(parameter.device.type != "cpu" for model in models for parameter in model.parameters()):
        return "only models in CPU memory are timed in separate processes"
    if not are_small(models):
        return f"models of more than {LARGEST_BYTES / 2**30:.0f} GiB are timed in one process"
    return None


def are_small(models: Sequence[nn.Module]) -> bool:
    """Return whether three such models fit beside these, and where they lie matters: in a CPU's memory, and small."""
    on_cpu = all(parameter.device.type == "cpu" for model in models for parameter in model.parameters())
    return on_cpu and max(cost_model.weights_bytes(model) for model in models) <= LARGEST_BYTES

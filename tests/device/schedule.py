"""Decides what runs, in which order and until when: steps in order of value, against a clock.

A step starts only if it can end in the time left, and is stopped if it takes longer; steps that could not run are
listed with the reason. Every step is kept as soon as it has ended. Knows neither processes nor models: `execute` does.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

TESTS_SECONDS, RECORD_SECONDS, START_SECONDS = 150.0, 60.0, 15.0
ENERGY_SECONDS = 45.0  # six blocks of three windows of two seconds, and the calls that overrun them
BYTES_PER_SECOND = 2e9  # assumed rate at which random weights are made on the device, on the cautious side
ASIDE_SECONDS = 4.0  # reserved from the time given, to end processes and write the index
TESTS = "tests"

# In order of value, models of a group together. The one with thirty billion parameters comes last
# and alone: loading it takes as long as a run.
MODELS = (("qwen3-vl-2b", "qwen3-4b-instruct-2507"), ("glm-4.7-flash",), ("qwen3-coder-30b",))
OPTIMIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "structured_pruning": {"finetune_steps": 0},
    "adaptive_sparse_attention": {"context": 32768},
    "tensor_decomposition": {"refine_steps": 0},
    "sparse_neural_networks": {"sparsity": 0.5, "pattern": "2:4", "method": "magnitude", "finetune_steps": 0},
    "streaming_computation": {"memory_ratio": 0.7},
    "adaptive_batch_sizes": {"replay_seconds": 2.0},
}
# Device memory of a run, in multiples of the weights' size: baseline, modified copy, and what both
# hold while they run. Attention and batching change no weights.
COPIES = {
    "structured_pruning": 2.1,
    "adaptive_sparse_attention": 1.3,
    "tensor_decomposition": 2.2,
    "sparse_neural_networks": 2.3,
    "streaming_computation": 2.1,
    "adaptive_batch_sizes": 1.3,
}
# Temporary disk space, in multiples of the weights' size.
ON_DISK = {"streaming_computation": 1.05}
MARGIN_BYTES = 6 * 2**30  # driver context, activations, workspaces


@dataclass(frozen=True)
class Step:
    """One step of a session. `seconds`: its limit, without loading; `weights_bytes` of its model, `needs_bytes` of
    device memory including loading, `disk_bytes` of temporary disk space; all 0 without a model.
    """

    name: str
    seconds: float
    model: str = ""
    optimization: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weights_bytes: float = 0.0
    needs_bytes: float = 0.0
    disk_bytes: float = 0.0
    scale: str = "full"
    checkpoints: str = ""

    @property
    def load_seconds(self) -> float:
        """The seconds that loading the model may take: libraries, then weights."""
        return START_SECONDS + self.weights_bytes / BYTES_PER_SECOND if self.model else START_SECONDS


@dataclass
class Ended:
    """How a step ended: status `finished`, `not_applicable`, `failed`, `stopped` (it took too long) or `left_out`.

    `record`: plain JSON, or None; `tests`: outcomes; `cell_seconds`: of a run, by index of the notebook's code cells.
    """

    step: Step
    status: str
    reason: str | None = None
    seconds: float = 0.0
    load_seconds: float | None = None
    record: dict[str, Any] | None = None
    tests: list[dict[str, Any]] = field(default_factory=list)
    cell_seconds: dict[str, float] = field(default_factory=dict)


class Executor(Protocol):
    """Executes steps. `loads` says whether a step has to load its model first, `hindrance` why it cannot run now."""

    def loads(self, step: Step) -> bool: ...

    def hindrance(self, step: Step) -> str | None: ...

    def execute(self, step: Step, limit_seconds: float) -> Ended: ...


class Clock:
    """Counts down `seconds` from its creation; `now` is a monotonic clock in seconds. `slower` is the slowdown of a
    rehearsal's clock: a CPU takes longer than the device, and the whole program is to be rehearsed.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic, slower: float = 1.0):
        self.seconds, self.slower = seconds, slower
        self.now = (lambda: now() / slower) if slower != 1 else now
        self.start = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.spent


def steps(
    weights_bytes: Mapping[str, float],
    *,
    energy: bool = False,
    groups: Sequence[Sequence[str]] = MODELS,
    optimizations: Mapping[str, Mapping[str, Any]] = OPTIMIZATIONS,
    checkpoints: Mapping[str, str] | None = None,
    margin_bytes: float = MARGIN_BYTES,
    context_bytes: Callable[[str, int], float] = lambda model, tokens: 0.0,
    positions: Mapping[str, int] | None = None,
) -> list[Step]:
    """Return the steps in order of value: tests, then each optimization on the models of a group, group by group, then
    the other models of `checkpoints` (name → folder of checkpoints). A model listed there uses its own weights wherever
    it appears.

    `weights_bytes` by model; a model missing there has no step. `context_bytes` of a model and a number of tokens: the
    bytes of the queries, keys and values of all blocks, for steps that set a context; `positions`: the longest context
    by model, if it is shorter than the requested one.
    """
    planned = [Step(TESTS, TESTS_SECONDS)]
    seconds = RECORD_SECONDS + (ENERGY_SECONDS if energy else 0.0)
    real = checkpoints or {}
    others = tuple(name for name in real if not any(name in group for group in groups))
    for group in (*groups, others):
        for optimization, parameters in optimizations.items():
            for model in group:
                if model not in weights_bytes:
                    continue
                size, context = weights_bytes[model], int(parameters.get("context", 0))
                context = min(context, (positions or {}).get(model, context))
                own = {**parameters, "context": context} if context else parameters
                planned.append(
                    Step(
                        f"{optimization}--{model}",
                        seconds,
                        model,
                        optimization,
                        own,
                        size,
                        COPIES.get(optimization, 2.5) * size + margin_bytes + context_bytes(model, context),
                        ON_DISK.get(optimization, 0.0) * size,
                        checkpoints=real.get(model, ""),
                    )
                )
    return planned


def run(planned: Iterable[Step], clock: Clock, executor: Executor, keep: Callable[[Ended], None]) -> list[Ended]:
    """Execute the steps that fit into the time left, in order; `keep` each as soon as it has ended; return them all.

    A step that does not fit is left out, and the next, which may be shorter, is tried. An exception of the executor is
    the step's failure; those that end the program propagate.
    """
    outcomes = []
    for step in planned:
        outcomes.append(_one(step, clock, executor))
        keep(outcomes[-1])
    return outcomes


def _one(step: Step, clock: Clock, executor: Executor) -> Ended:
    left = clock.left - ASIDE_SECONDS
    needed = step.seconds + (step.load_seconds if executor.loads(step) else 0.0)
    if needed > left:
        return Ended(step, "left_out", f"may take {needed:.0f} s, {max(0.0, left):.0f} s are left")
    if reason := executor.hindrance(step):
        return Ended(step, "left_out", reason)
    began = clock.now()
    try:
        ended = executor.execute(step, min(needed, left))
    except Exception as error:
        ended = Ended(step, "failed", f"{type(error).__name__}: {error}"[:500])
    ended.seconds = clock.now() - began
    return ended

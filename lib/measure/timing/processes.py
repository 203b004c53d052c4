"""Replicates timing in processes: two arms in saved files are timed in several fresh processes.

Memory placement, huge pages and what ran before are fixed for the life of a process and shift a ratio by several per
cent, so the process is the unit of replication: a few rounds in each of several processes are more informative than
many rounds in one (Kalibera and Jones, Rigorous benchmarking in reasonable time, ISMM 2013).
`lib.measure.timing.process_child` runs in these processes. Knows nothing about how the arms differ.

Shapes: B batch, T prompt tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lib.measure.timing import children
from lib.measure.timing.children import Arm
from lib.measure.timing.interleaved import Rounds

if TYPE_CHECKING:
    import torch

PROCESSES, ROUNDS = 6, 2


class ChildFailed(RuntimeError):
    """A process of a replication failed; the message states the reason."""


@dataclass(frozen=True)
class Replicate:
    """The rounds of one workload in one fresh process: the fields of `interleaved.Rounds` for the arms "baseline",
    "optimized" and "copy" (the baseline's files loaded a second time), with wall and CPU seconds per call of every
    round.

    `process` numbers the process, `loaded` is the order in which it loaded the arms. `addresses` of each arm's first
    weight show that memory placement differs between processes. `outputs` holds a hash of the tokens of each arm's last
    call, which shows that the saved arm does the same as the arm in memory.
    """

    process: int
    workload: str
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    disturbed: list[str | None]
    orders: list[list[str]]
    iterations: int
    set_aside: list[tuple[dict[str, float], str]]
    loaded: list[str]
    addresses: dict[str, int]
    outputs: dict[str, str]

    @property
    def rounds(self) -> Rounds:
        """The rounds of this process in the form of rounds timed in the current process."""
        repeated = self.set_aside
        return Rounds(self.wall, self.iterations, self.disturbed, self.orders, repeated, cpu_seconds=self.cpu)


def replicate(
    baseline: Arm,
    optimized: Arm,
    names: Sequence[str],
    *,
    prompt_BT: "torch.Tensor",
    new_tokens: int,
    batch: int,
    processes: int = PROCESSES,
    rounds: int | Mapping[str, int] = ROUNDS,
    seed: int = 0,
    except_for: Sequence[str] = (),
    limit_seconds: float = children.LIMIT_SECONDS,
) -> dict[str, list[Replicate]]:
    """Time the workloads `names` (see `workloads.standard`) of two arms and of a copy of the baseline in each of
    `processes` fresh processes; return one replicate per process for every workload.

    `rounds` is the number of balanced rounds in each process, for all workloads or by workload. A process moves its
    heap, loads the three models in its own order, warms each up, and repeats at most `rounds` disturbed rounds.
    `prompt_BT` holds token ids [1, T]; `new_tokens` and `batch` are those of `standard`. `except_for` names conditions
    in which the arms may differ (`workloads.assert_same_conditions`). Raises ChildFailed with the reason if a process
    fails or runs past `limit_seconds`.
    """
    job = {
        "arms": [asdict(baseline), asdict(optimized)],
        "names": list(names),
        "prompt": prompt_BT.tolist(),
        "new_tokens": new_tokens,
        "batch": batch,
        "rounds": dict(rounds) if isinstance(rounds, Mapping) else dict.fromkeys(names, rounds),
        "seed": seed,
        "except_for": list(except_for),
    }
    jobs = [{**job, "process": number} for number in range(processes)]
    answers = children.run("lib.measure.timing.process_child", jobs, limit_seconds=limit_seconds)
    replicates: dict[str, list[Replicate]] = {name: [] for name in names}
    for number, answer in enumerate(answers):
        if "failed" in answer:
            raise ChildFailed(f"process {number + 1} of {processes}: {answer['failed']}")
        for name in names:
            fields = answer["workloads"][name]
            fields["set_aside"] = [(seconds, reason) for seconds, reason in fields["set_aside"]]
            replicates[name].append(Replicate(number, name, **fields))
    return replicates

"""The workers of a Dask cluster that may run jobs: each is checked once, compared with this side, and given cores.

A worker is checked when it appears, and again when it returns under the same address. It is refused, in one line, if
its Python, code, environment, weights or data differ from those of the build. Workers on one machine get disjoint
cores; workers started on their own cores (`taskset`, Slurm) keep those. No two of them run on one GPU. Independent of
how a job runs or ends.
"""

import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib.suite.cluster import remote, worker_stub
from lib.suite.plan import cache_key
from lib.suite.plan.plan import Job

DEVICE = "device"
Claim = tuple[tuple[str, str], Mapping[str, Any]]  # a token: its worker's address and incarnation, and its answer


class PickledByValue:
    """A function of `lib.suite.cluster.worker_stub` that is pickled with its code, for schedulers and workers that
    cannot import `lib`.
    """

    def __init__(self, function: Callable):
        import cloudpickle

        cloudpickle.register_pickle_by_value(worker_stub)
        self.text = cloudpickle.dumps(function)

    def __reduce__(self) -> tuple:
        import cloudpickle

        return cloudpickle.loads, (self.text,)

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError("only its unpickled form, on a worker, can be called")


@dataclass
class WorkerSlot:
    """One `device` token of a worker: its cores, its GPU if runs use one, and the entry that the loop runs there."""

    address: str
    incarnation: str
    host: str
    cores: tuple[int, ...]
    gpu: str | None = None
    entry: Any = None
    future: Any = None
    doing: str = "starting"


@dataclass
class Crew:
    """Accepted workers (`slots`), workers whose check is `pending`, and `refused` ones not yet reported."""

    client: Any
    jobs: Sequence[tuple[Job, str]]
    parts_of: Callable[[str], Mapping[str, Mapping[str, str]]]
    variables: Mapping[str, str]
    library: Mapping[str, str]
    slots: list[WorkerSlot] = field(default_factory=list)
    pending: dict[tuple[str, str], Any] = field(default_factory=dict)
    tokens: dict[tuple[str, str], int] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)

    def look(self, workers: Mapping[str, Mapping[str, Any]]) -> list[WorkerSlot]:
        """Check new workers and drop those that are gone; return the dropped slots."""
        present = {}
        for address, about in workers.items():
            tokens = min(int(about["resources"].get(DEVICE, 0)), about["nthreads"])
            if tokens >= 1:
                present[address, about["local_directory"]] = tokens  # a new folder at each start identifies it
        gone = [slot for slot in self.slots if (slot.address, slot.incarnation) not in present]
        self.slots = [slot for slot in self.slots if slot not in gone]
        for mark in set(self.tokens) - set(present):
            self.pending.pop(mark, None)
            del self.tokens[mark]
        new = [mark for mark in present if mark not in self.tokens]
        self.tokens |= {mark: present[mark] for mark in new}
        pythons = self._pythons() if new else {}
        for mark in new:
            python = pythons.get(mark[0], "")
            if python.split(".")[:2] != [str(part) for part in sys.version_info[:2]]:
                here = ".".join(str(part) for part in sys.version_info[:3])
                self.refused[mark] = f"Python is {here} here, {python or 'unknown'} there"
            else:
                described = [(remote.describe(job), expected_key) for job, expected_key in self.jobs]
                self.pending[mark] = self.submit(mark[0], {"do": "hello", "jobs": described})
        return gone

    def _pythons(self) -> dict[str, str]:
        versions = self.client.get_versions()["workers"]
        return {
            address: about["host"]["python"].removesuffix(".final.0") for address, about in versions.items() if about
        }

    def submit(self, address: str, request: Mapping[str, Any]) -> Any:
        """Submit a request to a worker, using one of its tokens; return the future."""
        context = {"variables": dict(self.variables), "library": cache_key.digest(self.library)}
        return self.client.submit(
            PickledByValue(worker_stub.call),
            {**request, **context},
            key=f"workbench-{uuid.uuid4()}",
            workers=[address],
            allow_other_workers=False,
            resources={DEVICE: 1},
            retries=0,
            pure=False,
        )

    def welcome(self) -> list[str]:
        """Accept the workers that have answered; return a line for each refused worker not yet reported.

        Workers of one machine that answered together share its cores evenly.
        """
        answers = {mark: future for mark, future in self.pending.items() if future.done()}
        accepted = {}
        for mark, future in answers.items():
            del self.pending[mark]
            answer = answer_of(future)
            if why := self.objection(answer):
                self.refused[mark] = why
            else:
                accepted[mark] = answer
        wanted: list[Claim] = [(mark, answer) for mark, answer in accepted.items() for _ in range(self.tokens[mark])]
        claims = self._with_own_gpus(wanted)
        shares = self._cores([hello for _, hello in claims])
        for (mark, hello), cores in zip(claims, shares, strict=True):
            if cores:
                self.slots.append(WorkerSlot(*mark, hello["host"], tuple(cores), hello.get("gpu")))
            else:
                self.refused[mark] = f"every core of {hello['machine']} that it may use belongs to another worker"
        lines = [f"{address}: {why}" for (address, _), why in self.refused.items()]
        self.refused.clear()
        return lines

    def _with_own_gpus(self, claims: Sequence[Claim]) -> list[Claim]:
        """Return the claims except those to a GPU in use, which are refused: runs on one GPU would disturb each other.

        Claims without a GPU are all kept.
        """
        in_use = {(slot.host, slot.gpu) for slot in self.slots}
        kept = []
        for mark, answer in claims:
            place = answer["host"], answer.get("gpu")
            if place[1] is not None and place in in_use:
                self.refused[mark] = (
                    f"{place[1]} of {answer['machine']} belongs to another {DEVICE} token; "
                    f"start one worker for each GPU, with one {DEVICE} token and CUDA_VISIBLE_DEVICES of its own"
                )
            else:
                in_use.add(place)
                kept.append((mark, answer))
        return kept

    def _cores(self, claims: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return disjoint cores for each claim, shared out evenly among the claims on the same machine."""
        in_use = {(slot.host, core) for slot in self.slots for core in slot.cores}
        shares = []
        for claim in claims:
            host, own = claim["host"], set(claim["cores"])
            sharing = [rival for rival in claims if rival["host"] == host and own & set(rival["cores"])]
            fair = max(len(set().union(*(rival["cores"] for rival in sharing))) // len(sharing), 1)
            free = [core for core in claim["cores"] if (host, core) not in in_use]
            shares.append(free[:fair])
            in_use |= {(host, core) for core in free[:fair]}
        return shares

    def objection(self, answer: Mapping[str, Any]) -> str | None:
        """Return why a worker with this answer is refused, in one line; None if it is accepted."""
        for name in ("error", "lost"):
            if name in answer:
                return answer[name]
        theirs = answer.get("parts")
        if theirs is None:
            return None
        mine = self.parts_of(answer["stem"]) if "stem" in answer else {}
        return differing({**mine, "code": {**mine.get("code", {}), **self.library}}, theirs)

    def dismiss(self, address: str) -> list[WorkerSlot]:
        """Drop a worker until it reconnects; return its slots."""
        gone = [slot for slot in self.slots if slot.address == address]
        self.slots = [slot for slot in self.slots if slot.address != address]
        return gone

    def side_by_side(self, slot: WorkerSlot) -> int:
        """Return how many jobs may run at once on the machine of `slot`."""
        return sum(neighbour.host == slot.host for neighbour in self.slots)


def answer_of(future: Any) -> dict[str, Any]:
    """Return a finished future's answer, or `lost` with the reason."""
    if future.status == "finished":
        try:
            return future.result(timeout=60)
        except Exception as error:  # the worker with the answer is gone, or the answer could not be transferred
            return {"lost": f"its answer was lost ({type(error).__name__})"}
    cause = future.exception(timeout=10) if future.status == "error" else None
    return {"lost": f"{type(cause).__name__}: {cause}" if cause else f"its task was {future.status}"}


def differing(mine: Mapping[str, Mapping[str, str]], theirs: Mapping[str, Mapping[str, str]], most: int = 3) -> str:
    """Return the differences between two sides' parts: `torch is 2.13.0 here, 2.12.0 there; code: lib/x.py differs`."""
    differences = []
    for part in {**mine, **theirs}:
        here, there = mine.get(part, {}), theirs.get(part, {})
        if part == "versions":
            names = [name for name in here if here[name] != there.get(name)]
            differences += [f"{name} is {here[name]} here, {there.get(name, 'unknown')} there" for name in names]
            continue
        names = sorted(name for name in {**here, **there} if here.get(name) != there.get(name))
        if names and part in ("template", "parameters", "model", "dimensions"):
            differences.append(f"the {part} {'differ' if part.endswith('s') else 'differs'}")
        elif names:
            rest = f" and {len(names) - most} more" if len(names) > most else ""
            differences.append(f"{part}: {', '.join(names[:most])}{rest} {'differ' if len(names) > 1 else 'differs'}")
    return "; ".join(differences) or "its cache key differs"

"""Rounds of replays: what every arm did on every trace, and what disturbed the machine meanwhile. Serves nothing, and
measures nothing.
"""

from dataclasses import dataclass

from lib.measure.serving.protocol import Served
from lib.measure.serving.traffic import Trace
from lib.measure.timing import disturbance
from lib.measure.trackers.energy_source import Counter


@dataclass(frozen=True)
class Replayed:
    """A run of the real model: what happened, the tokens of every request, share of the given cores used, and what
    disturbed the machine meanwhile (None: nothing noticed). `cpu_seconds` and `joules` are of the whole run, its
    policy's thinking included (joules None: not read).
    """

    served: Served
    output: dict[int, list[int]]
    utilisation: float
    disturbed: str | None
    cpu_seconds: float = 0.0
    joules: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that were generated."""
        return sum(len(ids) for ids in self.output.values())


@dataclass(frozen=True)
class ServingRounds:
    """Replays of several arms, a round per trace: `runs[arm]` has a replay per round. `counter` is what joules were
    read from, in every step of an arm (`stepwise`) or around its whole replay; `planned`: the machine is disturbed on
    purpose; `calibration`: what disturbed it when step times were measured, from which rates and objectives follow;
    `slowness`: by how much the machine was slower than then at the beginning of each round, empty where nobody looked;
    `repeated`: rounds that were disturbed and served again; `shared`: whose work the counter counted too
    (`Counter.beside`).
    """

    traces: tuple[Trace, ...]
    runs: dict[str, list[Replayed]]
    counter: Counter
    planned: bool = False
    stepwise: bool = False
    calibration: str | None = None
    slowness: tuple[float, ...] = ()
    repeated: int = 0
    shared: str | None = None

    @property
    def busy(self) -> list[str]:
        """What disturbed the machine in each round in which it was disturbed, and nobody had planned it (where another
        program was let in on purpose, what the hypervisor took and heat alone); in all rounds, where it was when their
        rates were set.
        """
        if self.calibration:
            return [f"while step times were measured {self.calibration}"] * len(self.traces)
        each = ([reason for run in round_ if (reason := self._unplanned(run))] for round_ in zip(*self.runs.values()))
        return [reasons[0] for reasons in each if reasons]

    @property
    def disturbed(self) -> str:
        """What disturbed the machine meanwhile; without what other programs took where one of them was let in on
        purpose, since its share cannot be told from theirs.
        """
        return disturbance.in_words(self._all_unplanned())

    def _unplanned(self, run: Replayed) -> str | None:
        """Return what disturbed a replay, None where nothing did but what was let in on purpose."""
        own = self.planned and run.disturbed and disturbance.taken_by_others(run.disturbed)
        return None if own else run.disturbed

    def _all_unplanned(self) -> list[str]:
        return [reason for runs in self.runs.values() for run in runs if (reason := self._unplanned(run))]

    @property
    def source(self) -> str:
        """How the numbers came about, as a record states it."""
        requests = sum(len(trace.requests) for trace in self.traces)
        disturbed = len(self._all_unplanned())
        text = f"real model, every step made and timed, {len(self.traces)} rounds of {len(self.runs)} arms in turn, "
        text += "a trace per round, "
        text += "waiting left out" if self.stepwise else "each replay in real time, waiting included"
        text += f", {requests} requests in all, warm-up not counted"
        text += "; our cores shared with another process on purpose" if self.planned else ""
        if self.slowness:
            least, most = min(self.slowness), max(self.slowness)
            text += f"; seconds of a round divided by how much slower than in the calibration it began ({least:.2f} to "
            text += f"{most:.2f})"
        text += f"; {self.repeated} disturbed rounds served again" if self.repeated else ""
        return text + (f"; {disturbed} of {len(self.traces) * len(self.runs)} replays disturbed" if disturbed else "")

    def served(self, arm: str) -> list[Served]:
        """Return what happened in each round under an arm."""
        return [run.served for run in self.runs[arm]]

"""Rounds of replays: the result of every arm on every trace, and what disturbed the machine meanwhile. Data only:
serves and measures nothing.
"""

from dataclasses import dataclass

from lib.measure.serving.protocol import Served
from lib.measure.serving.traffic import Trace
from lib.measure.timing import disturbance
from lib.measure.trackers.energy_source import Counter


@dataclass(frozen=True)
class Replayed:
    """One replay with the real model: its outcome, the output tokens of every request, the used share of the given
    cores, and what disturbed the machine meanwhile (None: nothing). `cpu_seconds` and `joules` are those of the whole
    replay, including the policy's own computation (joules None: not read).
    """

    served: Served
    output: dict[int, list[int]]
    utilisation: float
    disturbed: str | None
    cpu_seconds: float = 0.0
    joules: float | None = None

    @property
    def tokens(self) -> int:
        """Number of generated tokens."""
        return sum(len(ids) for ids in self.output.values())


@dataclass(frozen=True)
class ServingRounds:
    """Replays of several arms, one round per trace: `runs[arm]` has one replay per round.

    `counter` is the source of joules, read around every step of an arm (`stepwise`) or around its whole replay.
    `planned`: the machine is disturbed on purpose. `calibration` is what disturbed it while step times were measured,
    from which rates and objectives follow. `slowness` is by which factor the machine was slower than then at the
    beginning of each round; empty if this was not measured. `repeated` counts the disturbed rounds that were served
    again. `shared` states whose work the counter included (`Counter.beside`).
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
        """What disturbed the machine in each round with an unplanned disturbance. (If another program shares the cores
        on purpose, only the hypervisor and heat count.) If the calibration was disturbed, all rounds are, since their
        rates follow from it.
        """
        if self.calibration:
            return [f"while step times were measured {self.calibration}"] * len(self.traces)
        each = ([reason for run in round_ if (reason := self._unplanned(run))] for round_ in zip(*self.runs.values()))
        return [reasons[0] for reasons in each if reasons]

    @property
    def disturbed(self) -> str:
        """What disturbed the machine, in words. If another program shares the cores on purpose, disturbances by other
        programs are left out, since its share cannot be told from theirs.
        """
        return disturbance.in_words(self._all_unplanned())

    def _unplanned(self, run: Replayed) -> str | None:
        """Return the unplanned disturbance of a replay, or None."""
        intended = self.planned and run.disturbed and disturbance.taken_by_others(run.disturbed)
        return None if intended else run.disturbed

    def _all_unplanned(self) -> list[str]:
        return [reason for runs in self.runs.values() for run in runs if (reason := self._unplanned(run))]

    @property
    def source(self) -> str:
        """How the numbers were measured, as a record states it."""
        requests = sum(len(trace.requests) for trace in self.traces)
        disturbed = len(self._all_unplanned())
        text = f"real model, every step run and timed, {len(self.traces)} rounds of {len(self.runs)} arms in turn, "
        text += "one trace per round, "
        text += "waiting left out" if self.stepwise else "each replay in real time, waiting included"
        text += f", {requests} requests in all, warm-up not counted"
        text += "; our cores shared with another process on purpose" if self.planned else ""
        if self.slowness:
            least, most = min(self.slowness), max(self.slowness)
            text += f"; a round's seconds divided by the slowness at its beginning ({least:.2f} to {most:.2f} times "
            text += "the calibration)"
        text += f"; {self.repeated} disturbed rounds served again" if self.repeated else ""
        return text + (f"; {disturbed} of {len(self.traces) * len(self.runs)} replays disturbed" if disturbed else "")

    def served(self, arm: str) -> list[Served]:
        """Return the outcome of each round under `arm`."""
        return [run.served for run in self.runs[arm]]

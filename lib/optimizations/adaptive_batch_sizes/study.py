"""The traffic study shared by all parts of the protocol: the measured setup, the seeds, the policies, and the cached
runs of each policy on each kind of traffic.

The fixed size is chosen and judged on traces of different seeds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lib.measure.metrics import settings
from lib.measure.metrics.settings import BRIEF
from lib.measure.serving import policy_comparison, slo
from lib.measure.serving.policy_comparison import NEW_JITTER, PolicyFactory, ServingSetup
from lib.measure.serving.protocol import Served
from lib.measure.serving.traffic import Trace
from lib.models.loading import Loaded
from lib.optimizations.adaptive_batch_sizes.method import Adaptive
from lib.optimizations.adaptive_batch_sizes.rivals import CHUNK, AimdSize, Chunked, FixedSize, Timeout, best_fixed

REQUESTS = {"preview": 12, "quick": 60, "standard": 120, "thorough": 400}  # in each phase of a simulated trace
SEEDS = {"preview": 6, "quick": 6, "standard": 6, "thorough": 20}  # on which policies are judged
CHOOSING = range(5000, 5003)  # added to the seed: traces on which the fixed size is chosen
# The fixed sizes to try, up to the limit of rows. A coarser grid can miss the best size: on three models four and eight
# rows were equally good, and no size between them had been tried.
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)
ADAPTIVE, BLIND = "adaptive", "adaptive, blind"
IN_PARTS = "adaptive, prompts in parts"
VARIANTS = ("cap alone", "admission alone", IN_PARTS)  # the adaptive policy with one part removed or added


@dataclass(frozen=True)
class TrafficStudy:
    """The setup, the policy's headroom, the tokens per step of chunked prefill, requests per phase, and the seeds."""

    setup: ServingSetup
    headroom: float
    requests: int
    seeds: tuple[int, ...]
    chunk: int = CHUNK
    kept: dict[tuple, list[Served]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def sizes(self) -> list[int]:
        """The fixed sizes to try."""
        most = self.setup.limits.rows
        return [size for size in SIZES if size < most] + [most]

    def traces(self, name: str, count: int | None = None) -> list[Trace]:
        """Return the traces of one kind of traffic, one per seed (the first `count` seeds)."""
        return policy_comparison.traces(self.setup, name, self.requests, self.seeds[:count])

    def adaptive(self, **parts: Any) -> Adaptive:
        """Return a new policy that has learned nothing yet; `parts` as in `Adaptive`."""
        most = self.setup.limits.rows
        return Adaptive(self.setup.objective, self.setup.single, headroom=self.headroom, most=most, **parts)

    def choose(self, name: str, setup: ServingSetup | None = None, count: int | None = None) -> tuple[int, dict]:
        """Return the best fixed size for one kind of traffic, and the goodput of every size, on seeds used for nothing
        else.
        """
        setup = setup or self.setup
        seeds = [self.seeds[0] + more for more in CHOOSING][:count]
        traces = policy_comparison.traces(setup, name, self.requests, seeds)
        return best_fixed(traces, setup.objective, setup.run, self.sizes)

    def policies(self, size: int) -> dict[str, PolicyFactory]:
        """Return the policies to compare: the fixed `size` first, the adaptive policy last.

        The time-out policy gathers up to four requests for at most a quarter of the first-token objective. Chunked
        prefill comes twice: with all rows, the default of engines, and with the rows of the fixed size, the sensible
        setting under objectives, since too many rows miss the objective per token however prompts are read.
        """
        objective, most = self.setup.objective, self.setup.limits.rows
        few = f"chunked {self.chunk}, fixed rows"
        return {
            f"fixed {size}": lambda: FixedSize(size),
            "time-out": lambda: Timeout(size, min(4, size), objective.first_token_seconds / 4),
            "AIMD": lambda: AimdSize(objective, most),
            f"chunked {self.chunk}": lambda: Chunked(self.chunk, most),
            few: lambda: Chunked(self.chunk, size, few),
            BLIND: lambda: self.adaptive(blind=True, name=BLIND),
            ADAPTIVE: self.adaptive,
        }

    def variants(self) -> dict[str, PolicyFactory]:
        """Return the variants of the adaptive policy with one part removed or added."""
        return {
            "cap alone": lambda: self.adaptive(admission=False, name="cap alone"),
            "admission alone": lambda: self.adaptive(cap=False, name="admission alone"),
            IN_PARTS: lambda: self.adaptive(chunked=True, name=IN_PARTS),
        }

    def served(
        self, traffic: str, policy: str, make: PolicyFactory, *, again: bool = False, count: int | None = None
    ) -> list[Served]:
        """Return the runs of a policy on the traces of one kind of traffic, simulated once and cached; `again`: with
        other jitter and step times.
        """
        size = getattr(make(), "size", None)  # the names of some policies do not contain it
        key = traffic, policy, size, again, count
        if key not in self.kept:
            jitter = NEW_JITTER if again else 0
            self.kept[key] = [self.setup.run(trace, make(), jitter) for trace in self.traces(traffic, count)]
        return self.kept[key]

    def goodputs(self, traffic: str, policy: str, make: PolicyFactory, **options: Any) -> list[float]:
        """Return the goodput, requests/s, of each run of `served`."""
        return [slo.goodput(run, self.setup.objective) for run in self.served(traffic, policy, make, **options)]

    def other_batching(self) -> "TrafficStudy":
        """Return the same study with the other kind of batching."""
        setup = replace(self.setup, batching="request" if self.setup.batching == "iteration" else "iteration")
        return TrafficStudy(setup, self.headroom, self.requests, self.seeds, self.chunk)


def calibrate(loaded: Loaded, effort: str, *, seed: int = 0, **options: Any) -> tuple[ServingSetup, float]:
    """Return the setup shared by all policies, and the seconds it took to measure the step times; `options` are those
    of `policy_comparison.prepare`.
    """
    start = time.perf_counter()
    preview = settings.read(effort).preview
    few, many = (3, 8) if loaded.scale == "proxy" and not preview else (2, 4)
    repeats = few if effort in BRIEF else many
    setup = policy_comparison.prepare(loaded, repeats=repeats, preview=preview, seed=seed, **options)
    return setup, time.perf_counter() - start


def prepare(setup: ServingSetup, headroom: float, effort: str, chunk: int = CHUNK, seed: int = 0) -> TrafficStudy:
    """Return the study of an effort, with seeds starting at `seed`."""
    return TrafficStudy(setup, headroom, REQUESTS[effort], tuple(range(seed, seed + SEEDS[effort])), chunk)


def mean_goodput(study: TrafficStudy, traces: Sequence[Trace], make: PolicyFactory) -> float:
    """Return the mean simulated goodput of a policy over `traces`, requests/s."""
    values = study.setup.goodputs(traces, make)
    return sum(values) / len(values)

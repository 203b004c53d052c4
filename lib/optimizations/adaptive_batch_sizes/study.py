"""What every part of the adaptive batch size's protocol shares: the measured setup, the seeds, the changing traces.

Makes the policies to compare and finds the best fixed size. Knows no figure and no claim.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lib.measure.serving import policy_comparison
from lib.measure.serving.policy_comparison import PolicyFactory, ServingSetup
from lib.measure.serving.server import MOST_ROWS
from lib.measure.serving.traffic import Trace
from lib.models.loading import Loaded
from lib.optimizations.adaptive_batch_sizes.method import Adaptive, best_fixed, rivals

REQUESTS = {"quick": 30, "standard": 60, "thorough": 200}  # in each phase of a trace
SIZES = range(1, MOST_ROWS + 1)


@dataclass(frozen=True)
class TrafficStudy:
    """The setup, the policy's headroom, requests per phase, the seeds, and the changing trace of each seed."""

    setup: ServingSetup
    headroom: float
    requests: int
    seeds: tuple[int, ...]
    changing: tuple[Trace, ...]

    def adaptive(self) -> Adaptive:
        """Return a new policy that has learned nothing yet."""
        return Adaptive(self.setup.objective, self.setup.single, headroom=self.headroom)

    def best_fixed(self, traces: Sequence[Trace], setup: ServingSetup | None = None) -> tuple[int, dict[int, float]]:
        """Return the best fixed size on `traces` in hindsight, and the goodput of every size."""
        setup = setup or self.setup
        return best_fixed(traces, setup.objective, setup.run, SIZES)

    def rivals(self, size: int) -> dict[str, PolicyFactory]:
        """Return the policies to compare: the fixed `size` first, ours last."""
        return rivals(size, self.adaptive, self.setup.objective)


def calibrate(
    loaded: Loaded, effort: str, *, first_token_factor: float, token_factor: float, cache_share: float, batching: str,
    seed: int = 0,
) -> tuple[ServingSetup, float]:  # fmt: skip
    """Return the setup that all policies share, and the seconds that measuring the step times took."""
    start = time.perf_counter()
    setup = policy_comparison.prepare(
        loaded,
        first_token_factor=first_token_factor,
        token_factor=token_factor,
        cache_share=cache_share,
        batching=batching,
        repeats=5 if effort != "quick" else 3 if loaded.scale == "proxy" else 2,
        seed=seed,
    )
    return setup, time.perf_counter() - start


def prepare(setup: ServingSetup, headroom: float, effort: str, count: int, seed: int = 0) -> TrafficStudy:
    """Return the study of `count` seeds from `seed` on."""
    seeds = tuple(range(seed, seed + count))
    changing = tuple(policy_comparison.traces(setup, "changing", REQUESTS[effort], seeds))
    return TrafficStudy(setup, headroom, REQUESTS[effort], seeds, changing)

"""What the replays of two policies judge."""

from types import SimpleNamespace

import pytest

from lib.measure.serving import replay
from lib.measure.trackers.energy_source import Counter

PEAKS = {"fixed": [4, 4, 4, 4, 4, 4], "again": [4, 4, 4, 4, 4, 4], "adaptive": [2, 2, 2, 2, 2, 2]}


@pytest.fixture
def rounds() -> replay.ServingRounds:
    """Six rounds in which the second arm's cache peaks at half and its time is half."""
    traces = tuple(SimpleNamespace(requests=()) for _ in range(6))
    counter = Counter("estimate", "estimated", "test", 0.1, None, lambda: 0.0)
    runs = {
        name: [
            replay.Replayed(SimpleNamespace(peak_bytes=peak), {0: [1]}, 1.0, None, peak / 4, peak / 4) for peak in peaks
        ]
        for name, peaks in PEAKS.items()
    }
    return replay.ServingRounds(traces, runs, counter)


def test_the_peak_of_a_cache_follows_from_the_chosen_size_and_is_not_judged(rounds):
    measured = {item.metric: item for item in replay.costs(rounds, "fixed", "again", "adaptive")}
    peak = measured["kv_cache_peak_bytes"]
    assert (peak.baseline, peak.optimized, peak.ratio) == (4, 2, 0.5)
    assert peak.verdict == "informative" and "chosen" in peak.reason
    assert measured["cpu_seconds_per_token"].verdict == "better", "the time of the same replays is judged"

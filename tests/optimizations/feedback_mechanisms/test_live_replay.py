"""What the replays of two profiles judge."""

from lib.measure.metrics import measurement
from lib.optimizations.feedback_mechanisms import live_replay


def test_the_peak_of_a_cache_follows_from_the_chosen_limit_and_is_not_judged():
    options = {"source": "test", "floor": 0.01}
    arms = [4.0, 4.1, 4.0, 4.2, 4.0, 4.1], [2.0, 2.1, 2.0, 2.2, 2.0, 2.1]
    peak = measurement.from_samples("kv_cache_peak_bytes", "serve", *arms, **options)
    assert peak.verdict == "better"
    shown = live_replay._shown(peak)
    assert shown.verdict == "informative" and shown.ratio == peak.ratio and "chosen" in shown.reason
    seconds = measurement.from_samples("cpu_seconds_per_token", "serve", *arms, **options)
    assert live_replay._shown(seconds) is seconds

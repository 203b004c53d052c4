"""Published findings about sparse attention, judged by the rows of a run."""

from types import SimpleNamespace

import pandas as pd

from lib.measure.metrics import measurement
from lib.optimizations.adaptive_sparse_attention import attention_timing, experiment
from lib.optimizations.adaptive_sparse_attention.attention_timing import PagesRead
from lib.optimizations.adaptive_sparse_attention.experiment import PromptLengths

SURVEY = [
    {"length": length, "block": block, "density": density, "recall": 0.96, "oracle": 1, "window": 0, "random": 0}
    | {"needed": 0.1}
    for length, density in ((1024, 0.8), (2048, 0.5), (4096, 0.3))
    for block in range(4)
]


def _row(length: int, gain: float, heads: str = "of the model") -> dict:
    return {"heads": heads, "length": length, "gain": gain, "gain_ci": (0.98 / gain, 1.02 / gain)}


LENGTHS = PromptLengths([1024, 2048, 4096], 4096)
# The first two blocks read all pages, so they are judged by what the best pages hold.
MASSES = {"mass held": [1.0, 1.0, 0.9, 0.95, 0.9], "in chosen pages": [0.5, 0.6, 0.9, 0.95, 0.9]}
PAGES = PagesRead(0.5, pd.DataFrame({"block": range(5)} | MASSES))


def _judged(times: list, prefill: list, lengths: PromptLengths = LENGTHS, random_weights: bool = False):
    compared, loaded = SimpleNamespace(measurements=prefill), SimpleNamespace(random_weights=random_weights)
    return experiment.replications(loaded, lengths, SURVEY, times, compared, PAGES)


def _prefill(ratio: float) -> list:
    rate = measurement.informative("prefill_tokens_per_second", "prefill", 100.0, 100 * ratio, "by hand", ratio=ratio)
    return [rate.model_copy(update={"ci": (0.99 * ratio, 1.01 * ratio)})]


def test_each_relation_has_its_answer():
    times = [_row(1024, 0.8), _row(4096, 1.9), _row(4096, 9.0, "planted")]
    judged = _judged(times, _prefill(1.2))
    assert [judgement.held for judgement in judged] == [True, True, True, True]
    assert "1,024 tokens 0.80" in judged[0].evidence and "kernel 1.9" in judged[3].evidence
    short = _judged(times[1:2], [])
    assert [judgement.held for judgement in short] == [True, None, True, None]


def test_the_kernel_is_compared_with_the_whole_at_one_length():
    times = [_row(1024, 0.8), _row(2048, 1.1), _row(4096, 1.9)]
    *_, kernel = _judged(times, _prefill(1.2), PromptLengths([1024, 2048, 4096], 2048))
    assert kernel.held is False and "kernel 1.1" in kernel.evidence, "not that of the longest, 1.9"


def test_random_weights_give_no_answer_about_the_location_of_mass():
    density, short, layers, kernel = _judged([_row(1024, 0.8), _row(4096, 1.9)], _prefill(1.2), random_weights=True)
    assert density.held is layers.held is None and density.evidence.startswith("random weights; 1,024 tokens")
    assert short.held and kernel.held


def test_attention_alone_is_not_judged_where_decoding_was_too_noisy():
    """Previously a time that the record does not judge refuted the claim."""
    rate = _prefill(0.7)[0].model_copy(update={"verdict": "worse", "noise_floor": 0.02})
    noisy = measurement.informative("decode_tokens_per_second", "decode", 100.0, 99.0, "by hand")
    noisy = noisy.model_copy(update={"verdict": "inconclusive", "noise_floor": 0.12, "reason": "too noisy"})
    alone = measurement.informative("attention_ms", "attention of one block, 4096 tokens", 1.0, 1.5, "by hand")
    alone = alone.model_copy(update={"verdict": "worse", "noise_floor": 0.05})
    parts = [SimpleNamespace(measurements=[m]) for m in (rate, noisy, alone)]
    timed = attention_timing.all_timed(*parts)
    assert [m.metric for m in timed] == [rate.metric, noisy.metric, alone.metric]
    assert {m.verdict for m in timed} == {"inconclusive"} and timed[-1].reason == f"decode: {noisy.reason}"
    quiet = [parts[0], SimpleNamespace(measurements=[]), parts[2]]
    assert attention_timing.all_timed(*quiet)[-1].verdict == "worse"


def test_a_busy_machine_leaves_relations_between_times_undecided():
    reason = "the machine was busy: our threads waited for a core 22% of the time"
    busy = [m.model_copy(update={"disturbed": 1, "reason": reason}) for m in _prefill(1.2)]
    density, short, layers, kernel = _judged([_row(1024, 0.8), _row(4096, 1.9)], busy)
    assert density.held and layers.held, "no time"
    assert short.held is kernel.held is None
    assert short.evidence.startswith("1,024 tokens: 0.8") and short.evidence.endswith(reason)

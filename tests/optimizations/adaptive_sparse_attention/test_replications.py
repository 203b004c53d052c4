"""What others published of sparse attention, judged by the rows that a run has."""

import pandas as pd

from lib.measure.metrics import measurement
from lib.optimizations.adaptive_sparse_attention import experiment
from lib.optimizations.adaptive_sparse_attention.attention_timing import PagesRead

SURVEY = [
    {"length": length, "block": block, "density": density, "recall": 0.96, "oracle": 1, "window": 0, "random": 0}
    | {"needed": 0.1}
    for length, density in ((1024, 0.8), (2048, 0.5), (4096, 0.3))
    for block in range(4)
]


def _row(length: int, gain: float, heads: str = "of the model") -> dict:
    return {"heads": heads, "length": length, "gain": gain, "gain_ci": (0.98 / gain, 1.02 / gain)}


def _prefill(ratio: float) -> list:
    rate = measurement.informative("prefill_tokens_per_second", "prefill", 100.0, 100 * ratio, "by hand", ratio=ratio)
    return [rate.model_copy(update={"ci": (0.99 * ratio, 1.01 * ratio)})]


def test_each_relation_has_its_answer():
    # The first two blocks read all pages: what the best ones hold there is judged, not what is read.
    masses = {"mass held": [1.0, 1.0, 0.9, 0.95, 0.9], "in chosen pages": [0.5, 0.6, 0.9, 0.95, 0.9]}
    pages = PagesRead(0.5, pd.DataFrame({"block": range(5)} | masses))
    times = [_row(1024, 0.8), _row(4096, 1.9), _row(4096, 9.0, "planted")]
    judged = experiment.replications(SURVEY, times, _prefill(1.2), pages)
    assert [judgement.held for judgement in judged] == [True, True, True, True]
    assert "1,024 tokens 0.80" in judged[0].evidence and "kernel 1.9" in judged[3].evidence
    short = experiment.replications(SURVEY, times[1:2], [], pages)
    assert [judgement.held for judgement in short] == [True, None, True, None]

"""Rates against the read bound: its reasons replace those of the other bound and nothing else."""

from types import SimpleNamespace

import pytest

from lib.measure.compare.speed import Compared
from lib.measure.metrics import busy, measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.roofline import ceilings
from lib.measure.roofline.cost_model import Cost
from lib.optimizations.streaming_computation import read_bound
from lib.optimizations.streaming_computation.read_bound import Reads

BUSY = "the machine was busy: 3 processes beside it, in 2 of 6 blocks, more than could be repeated"
SHARED = "reading and computing share the machine"


def _against(reason: str | None, seconds: float) -> measurement.Measurement:
    """Return a rate of half the baseline's, compared with the given seconds of reading; computing is bound by one."""
    rate = measurement.informative("decode_tokens_per_second", "decode", 2.0, 1.0, "timed", ci=(0.4, 0.6))
    rate = rate.model_copy(update={"reason": reason, "disturbed": 2})
    pairs = Pairs([1.0] * 6, [2.0] * 6, ["AB", "BA"] * 3, [None] * 6, 1)
    timed = SimpleNamespace(costs=(Cost(1.0, 1.0), Cost(1.0, 1.0)), pairs=pairs)
    peaks = ceilings.Ceilings(1.0, 1.0, "cpu", "float32", 1, "now", None)
    read = Reads(100, None, seconds, 1)
    compared, _ = read_bound.against_reading(Compared([rate], {"decode": timed}, {}, peaks), {"decode": read})
    return compared.measurements[0]


@pytest.mark.parametrize(
    ("seconds", "added"), [(1.0, f"; {SHARED}"), (2.0, ""), (9.0, "; baseline far from its bound")]
)
def test_the_reason_for_an_undecided_rate_is_kept(seconds, added):
    rate = _against(f"{BUSY}; {ceilings.DISPATCH}", seconds)
    assert rate.reason == BUSY + added
    assert busy.why_busy([rate]).startswith(BUSY)


def test_only_the_other_bounds_reason_is_removed():
    assert _against(ceilings.UNEXPLAINED, 2.0).reason is None
    assert _against(None, 1.0).reason == SHARED


def test_sharing_the_machine_does_not_explain_more_time_than_the_reads_take():
    """A second more than the resident model, of which reading takes a tenth: sharing cannot be the reason."""
    assert _against(None, 0.1).reason == "more time than reading and computing take one after the other"

"""What would refute the claims: each is answered from measurements, or left open if undecided; what the memory children
run.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.errors import NotApplicable, UserError
from lib.measure.compare.speed import Compared
from lib.measure.metrics import measurement, paired_samples, settings
from lib.measure.timing import child
from lib.measure.trackers import memory
from lib.models.checkpoints import io
from lib.models.decoding import mla_absorption
from lib.models.offload import streamer
from lib.models.structure.anatomy import anatomy
from lib.optimizations.streaming_computation import (
    experiment,
    memory_tradeoff,
    method,
    outcome,
    read_bound,
    window_quality,
)
from lib.optimizations.streaming_computation.window_quality import LongTexts

PEAK = "peak_memory_above_start_bytes"


def _offload(low, high, floor=0.01):
    """Rates of streaming over those of accelerate's offloading, spread from `low` to `high`, with an A/A control."""
    rates = np.linspace(low, high, 6).tolist()
    options = {"source": "timed", "floor": floor, "process_sigma": 0.0}
    return paired_samples.from_samples("decode_tokens_per_second", "decode", [1.0] * 6, rates, **options)


def _answers(optimized_tokens, peak=50.0, offload_ci=(1.5, 2.0), climb=(0.9, 1.0), exact=True):
    work = [SimpleNamespace(output_BN=torch.tensor([tokens])) for tokens in ([1, 2], optimized_tokens)]
    compared = Compared([], {"decode": SimpleNamespace(baseline=work[0], optimized=work[1])})
    peaks = [measurement.counted(PEAK, "generate", 100.0, peak, "counted", "measured")]
    offload = _offload(*offload_ci)
    texts = LongTexts(late_over_early={window_quality.WINDOWED: 1.0}, climb=climb)
    equal = {"all together": {"same_top": 1.0}}
    answers = outcome.refutations(compared, exact, equal, peaks, {"disk": offload}, texts)
    assert [claim for claim, *_ in answers] == list(outcome.CLAIMS)
    return [refuted for _, refuted, _ in answers]


def test_streamed_weights_take_as_much_disk_as_before(monkeypatch):
    """The record held only the bytes in memory: streaming was listed among the compressions as a lossless one."""
    tensors = {name: SimpleNamespace(nbytes=bytes_of) for name, bytes_of in (("a", 600), ("b", 400))}
    streamed = SimpleNamespace(lm_head=SimpleNamespace(streamer=SimpleNamespace(file=SimpleNamespace(places=tensors))))
    held = measurement.counted("weights_bytes", "load", 1000, 350, "planted")
    monkeypatch.setattr(experiment, "resources", lambda *_, **__: [held])
    monkeypatch.setattr(experiment, "_formulas", lambda *_: {})
    in_memory, on_disk = experiment.counted(None, streamed, settings.read("quick"), True)
    assert in_memory is held and on_disk.metric == "checkpoint_bytes"
    assert (on_disk.baseline, on_disk.optimized, on_disk.verdict) == (1000, 1000, "informative"), "it carries no word"
    assert experiment.counted(None, SimpleNamespace(), settings.read("quick"), True) == [held]


def test_nothing_is_refuted_if_everything_holds():
    assert _answers([1, 2]) == [False, False, False, False]


def test_each_claim_can_be_refuted():
    assert _answers([1, 3], 100.0, (0.5, 0.8), (1.2, 1.5)) == [True, True, True, True]


@pytest.mark.parametrize(
    ("rates", "floor", "refuted", "says"),
    [
        ((1.5, 2.0), 0.01, False, "× ("),
        ((1.005, 1.012), 0.005, True, "× ("),
        ((1.07, 1.09), 0.09, None, "the effect lies within the noise floor of 9 %"),
        ((1.5, 2.0), 0.2, None, "the noise floor of 20 % is above 10 %"),
        ((1.5, 2.0), None, None, "no A/A control ran"),
    ],
)
def test_faster_than_offloading_means_beyond_margin_and_noise_floor(rates, floor, refuted, says):
    """Previously any interval above 1 sufficed, however small the gain and whatever the machine did."""
    answer, evidence = outcome._no_faster(_offload(*rates, floor))
    assert answer is refuted and says in evidence and evidence.startswith("streamed ÷ accelerate 1.")


def test_evidence_has_the_digits_that_its_interval_supports():
    far = _offload(1.5, 2.0).model_copy(update={"ratio": 17.3, "ci": (12.0, 22.0)})
    assert "accelerate 17.3× (12.0–22.0)" in outcome._no_faster(far)[1]
    texts = LongTexts(late_over_early={window_quality.WINDOWED: 1.02}, climb=(1.0, 1.02996))
    climbs, evidence = window_quality.does_perplexity_climb(texts)
    assert climbs is False and "–1.02996)" in evidence, "an end below the limit is not shown as the limit"
    for share, said in ((0.99999, "99.999 % of the"), (1.0, "all")):
        evidence = outcome._other_tokens(Compared([], {}), True, share)[1]
        assert evidence.endswith(f"; {said} positions have the same most likely token")


def test_undecided_claims_are_left_open():
    assert _answers([1, 3], 50.0, (0.8, 1.2), (0.9, 1.2), exact=False) == [None, False, None, None]
    assert _answers([1, 2], climb=None)[3] is None


@pytest.mark.parametrize(("same_top", "refuted"), [(1.0, False), (0.9933, None)])
def test_two_equal_tokens_do_not_outweigh_positions_that_differ(same_top, refuted):
    """At 1 of 150 positions another token was the most likely one, yet 2 generated tokens answered the claim."""
    work = SimpleNamespace(output_BN=torch.tensor([[1, 2]]))
    compared = Compared([], {"decode": SimpleNamespace(baseline=work, optimized=work)})
    for exact in (True, False):
        answer, evidence = outcome._other_tokens(compared, exact, same_top)
        assert answer is refuted and evidence.startswith("2 of 2 generated tokens are equal; ")


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.5])
def test_the_increase_in_perplexity_is_that_of_the_losses(slope):
    random = np.random.default_rng(0)
    losses_NT = 3 + slope * np.linspace(0, 1, 800) + 0.01 * random.standard_normal((12, 800))
    low, high = window_quality.climb_interval(losses_NT, 100)
    assert (low + high) / 2 == pytest.approx(np.exp(slope * 600 / 799), abs=0.005) and 0 < high - low < 0.02


def test_memory_children_decode_absorbed_latents_like_the_timed_arms(tiny, name, tmp_path, monkeypatch):
    model = tiny(name)
    folder, latents = io.save(model, tmp_path / "saved"), anatomy(model).blocks[0].attention.kind == "latent"
    loaded = SimpleNamespace(model=model, scale="proxy", dtype=torch.float32, device="cpu")
    seen = []

    def peaks(*arms, turns):
        assert turns is None, "as many as the device decides, but for a preview"
        for resident in map(child.load, arms[:2]):
            seen.append((mla_absorption.is_absorbed(resident), "forward" in vars(anatomy(resident).decoder)))
        return [memory.Peaks([memory.failed("planted")]) for _ in arms]

    monkeypatch.setattr(memory, "peaks", peaks)
    experiment.peaks(loaded, settings.read("quick"), folder, 1.0, {"prefill_chunk": 8, "absorbed": True})
    assert seen == [(latents, False), (latents, True)], "whole prompts, then in chunks"


def test_a_model_that_already_streams_has_no_resident_arm(tiny, tmp_path):
    """It is loaded this way if it does not fit into memory: a result, reported before anything is written."""
    folder = io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "saved")
    streamed = streamer.open_streamed(folder, memory_ratio=0.6)
    with pytest.raises(NotApplicable, match="stream from a file already: there is no room for a resident arm"):
        experiment.saved(streamed)
    streamer.streamer(streamed).close()


def test_a_disk_without_room_for_the_weights_is_reported_before_writing(tiny, monkeypatch):
    model = tiny("qwen3-4b-instruct-2507")
    monkeypatch.setattr(experiment.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"GB of weights do not fit into the 0\.0 GB free in .*; .*TMPDIR"):
        experiment.saved(model)


def test_a_preview_generates_few_tokens_and_still_overruns_the_window(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    loaded = SimpleNamespace(model=model, scale="proxy", device="cpu", tokenizer=None, parameters=None)
    caches = window_quality.cache_makers(model, 4, 40)
    held = window_quality.cache_sizes(loaded, caches, 40, "preview")
    by_arm = {arm: rows.value.to_list() for arm, rows in held.groupby("arm")}
    assert by_arm[window_quality.WHOLE] == list(range(40, 88))
    assert by_arm[window_quality.WINDOWED][:3] == [40, 41, 42] and max(by_arm[window_quality.WINDOWED]) < 40 + 4 + 32


def test_a_preview_tests_a_value_outside_the_window_and_times_one_more_allowance():
    assert all(windows > 1 for windows in window_quality.OUTSIDE.values())
    assert memory_tradeoff.ratios(0.35, "proxy", "preview") == [0.35, 1.0]
    assert memory_tradeoff.ratios(0.35, "proxy", "quick") == [0.35, 0.65, 1.0]


def test_a_share_of_positions_that_was_not_measured_is_not_shown(tiny, tmp_path):
    """Rows of losses choose no token: a share of 1 was hard-coded there."""
    model = tiny("qwen3-4b-instruct-2507")
    folder = io.save(model, tmp_path / "saved")
    streamed = method.open_folder(folder, memory_ratio=0.7)
    ids_NT = torch.arange(8, 40).reshape(2, 16)
    equal = experiment.equality_of_variants(model, streamed, folder, ids_NT, 0.7)
    read_bound.stream_of(streamed).close()
    table = experiment.equality_table(equal).set_index("variant")["same most likely token, share"]
    assert table["all together"] == 1.0 and np.isnan(table[experiment.IN_ROWS])
    assert "same_top" not in equal[experiment.IN_ROWS] and equal[experiment.IN_ROWS]["difference"] < 1e-4

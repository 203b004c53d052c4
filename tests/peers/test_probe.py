"""What all arms measure with: perplexity, shares of zeros and bytes, checked by hand; and their shared setting."""

import math

import pytest
import torch

from lib.measure.quality import evaluate
from lib.models import loading
from tests.peers import setting
from tests.peers.arms import probe

NAME = "qwen3-4b-instruct-2507"
CHOICES = {"model": NAME, "dtype": "", "threads": 1, "prompt_tokens": 24, "windows": 3, "window_tokens": 32}


def test_perplexity_matches_the_workbench(tiny):
    model = tiny(NAME)
    ids_NT = torch.randint(8, 96, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = math.exp(evaluate.read(model, ids_NT).loss_N.mean())
    assert probe.perplexity(model, ids_NT.tolist()) == pytest.approx(expected, rel=1e-5)
    few = probe.sample_perplexity(model, ids_NT.tolist())
    assert few == pytest.approx(math.exp(evaluate.read(model, ids_NT[:2]).loss_N.mean()), rel=1e-5)


def test_zeros_are_counted_in_the_decoder_and_tied_weights_once(tiny):
    model = tiny(NAME)
    matrices = probe.decoder_matrices(model)
    assert len(matrices) == 4 * 7 and probe.zeros(model) == 0
    with torch.no_grad():
        for weight in matrices:
            weight[:, ::2] = 0
    assert probe.zeros(model) == pytest.approx(0.5)
    own = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    assert probe.stored_bytes(model) == sum(own.values())


def test_the_median_of_timed_rounds_and_the_peak_are_read(monkeypatch):
    """The two warm-up rounds take longest; of the five timed ones, the median is neither the mean nor the last."""
    now, lasts = [0.0], iter((90.0, 80.0, 5.0, 1.0, 2.0, 40.0, 3.0))
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(lasts)

    assert probe.median_seconds(call, 5, warmup=2) == 3.0 and next(lasts, None) is None
    assert probe.peak_megabytes() > 1


def test_the_setting_holds_text_of_three_kinds(monkeypatch):
    loaded = loading.load(NAME, dtype="float32")
    monkeypatch.setattr(setting.loading, "load", lambda name, scale, dtype: loaded)
    settings = setting.build(CHOICES | {"sequences": 4})
    assert len(settings["prompt"]) == 24 and [len(window) for window in settings["windows"]] == [32] * 3
    assert (
        [len(row) for row in settings["calibration"]] == [32] * 4
        and settings["gguf"] == ""
        and settings["gguf_bytes"] == 0
    )
    assert not {tuple(row) for row in settings["windows"]} & {tuple(row) for row in settings["calibration"]}
    assert settings["dtype"] == "float32" and settings["parameters"] > 1e6 and settings["folder"].endswith(NAME)

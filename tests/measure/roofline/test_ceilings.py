"""Utilizations are shares of the machine's measured ceilings; the vendor's figures are stated as well."""

from dataclasses import replace

import pytest
import torch

from lib.measure.roofline import ceilings
from lib.measure.roofline.ceilings import Ceilings
from lib.measure.roofline.cost_model import Cost

PEAKS = Ceilings(700e12, 4e12, "cuda", "bfloat16", 8, "2026-01-31", None)
COSTS = Cost(7e12, 1e10), Cost(3.5e12, 1e10)


def _sources(peaks: Ceilings) -> list[str]:
    return [m.source for m in ceilings.utilisation("prefill", COSTS, (0.1, 0.1), peaks)]


def test_data_sheet_figures_are_shown_with_the_measured_ceilings(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    measured = ceilings.utilisation("prefill", COSTS, (0.1, 0.1), PEAKS)
    assert [measured[0].baseline, measured[0].optimized] == pytest.approx([0.1, 0.05]), "shares of what was measured"
    assert all("700 TFLOP/s and 4 TB/s, of 989 and 4.8 in its data sheet" in source for source in _sources(PEAKS))


@pytest.mark.parametrize(
    ("changed", "name"), [({"device": "cpu"}, None), ({"dtype": "float32"}, "NVIDIA H200"), ({}, "A card of tomorrow")]
)
def test_no_figure_is_stated_without_a_data_sheet(monkeypatch, changed, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert not any("data sheet" in source for source in _sources(replace(PEAKS, **changed)))

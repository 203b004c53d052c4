"""The survey of attention against its parts, and values recalled from three places of a prompt."""

import pytest
import torch

from lib.models.decoding.attention_inputs import Heads
from lib.optimizations.adaptive_sparse_attention import attended_mass, experiment
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks

FIND = experiment.Finder(0.9, 16, 4, last=1)


@pytest.fixture(scope="module")
def noise():
    random = torch.Generator().manual_seed(2)
    return Heads(3, *(torch.randn(count, 256, 16, generator=random) for count in (4, 2, 2)), 0.25)


def test_the_oracle_holds_most_and_a_survey_agrees_with_its_parts(noise):
    planted = experiment.planted(noise, 16)
    rows = attended_mass.survey([planted], FIND, [128, 256])
    assert [row["length"] for row in rows] == [128, 256] and rows[0]["block"] == 3
    whole = rows[1]
    assert whole["recall"] == pytest.approx(experiment.judge(planted, FIND(planted), 16).recall)
    assert whole["needed"] == pytest.approx(experiment.needed(planted, 16, 0.95))
    assert whole["oracle"] >= whole["recall"] > max(whole["random"], whole["window"]) + 0.1
    assert len(whole["density_of_heads"]) == 4
    frame = attended_mass.curves(rows, {"density": "kept"})
    assert frame["value"].tolist() == [row["density"] for row in rows] and set(frame["arm"]) == {"kept"}


def test_the_oracle_of_a_survey_is_the_heaviest_blocks_of_each_row(noise):
    kept, mass = FIND(noise), experiment.mass(noise, 16)
    exact = blocks.exact_mass(noise.query_HTD, noise.key_GTD, noise.scaling, 16)
    rows = experiment.sampled_rows(16)
    by_hand = [exact[h, n].sort(descending=True).values[: int(kept[h, n].sum())].sum() for h in range(4) for n in rows]
    assert attended_mass._oracle(kept, mass) == pytest.approx(float(torch.stack(by_hand).mean()), abs=1e-5)


def test_values_are_asked_for_at_three_places_of_prompts_of_one_length(monkeypatch):
    asked = []

    def recall(loaded, distance, count, seed, lead):
        asked.append((loaded.model, lead, lead + distance + 16))
        return attended_mass.Retrieved(distance, torch.tensor([True, True, False, True]).numpy())

    monkeypatch.setattr(attended_mass.evaluate, "retrieval", recall)
    monkeypatch.setattr(attended_mass, "_with", lambda loaded, model: type("Arm", (), {"model": model}))
    found = attended_mass.at_places(None, {"full": "a", "sparse": "b"}, 512, 4)
    assert {length for *_, length in asked} == {512} and [lead for _, lead, _ in asked[:3]] == [8, 248, 432]
    bars = attended_mass.place_bars(found)
    assert list(bars["arm"][:2]) == ["start, full", "start, sparse"] and (bars["value"] == 0.75).all()
    assert (bars["low"] > 0.2).all() and (bars["high"] < 1).all()
    middle = found["full"]["middle"]
    asked.clear()
    attended_mass.at_places(None, {"full": "a"}, 512, 4, 0, {"full": {"middle": middle}})
    assert [lead for _, lead, _ in asked] == [8, 432]
    with pytest.raises(ValueError, match="not to prompts of 256 tokens"):
        attended_mass.at_places(None, {"full": "a"}, 256, 4, 0, {"full": {"middle": middle}})

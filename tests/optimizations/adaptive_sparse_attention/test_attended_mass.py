"""The attention survey compared with its parts: exact mass, the oracle, planted heads."""

import pytest
import torch

from lib.models.decoding.attention_inputs import Heads, watch
from lib.optimizations.adaptive_sparse_attention import attended_mass
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks

FIND = attended_mass.Finder(0.9, 16, 4)


@pytest.fixture(scope="module")
def noise():
    random = torch.Generator().manual_seed(2)
    return Heads(3, *(torch.randn(count, 256, 16, generator=random) for count in (4, 2, 2)), 0.25)


def test_the_oracle_holds_the_most_mass_and_a_survey_matches_its_parts(noise):
    planted = attended_mass.planted(noise, 16)
    rows = attended_mass.survey([planted], FIND, [128, 256])
    assert [row["length"] for row in rows] == [128, 256] and rows[0]["block"] == 3
    whole = rows[1]
    assert whole["recall"] == pytest.approx(attended_mass.attended(planted, FIND(planted), 16).recall)
    assert whole["needed"] == pytest.approx(attended_mass.needed(planted, 16, 0.95))
    assert whole["oracle"] >= whole["recall"] > max(whole["random"], whole["window"]) + 0.1
    assert len(whole["density_of_heads"]) == 4
    frame = attended_mass.curves(rows, {"density": "kept"})
    assert frame["value"].tolist() == [row["density"] for row in rows] and set(frame["arm"]) == {"kept"}


def test_the_survey_oracle_takes_the_heaviest_blocks_of_each_row(noise):
    kept, mass = FIND(noise), attended_mass.sampled_mass(noise, 16)
    exact = blocks.exact_mass(noise.query_HTD, noise.key_GTD, noise.scaling, 16)
    rows = attended_mass.sampled_rows(16)
    by_hand = [exact[h, n].sort(descending=True).values[: int(kept[h, n].sum())].sum() for h in range(4) for n in rows]
    assert attended_mass._oracle(kept, mass) == pytest.approx(float(torch.stack(by_hand).mean()), abs=1e-5)


def test_a_survey_is_summarized_in_two_sentences(noise):
    text = attended_mass.reading(attended_mass.survey([attended_mass.planted(noise, 16)], FIND, [256]))
    assert text.count(". ") == 1 and text.endswith(".") and "256 tokens" in text


def test_a_blockwise_survey_gives_the_same_rows(tiny, monkeypatch):
    """The rows equal those with all heads held at once, and the heads of two blocks are never held together."""
    model, ids = tiny("qwen3-coder-30b"), torch.randint(8, 96, (1, 128), generator=torch.Generator().manual_seed(4))
    held = attended_mass.survey(watch(model, ids), FIND, [64, 128])
    seen = []
    survey = attended_mass.survey
    monkeypatch.setattr(
        attended_mass, "survey", lambda heads, *rest, **o: seen.append(len(heads)) or survey(heads, *rest, **o)
    )
    assert attended_mass.survey_model(model, ids, FIND, [64, 128]) == held
    assert seen == [1] * 4

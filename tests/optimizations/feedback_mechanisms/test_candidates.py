"""Which candidates for the fast profile come in which order, by the structure of the model."""

from types import SimpleNamespace

import pytest

from lib.errors import UserError
from lib.optimizations.feedback_mechanisms import candidates


@pytest.fixture
def considered(tiny, monkeypatch):
    """The names and cuts of the candidates of a model; a cut of channels by more than `most` is out of reach."""
    monkeypatch.setattr(candidates.tasks, "calibration", lambda *_, **__: [])

    def names(model_name, ratio=0.5, most=1.0):
        cuts = []

        def apply(model, text, ratio, granularity, compensate=False, seed=0):
            cuts.append((granularity, ratio, compensate))
            if granularity == "channels" and ratio > most:
                raise UserError("out of reach")
            return model

        def first_admitted(loaded, every, bound, prompts, seed, **amounts):
            return [name for name, _ in every]

        monkeypatch.setattr(candidates.profiles, "first_admitted", first_admitted)
        loaded = SimpleNamespace(model=tiny(model_name))
        makers = candidates.Makers(apply, lambda model, *_, **__: (model, []))
        return candidates.fast_profiles(loaded, makers, ratio, 0, 0.1, "standard", 0)[1], cuts

    return names


def test_mild_cuts_of_channels_come_after_whole_blocks(considered):
    names, cuts = considered("qwen3-4b-instruct-2507")
    blocks = ["50 % fewer parameters, whole blocks", "25 % fewer parameters, whole blocks"]
    assert names == [*blocks, "25 % fewer parameters, channels", "10 % fewer parameters, channels"]
    assert cuts[2:] == [("channels", 0.25, True), ("channels", 0.1, True)]
    assert considered("qwen3-4b-instruct-2507", ratio=0.2)[0][2:] == ["10 % fewer parameters, channels"]


@pytest.mark.parametrize("name", ["qwen3-coder-30b", "glm-4.7-flash"])
def test_experts_are_not_narrowed(considered, name):
    """A tenth of them moves a token in ten on one proxy model, and on the other no step gets shorter by it."""
    names, cuts = considered(name)
    assert len(names) == 2 and {granularity for granularity, *_ in cuts} == {"depth"}


def test_a_cut_beyond_the_channels_is_no_candidate(considered):
    assert considered("qwen3-4b-instruct-2507", most=0.2)[0][2:] == ["10 % fewer parameters, channels"]

"""Which candidates for the fast profile are proposed, and in which order, by the structure of the model."""

import copy
from types import SimpleNamespace

import pytest

from lib.errors import UserError
from lib.optimizations.feedback_mechanisms import candidates


@pytest.fixture
def considered(tiny, monkeypatch):
    """The names and cuts of a model's candidates; channel cuts above `most` are infeasible."""
    monkeypatch.setattr(candidates.tasks, "calibration", lambda *_, **__: [])

    def names(model_name, ratio=0.5, most=1.0, slow=None):
        cuts = []

        def apply(model, text, ratio, granularity, compensate=False, seed=0):
            cuts.append((granularity, ratio, compensate))
            if granularity == "channels" and ratio > most:
                raise UserError("out of reach")
            return copy.copy(model)

        def first_admitted(loaded, every, bound, prompts, seed, saving=None, worth=None, **amounts):
            """Refuse every candidate: those of channels by `slow`, the others for their quality."""
            names = []
            for name, model in every:
                names.append(name)
                if "channels" in name and slow:
                    {"saving": saving, "worth": worth}[slow](model)
            return names

        monkeypatch.setattr(candidates.profiles, "first_admitted", first_admitted)
        loaded = SimpleNamespace(model=tiny(model_name))
        makers = candidates.Makers(apply, lambda model, *_, **__: (model, []))
        net = SimpleNamespace(refused="not faster" if slow == "saving" else None)
        monkeypatch.setattr(candidates.experiment, "not_worth_it", lambda *_: "no fewer seconds missed")
        measure = (lambda _: SimpleNamespace(net=net)) if slow else None
        return candidates.fast_profiles(loaded, makers, ratio, 0, 0.1, "standard", 0, measure)[1], cuts

    return names


def test_mild_channel_cuts_come_after_whole_blocks(considered):
    names, cuts = considered("qwen3-4b-instruct-2507")
    blocks = ["50 % fewer parameters, whole blocks", "25 % fewer parameters, whole blocks"]
    assert names == [*blocks, "25 % fewer parameters, channels", "10 % fewer parameters, channels"]
    assert cuts[2:] == [("channels", 0.25, True), ("channels", 0.1, True)]
    assert considered("qwen3-4b-instruct-2507", ratio=0.2)[0][2:] == ["10 % fewer parameters, channels"]


@pytest.mark.parametrize("slow", ["saving", "worth"])
def test_a_milder_cut_than_one_that_saves_too_little_is_not_tried(considered, slow):
    names, _ = considered("qwen3-4b-instruct-2507", slow=slow)
    assert names[2:] == ["25 % fewer parameters, channels"]


@pytest.mark.parametrize("name", ["qwen3-coder-30b", "glm-4.7-flash"])
def test_experts_are_not_narrowed(considered, name):
    """Cutting a tenth of them changes one token in ten on one proxy model and shortens no step on the other."""
    names, cuts = considered(name)
    assert len(names) == 2 and {granularity for granularity, *_ in cuts} == {"depth"}


def test_a_cut_beyond_the_channels_is_not_a_candidate(considered):
    assert considered("qwen3-4b-instruct-2507", most=0.2)[0][2:] == ["10 % fewer parameters, channels"]

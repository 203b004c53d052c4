"""Long texts and values on models of few positions, grouped by their source documents."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from lib.measure.quality import noninferiority
from lib.models import parameters
from lib.optimizations.streaming_computation import window_quality
from lib.optimizations.streaming_computation.window_quality import LongTexts

NAME, WINDOW = "qwen3-4b-instruct-2507", 32


def _loaded(tiny, positions: int) -> SimpleNamespace:
    model = copy.deepcopy(tiny(NAME))
    model.config.max_position_embeddings = positions
    described = SimpleNamespace(tasks=[])
    return SimpleNamespace(
        model=model, scale="proxy", device="cpu", tokenizer=None, parameters=described, random_weights=False
    )


def _read(loaded, effort="preview"):
    caches = window_quality.cache_makers(loaded.model, 4, WINDOW)
    texts = window_quality.read_long_texts(loaded, caches, WINDOW, effort)
    retrieved = window_quality.retrieval_by_distance(loaded, caches, WINDOW, effort)
    held = window_quality.cache_sizes(loaded, caches, WINDOW, effort)
    return texts, retrieved, held


def test_texts_are_no_longer_than_the_model_reads(tiny):
    texts, retrieved, held = _read(_loaded(tiny, 200))
    assert "of 200 tokens" in texts.perplexity[window_quality.WINDOWED].source
    assert "over 97 tokens" in retrieved["outside the window"].source, "surely outside, whenever the window is cut"
    assert set(held["arm"]) == {window_quality.WHOLE, window_quality.WINDOWED}
    assert len(window_quality.retrieval_bars(retrieved)) == 4


def test_nothing_is_read_if_a_window_does_not_fit_and_the_reason_is_stated(tiny):
    texts, retrieved, held = _read(_loaded(tiny, 128))
    assert texts.curves.empty and not texts.perplexity and retrieved == {}
    assert window_quality.does_perplexity_climb(texts) == (
        None,
        "no texts were read: the model has 128 positions, and texts for this window need 160",
    )
    assert set(held["arm"]) == {window_quality.WHOLE} and held["strength"].max() < 128
    assert window_quality.does_perplexity_climb(LongTexts())[1] == "no texts were read: random weights"


def test_at_real_dimensions_the_few_generated_tokens_overrun_the_window(tiny):
    """A prompt of 64 tokens and 8 more were shown as endless generation: a window of 256 never forgot one."""
    loaded = _loaded(tiny, 200)
    loaded.scale = "full"
    caches = window_quality.cache_makers(loaded.model, 4, WINDOW)
    held = window_quality.cache_sizes(loaded, caches, WINDOW, "quick")
    by_arm = {arm: rows.value.to_list() for arm, rows in held.groupby("arm")}
    assert by_arm[window_quality.WHOLE] == list(range(64, 72))
    assert by_arm[window_quality.WINDOWED] == [64, 65, 66, 67, 36, 37, 38, 39]
    loaded.model.config.max_position_embeddings = 128
    held = window_quality.cache_sizes(loaded, caches, WINDOW, "quick")
    assert set(held["arm"]) == {window_quality.WHOLE} and held["value"].max() == 71, "no window fits"


def _planted(monkeypatch, tiny, source_N):
    """Read planted losses of texts from the given documents; a window's are lower by an amount set by its document."""
    loaded = _loaded(tiny, 200)
    random, documents = np.random.default_rng(0), np.asarray(source_N)
    whole_NT = 2 + 0.01 * random.standard_normal((len(documents), 199))
    arms = iter([whole_NT, whole_NT - 0.02 * (1 + documents)[:, None], whole_NT])
    monkeypatch.setattr(window_quality, "losses", lambda *arguments, **options: next(arms))
    monkeypatch.setattr(window_quality.task_list, "window_sources", lambda *arguments: documents)
    caches = window_quality.cache_makers(loaded.model, 4, WINDOW)
    return window_quality.read_long_texts(loaded, caches, WINDOW, "quick")


def test_texts_of_one_document_count_as_one_draw(tiny, monkeypatch):
    several = _planted(monkeypatch, tiny, np.arange(6))
    assert several.perplexity[window_quality.WINDOWED].verdict != "inconclusive" and "low" in several.curves
    one = _planted(monkeypatch, tiny, np.zeros(6, dtype=int))
    assert one.perplexity[window_quality.WINDOWED].verdict == "inconclusive"
    assert one.climb is None and "low" not in one.curves
    assert window_quality.does_perplexity_climb(one) == (None, window_quality.ONE_DOCUMENT)
    two = _planted(monkeypatch, tiny, np.asarray([0, 0, 0, 1, 1, 1]))
    assert two.climb[1] - two.climb[0] > several.climb[1] - several.climb[0]


def test_values_behind_one_document_count_as_one_draw(tiny, monkeypatch):
    monkeypatch.setattr(window_quality.task_list, "filler_sources", lambda loaded, distance, count, *_: np.zeros(count))
    loaded = _loaded(tiny, 200)
    with window_quality.reading_in_chunks(loaded.model) as model:
        answers = window_quality.retrieve(loaded, model, 16, 4, lambda: None)
    assert answers.source_N.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("sinks", [4, 40])
def test_values_outside_the_window_are_not_among_its_sinks(tiny, monkeypatch, sinks):
    """A cache never forgets its sinks: a value among them would be recalled from any distance."""
    prompts, seen = window_quality.task_list.retrieval_prompts, []

    def watched(*arguments):
        seen.append(prompts(*arguments))
        return seen[-1]

    monkeypatch.setattr(window_quality.task_list, "retrieval_prompts", watched)
    loaded = _loaded(tiny, 400)
    caches = window_quality.cache_makers(loaded.model, sinks, WINDOW)
    assert len(window_quality.retrieval_by_distance(loaded, caches, WINDOW, "preview")) == 2
    key = window_quality.retrieval.KEY
    for ids_BT, value_BV in seen:
        for ids_T, value_V in zip(ids_BT.tolist(), value_BV.tolist()):
            places = [at for at in range(len(ids_T)) if ids_T[at : at + len(value_V)] == value_V]
            assert places and places[0] - key >= sinks and len(ids_T) + len(value_V) <= 400


def test_long_texts_come_from_as_many_documents_as_a_verdict_needs(name):
    tokenizer = AutoTokenizer.from_pretrained(parameters.PARAMETERS / "proxies" / name)
    loaded = SimpleNamespace(tokenizer=tokenizer, parameters=parameters.read(name))
    for effort in ("quick", "standard"):
        sources = window_quality.task_list.window_sources(loaded, "final", *window_quality.TEXTS[effort])
        assert len(np.unique(sources)) >= noninferiority.MINIMUM_WINDOWS, effort

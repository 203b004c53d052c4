"""The frozen text: no held-out text is in the training text, splits share nothing, classes are large enough."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from lib.errors import UserError
from lib.models import parameters
from lib.models.tasks import corpus

RUN = 13  # words; training text and held-out text share no run of this many words


def word_runs(text: str) -> Iterator[str]:
    """Yield every run of RUN consecutive words of `text`, lower case."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - RUN + 1):
        yield " ".join(words[start : start + RUN])


def held_out_runs(part: str, splits: Iterable[str] = corpus.SPLITS) -> set[str]:
    """Return all runs of RUN words in the held-out items and running text of `splits`."""
    passages = [p for split in splits for p in corpus.labelled(part, split) + corpus.running_text(part, split)]
    return {run for passage in passages for run in word_runs(passage.text)}


@pytest.fixture(params=corpus.CORPORA)
def part(request) -> str:
    return request.param


def test_training_text_shares_no_run_of_words_with_held_out_text(part):
    held_out = held_out_runs(part)
    assert len(held_out) > 10_000
    for document in corpus.documents(part):
        for piece in document.pieces:
            shared = next((run for run in word_runs(piece) if run in held_out), None)
            assert shared is None, f"{document.source}: {shared}"


def test_splits_share_no_run_of_words(part):
    runs = [held_out_runs(part, [split]) for split in corpus.SPLITS]
    assert not runs[0] & runs[1] and not runs[0] & runs[2] and not runs[1] & runs[2]


def test_items_are_distinct_and_numerous_enough(part):
    passages = [passage for split in corpus.SPLITS for passage in corpus.labelled(part, split)]
    assert len({passage.id for passage in passages}) == len(passages)
    assert len({passage.text for passage in passages}) == len(passages)
    per_class = Counter(passage.label for passage in corpus.labelled(part, "final"))
    assert len(per_class) >= 8 and sum(per_class.values()) >= 700 and min(per_class.values()) >= 50
    assert set(per_class) == set(corpus.classes(part))


def test_every_class_has_training_text(part):
    trained = Counter(d.label for d in corpus.documents(part) for _ in d.pieces if d.label)
    assert set(trained) == set(corpus.classes(part)) and min(trained.values()) >= 50


def test_masked_text_contains_no_class_name():
    assert corpus.masked("import Tkinter, xml.dom", "code") == "import _, _.dom"
    for passage in corpus.labelled("docs", "final"):
        assert passage.label not in corpus.masked(passage.text, "docs").lower()


def test_the_corpus_is_small_and_licensed():
    folder = parameters.PARAMETERS / "evaluation"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_damage_is_reported_in_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "docs-items.jsonl.xz").write_bytes(b"no archive")
    monkeypatch.setattr(corpus, "PARAMETERS", tmp_path)
    corpus._rows.cache_clear()
    try:
        with pytest.raises(UserError, match=r"docs-items.jsonl.xz: frozen text missing or damaged"):
            corpus.labelled("docs", "final")
    finally:
        corpus._rows.cache_clear()

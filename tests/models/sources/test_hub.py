"""The hub's cache, in made-up folders: what is whole there, what is damaged, and where it lies. Offline."""

import pytest

from lib.models.checkpoints import tokenizer_check
from lib.models.sources import hub

ID = "organisation/model"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Return the empty folder of the snapshot that the cache holds of a model."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--organisation--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    return home / "snapshots" / "abc"


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (["config.json", "tokenizer.json", "model.safetensors"], True),
        (["config.json", "tokenizer.model", "model.safetensors"], True),
        (["config.json", "tokenizer.json", "model-00001-of-00016.safetensors"], False),
        (["config.json", "model.safetensors"], False),
        (["tokenizer.json", "model.safetensors"], False),
        (["config.json", "tokenizer.json"], False),
    ],
    ids=["whole", "another tokenizer", "shards without index", "no tokenizer", "no configuration", "no weights"],
)
def test_a_download_that_broke_off_is_not_whole(names, whole, snapshot):
    for name in names:
        (snapshot / name).write_text("{}")
    assert hub.local(ID) == (snapshot if whole else None)


def test_the_check_of_a_folder_expects_the_same_tokenizers():
    assert hub.TOKENIZERS == tokenizer_check.FILES

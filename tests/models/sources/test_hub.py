"""The hub cache in made-up folders: what is complete, what is damaged, and where it is. Offline."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from lib.errors import UserError
from lib.models.checkpoints import tokenizer_check
from lib.models.checkpoints.folder import INDEX
from lib.models.sources import fetch, hub, reference

ID = "organisation/model"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Return the empty snapshot folder that the cache holds for a model."""
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
def test_an_interrupted_download_is_not_complete(names, whole, snapshot):
    for name in names:
        (snapshot / name).write_text("{}")
    assert hub.local(ID) == (snapshot if whole else None)


def test_the_folder_check_expects_the_same_tokenizers():
    assert hub.TOKENIZERS == tokenizer_check.FILES


VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"XDG_CACHE_HOME": "~/xdg"},
        {"HF_HOME": "$PLACE/home", "XDG_CACHE_HOME": "/xdg"},
        {"HUGGINGFACE_HUB_CACHE": "~/old", "HF_HOME": "/home"},
        {"HF_HUB_CACHE": "~/$PLACE", "HUGGINGFACE_HUB_CACHE": "/old"},
    ],
    ids=["none", *VARIABLES[::-1]],
)
def test_the_cache_is_where_the_hub_client_looks(values, monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), "PLACE": "somewhere", **values}.items():
        monkeypatch.setenv(name, value)
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert str(hub.cache()) == ended.stdout.strip()


def test_a_user_without_a_home_has_a_cache_only_by_its_variable(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert hub.cache() is None
    monkeypatch.setenv("HF_HUB_CACHE", "/somewhere")
    assert hub.cache() == Path("/somewhere")


def _stored(snapshot, name: str, content: bytes) -> Path:
    """Store a file as the hub client does: under the SHA-256 of its content, with a link in the snapshot."""
    blob = snapshot.parents[1] / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(content)
    (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return blob


def test_a_damaged_file_is_found_and_removed_so_that_the_client_refetches_it(snapshot):
    source = reference.parse(ID)
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    weights = _stored(snapshot, "model.safetensors", b"weights")
    other = _stored(snapshot, "tokenizer.model", b"tokens")
    assert fetch.verify(source) is None and fetch.local(source) == snapshot
    assert fetch.checked(source) == "2 of 4 files checked by SHA-256 and unchanged"
    other.write_bytes(b"tokenS")
    assert fetch.verify(source) == f"{snapshot / 'tokenizer.model'} has changed since it was fetched"
    fetch.forget(source)
    assert not other.exists() and not (snapshot / "tokenizer.model").is_symlink() and weights.exists()
    assert fetch.local(source) is None, "the client is asked for what is missing"


def test_a_file_in_the_shared_store_is_identified_by_the_hash_of_its_link(snapshot, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    blob = _stored(snapshot, "model.safetensors", b"weights")
    shared = blob.rename(tmp_path / ("0" * 64))
    blob.symlink_to(shared)
    assert hub.verify(ID) is None
    shared.write_bytes(b"Weights")
    assert hub.verify(ID)
    hub.forget(ID)
    assert not shared.exists() and not blob.is_symlink()


@pytest.mark.parametrize("head", [b"blob 8\0", b""], ids=["the hub", "a mirror"])
def test_small_files_are_checked_by_their_git_hash(snapshot, head):
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for name, content in (("config.json", b'{"c": 1}'), ("tokenizer.json", b'{"t": 1}')):
        blob = blobs / hashlib.sha1(head + content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    _stored(snapshot, "model.safetensors", b"weights")
    assert hub.verify(ID) is None and hub.checked(ID) == "every file unchanged"
    (snapshot / "notes.txt").write_text("of nobody's")
    assert hub.checked(ID) == "3 of 4 files checked by SHA-256 and SHA-1 and unchanged"
    blob.write_bytes(b"damaged!")
    assert hub.verify(ID) == f"{snapshot / 'tokenizer.json'} has changed since it was fetched"
    hub.forget(ID)
    assert not blob.exists() and not (snapshot / "tokenizer.json").is_symlink() and hub.local(ID) is None


def test_the_hash_is_the_one_git_computes(tmp_path):
    (tmp_path / "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391").touch()  # an empty file, everywhere
    assert hub._holds(tmp_path / "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")


def test_only_one_copy_of_the_weights_is_downloaded(snapshot, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    used = ["config.json", "tokenizer.model", "chat_template.jinja", INDEX, "model-00001-of-00002.safetensors"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/a.safetensors"]
    asked = {}

    def download(_, **patterns):
        asked.update(patterns)
        return snapshot

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch(ID) == snapshot
    assert [*filter_repo_objects([*others, *used, "pytorch_model.bin"], **asked)] == used


def test_a_download_is_checked_before_it_is_used(snapshot, monkeypatch):

    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")

    def brought(content):
        def download(*_, **__):
            if not (snapshot / "model.safetensors").is_symlink():
                (snapshot / "config.json").write_text("{}")
                _stored(snapshot, "model.safetensors", b"weights").write_bytes(content)
            return snapshot

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    brought(b"Weights")
    with pytest.raises(UserError, match=r"the download is damaged \(model.safetensors has another hash\)"):
        hub.fetch(ID)
    assert hub.local(ID) is None and not (snapshot / "model.safetensors").is_symlink()
    brought(b"weights")
    assert hub.fetch(ID) == snapshot == hub.local(ID)


def test_a_failed_download_is_incomplete_although_its_weights_arrived(snapshot, monkeypatch):
    """Previously the next run used it without the chat template that had failed."""

    def download(*_, **__):
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (snapshot / name).write_text("{}")
        raise OSError("chat_template.jinja: 500")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        hub.fetch("organisation/model")
    assert hub.local("organisation/model") is None

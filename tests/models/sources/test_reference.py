"""What `checkpoint:` and `--model` refer to: paths, packages, hub ids, or none of these."""

import pytest

from lib.errors import UserError
from lib.models.sources import hub, reference


@pytest.mark.parametrize(
    ("text", "kind", "title"),
    [
        ("/models/Tiny-Llama", "folder", "Tiny-Llama"),
        ("~/x/y/", "folder", "y"),
        ("./y.Q4_0.gguf", "gguf", "y.Q4_0"),
        ("y.GGUF", "gguf", "y"),
        ("organisation/model-1.5", "hub", "model-1.5"),
        ("gpt2", "hub", "gpt2"),
        ("package:some-weights==0.1.2/inside/model.gguf", "package", "model"),
        ("package:some.weights==1!2.0+cpu/folder/", "package", "folder"),
    ],
)
def test_kinds_and_titles(text, kind, title):
    source = reference.parse(text)
    assert (source.kind, source.title) == (kind, title)
    assert reference.parse(source.text) == source, "it can be stored and read again"


@pytest.mark.parametrize(
    "text",
    ["", "a b/c", "a/b/c", "../../etc/passwd\0", "package:x", "package:x==1", "package:x==1/../y", "package:x==1//y",
     "package:-x==1/y", "https://somewhere/model", "organisation/.."],
)  # fmt: skip
def test_references_of_no_kind_are_refused(text):
    if text.startswith(".."):  # a path to nothing
        assert reference.parse(text).kind == "folder"
        return
    with pytest.raises(UserError) as caught:
        reference.parse(text)
    assert "expected" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("https://huggingface.co/organisation/model/tree/main", "; that is organisation/model"),
        ("organisation/model@v1.0", "; revisions are not supported: download it into a folder, and give the folder"),
        ("https://somewhere/model", "or a hub id such as organisation/model"),
        ("nobody@home", "; revisions are not supported: download it into a folder, and give the folder"),
    ],
)
def test_common_mistakes_for_hub_ids_have_a_hint(text, hint):
    with pytest.raises(UserError) as caught:
        reference.parse(text)
    assert str(caught.value).startswith(f"{text}: expected a folder") and str(caught.value).endswith(hint)


def test_a_relative_path_starts_at_its_file(tmp_path, monkeypatch):
    (tmp_path / "weights" / "tiny").mkdir(parents=True)
    assert reference.parse("weights/tiny", tmp_path).text == str(tmp_path / "weights" / "tiny")
    assert reference.parse("weights/other", tmp_path).kind == "hub"
    assert reference.parse("./other", tmp_path).text == str(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert reference.parse("weights/tiny").kind == "folder"


def test_a_complete_hub_snapshot_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--organisation--model"
    assert hub.local("organisation/model") is None and hub.revision("organisation/model") is None
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc\n")
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    (snapshot / hub.INDEX).write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    (snapshot / "one.safetensors").write_text("")
    assert hub.revision("organisation/model") == "abc" and hub.local("organisation/model") is None, "a part is missing"
    (snapshot / "two.safetensors").write_text("")
    assert hub.local("organisation/model") == snapshot


def test_a_hub_id_without_a_network_gives_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="organisation/model: cannot be fetched from the hub") as caught:
        hub.fetch("organisation/model")
    assert "\n" not in str(caught.value)

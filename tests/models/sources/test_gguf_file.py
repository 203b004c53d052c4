"""GGUF files become ordinary checkpoint folders: the same logits, the same tokens, or one line that says why not."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.errors import UserError
from lib.models import loading, parameters
from lib.models.checkpoints import validate
from lib.models.sources import fetch, gguf_file, reference, store
from tests.models.sources import gguf_files

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokens():
    return gguf_files.tokenizer()


@pytest.fixture(scope="module")
def original(tokens):
    return gguf_files.model(tokens.get_vocab_size())


def test_logits_tokens_chat_and_ends_are_those_of_the_file(tmp_path, original, tokens):
    file = gguf_files.write(tmp_path / "tiny.gguf", original, tokens)
    source = reference.parse(str(file))
    assert fetch.local(source) is None
    folder = fetch.fetch(source)
    assert fetch.local(source) == folder and fetch.verify(source) is None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokens.encode(gguf_files.TEXT).ids
    assert tokenizer(gguf_files.TEXT).input_ids == ids, "digits alone, as the file's own name of its split says"
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, original(torch.tensor([ids])).logits)
    assert tokenizer.decode(ids) == gguf_files.TEXT and tokenizer.chat_template == gguf_files.CHAT
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2 == tokenizer.eos_token_id
    assert not hasattr(model.config, "quantization_config") and model.config.tie_word_embeddings
    assert validate.fault(folder) is None


def test_quantized_matrices_are_what_the_format_says(tmp_path, original, tokens):
    import gguf

    folder = gguf_file.convert(gguf_files.write(tmp_path / "tiny.gguf", original, tokens, "Q8_0"))
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(original.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(stored[name], torch.from_numpy(expected).bfloat16().float())
    assert torch.equal(stored["model.norm.weight"], original.model.norm.weight)


def test_it_is_converted_once_and_again_when_it_has_changed(tmp_path, original, tokens, monkeypatch):
    file = gguf_files.write(tmp_path / "tiny.gguf", original, tokens)
    first = gguf_file.convert(file)
    ran = []
    monkeypatch.setattr(gguf_file, "_run", lambda *arguments: ran.append(arguments))
    assert gguf_file.convert(file) == first and not ran
    gguf_files.write(file, gguf_files.model(tokens.get_vocab_size(), seed=1), tokens)
    assert gguf_file.convert(file) != first and len(ran) == 1


def test_a_pinned_hash_holds_for_what_is_converted_already(tmp_path, original, tokens):
    file = gguf_files.write(tmp_path / "tiny.gguf", original, tokens)
    source = reference.parse(str(file))
    folder = fetch.fetch(source)
    assert fetch.fetch(source, sha256=store.sha256(file)) == folder
    with pytest.raises(UserError, match="expected 000000000000…: not the expected file"):
        fetch.fetch(source, sha256="0" * 64)


def test_a_model_by_its_file_alone(tmp_path, original, tokens):
    name = parameters.register(str(gguf_files.write(tmp_path / "Tiny Llama.gguf", original, tokens)))
    loaded = loading.load(name, "full", dtype="float32")
    described = parameters.read(name)
    assert name == "tiny-llama" and described.architecture == "llama" and described.full["num_hidden_layers"] == 2
    assert (
        loaded.tokenizer.eos_token_id == 2 and described.scales == ("full",) and loaded.tasks == ["topic", "retrieval"]
    )


def refused(file) -> str:
    with pytest.raises(UserError) as caught:
        fetch.fetch(reference.parse(str(file)))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not [path for path in (store.root() / "gguf").glob("*") if path.suffix != ".lock"], "nothing half-written"
    return str(caught.value)


def test_what_cannot_be_read_is_one_line(tmp_path, original, tokens):
    file = tmp_path / "tiny.gguf"
    assert "no such folder or file" in refused(file)
    file.write_bytes(b"PK\x03\x04 no model at all, but a long enough file")
    assert "not a GGUF file" in refused(file)
    gguf_files.write(file, original, tokens)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused(file) or "cannot be read" in refused(file)
    gguf_files.write(file, original, tokens, architecture="rwkv6")
    assert 'architecture "rwkv6"' in refused(file)
    gguf_files.write(file, original, tokens, pre="never-heard-of")
    assert 'splits text as "never-heard-of"' in refused(file)

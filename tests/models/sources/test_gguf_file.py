"""GGUF files become ordinary checkpoint folders: the same logits, the same tokens, or one line that says why not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.errors import UserError
from lib.models import loading, parameters
from lib.models.checkpoints import validate
from lib.models.sources import convert, fetch, gguf_file, reference, store
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


def test_logits_tokens_chat_and_end_tokens_match_the_file(tmp_path, original, tokens):
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


def test_quantized_matrices_follow_the_format(tmp_path, original, tokens):
    import gguf

    folder = gguf_file.convert(gguf_files.write(tmp_path / "tiny.gguf", original, tokens, "Q8_0"))
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(original.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(stored[name], torch.from_numpy(expected).bfloat16().float())
    assert torch.equal(stored["model.norm.weight"], original.model.norm.weight)


def test_a_file_is_converted_once_and_again_after_a_change(tmp_path, original, tokens, monkeypatch):
    file = gguf_files.write(tmp_path / "tiny.gguf", original, tokens)
    first = gguf_file.convert(file)
    ran = []
    monkeypatch.setattr(gguf_file, "_run", lambda *arguments: ran.append(arguments))
    assert gguf_file.convert(file) == first and not ran
    gguf_files.write(file, gguf_files.model(tokens.get_vocab_size(), seed=1), tokens)
    assert gguf_file.convert(file) != first and len(ran) == 1


def test_a_pinned_hash_also_applies_to_existing_conversions(tmp_path, original, tokens):
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


def test_unreadable_files_are_refused_in_one_line(tmp_path, original, tokens):
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


THETA, SIZE = 10000.0, 16
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = {
    "by frequency": LLAMA_3 | {"rope_theta": THETA, "original_max_position_embeddings": 8192},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": THETA},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotations_match_the_file(tmp_path, original, tokens, kind):
    scaled = gguf_files.model(tokens.get_vocab_size(), rope_parameters=dict(SCALED[kind]))
    stored = {"keys": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}}
    if kind != "linear":
        plain = THETA ** -(torch.arange(0, SIZE, 2) / SIZE)
        stored = {"tensors": {"rope_freqs.weight": (plain / scaled.model.rotary_emb.inv_freq).float().numpy()}}
    convert.convert(gguf_files.write(tmp_path / "tiny.gguf", scaled, tokens, **stored), tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    ids = torch.tensor([tokens.encode(gguf_files.TEXT).ids])
    assert torch.equal(model(ids).logits, scaled(ids).logits)
    assert not torch.allclose(model(ids).logits, original(ids).logits, atol=1e-3)


PASSED_OVER = {
    "a part of a split file": ({"keys": {"split.count": 3}}, "is one of 3 parts of a model; merge them first"),
    "a tensor is missing": ({"without": ("blk.1.ffn_up.weight",)}, "no tensor for model.layers.1.mlp.up_proj.weight"),
    "a bias": ({"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "tensors would be left out"),
    "rotations scaled otherwise": (
        {"keys": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
        'not converted here ("yarn")',
    ),
    "rotations divided otherwise": (
        {"tensors": {"rope_freqs.weight": np.linspace(1, 2, SIZE // 2, dtype=np.float32)}},
        "differently from Llama 3.1",
    ),
    "logits are scaled": ({"keys": {"llama.logit_scale": 0.5}}, "states llama.logit_scale"),
    "logits are capped": ({"keys": {"llama.final_logit_softcapping": 30.0}}, "transformers takes 0"),
    "a window": ({"keys": {"llama.attention.sliding_window": 64}}, "states llama.attention.sliding_window 64"),
    "attention is scaled": ({"keys": {"llama.attention.scale": 0.5}}, "by 0.5, transformers by 0.25"),
    "no number of heads": ({"without": ("llama.attention.head_count_kv",)}, "states no llama.attention.head_count_kv"),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_settings_that_transformers_would_ignore_are_refused(tmp_path, tokens, case):
    stored, message = PASSED_OVER[case]
    model = gguf_files.model(tokens.get_vocab_size(), num_key_value_heads=4)
    file = gguf_files.write(tmp_path / "tiny.gguf", model, tokens, **stored)
    with pytest.raises(UserError) as caught:
        convert.convert(file, tmp_path / "folder")
    assert message in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "folder").exists()


def test_windows_and_scales_without_effect_are_ignored(tmp_path, original, tokens):
    keys = {"llama.attention.sliding_window": 256, "llama.logit_scale": 1.0, "llama.rope.scaling.factor": 1.0}
    keys |= {"split.count": 1, "llama.attention.scale": 0.25}
    ones = {"rope_freqs.weight": np.ones(SIZE // 2, np.float32)}
    file = gguf_files.write(tmp_path / "tiny.gguf", original, tokens, keys=keys, tensors=ones)
    convert.convert(file, tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"


def test_pieces_that_are_tokens_stay_whole_and_texts_begin_as_in_llama_3(tmp_path, original, tokens):
    content = json.loads(tokens.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    whole = max((token for token in vocabulary if token.isascii() and token.isalpha()), key=len)
    content["model"]["merges"] = [merge for merge in merges if "".join(merge).replace(" ", "") != whole]
    fewer = Tokenizer.from_str(json.dumps(content))
    assert len(fewer.encode(whole).ids) > 1, "no merge leads to it"
    for left_out, begin in ((("tokenizer.ggml.add_bos_token",), [1]), ((), [])):
        file = gguf_files.write(tmp_path / "tiny.gguf", original, fewer, pre="llama-bpe", without=left_out)
        convert.convert(file, tmp_path / f"folder{len(begin)}")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / f"folder{len(begin)}")
        assert tokenizer(whole).input_ids == [*begin, vocabulary[whole]]


def test_a_conversion_needs_two_bytes_per_number_whatever_the_file_size(tmp_path, original, tokens, monkeypatch):
    file = gguf_files.write(tmp_path / "tiny.gguf", original, tokens)
    needed = 2 * sum(parameter.numel() for parameter in original.parameters())
    for free in (needed - 1, needed):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        if free < needed:
            with pytest.raises(UserError, match=r"its conversion: needs 0 MB in .* make room"):
                convert.convert(file, tmp_path / "folder")
    convert.convert(file, tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors").stat().st_size < 2 * file.stat().st_size


def test_a_file_without_read_permission_or_with_too_long_a_name(tmp_path, original, tokens, monkeypatch):
    file = gguf_files.write(tmp_path / "tiny.gguf", original, tokens)
    assert "File name too long" in refused(f"{tmp_path}/{'x' * 300}.gguf")
    whole = Path.open

    def locked(path, *arguments, **options):
        if path == file:
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", locked)
    assert refused(file) == f"{file}: cannot be read (Permission denied)"


def test_texts_begin_without_a_space_if_the_file_says_so(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    model = gguf_files.model(len(pieces))
    for keys, first in (({}, "▁ab"), ({"tokenizer.ggml.add_space_prefix": False}, "ab")):
        file = gguf_files.write(tmp_path / "tiny.gguf", model, pieces, keys=keys)
        convert.convert(file, tmp_path / first)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / first)
        assert tokenizer("ab").input_ids == [1, pieces.index(first)]
        assert tokenizer.decode(tokenizer("ab ab").input_ids, skip_special_tokens=True) == "ab ab"

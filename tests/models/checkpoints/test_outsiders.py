"""Checkpoints as third parties leave them: each works on every path, or is refused in one line during planning."""

import json
import re
import shutil
import struct
import subprocess
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lib.errors import UserError
from lib.models import loading, parameters, tokenizing
from lib.models.checkpoints import io, validate
from lib.models.checkpoints.folder import INDEX, MANIFEST, WEIGHTS, check_checkpoint, tensor_shapes
from lib.models.offload import streamer
from lib.models.sources import fetch, reference
from lib.models.tasks import prompting, tasks
from lib.suite.plan import plan
from tests.models import architectures
from tests.models.sources import gguf_files

IDS = torch.arange(24)[None] * 13 % 300


@pytest.fixture(scope="module")
def tokens():
    return gguf_files.tokenizer()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path, tokens):
    """A complete Llama checkpoint, as transformers saves it."""
    model = gguf_files.model(tokens.get_vocab_size())
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "tiny")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = gguf_files.CHAT
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edited(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def fault(folder) -> str:
    """Return the line with which planning refuses a folder."""
    try:
        name = parameters.register(str(folder))
        reason = validate.fault(check_checkpoint(name, folder))
    except UserError as error:
        reason = str(error)
    assert reason and "\n" not in reason, reason
    return reason


@torch.no_grad()
def logits(folder, monkeypatch=None):
    """Return a folder's logits: from transformers, from our loader in memory, saved and reloaded, and streamed."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = io.load_folder(folder, torch.float32)
    again = io.load_folder(io.save(whole, folder.parent / "again"), torch.float32)
    _, total = streamer.smallest(folder)
    streamed = streamer.open_streamed(folder, allowance_bytes=total)
    return [model(IDS).logits for model in (theirs, whole, again, streamed)]


def test_an_intact_checkpoint_is_equal_on_every_path(folder):
    assert validate.fault(check_checkpoint(parameters.register(str(folder)), folder)) is None
    theirs, *ours = logits(folder)
    assert all(torch.allclose(logits, theirs, atol=1e-4) for logits in ours)


def test_a_separate_head_under_tied_embeddings(folder):
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    theirs, *ours = logits(folder)
    assert all(torch.allclose(logits, theirs, atol=1e-4) for logits in ours)
    tied = load_file(folder / WEIGHTS) | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(tied, folder / WEIGHTS, metadata={"format": "pt"})
    model = io.load_folder(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "equal ones stay tied"


def test_generation_settings_are_the_same_on_every_path(folder):
    edited(folder / "generation_config.json", eos_token_id=[2, 5], repetition_penalty=1.3)
    whole = io.load_folder(folder, torch.float32)
    again = io.load_folder(io.save(whole, folder.parent / "again"), torch.float32)
    third = io.load_folder(io.save(again, folder.parent / "third"), torch.float32)
    streamed = streamer.open_streamed(folder, allowance_bytes=streamer.smallest(folder)[1])
    for model in (whole, again, third, streamed):
        settings = model.generation_config
        assert (settings.eos_token_id, settings.repetition_penalty) == ([2, 5], 1.3)


def test_tied_weights_stored_as_the_head_are_found(folder):
    """safetensors keeps the alphabetically first of two names, so streaming did not find the embeddings."""
    weights = load_file(folder / WEIGHTS)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert validate.fault(check_checkpoint(parameters.register(str(folder)), folder)) is None
    theirs, *ours = logits(folder)
    assert all(torch.allclose(logits, theirs, atol=1e-4) for logits in ours)


def test_generation_settings_that_transformers_refuses(folder):
    """In memory it failed in the notebook; streamed it had other settings."""
    whole = (folder / "generation_config.json").read_text()
    edited(folder / "generation_config.json", max_new_tokens=-1)
    assert "its generation_config.json cannot be used (`max_new_tokens` must be greater than 0" in fault(folder)
    (folder / "generation_config.json").write_text("[]")
    assert "its generation_config.json cannot be used" in fault(folder)
    (folder / "generation_config.json").write_text(whole[: len(whole) // 2])
    assert validate.fault(folder) is None, "which transformers takes for none"


@torch.no_grad()
@pytest.mark.parametrize("wider", ["norm", "embed_tokens"])
@pytest.mark.parametrize("page_cache", ["keep", "copy"])
def test_mixed_dtype_weights_stream_as_they_load(folder, wider, page_cache):
    weights = load_file(folder / WEIGHTS)
    mixed = {name: tensor if wider in name else tensor.bfloat16() for name, tensor in weights.items()}
    assert len({tensor.dtype for tensor in mixed.values()}) == 2
    save_file(mixed, folder / WEIGHTS, metadata={"format": "pt"})
    least, _ = streamer.smallest(folder)
    streamed = streamer.open_streamed(folder, allowance_bytes=least, page_cache=page_cache)
    expected = io.load_folder(folder, torch.bfloat16)(IDS).logits
    assert streamed(IDS).logits.dtype == torch.bfloat16
    torch.testing.assert_close(streamed(IDS).logits, expected, atol=0.05, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("page_cache", ["keep", "copy"])
def test_tensors_under_legacy_names_stream_as_they_load(tmp_path, page_cache):
    architectures.build("mixtral").save_pretrained(tmp_path / "mixtral")
    names = tensor_shapes(tmp_path / "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names
    least, _ = streamer.smallest(tmp_path / "mixtral")
    streamed = streamer.open_streamed(tmp_path / "mixtral", allowance_bytes=least, page_cache=page_cache)
    ids = architectures.prompt()
    expected = io.load_folder(tmp_path / "mixtral", torch.float32)(ids).logits
    torch.testing.assert_close(streamed(ids).logits, expected, atol=1e-4, rtol=1e-3)


def test_a_leftover_index_beside_merged_weights(folder, tokens):
    gguf_files.model(tokens.get_vocab_size(), seed=7).save_pretrained(folder.parent / "old", max_shard_size="60KB")
    for path in (folder.parent / "old").glob("model*"):
        shutil.copy(path, folder)
    assert (folder / INDEX).is_file() and (folder / WEIGHTS).is_file()
    theirs, *ours = logits(folder)
    assert all(torch.allclose(logits, theirs, atol=1e-4) for logits in ours)


def test_a_checkpoint_in_the_place_of_the_folder_above_it(folder):
    with pytest.raises(UserError, match=r"no checkpoint folder for mine; .*tiny is a checkpoint itself: give it as"):
        check_checkpoint("mine", folder / "mine")


def test_shards_without_an_index_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    assert f"and no {WEIGHTS}; expected {WEIGHTS}, or shards with {INDEX}" in fault(folder)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds pytorch_model.bin and no" in fault(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_copied_links_without_their_targets(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    assert fault(folder).startswith(f"{folder / name}: a link to ../../blobs/0123, which is not there (cp -rL")


def test_a_pointer_file_instead_of_weights(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n")
    assert fault(folder).startswith(f"{folder / WEIGHTS}: a git-lfs pointer, not the weights")


@pytest.mark.parametrize("entry", ["../outside.safetensors", "/etc/passwd", None, 7, "", "a/b.safetensors", "..\\x"])
def test_an_index_that_points_outside_the_folder(folder, entry, monkeypatch):
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    places = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
    places["model.norm.weight"] = entry
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "one.safetensors", outside)
    reason = fault(folder)
    assert f"model.norm.weight lies in {entry!r}" in reason
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        streamer.open_streamed(folder)


@pytest.mark.parametrize("own", [{}, {"metadata": None}])
def test_an_index_that_transformers_cannot_read(folder, own):
    """Streamed it was right; in memory it failed in the notebook."""
    (folder / WEIGHTS).rename(folder / "one.safetensors")
    places = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": places} | own))
    got = "None" if own else "nothing"
    assert fault(folder) == f'{folder / INDEX}: key "metadata": expected an object, got {got}; write "metadata": {{}}'
    (folder / INDEX).write_text(json.dumps({"weight_map": places, "metadata": {}}))
    theirs, *ours = logits(folder)
    assert all(torch.allclose(logits, theirs, atol=1e-4) for logits in ours)


def test_a_tensor_in_two_files_is_ambiguous(folder):
    """Transformers takes the last file by name, whatever the index says; streaming took the one that the index names
    last.
    """
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = "b-of.safetensors", "a-of.safetensors"
    places = {name: files[at % 2] for at, name in enumerate(sorted(weights))}
    for file in files:
        own = {name: tensor for name, tensor in weights.items() if places[name] == file}
        save_file(own | {"model.norm.weight": weights["model.norm.weight"]}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    right = places["model.norm.weight"]
    [other] = {*files} - {right}
    assert fault(folder).startswith(f"{folder / other}: holds model.norm.weight, which the index places in {right}")


@pytest.mark.parametrize("chosen", ["other.safetensors", INDEX])
def test_a_configuration_that_selects_other_weights(folder, chosen):
    edited(folder / "config.json", transformers_weights=chosen)
    assert f'key "transformers_weights": expected {WEIGHTS}, which is read here, got {chosen!r}' in fault(folder)
    edited(folder / "config.json", transformers_weights=WEIGHTS)
    assert check_checkpoint(parameters.register(str(folder)), folder) == folder


def _parts(path) -> tuple[dict, bytes]:
    """Return the header of a safetensors file and the data after it."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _put(path, header: dict, weights: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + weights)


@pytest.mark.parametrize("change", [{"dtype": ...}, {"shape": ...}, {"shape": [-1]}, {"shape": "4"}, {"dtype": 7}])
def test_a_header_with_an_incomplete_tensor_description(folder, change):
    path = folder / WEIGHTS
    header, weights = _parts(path)
    entry = header["model.norm.weight"] | change
    header["model.norm.weight"] = {key: value for key, value in entry.items() if value is not ...}
    _put(path, header, weights)
    assert fault(folder) == f"{path}: the header describes no tensors; the file is damaged"


@pytest.mark.parametrize(("dtype", "bytes_"), [("F64", 8), ("BF16", 2)])
def test_a_header_whose_offsets_do_not_match_its_shapes(folder, dtype, bytes_):
    path = folder / WEIGHTS
    header, weights = _parts(path)
    first, last = header["model.norm.weight"]["data_offsets"]
    header["model.norm.weight"]["dtype"] = dtype
    _put(path, header, weights)
    count = header["model.norm.weight"]["shape"][0]
    wanted = f"{last - first} bytes in the header, but its shape and {dtype} take {bytes_ * count}"
    assert fault(folder) == f"{path}: model.norm.weight has {wanted}; the file is damaged"


@pytest.mark.parametrize("moved", [-4, 4])
def test_a_header_whose_tensors_overlap_or_leave_a_gap(folder, moved):
    """safetensors refuses it too, but in the notebook and with its own exception."""
    path = folder / WEIGHTS
    header, weights = _parts(path)
    places = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"] == places[1]:
            entry["data_offsets"] = [place + moved for place in places[1]]
    _put(path, header, weights)
    expected = "its header describes tensors that overlap or leave gaps"
    assert fault(folder) == f"{path}: {expected}; the file is damaged"


def test_a_saved_folder_is_checked_by_the_names_in_its_manifest(folder, tmp_path):
    place = io.save(io.load_folder(folder), tmp_path / "saved", tokenizer=AutoTokenizer.from_pretrained(folder))
    assert validate.fault(place) is None
    header, weights = _parts(place / WEIGHTS)
    header["model.extra.weight"] = header.pop("model.norm.weight")
    _put(place / WEIGHTS, header, weights)
    assert fault(place) == f"{place}: the checkpoint lacks model.norm.weight, which {MANIFEST} and config.json describe"
    header["model.norm.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    _put(place / WEIGHTS, header, weights)
    assert fault(place).startswith(f"{place}: the checkpoint holds model.extra.weight, which {MANIFEST}")


def test_a_folder_without_access_permission(folder, monkeypatch):
    stat, source = Path.stat, reference.parse(str(folder))

    def locked(path, **options):
        if folder in (path, *path.parents):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", locked)
    assert fetch.local(source) is None
    with pytest.raises(UserError, match=r"tiny: cannot be read \(Permission denied\)"):
        fetch.require(source)
    with pytest.raises(UserError):
        check_checkpoint("tiny", folder)


def test_weights_without_read_permission(folder, monkeypatch):
    whole = Path.open

    def locked(path, *arguments, **options):
        if path.name == WEIGHTS:
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", locked)
    assert fault(folder) == f"{folder / WEIGHTS}: cannot be read (Permission denied)"


@pytest.mark.parametrize("text", ['{"blocks": [', "[]", '{"blocks": 4}'])
def test_a_damaged_manifest_is_named_during_planning(folder, text):
    (folder / MANIFEST).write_text(text)
    assert fault(folder).startswith(f"{folder / MANIFEST}: ")


def test_a_crashed_check_names_folder_and_reason(folder, monkeypatch):
    lost = subprocess.CompletedProcess([], 1, "", "Traceback (most recent call last):\n  x\nMemoryError: no room\n")
    monkeypatch.setattr(validate.subprocess, "run", lambda *_, **__: lost)
    with pytest.raises(UserError, match=r"tiny: the tensors could not be checked \(MemoryError: no room\)"):
        validate.check([folder])
    monkeypatch.setattr(validate.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9, "", ""))
    with pytest.raises(UserError, match=r"\(its process ended with -9\)"):
        validate.check([folder])


def test_an_adapter_beside_or_instead_of_weights(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "merge the adapter into its base model first" in fault(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    assert "merge the adapter into its base model first" in fault(folder)
    (folder / "config.json").unlink()  # as PEFT writes it
    assert "merge the adapter into its base model first" in fault(folder)
    assert not parameters.registered(), "nothing is kept of what is no checkpoint"


def test_a_hub_cache_folder_names_the_checkpoint_inside_it(folder):
    home = folder.parent / "models--organisation--tiny"
    home.mkdir()
    assert fault(home) == f"{home / 'config.json'}: missing; a checkpoint folder holds config.json and *.safetensors"
    snapshot = home / "snapshots" / "0123"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    assert fault(home) == f"{home}: a folder of the hub's cache; give the checkpoint inside it: {snapshot}"


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantized_weights_that_cannot_be_dequantized(folder, method):
    edited(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    reason = fault(folder)
    assert f"quantized ({method})" in reason and "give the checkpoint before it was quantized" in reason


def test_quantized_weights_missing_from_the_configuration(folder):
    weights = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert f"{name} is stored as F8_E4M3 by a quantizer that config.json does not name" in fault(folder)
    weights[name] = weights[name].float()
    weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert f"{name}_scale_inv" in fault(folder)


def test_block_scaled_fp8_is_dequantized_and_reported(folder, caplog, monkeypatch):
    weights, scaled = load_file(folder / WEIGHTS), {}
    for name, tensor in weights.items():
        if "proj.weight" in name:
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[f"{name}_scale_inv"] = scale.float().expand(1, 1).clone()
        else:
            scaled[name] = tensor
    save_file(scaled, folder / WEIGHTS, metadata={"format": "pt"})
    described = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edited(folder / "config.json", quantization_config=described)
    assert validate.fault(check_checkpoint(parameters.register(str(folder)), folder)) is None
    model = io.load_folder(folder, torch.float32)
    assert "quantized (fp8) and are dequantized" in caplog.text
    for name, parameter in model.named_parameters():
        assert (parameter - weights[name].float()).abs().max() <= weights[name].abs().max() / 16
    back = io.load_folder(io.save(model, folder.parent / "again"), torch.float32)
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    monkeypatch.setattr("lib.memory_limits.free_memory_bytes", lambda: 10_000)
    assert "they cannot be streamed from their files" in fault(folder)


@pytest.mark.parametrize(
    ("scale", "shape", "why"),
    [
        ("weight_scale", (1,), "is stored as F8_E4M3 without its scale (weight_scale_inv)"),
        ("", (1,), "is stored as F8_E4M3 without its scale"),
        ("weight_scale_inv", (5, 1), "has the shape (128, 64), which is not a multiple of (5, 1)"),
        ("weight_scale_inv", (128,), "has the shape (128, 64), which is not a multiple of (128,)"),
    ],
)
def test_fp8_that_transformers_would_load_unscaled_or_cannot_dequantize(folder, scale, shape, why):
    """AutoFP8 and vLLM call scales weight_scale: transformers drops those silently and takes the weights unscaled."""
    weights = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    if scale:
        weights[name.replace("weight", scale)] = torch.ones(shape)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    described = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    edited(folder / "config.json", quantization_config=described)
    assert f"{name} {why}" in fault(folder)


@pytest.mark.parametrize("change", [{"_attn_implementation": "nowhere/kernel"}, {"model_type": "never_heard_of"}])
def test_a_configuration_that_transformers_cannot_build_is_refused(folder, change):
    edited(folder / "config.json", **change)
    assert re.search("transformers cannot build its model|names no architecture", fault(folder))


@pytest.mark.parametrize(
    ("architecture", "full", "why"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96}, 'architecture "gpt2" is not supported'),
        ("llamma", {"hidden_size": 64}, 'of architecture "llamma"'),
    ],
)
def test_random_weights_of_an_unknown_model_are_refused_during_planning(architecture, full, why, tmp_path, monkeypatch):
    """Previously the notebook found it out after a minute, as a failed run."""
    described = {"checkpoint": "a/b", "architecture": architecture, "full": full}
    (tmp_path / "mine.yaml").write_text(json.dumps(described))
    known = {"checkpoint": "a/b", "architecture": "llama", "full": {"hidden_size": 64}}
    (tmp_path / "known.yaml").write_text(json.dumps(known))
    monkeypatch.setattr(parameters, "PARAMETERS", tmp_path)
    called = []

    def here(command, **_):
        with redirect_stdout(io_text := StringIO()):
            code = validate.main(command[3:])
        called.append(command[3:])
        return subprocess.CompletedProcess(command, code, io_text.getvalue(), "")

    monkeypatch.setattr(validate.subprocess, "run", here)
    request = plan.Request(("structured_pruning",), ("known",), "full", random_weights=True)
    assert [job.model for job in plan.plan(request)] == ["known"] and not called, "which takes no second"
    with pytest.raises(UserError) as caught:
        plan.plan(replace(request, models=("mine",)))
    assert str(caught.value).startswith("mine: ") and why in str(caught.value) and "\n" not in str(caught.value)
    assert ('Did you mean "llama"?' in str(caught.value)) == (architecture == "llamma")
    assert called == [["--described", "full", "mine"]]


@pytest.mark.parametrize("model_type", ["t5", "clip"])
def test_the_error_for_an_unsupported_architecture_lists_the_supported_ones(folder, model_type):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    reason = fault(folder)
    assert f'architecture "{model_type}" is not supported: transformers has no model of it' in reason
    assert "; supported are gemma2," in reason
    edited(folder / "config.json", model_type="never_heard_of")
    assert "`never_heard_of`" in fault(folder) and "; supported are gemma2," in fault(folder)


def test_a_text_model_extracted_from_a_multimodal_one_is_accepted(folder):
    """Its configuration keeps the section, empty, so it was mistaken for a model with pictures and refused."""
    edited(folder / "config.json", vision_config=None)
    assert validate.fault(check_checkpoint(parameters.register(str(folder)), folder)) is None
    theirs, *ours = logits(folder)
    assert all(torch.allclose(logits, theirs, atol=1e-4) for logits in ours)


def test_code_in_a_folder_is_neither_run_nor_requested(folder, monkeypatch):
    lines = [f"open({str(folder / 'ran')!r}, 'w')", "from transformers import LlamaConfig", "", ""]
    lines += ["class OwnConfig(LlamaConfig):", "    model_type = 'own'", ""]
    (folder / "configuration_own.py").write_text("\n".join(lines))
    edited(folder / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    assert "contains custom code" in fault(folder)
    assert not asked and not (folder / "ran").exists()


def test_damaged_or_mismatched_tokenizers(folder, tokens):
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    assert "its tokenizer cannot be read" in fault(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be read" in fault(folder)
    larger = json.loads(whole)
    larger["model"]["vocab"] |= {f"more{n}": 313 + n for n in range(90)}
    (folder / "tokenizer.json").write_text(json.dumps(larger))
    assert "its embeddings have 313 rows" in fault(folder)
    smaller = json.loads(whole)
    smaller["model"] |= {"vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}
    smaller["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(smaller))
    assert "of another model" in fault(folder)
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer" in fault(folder)


def test_added_tokens_beyond_the_embeddings(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    added = content["added_tokens"][0] | {"id": 313, "content": "<picture>"}
    path.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], added]}))
    assert validate.fault(folder) is None, "no text ever holds it"
    edited(folder / "tokenizer_config.json", eos_token="<picture>")
    assert "turns a text into the id 313, its embeddings have 313 rows" in fault(folder)


def test_padding_beyond_the_embeddings(folder):
    """A token added for training had no row, and shorter prompts of a batch were padded with it."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    added = content["added_tokens"][0] | {"id": 313, "content": "[PAD]"}
    path.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], added]}))
    edited(folder / "tokenizer_config.json", pad_token="[PAD]")
    assert validate.fault(folder) is None
    loaded = loading.load(parameters.register(str(folder)), "full")
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "<|im_end|>"
    inputs, last_B = next(tasks.batches(loaded, tasks.items("topic", "final", 3)))
    assert len(set(last_B.tolist())) > 1 and inputs["input_ids"].max() < 313


@pytest.mark.parametrize("end", [-1, 5000])
def test_an_end_token_unknown_to_the_model(folder, end):
    edited(folder / "tokenizer_config.json", eos_token=..., pad_token=...)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    edited(folder / "generation_config.json", eos_token_id=...)
    edited(folder / "config.json", eos_token_id=end)
    loaded = loading.load(parameters.register(str(folder)), "full")
    assert 0 <= loaded.tokenizer.eos_token_id < 313
    assert tasks.text_windows(loaded, "final", 2, 64).shape == (2, 64)


def test_missing_end_and_padding_tokens(folder):
    edited(folder / "tokenizer_config.json", eos_token=..., pad_token=...)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    loaded = loading.load(parameters.register(str(folder)), "full")
    assert loaded.tokenizer.eos_token_id == 2, "as the generation configuration says"
    assert tasks.calibration(loaded, 2, 64)[0]["input_ids"].shape == (2, 64)
    assert next(tasks.batches(loaded, tasks.items("topic", "final", 2)))[0]["input_ids"].max() < 313
    edited(folder / "generation_config.json", eos_token_id=...)
    edited(folder / "config.json", eos_token_id=None)
    assert loading.load(parameters.register(str(folder)), "full").tokenizer.eos_token_id is not None


def test_every_text_starts_with_the_tokenizer_prefix(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").unlink()
    loaded = loading.load(parameters.register(str(folder)), "full")
    assert tokenizing.prefix(loaded.tokenizer) == (1,)
    assert (tasks.text_windows(loaded, "final", 3, 64)[:, 0] == 1).all()
    assert tasks.text_windows(loaded, "final", 3, 64).shape == (3, 64)
    assert (tasks.calibration(loaded, 4, 64)[0]["input_ids"][:, 0] == 1).all()
    prompts, values = tasks.retrieval_prompts(loaded, 32, 2)
    assert (prompts[:, 0] == 1).all() and prompts.shape[1] == 1 + 8 + 4 + 8 + 32 + 4 and values.shape == (2, 8)
    row = prompting.shown(loaded, tasks.items("topic", "final", 1)[0])
    assert prompting.prompt_ids(loaded, row)[0] == 1
    assert loaded.tokenizer(prompting.text(loaded, row)).input_ids == prompting.prompt_ids(loaded, row)


THINKS = gguf_files.CHAT.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}"
LISTS = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['content'] is not string %}{% for part in m['content'] %}"
    "{{ part['text'] }}{% endfor %}{% endif %};{% endfor %}"
)


def test_chat_templates_may_think_or_take_lists_but_not_require_a_system_turn(folder):
    template = folder / "chat_template.jinja"
    template.write_text(THINKS)
    loaded = loading.load(parameters.register(str(folder)), "full")
    assert validate.fault(folder) is None
    row = prompting.shown(loaded, tasks.items("topic", "final", 1)[0])
    assert prompting.text(loaded, row).endswith("assistant\n<think>\n\n</think>\n\n")
    template.write_text(LISTS)
    assert validate.fault(folder) is None
    loaded = loading.load(parameters.register(str(folder)), "full")
    assert row[-1].prompt in prompting.text(loaded, row)
    template.write_text("{% if messages[0]['content'] is string %}{{ raise_exception('parts') }}{% endif %}" + LISTS)
    assert validate.fault(folder) is None, "refused as text, and right as a list"
    template.write_text(SYSTEM + gguf_files.CHAT)
    assert "its chat template refuses turns of a user and an assistant (a system turn first)" in fault(folder)
    template.write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")
    assert "leaves out what the user says" in fault(folder)


def test_a_single_non_finite_expert(tiny, tmp_path):
    model = tiny("qwen3-coder-30b")
    model.model.layers[2].mlp.experts.gate_up_proj.data[5, 3, 1] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.experts\.gate_up_proj, expert 5, holds NaN"):
        io.load_folder(tmp_path / "nan")


def test_only_the_configuration_of_a_processor(tiny, tmp_path, tokens):
    model = tiny("qwen3-vl-2b")
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(tmp_path / "vision")
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|im_end|>").save_pretrained(tmp_path / "vision")
    assert "holds no preprocessor_config.json" in fault(tmp_path / "vision")
    from lib.models.proxies import proxy_model

    processor = proxy_model.make_image_processor(model.config.vision_config.to_dict())
    described = {"image_processor": processor.to_dict(), "processor_class": "Qwen3VLProcessor"}
    (tmp_path / "vision" / "processor_config.json").write_text(json.dumps(described))
    assert validate.fault(tmp_path / "vision") is None
    loaded = io.load_image_processor(tmp_path / "vision")
    assert loaded.patch_size == processor.patch_size and loaded.merge_size == processor.merge_size
    described["image_processor"] |= {"patch_size": 14}
    (tmp_path / "vision" / "processor_config.json").write_text(json.dumps(described))
    assert "its image processor has the patch_size 14, its vision tower" in fault(tmp_path / "vision")
    (tmp_path / "vision" / "processor_config.json").write_text('{"image_processor": {')
    assert "its image processor cannot be read" in fault(tmp_path / "vision")

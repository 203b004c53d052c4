"""Checkpoints: the round trip through disk, and the message for every damaged folder before anything runs."""

import copy
import json
import shutil

import pytest
import torch

from lib.errors import UserError
from lib.models import loading, parameters
from lib.models.checkpoints import fastest_dtype, io, placement
from lib.models.checkpoints.folder import check_checkpoint, tensor_shapes
from lib.models.offload import streamer


@pytest.fixture
def folder(tiny, tmp_path):
    """Return a small checkpoint of Coder's architecture in several shards with an index."""
    tiny("qwen3-coder-30b").save_pretrained(tmp_path / "checkpoint", max_shard_size="60KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    return tmp_path / "checkpoint"


def test_round_trip_keeps_every_bit(tiny, name, batch, tmp_path):
    model = tiny(name)
    back = io.load_folder(io.save(model, tmp_path), torch.float32)
    assert torch.equal(back(**batch).logits, model(**batch).logits)
    assert io.weights_hash(back) == io.weights_hash(model)


def test_a_loaded_model_owns_its_weights(tiny, batch, tmp_path):
    model = tiny("qwen3-4b-instruct-2507")
    back = io.load_folder(io.save(model, tmp_path), torch.float32)
    path = tmp_path / io.WEIGHTS
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # overwritten in place: mapped weights would become zeros
    assert torch.equal(back(**batch).logits, model(**batch).logits)


def test_the_head_never_receives_a_view(tiny, name, batch):
    """Torch copies the whole head before multiplying a view: seconds more per prompt with real vocabularies."""
    model, strides = copy.deepcopy(tiny(name)), []
    model.lm_head.register_forward_pre_hook(lambda module, args: strides.append(args[0].stride()))
    single, pair = {"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"]}
    for inputs in (single, pair):
        model(**inputs, logits_to_keep=1)
    assert strides == [(32, 32, 1)] * 2


def test_the_hash_detects_one_changed_weight(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    before = io.weights_hash(model)
    model.lm_head.weight.view(-1)[0] += 1
    assert io.weights_hash(model) != before


def test_a_sharded_checkpoint_is_complete_and_loads(tiny, folder, batch):
    assert check_checkpoint("qwen3-coder-30b", folder) == folder
    assert len(tensor_shapes(folder)) > 10
    model = io.load_folder(folder, torch.float32)
    assert torch.allclose(model(**batch).logits, tiny("qwen3-coder-30b")(**batch).logits, atol=1e-5)


def test_load_takes_a_checkpoint_folder_by_the_models_name(folder, tmp_path, tiny, monkeypatch):
    folder.rename(tmp_path / "qwen3-coder-30b")
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda path: "tokenizer")
    loaded = loading.load("qwen3-coder-30b", "full", checkpoints=tmp_path)
    assert loaded.folder == tmp_path / "qwen3-coder-30b" and not loaded.random_weights
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("free", "fastest", "streams", "dtype"),
    [
        (3.0, "float32", False, torch.float32),
        (2.0, "float32", False, torch.bfloat16),  # float32 would not fit
        (2.0, "bfloat16", False, torch.bfloat16),
        (1.2, "float32", True, torch.bfloat16),
        (1.2, "float16", True, torch.bfloat16),  # a streamed model keeps its own dtype
    ],
)
def test_models_that_fit_in_bfloat16_are_not_streamed(tiny, tmp_path, monkeypatch, free, fastest, streams, dtype):
    folder = io.save(tiny("qwen3-4b-instruct-2507").to(torch.bfloat16), tmp_path / "qwen3-4b-instruct-2507")
    total = placement.weights_bytes(folder, torch.bfloat16)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda path: "tokenizer")
    monkeypatch.setattr(placement, "free_bytes", lambda device: int(free * total))
    monkeypatch.setattr(fastest_dtype, "fastest", lambda config: fastest)
    loaded = loading.load("qwen3-4b-instruct-2507", "full", checkpoints=tmp_path)
    assert (streamer.streamer(loaded.model) is not None) == streams
    assert loaded.dtype == next(loaded.model.parameters()).dtype == dtype


@pytest.mark.parametrize(
    "damage", ["gone", "no config", "bad config", "other", "missing shard", "cut", "index", "junk"]
)
def test_damage_is_named(folder, damage):
    shard = sorted(folder.glob("*.safetensors"))[0]
    index = folder / "model.safetensors.index.json"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "bad config":
        (folder / "config.json").write_text("{")
    elif damage == "other":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "index":
        content = json.loads(index.read_text())
        content["weight_map"]["model.layers.99.nothing.weight"] = shard.name
        index.write_text(json.dumps(content))
    else:
        shard.write_bytes(b"\x05")
    words = {
        "gone": "no checkpoint folder",
        "no config": "config.json: missing",
        "bad config": "not readable as JSON",
        "other": 'architecture "llama"',
        "missing shard": "missing, though the index names it",
        "cut": "truncated",
        "index": "does not hold it",
        "junk": "truncated or not a safetensors file",
    }
    with pytest.raises(UserError) as caught:
        check_checkpoint("qwen3-coder-30b", folder)
    assert words[damage] in str(caught.value) and "\n" not in str(caught.value)


def test_random_weights_have_no_quality_and_are_repeatable(monkeypatch):
    described = parameters.read("qwen3-4b-instruct-2507")
    monkeypatch.setattr(
        parameters, "read", lambda name: described.model_copy(update={"full": described.config("proxy")})
    )
    first, second = (loading.load("qwen3-4b-instruct-2507", "slice", seed=5) for _ in range(2))
    assert "random weights" in first.quality_unavailable
    assert len(first.model.model.layers) == described.slice.layers and first.dtype == torch.bfloat16
    assert io.weights_hash(first.model) == io.weights_hash(second.model)


def test_invalid_requests_are_named():
    with pytest.raises(UserError, match="unknown scale"):
        loading.load("qwen3-4b-instruct-2507", "huge")
    with pytest.raises(UserError, match="unknown dtype"):
        loading.load("qwen3-4b-instruct-2507", dtype="int3")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="not available here"):
            loading.load("qwen3-4b-instruct-2507", device="cuda")

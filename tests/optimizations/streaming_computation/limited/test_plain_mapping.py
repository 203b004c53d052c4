"""Plainly mapped weights: the answers of the resident model, no memory of their own, damage reported."""

import pytest
import torch

from lib.errors import UserError
from lib.models.checkpoints import io
from lib.models.checkpoints.weight_file import places
from lib.optimizations.streaming_computation import method
from lib.optimizations.streaming_computation.limited import plain_mapping


def test_answers_equal_those_of_the_resident_model(tiny, name, tmp_path, batch):
    model = tiny(name)
    mapped, private_bytes = plain_mapping.open_mapped(io.save(model, tmp_path / "model"))
    held = sum(place.nbytes for place in places(tmp_path / "model").values())
    assert private_bytes < held / 4, "only what the file cannot hold aligned"
    with torch.inference_mode():
        torch.testing.assert_close(mapped(**batch).logits, model(**batch).logits, atol=2e-5, rtol=1e-4)
        method.attach(mapped, prefill_chunk=8, absorbed=True)
        torch.testing.assert_close(mapped(**batch).logits, model(**batch).logits, atol=2e-5, rtol=1e-4)


def test_weights_are_pages_of_the_file_and_tied_ones_are_shared(tiny, tmp_path):
    model = tiny("qwen3-4b-instruct-2507")
    mapped, _ = plain_mapping.open_mapped(io.save(model, tmp_path / "model"))
    path = tmp_path / "model" / io.WEIGHTS
    if getattr(model.config, "tie_word_embeddings", False):
        assert mapped.lm_head.weight is mapped.model.embed_tokens.weight
    place = places(tmp_path / "model")["model.embed_tokens.weight"]
    before = mapped.model.embed_tokens.weight[0, 0].item()
    with path.open("r+b") as file:  # a mapping shows what the file holds now
        file.seek(place.offset)
        file.write(b"\0\0\0\0")
    assert before != 0 and mapped.model.embed_tokens.weight[0, 0].item() == 0


def test_a_damaged_file_is_refused(tiny, tmp_path):
    folder = io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "model")
    weights = folder / io.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        plain_mapping.open_mapped(folder)

"""Parked weights take no memory; afterwards they are the same and shared as before."""

import copy

import pytest
import torch
from torch import nn

from lib.errors import UserError
from lib.models.checkpoints import io
from lib.models.checkpoints.parking import parked
from lib.models.structure.replacements import sparse
from lib.optimizations.sparse_neural_networks import method


def arms(model, tmp_path):
    """Return the model and another that shares its embeddings, each with the folder it is saved in."""
    twin = copy.deepcopy(model)
    twin.set_input_embeddings(model.get_input_embeddings())
    twin.get_parameter("lm_head.weight").data.mul_(2)
    return [(part, io.save(part, tmp_path / str(at))) for at, part in enumerate((model, twin))]


def held(model):
    return sum(tensor.nbytes for tensor in model.parameters())


def test_weights_leave_and_come_back(tiny, name, batch, tmp_path):
    saved = arms(copy.deepcopy(tiny(name)), tmp_path)
    before = [(io.weights_hash(model), model(**batch).logits) for model, _ in saved]
    with parked(*saved):
        assert [held(model) for model, _ in saved] == [0, 0]
    for (model, _), (hashed, logits) in zip(saved, before):
        assert io.weights_hash(model) == hashed and torch.equal(model(**batch).logits, logits)
    first, second = (model.get_input_embeddings().weight for model, _ in saved)
    assert first.data_ptr() == second.data_ptr()
    model = saved[0][0]
    tied = model.config.get_text_config().tie_word_embeddings
    assert (model.get_parameter("lm_head.weight").data_ptr() == first.data_ptr()) == tied


def test_tensors_that_share_memory_still_share_it_afterwards(tiny, tmp_path):
    (model, folder), (twin, twin_folder) = arms(copy.deepcopy(tiny("qwen3-coder-30b")), tmp_path)
    embedding = model.get_input_embeddings().weight
    twin.set_input_embeddings(nn.Embedding.from_pretrained(embedding.data))
    twin.first_of_all = nn.Parameter(embedding.data)  # in no file
    twin._parameters = {"first_of_all": twin._parameters.pop("first_of_all"), **twin._parameters}
    with parked((twin, twin_folder), (model, folder)):
        assert held(model) == held(twin) == 0
    assert twin.get_input_embeddings().weight.data_ptr() == embedding.data_ptr() == twin.first_of_all.data_ptr()


def test_parts_of_larger_tensors_and_sparse_tensors_stay(tiny, tmp_path):
    ids = torch.randint(8, 96, (8, 32), generator=torch.Generator().manual_seed(5))
    text = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    model = method.apply(copy.deepcopy(tiny("qwen3-4b-instruct-2507")), text, sparsity=0.75)
    size = model.get_input_embeddings().weight.shape
    larger = torch.randn(2 * size[0], size[1])
    model.get_input_embeddings().weight.data = larger[: size[0]]
    weights = sparse.stored(model)
    folder, before = io.save(model, tmp_path), io.weights_hash(model)
    with parked((model, folder)):
        assert held(model) >= larger.nbytes // 2 and all(part._nnz() for part in weights.values())
        assert model.get_parameter("model.norm.weight").nbytes == 0
    assert weights and io.weights_hash(model) == before
    assert model.get_input_embeddings().weight.data_ptr() == larger.data_ptr()


def test_weights_return_after_a_failure_and_a_lost_file_is_reported(tiny, tmp_path):
    ((model, folder), _) = arms(copy.deepcopy(tiny("qwen3-4b-instruct-2507")), tmp_path)
    before = io.weights_hash(model)
    with pytest.raises(ZeroDivisionError), parked((model, folder)):
        _ = 1 / 0
    assert io.weights_hash(model) == before
    with pytest.raises(UserError, match="truncated"), parked((model, folder)):
        (folder / io.WEIGHTS).write_bytes(b"")

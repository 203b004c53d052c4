"""From file to file against in memory: the same checkpoint, one block in memory, and nothing half-written."""

import gc
import json

import pytest
import torch

from lib.errors import UserError
from lib.models.checkpoints import io
from lib.models.offload import file_blocks
from lib.models.offload.file_blocks import FileBlocks
from lib.models.structure.anatomy import anatomy
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks.out_of_core import apply_to_file as sparsify
from lib.optimizations.structured_pruning import method as pruning
from lib.optimizations.structured_pruning.out_of_core import apply_to_file as prune
from lib.optimizations.tensor_decomposition import analysis
from lib.optimizations.tensor_decomposition import method as decomposition
from lib.optimizations.tensor_decomposition.out_of_core import apply_to_file as factor


@pytest.fixture
def text():
    ids = torch.randint(8, 96, (2, 6, 48), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": part} for part in ids]


@pytest.fixture
def folder(tiny, name, tmp_path):
    """Return the folder of a model as transformers writes it: no manifest, experts one by one."""
    tiny(name).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def load(path):
    return io.load_folder(path, torch.float32)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("execute", ["sparse", "dense"])
def test_sparse_from_file_to_file(folder, text, tmp_path, method, execute):
    options = {"sparsity": 0.5, "method": method, "execute": execute}
    written = load(sparsify(folder, tmp_path / "sparse", text, **options))
    expected = sparse.apply(load(folder), text, **options)
    lost = (written(**text[0]).logits - expected(**text[0]).logits).norm() / expected(**text[0]).logits.norm()
    assert lost < 1e-3
    assert sparse.stored_shares(written).keys() == sparse.stored_shares(expected).keys()


@pytest.mark.parametrize("compensate", [False, True])
def test_parts_removed_from_file_to_file(folder, text, tmp_path, compensate):
    written = load(prune(folder, tmp_path / "pruned", text, ratio=0.2, compensate=compensate))
    model = load(folder)
    assert pruning.decoder_parameters(written) < 0.85 * pruning.decoder_parameters(model)
    if not compensate:  # the first block sees what it sees in memory
        expected = anatomy(pruning.apply(model, text, ratio=0.2)).blocks[0].module.state_dict()
        ours = anatomy(written).blocks[0].module.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_factors_from_file_to_file(folder, text, tmp_path):
    written = load(factor(folder, tmp_path / "factored", text, compression=0.2))
    spectra = analysis.Spectra(load(folder), text, weighed=False)
    expected = decomposition.apply(spectra.model, text, method="whitened", budget="uniform", spectra=spectra)
    assert {name: tuple(t.shape) for name, t in written.state_dict().items()} == {
        name: tuple(t.shape) for name, t in expected.state_dict().items()
    }
    assert torch.isfinite(written(**text[0]).logits).all()


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_one_block_is_in_memory_at_a_time(folder, text):
    store = FileBlocks(folder)
    blocks = [block.module for block in anatomy(store.model).blocks]

    def resident() -> list[int]:
        return [i for i, module in enumerate(blocks) if all(_in_memory(p) for p in module.parameters())]

    assert resident() == []
    seen = []
    for block in file_blocks.Walk(store.model, text, store=store):
        gc.collect()
        seen.append((block.index, resident()))
    assert seen == [(index, [index]) for index in range(4)] and resident() == []
    store.close()


def _in_memory(parameter: torch.Tensor) -> bool:
    return not parameter.is_meta and parameter.untyped_storage().nbytes() >= parameter.nbytes


@pytest.mark.parametrize("name", ["qwen3-coder-30b"])
def test_an_interrupted_run_leaves_no_target_and_is_gone_on_with(folder, text, tmp_path, monkeypatch):
    target, load_block = tmp_path / "sparse", FileBlocks.load
    expected = load(sparsify(folder, tmp_path / "at once", text))

    def broken(self, index):
        if index == 2:
            raise UserError("cannot be read")
        load_block(self, index)

    monkeypatch.setattr(FileBlocks, "load", broken)
    with pytest.raises(UserError, match="cannot be read"):
        sparsify(folder, target, text)
    assert not target.exists()
    shards = sorted(path.name for path in (tmp_path / "sparse.part").glob("model-*.safetensors"))
    assert shards == ["model-00000.safetensors", "model-00001.safetensors"]
    with pytest.raises(UserError, match="unfinished run of something else"):
        sparsify(folder, target, text, sparsity=0.7)
    monkeypatch.setattr(FileBlocks, "load", load_block)
    changed = []
    monkeypatch.setattr(file_blocks.FileBlocks, "_write", _counting(FileBlocks._write, changed))
    again = load(sparsify(folder, target, text))
    assert changed == [2, 3]
    assert io.weights_hash(again) == io.weights_hash(expected)
    assert not (tmp_path / "sparse.part").exists() and not list(target.glob("block-*"))


def _counting(write, indices):
    def counted(self, index):
        indices.append(index)
        write(self, index)

    return counted


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_what_cannot_be_is_refused_before_anything_is_written(folder, text, tmp_path):
    with pytest.raises(UserError, match="is there already"):
        sparsify(folder, folder, text)
    factored = factor(folder, tmp_path / "factored", text, compression=0.2)
    with pytest.raises(UserError, match="factored or sparse"):
        sparsify(factored, tmp_path / "twice", text)
    with pytest.raises(UserError, match="whole blocks"):
        prune(folder, tmp_path / "deep", text, granularity="depth")
    index = json.loads((factored / "model.safetensors.index.json").read_text())
    assert all((factored / file).is_file() for file in index["weight_map"].values())

"""File-to-file processing against in-memory: the same checkpoint, one block in memory, nothing half-written."""

import gc
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import UserError
from lib.models.checkpoints import io, placement
from lib.models.offload import file_blocks, rewriting
from lib.models.offload.file_blocks import FileBlocks
from lib.models.structure import surgery
from lib.models.structure.anatomy import anatomy
from lib.models.structure.surgery import synchronise
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks.out_of_core import apply_to_file as sparsify
from lib.optimizations.structured_pruning import method as pruning
from lib.optimizations.structured_pruning.out_of_core import apply_to_file as prune
from lib.optimizations.tensor_decomposition import analysis
from lib.optimizations.tensor_decomposition import method as decomposition
from lib.optimizations.tensor_decomposition.out_of_core import apply_to_file as factor
from tests.models import architectures


@pytest.fixture
def text():
    ids = torch.randint(8, 96, (2, 6, 48), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": part} for part in ids]


@pytest.fixture
def folder(tiny, name, tmp_path):
    """Return the folder of a model as transformers writes it: no manifest, experts stored separately."""
    tiny(name).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


CHANNELS, HEADS = {"granularity": "channels"}, {"granularity": "heads"}


def load(path):
    return io.load_folder(path, torch.float32)


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_a_shard_is_on_the_disk_before_its_description(folder, text, tmp_path, monkeypatch):
    """After a power loss, a description without its shard stopped every resumed run with a traceback."""
    flushed, describe = set(), file_blocks.write_atomically
    monkeypatch.setattr(file_blocks, "_flush", lambda path: flushed.add(path.name))

    def described(path, content):
        if path.name.startswith("block-"):
            assert f"{path.stem.replace('block', 'model')}.safetensors" in flushed
        return describe(path, content)

    monkeypatch.setattr(file_blocks, "write_atomically", described)
    sparsify(folder, tmp_path / "sparse", text)
    assert file_blocks.REST in flushed and len(flushed) > 1


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_sparse_matrices_are_counted_as_memory_holds_them(folder, text, tmp_path):
    """Previously their 32-bit columns and float32 values were counted in the dtype of the model."""
    made = sparse.apply(io.load_folder(folder, torch.bfloat16), text, sparsity=0.5, method="magnitude")
    io.save(made, tmp_path / "sparse")
    state = io.load_folder(tmp_path / "sparse", torch.bfloat16).state_dict()
    held = sum(tensor.nbytes for name, tensor in state.items() if name != "lm_head.weight")  # tied
    assert placement.weights_bytes(tmp_path / "sparse", torch.bfloat16) >= 0.99 * held


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude", "random"])
@pytest.mark.parametrize("execute", ["sparse", "dense"])
def test_file_to_file_sparsification_matches_in_memory(folder, text, tmp_path, method, execute):
    options = {"sparsity": 0.5, "method": method, "execute": execute, "seed": 3}
    written = load(sparsify(folder, tmp_path / "sparse", text, **options))
    expected = sparse.apply(load(folder), text, **options)
    lost = (written(**text[0]).logits - expected(**text[0]).logits).norm() / expected(**text[0]).logits.norm()
    assert lost < 1e-3
    assert sparse.stored_shares(written).keys() == sparse.stored_shares(expected).keys()


@pytest.mark.parametrize(
    "options",
    [{}, CHANNELS, CHANNELS | {"compensate": True}, HEADS, {"saliency": "magnitude"}],
    ids=str,
)
def test_file_to_file_removal_matches_in_memory(folder, text, tmp_path, options):
    options = {"ratio": 0.05 if options == HEADS else 0.2} | options
    written = load(prune(folder, tmp_path / "pruned", text, **options))
    expected = pruning.apply(load(folder), text, **options)
    assert pruning.decoder_parameters(written) < 0.97 * pruning.decoder_parameters(load(folder))
    assert_the_same(written, expected, text)


@pytest.mark.parametrize("method", ["whitened", "refitted"])
def test_file_to_file_factorization_matches_in_memory(folder, text, tmp_path, method):
    written = load(factor(folder, tmp_path / "factored", text, compression=0.2, method=method))
    spectra = analysis.Spectra(load(folder), text, weighed=False)
    options = {"compression": 0.2, "method": method, "budget": "uniform", "spectra": spectra}
    assert_the_same(written, decomposition.apply(spectra.model, text, **options), text)


def assert_the_same(written, expected, text):
    shapes = [{name: tuple(t.shape) for name, t in model.state_dict().items()} for model in (written, expected)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(written(**text[0]).logits, expected(**text[0]).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_only_one_block_is_in_memory_at_a_time(folder, text):
    store = FileBlocks(folder)
    blocks = [block.module for block in anatomy(store.model).blocks]

    def resident() -> list[int]:
        return [i for i, module in enumerate(blocks) if all(_in_memory(p) for p in module.parameters())]

    assert resident() == []
    seen = []
    for block in rewriting.Walk(store.model, text, store=store):
        gc.collect()
        seen.append((block.index, resident()))
    assert seen == [(index, [index]) for index in range(4)] and resident() == []
    store.close()


def _in_memory(parameter: torch.Tensor) -> bool:
    return not parameter.is_meta and parameter.untyped_storage().nbytes() >= parameter.nbytes


WRITERS = {
    "sparse": partial(sparsify, sparsity=0.5),
    "pruned": partial(prune, ratio=0.1, granularity="channels", compensate=True),
    "factored": partial(factor, compression=0.2, method="refitted"),
}


@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.parametrize(
    "fault", [UserError("cannot be read"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("name", ["qwen3-coder-30b"])
def test_an_interrupted_run_leaves_no_target_and_is_resumed(folder, text, tmp_path, monkeypatch, kind, fault):
    write, target = WRITERS[kind], tmp_path / "made"
    expected = load(write(folder, tmp_path / "at once", text))
    release = FileBlocks.release

    def broken(self, index):
        if index == 2 and self.shards is not None:
            raise fault
        release(self, index)

    monkeypatch.setattr(FileBlocks, "release", broken)
    with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else UserError) as raised:
        write(folder, target, text)
    if raised.type is UserError:
        message = str(raised.value)
        assert (
            "made.part keeps the blocks before it, and the same command resumes there" in message
            and "\n" not in message
        )
    assert not target.exists()
    shards = sorted(path.name for path in (tmp_path / "made.part").glob("model-*.safetensors"))
    assert shards == ["model-00000.safetensors", "model-00001.safetensors"]
    with pytest.raises(UserError, match="unfinished run of something else"):
        write(folder, target, text[:1])
    with pytest.raises(UserError, match="unfinished run of something else"):
        sparsify(folder, target, text, sparsity=0.7)
    monkeypatch.setattr(FileBlocks, "release", release)
    changed: list[int] = []
    monkeypatch.setattr(FileBlocks, "_write", _counting(FileBlocks._write, changed))
    again = load(write(folder, target, text))
    assert changed == [2, 3]
    assert io.weights_hash(again) == io.weights_hash(expected)
    assert not (tmp_path / "made.part").exists() and not list(target.glob("block-*"))


@pytest.mark.parametrize("name", ["qwen3-coder-30b"])
def test_an_immediate_failure_leaves_nothing(folder, text, tmp_path):
    poison(folder, "model.layers.0.mlp.experts", 3)
    with pytest.raises(UserError, match=r"block 0, expert 3: .* not finite"):
        sparsify(folder, tmp_path / "sparse", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    (tmp_path / "sparse.part").mkdir()
    (tmp_path / "sparse.part" / "model-00000.safetensors").write_bytes(b"of another program")
    with pytest.raises(UserError, match="unfinished run of something else"):
        sparsify(folder, tmp_path / "sparse", text)


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
@pytest.mark.parametrize("weight", ["model.embed_tokens.weight", "model.norm.weight"])
def test_what_is_no_block_and_no_number_is_named(folder, text, tmp_path, weight):
    poison(folder, weight)
    with pytest.raises(UserError, match=f"{weight} holds NaN"):
        sparsify(folder, tmp_path / "sparse", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def poison(folder, prefix, expert=None):
    """Put a NaN into the first stored tensor with this prefix; for stacked or separate experts, into the given one."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        names = sorted(name for name in tensors if name.startswith(prefix))
        single = [name for name in names if f".{expert}." in name]
        if names:
            at = () if expert is None or single else (expert,)
            tensors[(single or names)[0]][(*at, ..., 0)] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_a_disk_that_returns_other_bytes_is_reported(folder, text, tmp_path, monkeypatch):
    write = file_blocks.weight_file.write

    def damaged(path, tensors):
        write(path, tensors)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(file_blocks.weight_file, "write", damaged)
    with pytest.raises(UserError, match="differs from what was written"):
        sparsify(folder, tmp_path / "sparse", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def _counting(write, indices):
    def counted(self, index):
        indices.append(index)
        write(self, index)

    return counted


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_impossible_requests_are_refused_before_anything_is_written(folder, text, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        sparsify(folder, folder, text)
    factored = factor(folder, tmp_path / "factored", text, compression=0.2)
    with pytest.raises(UserError, match="factored or sparse"):
        sparsify(factored, tmp_path / "twice", text)
    with pytest.raises(UserError, match="whole blocks"):
        prune(folder, tmp_path / "deep", text, granularity="depth")
    index = json.loads((factored / "model.safetensors.index.json").read_text())
    assert all((factored / file).is_file() for file in index["weight_map"].values())


def test_heads_that_do_not_divide_the_width(text, tmp_path):
    architectures.build("llama").save_pretrained(tmp_path / "whole")

    def change(model, walk, block):
        surgery.keep_groups(block.attention, torch.tensor([0, 2, 3]))
        synchronise(model)

    written = load(rewriting.rewrite(tmp_path / "whole", tmp_path / "cut", text, change, about={}))
    expected = load(tmp_path / "whole")
    for block in anatomy(expected).blocks:
        change(expected, None, block)
    assert {anatomy(model).config.num_attention_heads for model in (written, expected)} == {6}, "of a width of 64"
    assert_the_same(written, expected, text)


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_the_written_checkpoint_generates_like_its_source(folder, text, tmp_path):
    settings = {"eos_token_id": [2, 5], "repetition_penalty": 1.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    (folder / "source.json").write_text("{}")  # as for a converted file: it lists hashes of other weights
    made = prune(folder, tmp_path / "pruned", text, **CHANNELS)
    assert json.loads((made / "generation_config.json").read_text()).items() >= settings.items()
    assert not (made / "source.json").exists()


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_mixed_dtype_weights_are_written_in_the_majority_dtype(folder, text, tmp_path):
    for path in folder.glob("*.safetensors"):
        mixed = {name: t.float() if "norm" in name else t.bfloat16() for name, t in load_file(path).items()}
        save_file(mixed, path, metadata={"format": "pt"})
    made = prune(folder, tmp_path / "pruned", text, **CHANNELS)
    assert {t.dtype for path in made.glob("*.safetensors") for t in load_file(path).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_unwritable_results_are_refused_before_a_block_is_read(folder, text, tmp_path, monkeypatch, kind):
    """Parts of a large model are ranked for hours before the first one is removed."""
    read: list[int] = []
    monkeypatch.setattr(FileBlocks, "load", lambda self, index: read.append(index))
    target = tmp_path / "made"
    target.mkdir()
    with pytest.raises(UserError, match="made: exists already"):
        WRITERS[kind](folder, target, text)
    target.rmdir()
    (tmp_path / "made.part").mkdir()
    (tmp_path / "made.part" / "model-00000.safetensors").write_bytes(b"of another run")
    with pytest.raises(UserError, match="unfinished run of something else"):
        WRITERS[kind](folder, target, text)
    monkeypatch.setattr(rewriting, "_disk", lambda path: len(str(path)))
    with pytest.raises(UserError, match=r"made\.part: lies on another disk than .*made; name a folder on the same one"):
        WRITERS[kind](folder, target, text)
    assert read == [] and not target.exists()


@pytest.mark.parametrize("kind", sorted(WRITERS))
@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_a_second_run_into_the_same_folder_is_refused_in_one_line(folder, text, tmp_path, monkeypatch, kind):
    """Previously both wrote into one `.part` and mixed their checkpoints. It is refused before a block is read."""
    release, target = FileBlocks.release, tmp_path / "made"
    refused, read = [], []

    def beside(self, index):
        if self.shards is not None and index == 1 and not refused:
            monkeypatch.setattr(FileBlocks, "load", lambda *_: read.append(index))
            for other in (text, text[:1]):  # the same run, and a different one
                with pytest.raises(UserError) as raised:
                    WRITERS[kind](folder, target, other)
                refused.append(str(raised.value))
            monkeypatch.undo()
        release(self, index)

    monkeypatch.setattr(FileBlocks, "release", beside)
    made = WRITERS[kind](folder, target, text)
    assert len(refused) == 2 and read == []
    for message in refused:
        assert message.startswith(f"{tmp_path / 'made.part'}: another run writes into it (process ")
        assert message.endswith("; wait for it, or name another folder") and "\n" not in message
    assert load(made)(**text[0]).logits.isfinite().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "whole"], "no lock is left behind"


@pytest.mark.parametrize(
    "options", [{"ratio": -0.1}, {"ratio": 0.95}, {"saliency": "largest"}, {"granularity": "rows"}], ids=str
)
@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_removal_options_match_those_in_memory(folder, text, tmp_path, options):
    target = tmp_path / "made"
    for write in (lambda: prune(folder, target, text, **options), lambda: pruning.apply(None, [], **options)):
        with pytest.raises(UserError, match=r"out of range; expected|expected one of"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), RuntimeError("out of memory")])
@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_a_failure_before_the_first_block_leaves_nothing(folder, text, tmp_path, monkeypatch, fault):
    def broken(self, index):
        raise fault

    monkeypatch.setattr(FileBlocks, "release", broken)
    with pytest.raises(type(fault)):
        sparsify(folder, tmp_path / "sparse", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_blocks_are_kept_when_the_folder_cannot_be_renamed(folder, text, tmp_path, monkeypatch):
    rename = Path.rename

    def broken(self, target):
        raise OSError(18, "Invalid cross-device link", str(target))

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(UserError, match=r"made: cannot be written .* the same command resumes there"):
        sparsify(folder, tmp_path / "made", text)
    monkeypatch.setattr(Path, "rename", rename)
    changed: list[int] = []
    monkeypatch.setattr(FileBlocks, "_write", _counting(FileBlocks._write, changed))
    made = sparsify(folder, tmp_path / "made", text)
    assert changed == [] and load(made)(**text[0]).logits.isfinite().all()
    assert not list(made.glob("block-*")) and not (made / file_blocks.ABOUT).exists()


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_blocks_with_non_finite_outputs_cannot_be_resumed(folder, text, tmp_path):
    def change(model, walk, block):
        if block.index == 3:
            block.feed_forward.down.weight.fill_(3e38)

    with pytest.raises(UserError, match=r"what was written cannot be used: block 3.* not finite") as why:
        rewriting.rewrite(folder, tmp_path / "made", text, change, about={})
    assert str(why.value).endswith(f"; delete {tmp_path / 'made.part'}") and "resumes" not in str(why.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_few_tokens_are_reported_file_to_file_too(folder, tmp_path):
    few = [{"input_ids": torch.arange(8, 16)[None]}]
    named = re.escape("model.layers.0.self_attn.q_proj.weight (and 27 more): fewer calibration tokens than inputs")
    with pytest.warns(UserWarning, match=named):
        sparsify(folder, tmp_path / "sparse", few, sparsity=0.5)

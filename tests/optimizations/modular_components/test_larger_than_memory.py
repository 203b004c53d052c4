"""A checkpoint larger than memory: changed file by file as in memory, or refused in one line."""

import shutil
from dataclasses import replace

import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.models import loading, parameters
from lib.models.checkpoints import io, placement
from lib.models.checkpoints.folder import MANIFEST
from lib.models.offload import streamer
from lib.models.offload.file_blocks import FileBlocks
from lib.models.tasks import tasks
from lib.optimizations.common import discovery
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.modular_components import saving
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.structured_pruning import method as pruning
from lib.optimizations.tensor_decomposition import method as decomposition

MODEL = "qwen3-4b-instruct-2507"
PROXIES = parameters.PARAMETERS / "proxies"
COMMON = {"scale": "full", "effort": "quick", "device": "cpu", "random_weights": False, "seed": 0}
RUNS = {
    "structured_pruning": {"ratio": 0.2, "granularity": "channels", "finetune_steps": -1},
    "tensor_decomposition": {"compression": 0.2, "method": "auto", "budget": "uniform", "refine_steps": 20},
    "sparse_neural_networks": {
        "sparsity": -1.0, "method": "sparsegpt", "pattern": "unstructured", "within": "row", "parts": "feed_forward",
        "finetune_steps": -1,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def larger(tmp_path_factory, monkeypatch):
    """Make the free memory less than the model takes, a stand-in in float32."""
    folder = tmp_path_factory.mktemp("checkpoints")
    shutil.copytree(PROXIES / MODEL, folder / MODEL)
    io.save(io.load_folder(PROXIES / MODEL, torch.float32), folder / MODEL)
    monkeypatch.setitem(COMMON, "checkpoints", str(folder))
    read = settings.read
    little = {"calibration_sequences": 4, "calibration_tokens": 64}
    monkeypatch.setattr(settings, "read", lambda *arguments: replace(read(*arguments), **little))
    least, total = streamer.smallest(folder / MODEL)
    free = int(max(least / placement.STREAMED_SHARE, total) * 1.01)
    monkeypatch.setattr(placement, "WEIGHTS_SHARE", 0.1)
    monkeypatch.setattr(placement, "free_bytes", lambda _: free)


def in_memory(optimization: str) -> torch.nn.Module:
    model = io.load_folder(f"{COMMON['checkpoints']}/{MODEL}")
    size = settings.read("quick", "full")
    loaded = loading.load(MODEL)
    count = calibration_text.sequences(model, size)
    text = tasks.calibration(loaded, count, size.calibration_tokens, 0)
    if optimization == "structured_pruning":
        return pruning.apply(model, text, ratio=0.2, granularity="channels", compensate=True)
    if optimization == "sparse_neural_networks":
        return sparse.apply(model, text, sparsity=0.5, parts="feed_forward")
    return decomposition.apply(model, text, compression=0.2, method="refitted", budget="uniform")


@pytest.mark.parametrize("optimization", sorted(RUNS))
def test_file_by_file_equals_the_result_in_memory(optimization, tmp_path):
    saved = saving.save(
        MODEL, optimization, None, COMMON | RUNS[optimization], tmp_path / "made", tmp_path / "made.part"
    )
    assert saved.by_blocks and saved.weights_hash is None and not (tmp_path / "made.part").exists()
    assert (tmp_path / "made" / "tokenizer.json").is_file() and (tmp_path / "made" / MANIFEST).is_file()
    ids_BT = torch.arange(8, 72)[None]
    with torch.inference_mode():
        ours, expected = (
            model(ids_BT).logits.float() for model in (io.load_folder(tmp_path / "made"), in_memory(optimization))
        )
        whole = io.load_folder(PROXIES / MODEL, torch.float32)(ids_BT).logits.float()
    lost, changed = ((output - expected).norm() / expected.norm() for output in (ours, whole))
    assert lost < 1e-3 and lost < 0.1 * changed


@pytest.mark.parametrize(
    ("optimization", "changed", "message"),
    [
        ("structured_pruning", {"finetune_steps": 5}, "needs the whole model in memory; give -p finetune_steps=0"),
        ("sparse_neural_networks", {"finetune_steps": 5}, "needs the whole model in memory; give -p finetune_steps=0"),
        (
            "tensor_decomposition",
            {"method": "refined"},
            "needs the whole model in memory; give -p method=whitened or refitted",
        ),
        ("structured_pruning", {"granularity": "depth"}, "whole blocks cannot be removed from file to file"),
        ("structured_pruning", {"ratio": 0.0}, "removes nothing"),
        ("sparse_neural_networks", {"pattern": "2:4", "parts": "experts"}, "no matrix to prune"),
    ],
)
def test_needing_the_whole_model_is_refused_in_one_line_and_leaves_nothing(optimization, changed, message, tmp_path):
    options = COMMON | RUNS[optimization] | changed
    with pytest.raises(UserError, match=message) as raised:
        saving.save(MODEL, optimization, None, options, tmp_path / "made", tmp_path / "made.part")
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_a_refusal_names_the_optimizations_that_work_file_by_file(tmp_path, monkeypatch):
    find = discovery.beside_method
    monkeypatch.setattr(
        discovery, "beside_method", lambda stem, name: None if stem == "structured_pruning" else find(stem, name)
    )
    with pytest.raises(UserError, match="from file to file: sparse_neural_networks, tensor_decomposition"):
        saving.save(MODEL, "structured_pruning", None, COMMON | RUNS["structured_pruning"], tmp_path / "made")
    steps = [saving.RecipeStep(optimization="structured_pruning")]
    with pytest.raises(UserError, match="does not fit into memory; give one optimization"):
        saving.save(MODEL, "structured_pruning", steps, COMMON | RUNS["structured_pruning"], tmp_path / "made")


def test_a_model_that_fits_once_is_written_by_blocks_or_refused_before_the_work(tmp_path, monkeypatch):
    """Previously it was optimized and saved in memory, and the process was killed when it loaded the result again."""
    one = placement.weights_bytes(f"{COMMON['checkpoints']}/{MODEL}", torch.float32)
    monkeypatch.setattr(placement, "WEIGHTS_SHARE", 0.8)
    free = {"bytes": round(1.2 * one)}  # in bfloat16 twice the weights fit, but not three times
    monkeypatch.setattr(placement, "free_bytes", lambda _: free["bytes"])
    options = COMMON | RUNS["sparse_neural_networks"]
    assert saving.save(MODEL, "sparse_neural_networks", None, options, tmp_path / "made", tmp_path / "part").by_blocks
    load = loading.load

    def loaded(*arguments, **given):
        model = load(*arguments, **given)
        free["bytes"] = one // 4
        return model

    monkeypatch.setattr(loading, "load", loaded)
    monkeypatch.setattr(saving, "_composed", lambda *_: pytest.fail("optimized before memory was checked"))
    steps = [saving.RecipeStep(optimization="structured_pruning")]
    with pytest.raises(UserError, match="saving an optimized copy holds about 1 copies of the model at once"):
        saving.save(MODEL, "structured_pruning", steps, COMMON | RUNS["structured_pruning"], tmp_path / "other")


@pytest.mark.parametrize(("budget", "said"), [("global", True), ("uniform", False)])
def test_ranks_that_differ_from_those_in_memory_are_stated(budget, said, tmp_path):
    options = COMMON | RUNS["tensor_decomposition"] | {"budget": budget, "method": "whitened"}
    saved = saving.save(MODEL, "tensor_decomposition", None, options, tmp_path / "made", tmp_path / "made.part")
    assert ("the same worth" in saved.remark) == said


def test_an_interrupted_run_resumes_in_its_folder(tmp_path, monkeypatch):
    options = COMMON | RUNS["sparse_neural_networks"]
    place, unfinished = tmp_path / "temporary" / "checkpoint", tmp_path / "made.part"
    place.parent.mkdir()
    load = FileBlocks.load

    def broken(self, index):
        if index == 1:
            raise UserError("block 1 cannot be read")
        load(self, index)

    monkeypatch.setattr(FileBlocks, "load", broken)
    with pytest.raises(UserError, match=r"block 1 cannot be read; .*made\.part keeps the blocks before it"):
        saving.save(MODEL, "sparse_neural_networks", None, options, place, unfinished)
    assert [path.name for path in unfinished.glob("*.safetensors")] == ["model-00000.safetensors"]
    monkeypatch.setattr(FileBlocks, "load", load)
    assert saving.save(MODEL, "sparse_neural_networks", None, options, place, unfinished).by_blocks
    assert place.is_dir() and not unfinished.exists()

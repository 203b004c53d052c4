"""A model whose weights stream from a file can run but not be changed: it is refused at once with a clear message."""

from types import SimpleNamespace

import pytest

from lib.errors import NotApplicable
from lib.measure.metrics import settings
from lib.models.checkpoints import io
from lib.models.offload import streamer
from lib.optimizations.sparse_neural_networks import experiment as sparsity
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.structured_pruning import experiment as pruning
from lib.optimizations.tensor_decomposition import experiment as decomposition

EFFORT = settings.read("quick", "full")
ZEROS = {"sparsity": 0.5, "pattern": "unstructured", "within": "row", "parts": "all"}
SET_UPS = {
    "structured_pruning": lambda loaded: pruning.set_up(loaded, EFFORT, 0.2, "auto", 0),
    "tensor_decomposition": lambda loaded: decomposition.set_up(loaded, EFFORT, 0.2, "auto", "global", 1, 0),
    "sparse_neural_networks": lambda loaded: sparsity.set_up(loaded, EFFORT, "wanda", ZEROS, 0),
    "stored at once": lambda loaded: sparse.apply(loaded.model, [], method="magnitude"),
}


@pytest.mark.parametrize("stem", sorted(SET_UPS))
def test_a_streamed_model_is_not_called_a_damaged_checkpoint(tiny, tmp_path, stem):
    """Weights outside memory are NaN: previously an intact checkpoint got the message "repair the checkpoint"."""
    io.save(tiny("qwen3-4b-instruct-2507"), tmp_path)
    model = streamer.open_streamed(tmp_path, memory_ratio=0.8)
    try:
        with pytest.raises(NotApplicable, match="stream from a file: it can run, but it cannot be"):
            SET_UPS[stem](SimpleNamespace(model=model, scale="full", random_weights=False))
    finally:
        streamer.streamer(model).close()

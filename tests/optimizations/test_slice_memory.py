"""A compression's memory beside the weights does not grow with the number of blocks, in memory and from a file."""

import pytest
import torch

from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.dimensions import merge
from tests.conftest import TINY
from tests.optimizations import slice_memory
from tests.optimizations.slice_memory import METHODS, Reading


def tiny_config(name: str, blocks: int) -> tuple[dict, str]:
    described = parameters.read(name)
    small = TINY[name] | {"num_hidden_layers": blocks, "hidden_size": 64, "vocab_size": 320}
    return merge(described.full, small), described.architecture


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", slice_memory.MODELS)
def test_memory_beside_the_weights_does_not_grow_with_depth(name, method, from_file):
    text = [{"input_ids": torch.randint(8, 96, (2, 48), generator=torch.Generator().manual_seed(1))} for _ in range(2)]
    readings = [slice_memory.measure(*tiny_config(name, blocks), METHODS[method], text, from_file) for blocks in (2, 6)]
    assert [reading.blocks for reading in readings] == [2, 6]
    assert readings[1].in_blocks == 3 * readings[0].in_blocks
    grown = readings[1].beside - readings[0].beside
    # A few numbers per row are kept for every block: here up to an eighth of its bytes, at real sizes a thousandth.
    assert readings[0].beside > 0 and grown < 0.2 * (readings[1].in_blocks - readings[0].in_blocks)


def test_total_memory_is_the_weights_plus_the_extra():
    config, architecture = tiny_config(slice_memory.MODELS[0], 6)
    model = io.build(config, architecture, dtype=torch.bfloat16)
    weights, blocks = slice_memory.nbytes(model), slice_memory.bytes_of_blocks(model)
    assert 0 < blocks < weights
    readings = [Reading(2, 100, 40, 20, 130, False), Reading(4, 140, 80, 40, 195, False)]
    assert [reading.beside for reading in readings] == [10, 15]
    assert slice_memory.whole(readings, config, architecture) == weights + blocks / 2 + 15
    filed = [Reading(2, 100, 40, 20, 130, True), Reading(4, 140, 80, 40, 135, True)]
    assert [reading.beside for reading in filed] == [70, 75]
    assert slice_memory.whole(filed, config, architecture) == weights - blocks + 75

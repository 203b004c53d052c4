"""The view against the architectures: counts, shapes, and that nothing is skipped."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lib.models import parameters
from lib.models.decoding import cache_names
from lib.models.structure.anatomy import anatomy

COUNTS = {
    "glm-4.7-flash": 29_943_390_976,
    "qwen3-4b-instruct-2507": 4_022_468_096,
    "qwen3-coder-30b": 30_532_122_624,
    "qwen3-vl-2b": 2_127_532_032,
}


def on_meta(name: str, scale: str):
    described = parameters.read(name)
    configuration = AutoConfig.for_model(described.architecture, **described.config(scale))
    auto = AutoModelForImageTextToText if hasattr(configuration, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(configuration)


def test_full_dimensions_count_exactly(name):
    assert sum(parameter.numel() for parameter in on_meta(name, "full").parameters()) == COUNTS[name]


def test_slice_is_the_first_blocks_at_real_dimensions(name):
    full, cut = anatomy(on_meta(name, "full")), anatomy(on_meta(name, "slice"))
    assert len(cut.blocks) == parameters.read(name).slice.layers
    for whole, part in zip(full.blocks, cut.blocks):
        shapes = [
            {key: tuple(value.shape) for key, value in block.module.named_parameters()} for block in (whole, part)
        ]
        assert shapes[0] == shapes[1]


def test_proxy_is_small_and_of_the_same_class(name):
    proxy = on_meta(name, "proxy")
    assert type(proxy) is type(on_meta(name, "slice"))
    assert sum(parameter.numel() for parameter in proxy.parameters()) <= 5_000_000


def test_view_reaches_every_matrix_of_a_block(tiny, name):
    for block in anatomy(tiny(name)).blocks:
        part, attention = block.feed_forward, block.attention
        reached = {id(parameter) for parameter in attention.module.parameters()}
        if part.dense is not None:
            reached |= {id(linear.weight) for linear in (part.gate, part.up, part.down)}
        if part.experts is not None:
            reached |= {id(part.experts.gate_up), id(part.experts.down), id(part.experts.router.weight)}
        matrices = {id(parameter) for parameter in block.module.parameters() if parameter.ndim > 1}
        assert matrices <= reached


def test_structure_of_each_architecture(tiny):
    glm = anatomy(tiny("glm-4.7-flash"))
    assert [block.feed_forward.kind for block in glm.blocks] == ["dense", "experts", "experts", "experts"]
    assert all(block.attention.kind == "latent" for block in glm.blocks)
    assert glm.blocks[1].feed_forward.dense is not None, "the shared expert"
    assert glm.blocks[1].feed_forward.experts.correction_bias is not None
    coder = anatomy(tiny("qwen3-coder-30b"))
    assert all(block.feed_forward.experts.count == 8 for block in coder.blocks)
    vision = anatomy(tiny("qwen3-vl-2b"))
    assert vision.vision is not None and vision.fixed_blocks == 2
    assert anatomy(tiny("qwen3-4b-instruct-2507")).tied


def test_cache_elements_match_the_real_cache(tiny, name, batch):
    model = tiny(name)
    cache = cache_names.of(model(input_ids=batch["input_ids"], use_cache=True))
    stored = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) / batch["input_ids"].numel()
    assert stored == sum(block.attention.cache_elements_per_token for block in anatomy(model).blocks)


def test_an_unknown_structure_is_refused():
    with pytest.raises(TypeError, match="decoder"):
        anatomy(torch.nn.Linear(2, 2))

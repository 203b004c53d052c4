"""The absorbed baseline of latent attention: the same weights and answers, and models that have no latents."""

from dataclasses import dataclass

import pytest
import torch

from lib.measure.timing import workloads
from lib.models.decoding import mla_absorption
from lib.optimizations.adaptive_sparse_attention import method as sparse
from lib.optimizations.common import absorbed_baseline
from lib.optimizations.structured_pruning import method as pruning

PROMPT = torch.randint(8, 96, (1, 20), generator=torch.Generator().manual_seed(2))


@dataclass
class _Loaded:
    model: torch.nn.Module


def _tokens(model) -> torch.Tensor:
    work = workloads.generate(model, PROMPT, 6)
    work()
    return work.output_BN


def test_the_baseline_decodes_absorbed_with_the_same_weights_and_answers(tiny):
    model = tiny("glm-4.7-flash")
    loaded = absorbed_baseline.of(_Loaded(model))
    assert mla_absorption.is_absorbed(loaded.model) and not mla_absorption.is_absorbed(model)
    assert next(loaded.model.parameters()) is next(model.parameters()), "weights were copied"
    assert torch.equal(_tokens(loaded.model), _tokens(model))
    assert absorbed_baseline.formula(model) == {"costs": {"absorbed": True}, "baseline_costs": {"absorbed": True}}


def test_what_is_made_of_it_decodes_absorbed_as_well(tiny, batch):
    model = absorbed_baseline.absorbed_baseline(tiny("glm-4.7-flash"))
    pruned = pruning.apply(model, [batch], ratio=0.2)
    assert mla_absorption.is_absorbed(pruned)
    assert torch.equal(_tokens(pruned), _tokens(mla_absorption.expand(pruned)))


def test_sparse_attention_keeps_its_own_decoding_in_either_order(tiny):
    """Pages are read in the latent space already: absorbing neither before nor after may bypass them."""
    model = tiny("glm-4.7-flash")
    options = {"block_size": 16, "stride": 4, "page_size": 4, "pages": 1, "dense_blocks": 0, "tau": 1.0}
    before = sparse.apply(absorbed_baseline.absorbed_baseline(model), **options)
    after = mla_absorption.absorb(sparse.apply(model, **options))
    assert torch.equal(_tokens(before), _tokens(after)) and not mla_absorption.is_absorbed(after)
    assert sparse.density(before)["tokens"] < 0.5
    assert mla_absorption.is_absorbed(sparse.revert(before)) and not mla_absorption.is_absorbed(sparse.revert(after))


@pytest.mark.parametrize("plain", ["qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b"])
def test_without_latents_there_is_nothing_to_absorb(tiny, plain):
    loaded = _Loaded(tiny(plain))
    assert absorbed_baseline.of(loaded) is loaded
    assert absorbed_baseline.absorbed_baseline(loaded.model) is loaded.model

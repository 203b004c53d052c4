"""Counts in modules and configuration follow the tensor shapes; cuts of parts are tested per architecture in
`test_other_architectures.py`.
"""

import copy

import torch

from lib.models.structure.anatomy import anatomy
from lib.models.structure.surgery import synchronise


def test_synchronise_changes_nothing_on_a_whole_model(tiny, name, batch):
    model = tiny(name)
    before, config = model(**batch).logits, copy.deepcopy(anatomy(model).config.to_dict())
    synchronise(model)
    assert torch.equal(model(**batch).logits, before)
    assert anatomy(model).config.to_dict() == config

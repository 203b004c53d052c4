"""The arms of a comparison in one process are fresh copies, made in random order."""

import threading
from typing import ClassVar

import torch
from torch import nn

from lib.errors import NotApplicable
from lib.measure.timing import control


class Noted(nn.Module):
    """A module that records the order in which its copies are made."""

    order: ClassVar[list[str]] = []

    def __init__(self, name):
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.ones(4))

    def __deepcopy__(self, memo):
        self.order.append(self.name)
        return Noted(self.name)


def test_copies_have_their_own_memory():
    model = nn.Linear(4, 4)
    fresh = control.fresh_copies({"baseline": model, "copy": model})
    addresses = {copied.weight.data_ptr() for copied, _ in fresh.values()}
    assert len(addresses | {model.weight.data_ptr()}) == 3 and list(fresh) == ["baseline", "copy"]
    assert all(reason is None and copied.weight.equal(model.weight) for copied, reason in fresh.values())


def test_the_seed_decides_which_copy_is_made_first():
    models = {name: Noted(name) for name in "abc"}
    firsts = set()
    for seed in range(20):
        Noted.order.clear()
        control.fresh_copies(models, seed)
        assert sorted(Noted.order) == ["a", "b", "c"]
        firsts.add(Noted.order[0])
        order = list(Noted.order)
        Noted.order.clear()
        control.fresh_copies(models, seed)
        assert Noted.order == order
    assert firsts == {"a", "b", "c"}


def test_only_small_models_are_copied_to_equalize_age(monkeypatch):
    model = nn.Linear(4, 4)
    assert control.fresh_copy(model).weight.data_ptr() != model.weight.data_ptr()
    monkeypatch.setattr(control, "SMALL_BYTES", 10)
    assert control.fresh_copy(model) is model


def test_models_that_cannot_be_copied_are_used_as_they_are():
    model = nn.Linear(4, 4)
    model.lock = threading.Lock()
    (copied, reason), (other, none) = control.fresh_copies({"first": model, "second": nn.Linear(2, 2)}).values()
    assert copied is model and "cannot be copied" in reason and none is None and other is not model


class Streams(nn.Linear):
    """A module that refuses to be copied, like one whose weights stream from a file."""

    def __deepcopy__(self, memo):
        raise NotApplicable("the weights of this model stream from a file")


def test_a_refused_copy_uses_the_original_and_ends_no_comparison():
    """A streaming stack, chosen by a search, ended the sweep over prompt lengths: "not applicable"."""
    model = nn.Sequential(Streams(4, 4))
    (copied, reason), (other, none) = control.fresh_copies({"first": model, "second": nn.Linear(2, 2)}).values()
    assert copied is model and "stream from a file" in reason and none is None and other is not model

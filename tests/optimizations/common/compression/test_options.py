"""Refusals name the option, its value and what was expected; allowed values pass."""

import pytest
from torch import nn

from lib.errors import UserError
from lib.optimizations.common.compression import options


def test_choices():
    options.one_of("pruning", "order", "rows", ("rows", "columns"))
    with pytest.raises(UserError, match=r'^pruning: order "row"; expected one of rows, columns$'):
        options.one_of("pruning", "order", "row", ("rows", "columns"))


@pytest.mark.parametrize(
    ("closed", "allowed", "refused", "says"),
    [
        ("both", (0, 0.5, 1), (-0.1, 1.1, float("nan")), "expected 0 to 1"),
        ("low", (0, 0.5), (-0.1, 1, float("nan")), "expected 0 <= share < 1"),
        ("high", (0.5, 1), (0, 1.1, float("nan")), "expected 0 < share <= 1"),
        ("neither", (0.5,), (0, 1, float("nan")), "expected 0 < share < 1"),
    ],
)
def test_ranges(closed, allowed, refused, says):
    for value in allowed:
        options.in_range("pruning", "share", value, 0, 1, closed)
    for value in refused:
        with pytest.raises(UserError, match=rf"^pruning: share {value} is out of range; {says}$"):
            options.in_range("pruning", "share", value, 0, 1, closed)


def test_least_values():
    options.at_least("pages", "count", 0, 0)
    with pytest.raises(UserError, match=r"^pages: count -1 is out of range; expected 0 \(all pages\) or more$"):
        options.at_least("pages", "count", -1, 0, "all pages")


def test_models_that_do_not_fit():
    options.applies("pruning", nn.Identity(), lambda model: None)
    with pytest.raises(UserError, match=r"^pruning: it has no matrix$"):
        options.applies("pruning", nn.Identity(), lambda model: "it has no matrix")

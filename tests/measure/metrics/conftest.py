"""Shared by the tests of what a single process shows."""

import pytest

from lib.measure.metrics import process_variance


@pytest.fixture
def one_process_is_like_another(monkeypatch):
    """No variance between processes is added: that is the matter of `test_process_variance.py`."""
    monkeypatch.setattr(process_variance, "PRIOR_SIGMA", 0.0)
    monkeypatch.delenv(process_variance.VARIABLE, raising=False)

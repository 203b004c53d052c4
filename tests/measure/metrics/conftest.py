"""A fixture shared by tests of timing in a single process."""

import pytest

from lib.measure.metrics import process_variance


@pytest.fixture
def one_process_is_like_another(monkeypatch):
    """Add no variance between processes, which `test_process_variance.py` tests."""
    monkeypatch.setattr(process_variance, "PRIOR_SIGMA", 0.0)
    monkeypatch.delenv(process_variance.VARIABLE, raising=False)

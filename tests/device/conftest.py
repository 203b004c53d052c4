"""Fixture shared by the GPU session's tests: environment variables set in a test do not outlive it."""

import os

import pytest


@pytest.fixture(autouse=True)
def own_environment():
    """Restore the environment variables: the program under test sets some for the processes that it starts."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

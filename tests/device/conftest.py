"""Shared by the tests of a session on a GPU: what it sets in the environment does not outlive a test."""

import os

import pytest


@pytest.fixture(autouse=True)
def own_environment():
    """Give the environment's variables back: the program under test sets some for the processes that it starts."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

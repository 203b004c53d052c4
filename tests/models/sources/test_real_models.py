"""The real models, left out unless asked for: WORKBENCH_REAL_MODELS=1 fetches hundreds of megabytes into the cache."""

import os

import pytest

pytestmark = pytest.mark.skipif(not os.environ.get("WORKBENCH_REAL_MODELS"), reason="WORKBENCH_REAL_MODELS is not set")
TEXT = 'In 2026, 1234567 people said: "don\'t stop!"\n\n\tdef f(x):\n        return x_1 + 3.14159  # Ünïcödé 日本 🙂'
# Of this text by llama.cpp, without special tokens (xllamacpp 0.2, the same files).
SMOLLM2: list[int] = []
GEMMA: list[int] = []

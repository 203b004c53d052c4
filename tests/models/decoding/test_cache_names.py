"""Every model call passes the cache under the name used by the installed transformers."""

import warnings
from pathlib import Path

import torch

import lib
from lib.measure.timing import workloads
from lib.models.decoding import batch_cache, cache_names

LIB = Path(next(iter(lib.__path__)))


def test_no_other_file_contains_the_name():
    knowing = [path for path in LIB.rglob("*.py") if "past_key_values" in path.read_text(encoding="utf-8")]
    assert [path.name for path in knowing] == ["cache_names.py"]


def test_decoding_uses_no_deprecated_name(tiny, name, batch):
    model, prompt_BT = tiny(name), batch["input_ids"][:1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*past_key_values", category=FutureWarning)
        workloads.decode(model, prompt_BT, 2)()
        batch_cache.step(model, batch_cache.prefill(model, list(prompt_BT)))
        with torch.inference_mode():
            output = model(prompt_BT, use_cache=True)
            model(prompt_BT[:, -1:], use_cache=True, **cache_names.as_kwargs(cache_names.of(output)))

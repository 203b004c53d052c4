"""The models of a rehearsal: the session's architectures and names, made tiny.

They lie in a temporary folder of parameter files, which the environment variable WORKBENCH_PARAMETERS passes to every
process. The evaluation text and the proxy models stay where they are.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.device.schedule import OPTIMIZATIONS

# Whatever takes a CPU more than a minute is made small; all else is as in the session.
SMALL: Mapping[str, Mapping[str, Any]] = {
    "adaptive_sparse_attention": {"context": 2048},
    "adaptive_batch_sizes": {"replay_seconds": 2.0},
}
TEXT = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512, "max_position_embeddings": 8192}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128}
TINY: Mapping[str, Mapping[str, Any]] = {
    "glm-4.7-flash": TEXT
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16}
    | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "intermediate_size": 128}
    | {"moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "qwen3-4b-instruct-2507": TEXT | GROUPED,
    "qwen3-coder-30b": TEXT | GROUPED | {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen3-vl-2b": {
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "text_config": TEXT | GROUPED | {"rope_parameters": {"rope_theta": 10000, "mrope_section": [4, 2, 2]}},
        "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
        | {"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    },
}


@contextlib.contextmanager
def tiny_models() -> Iterator[tuple[dict[str, str], dict[str, Mapping[str, Any]]]]:
    """Yield the environment variables and the optimizations of a rehearsal; the folder is removed afterwards."""
    from lib.models import parameters

    with tempfile.TemporaryDirectory(prefix="tiny-") as folder:
        for path in parameters.PARAMETERS.iterdir():
            if path.stem in TINY:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
                content["full"] = parameters.merge(content["full"], dict(TINY[path.stem]))
                (Path(folder) / path.name).write_text(yaml.safe_dump(content), encoding="utf-8")
            else:
                (Path(folder) / path.name).symlink_to(path)
        small = {name: {**chosen, **SMALL.get(name, {})} for name, chosen in OPTIMIZATIONS.items()}
        before = parameters.PARAMETERS
        parameters.PARAMETERS = Path(folder)
        try:
            yield {"WORKBENCH_PARAMETERS": folder}, small
        finally:
            parameters.PARAMETERS = before

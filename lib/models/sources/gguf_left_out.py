"""Handles what transformers silently ignores in a GGUF file: writes it into the configuration if possible, and refuses
the file in one line otherwise.

The loader of transformers reads the keys and tensors that it knows, ignores the others, and initialises missing tensors
at random. A part of a split file, experts under the name of a dense architecture, or scaled rotations would become a
different model. Knows GGUF's names of keys and tensors, but no architecture.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from torch import nn

from lib.errors import UserError

ADVICE = "give the model's own checkpoint folder"
NOT_READ = ("logit_scale", "embedding_scale", "residual_scale")  # keys of factors that transformers ignores
# Keys that transformers replaces by defaults in some architectures → the attribute of its configuration.
STATED = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
ROTATIONS = "rope_freqs.weight"  # the tensor of the divisors of each frequency
LOW, HIGH, TRAINED = 1.0, 4.0, 8192  # constants of Llama 3.1's scaling, equal in all its models (Dubey et al. 2024)
Header = Callable[[str], Any]


def require_whole(header: Header) -> None:
    """Raise UserError if the file is only a part of a split file."""
    if (parts := header("split.count") or 1) > 1:
        raise UserError(f"is one of {parts} parts of a model; merge them first (llama-gguf-split --merge)")


def require_all_read(model: nn.Module, missing: Collection[str], tensors: Collection[Any]) -> None:
    """Raise UserError unless the model has exactly the weights of the file. `tensors`: those of the GGUFReader;
    `missing`: names of the tensors that transformers did not find.
    """
    if missing:
        raise UserError(f"holds no tensor for {min(missing)}: a part of a model, or of another architecture; {ADVICE}")
    in_file = sum(int(tensor.n_elements) for tensor in tensors if not tensor.name.startswith("rope_"))
    in_model = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if in_file != in_model:
        raise UserError(
            f"holds {in_file:,} weights, but {type(model).__name__} of transformers has {in_model:,}: tensors would be "
            f"left out; {ADVICE}"
        )


def state(config: Any, header: Header, tensors: Collection[Any]) -> None:
    """Write scaled rotations into the configuration, in place.

    Raises UserError if transformers ignores or misreads a setting of the header: factors of results, scale, soft-caps
    or window of attention.
    """
    architecture = header("general.architecture")

    def own(name: str) -> Any:
        return header(f"{architecture}.{name}")

    if own("attention.head_count_kv") is None:  # transformers then leaves queries and keys in llama.cpp's order
        raise UserError(f"states no {architecture}.attention.head_count_kv, so its heads are read wrongly; {ADVICE}")
    for name in NOT_READ:
        if (own(name) or 1) != 1:
            raise UserError(f"states {architecture}.{name}, which transformers does not read; {ADVICE}")
    for name, attribute in STATED.items():
        stated, taken = own(name), getattr(config, attribute, None) or 0
        if not stated or (attribute == "sliding_window" and stated >= config.max_position_embeddings):
            continue  # not stated, or without effect
        if not math.isclose(stated, taken, rel_tol=1e-6):
            raise UserError(f"states {architecture}.{name} {stated:g}, transformers takes {taken:g}; {ADVICE}")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stated = own("attention.scale") or size**-0.5
    taken = (getattr(config, "query_pre_attn_scalar", None) or size) ** -0.5
    if not math.isclose(stated, taken, rel_tol=1e-4):
        raise UserError(f"scales its attention by {stated:.4g}, transformers by {taken:.4g}; {ADVICE}")
    _state_rotations(config, own, size, next((t.data for t in tensors if t.name == ROTATIONS), None))


def _state_rotations(config: Any, own: Header, size: int, divisors: np.ndarray | None) -> None:
    kind = own("rope.scaling.type") or "linear"  # the default of llama.cpp
    factor = 1 if kind == "none" else own("rope.scaling.factor") or own("rope.scale_linear") or 1
    by_frequency = divisors is not None and not np.allclose(divisors, 1)
    if kind not in ("linear", "none") or (by_frequency and factor != 1):
        raise UserError(f'scales its rotations in a way that is not converted here ("{kind}"); {ADVICE}')
    if factor == 1 and not by_frequency:
        return
    everywhere = config.rope_parameters
    rotations = everywhere.get("full_attention", everywhere)  # blocks with a window are unchanged
    if divisors is None or not by_frequency:
        rotations.update(rope_type="linear", factor=float(factor))
        return
    factor = round(float(divisors.max()), 3)  # divisors are float32 quotients
    expected = _divisors(size, rotations["rope_theta"], factor)
    near = divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-3)
    if rotations is not everywhere or not near:
        raise UserError(f"divides its rotations ({ROTATIONS}) differently from Llama 3.1; {ADVICE}")
    rotations.update(rope_type="llama3", factor=factor, low_freq_factor=LOW, high_freq_factor=HIGH)
    rotations.update(original_max_position_embeddings=TRAINED)


def _divisors(size: int, theta: float, factor: float) -> np.ndarray:
    """Return the divisors of a head's frequencies in Llama 3.1: 1 for short waves, `factor` for long waves."""
    wave = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = (TRAINED / wave - LOW) / (HIGH - LOW)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < TRAINED / HIGH, 1, np.where(wave > TRAINED / LOW, factor, between))

"""What transformers passes over in a GGUF file without a word: stated in the configuration where that can hold it, and
refused in one line where it cannot.

Its loader takes the keys and tensors that it knows, leaves out the others, and draws at random what it does not find. A
part of a split file, experts under the name of a dense architecture, and scaled rotations would be converted into
another model. Knows GGUF's names of keys and tensors, and no architecture.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from torch import nn

from lib.errors import UserError

ADVICE = "give the model's own checkpoint folder"
NOT_READ = ("logit_scale", "embedding_scale", "residual_scale")  # by which a result is multiplied
# Keys for which transformers takes its own defaults in some architectures, and what its configuration calls them.
STATED = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
ROTATIONS = "rope_freqs.weight"  # by what each frequency is divided
LOW, HIGH, TRAINED = 1.0, 4.0, 8192  # of Llama 3.1's scaling, in all its models (Dubey et al. 2024)
Header = Callable[[str], Any]


def require_whole(header: Header) -> None:
    """Raise UserError for a part of a file that was split."""
    if (parts := header("split.count") or 1) > 1:
        raise UserError(f"is one of {parts} parts of a model; merge them first (llama-gguf-split --merge)")


def require_all_read(model: nn.Module, missing: Collection[str], tensors: Collection[Any]) -> None:
    """Raise UserError unless the model holds every number of the file and no other. `tensors`: those of gguf's reader;
    `missing`: what transformers did not find.
    """
    if missing:
        raise UserError(f"holds no tensor for {min(missing)}: a part of a model, or of another architecture; {ADVICE}")
    held = sum(int(tensor.n_elements) for tensor in tensors if not tensor.name.startswith("rope_"))
    read = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if held != read:
        raise UserError(
            f"holds {held:,} numbers, but {type(model).__name__} of transformers {read:,}: tensors would be left out; "
            f"{ADVICE}"
        )


def state(config: Any, header: Header, tensors: Collection[Any]) -> None:
    """Write scaled rotations into the configuration. Raises UserError for what the header states and transformers does
    not read, or reads otherwise: how results are multiplied, attention scaled, capped or limited.
    """
    architecture = header("general.architecture")

    def own(name: str) -> Any:
        return header(f"{architecture}.{name}")

    if own("attention.head_count_kv") is None:  # then queries and keys stay in llama.cpp's order
        raise UserError(f"states no {architecture}.attention.head_count_kv, so its heads are read wrongly; {ADVICE}")
    for name in NOT_READ:
        if (own(name) or 1) != 1:
            raise UserError(f"states {architecture}.{name}, which transformers does not read; {ADVICE}")
    for name, theirs in STATED.items():
        stated, taken = own(name), getattr(config, theirs, None) or 0
        if not stated or (theirs == "sliding_window" and stated >= config.max_position_embeddings):
            continue  # not there, or of no effect
        if not math.isclose(stated, taken, rel_tol=1e-6):
            raise UserError(f"states {architecture}.{name} {stated:g}, transformers takes {taken:g}; {ADVICE}")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stated = own("attention.scale") or size**-0.5
    taken = (getattr(config, "query_pre_attn_scalar", None) or size) ** -0.5
    if not math.isclose(stated, taken, rel_tol=1e-4):
        raise UserError(f"scales its attention by {stated:.4g}, transformers by {taken:.4g}; {ADVICE}")
    _state_rotations(config, own, size, next((t.data for t in tensors if t.name == ROTATIONS), None))


def _state_rotations(config: Any, own: Header, size: int, divisors: np.ndarray | None) -> None:
    kind = own("rope.scaling.type") or "linear"  # as llama.cpp where the header names none
    factor = 1 if kind == "none" else own("rope.scaling.factor") or own("rope.scale_linear") or 1
    by_frequency = divisors is not None and not np.allclose(divisors, 1)
    if kind not in ("linear", "none") or (by_frequency and factor != 1):
        raise UserError(f'scales its rotations in a way that is not converted here ("{kind}"); {ADVICE}')
    if factor == 1 and not by_frequency:
        return
    everywhere = config.rope_parameters
    rotations = everywhere.get("full_attention", everywhere)  # blocks with a window are left as they are
    if divisors is None or not by_frequency:
        rotations.update(rope_type="linear", factor=float(factor))
        return
    factor = round(float(divisors.max()), 3)  # of a quotient in float32
    expected = _divisors(size, rotations["rope_theta"], factor)
    near = divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-3)
    if rotations is not everywhere or not near:
        raise UserError(f"divides its rotations ({ROTATIONS}) otherwise than Llama 3.1 does; {ADVICE}")
    rotations.update(rope_type="llama3", factor=factor, low_freq_factor=LOW, high_freq_factor=HIGH)
    rotations.update(original_max_position_embeddings=TRAINED)


def _divisors(size: int, theta: float, factor: float) -> np.ndarray:
    """Return by what Llama 3.1 divides the frequencies of a head: 1 for short waves, `factor` for long ones."""
    wave = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = (TRAINED / wave - LOW) / (HIGH - LOW)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < TRAINED / HIGH, 1, np.where(wave > TRAINED / LOW, factor, between))

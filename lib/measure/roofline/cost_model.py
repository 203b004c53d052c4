"""The cost model: the least parameters, FLOPs and bytes of a workload, by formula from the anatomy of a model. Derived,
never timed.

A multiplication and an addition count as two FLOPs. Only matrices are counted (not norms, activations or the embedding
look-up). The vision tower is left out, since the timed prompts are text. `torch.utils.flop_counter` is right for linear
layers only (it returns 0 for attention on a CPU and counts causal attention as dense); a test compares that part.

Symbols: L layers, H query heads, T prompt tokens, c context, B batch, b bytes per element, E experts, k experts per
token.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lib.measure.roofline import expert_usage
from lib.measure.timing.workloads import Workload
from lib.models.decoding import mla_absorption
from lib.models.structure.anatomy import Anatomy, Attention, Block, Experts, anatomy, feed_forward
from lib.models.structure.replacements.factored import FactoredLinear
from lib.models.structure.replacements.quantized import QuantizedExperts, QuantizedLinear, stored
from lib.models.structure.replacements.sparse import is_dense


@dataclass(frozen=True)
class Cost:
    """FLOPs and moved bytes of one call of a workload."""

    flops: float
    bytes: float


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, including indices, masks and scales of sparse layouts and subclasses."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
        return sum(part.nbytes for part in parts)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    if hasattr(tensor, "__tensor_flatten__"):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(tensor_bytes(part) for part in inner if torch.is_tensor(part))
    return tensor.numel() * tensor.element_size()


def _unique(model: nn.Module) -> list[torch.Tensor]:
    """Return parameters and buffers, tied tensors once."""
    return list({id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values())


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers in memory, tied tensors once. For a model that streams its weights
    from a file, return the most bytes that it holds.
    """
    allowance = getattr(model, "weights_in_memory_bytes", None)
    if allowance is not None:
        return allowance
    return sum(tensor_bytes(tensor) for tensor in _unique(model))


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once. A sparse matrix counts with its stored elements, packed values
    with the weights that they represent.
    """
    packed, inside = _packed(model)
    plain = (_stored_elements(parameter) for parameter in model.parameters() if id(parameter) not in inside)
    return sum(plain) + sum(part.elements for part in packed)


def checkpoint_bytes(folder: Path | str) -> int:
    """Return the bytes of a checkpoint's weight files. Raises FileNotFoundError if there are none."""
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin"), *Path(folder).glob("*.pt")]
    if not files:
        raise FileNotFoundError(f"{folder}: no weight files")
    return sum(file.stat().st_size for file in files)


def zero_share(model: nn.Module) -> float:
    """Return the share of exact zeros in the dense matrices of the decoder blocks; packed values are left out."""
    zeros = total = 0
    for block in anatomy(model).blocks:
        for parameter in block.module.parameters():
            if parameter.dim() > 1 and is_dense(parameter) and parameter.is_floating_point():
                total += parameter.numel()
                zeros += parameter.numel() - int(parameter.count_nonzero())
    return zeros / total if total else 0.0


@dataclass(frozen=True)
class _Size:
    """Elements and bytes of the matrices of one part: those that every token uses, and those of one routed expert."""

    dense: float = 0
    dense_bytes: float = 0
    expert: float = 0
    expert_bytes: float = 0
    count: int = 0
    top_k: int = 0

    @property
    def active(self) -> float:
        return self.dense + self.top_k * self.expert


def _stored_elements(tensor: torch.Tensor) -> int:
    if is_dense(tensor):
        return tensor.numel()
    return (tensor.values() if tensor.layout != torch.sparse_coo else tensor._values()).numel()


def _elements(tensor: torch.Tensor, skip_zeros: bool) -> tuple[float, float]:
    """Return the elements that a product uses and the bytes that it reads; with `skip_zeros`, by a perfect sparse
    kernel.
    """
    if not is_dense(tensor):
        return _stored_elements(tensor), tensor_bytes(tensor)
    if skip_zeros:
        used = int(tensor.count_nonzero())
        return used, used * tensor.element_size()
    return tensor.numel(), tensor_bytes(tensor)


def _block_size(block: Block, skip_zeros: bool = False) -> _Size:
    return _size(block.module, block.feed_forward.experts, skip_zeros)


def _size(module: nn.Module, experts: Experts | None, skip_zeros: bool = False) -> _Size:
    routed = {id(parameter) for parameter in experts.module.parameters()} if experts else set()
    dense = dense_bytes = expert = expert_bytes = 0.0
    packed, inside = _packed(module)
    matrices = [
        (_elements(parameter, skip_zeros), id(parameter) in routed and _is_stack(parameter, experts))
        for parameter in module.parameters()
        if parameter.dim() > 1 and id(parameter) not in inside
    ]
    # Packed values save bytes but no operations: they are multiplied like unpacked ones.
    matrices += [
        ((part.elements, sum(t.nbytes for t in stored(part))), isinstance(part, QuantizedExperts)) for part in packed
    ]
    for (elements, size), stacked in matrices:
        if experts and stacked:
            expert += elements / experts.count
            expert_bytes += size / experts.count
        else:
            dense += elements
            dense_bytes += size
    if not experts:
        return _Size(dense, dense_bytes)
    return _Size(dense, dense_bytes, expert, expert_bytes, experts.count, experts.top_k)


def _is_stack(parameter: torch.Tensor, experts: Experts | None) -> bool:
    """Return whether a parameter is stacked along the experts (a factor shared by all experts is not)."""
    return experts is not None and parameter.dim() == 3 and parameter.shape[0] == experts.count


def _packed(module: nn.Module) -> tuple[list[QuantizedLinear | QuantizedExperts], set[int]]:
    """Return the packed parts of a module, and the ids of their values and scales."""
    parts = [part for part in module.modules() if isinstance(part, (QuantizedLinear, QuantizedExperts))]
    return parts, {id(tensor) for part in parts for tensor in stored(part)}


def _head_size(view: Anatomy, skip_zeros: bool = False) -> _Size:
    sizes = [_elements(p, skip_zeros) for p in view.head.parameters() if p.dim() > 1]
    return _Size(sum(elements for elements, _ in sizes), sum(size for _, size in sizes))


def of_feed_forward(module: nn.Module, tokens: int, *, skip_zeros: bool = False) -> Cost:
    """Return FLOPs and bytes of one pass of `tokens` tokens through a feed-forward part, under uniform routing."""
    size = _size(module, feed_forward(module).experts, skip_zeros)
    hit = expert_usage.expected(size.count, size.top_k, tokens) if size.count else 0
    return Cost(2 * size.active * tokens, size.dense_bytes + hit * size.expert_bytes)


def active_parameters(model: nn.Module, *, skip_zeros: bool = False) -> int:
    """Return N_act, the number of matrix elements that one token of text uses, including top-k and shared experts,
    router and head, but not the embedding.
    """
    view = anatomy(model)
    sizes = [_block_size(block, skip_zeros) for block in view.blocks]
    return round(sum(size.active for size in sizes) + _head_size(view, skip_zeros).dense)


def kv_cache_bytes_per_token(model: nn.Module, context: int | None = None) -> float:
    """Return the cache bytes per token: 2·L·H_kv·d·b, or L·(latent + rope)·b for a cache of latents.

    With a `context`, return the mean over that many tokens, of which a block with a sliding window holds only the last;
    without one, return the bytes that a token adds while it is within every window.
    """
    element = next(model.parameters()).element_size()
    if context is None:
        return element * sum(block.attention.cache_elements_per_token for block in anatomy(model).blocks)
    return kv_cache_bytes(model, context) / context


def kv_cache_bytes(model: nn.Module, context: float) -> float:
    """Return the cache bytes of one sequence of `context` tokens; sliding windows hold only the last tokens."""
    element = next(model.parameters()).element_size()
    parts = (block.attention for block in anatomy(model).blocks)
    return element * sum(part.cache_elements_per_token * part.cached_tokens(context) for part in parts)


def prefill_flops(
    model: nn.Module,
    tokens: int,
    batch: int = 1,
    *,
    logits: int | None = None,
    skip_zeros: bool = False,
    density: float = 1.0,
    stride: int = 0,
) -> float:
    """Return the FLOPs of B prompts of T tokens: 2·N_act·T + Σ_L H·(d_qk + d_v)·T² for each prompt (causal; the sum is
    2·L·H·d·T² where d_qk = d_v).

    `logits` is the number of positions per prompt that pass through the head: all by default, 1 in a timed prefill.
    Sparse attention computes the share `density` of the causal scores, plus Σ_L H·d_qk·T²/`stride` to select them.
    """
    view = anatomy(model)
    head = _head_size(view, skip_zeros).dense * (tokens if logits is None else logits)
    matrices = sum(_block_size(block, skip_zeros).active for block in view.blocks) * tokens + head
    attention = sum(
        b.attention.heads * (b.attention.head_dim + b.attention.value_dim) * _causal_pairs(b.attention, tokens)
        for b in view.blocks
    )
    search = sum(b.attention.heads * b.attention.head_dim for b in view.blocks) / stride if stride else 0.0
    return batch * (2 * matrices + density * attention + search * tokens**2)


def _causal_pairs(attention: Attention, tokens: int) -> float:
    """Return twice the number of query-key pairs: T², or 2·T·w − w² with a window of w < T tokens."""
    window = attention.attended_tokens(tokens)
    return 2 * tokens * window - window**2


def decode_flops(
    model: nn.Module,
    context: float,
    *,
    absorbed: bool | None = None,
    skip_zeros: bool = False,
    attended: float | None = None,
) -> float:
    """Return the FLOPs of one token at context c: 2·N_act + Σ_L 2·H·(d_qk + d_v)·c (the sum is 4·L·H·d·c where d_qk =
    d_v).

    Stock latent attention expands the whole cache again at every token, for another 2·|kv_b_proj|·(c − 1). With
    `absorbed` weights it attends in the latent space instead: 2·H·(2·latent + rope)·c; if kv_b_proj is factored, every
    head then applies the inner factor. `absorbed` None counts each attention as it decodes (`mla_absorption`). Sparse
    attention reads only `attended` tokens of the context.
    """
    read = context if attended is None else min(context, attended)
    view = anatomy(model)
    flops = 2.0 * active_parameters(model, skip_zeros=skip_zeros)
    for attention in (block.attention for block in view.blocks):
        width = attention.head_dim + attention.value_dim
        if attention.kind == "latent":
            expansion, inside = attention.module.kv_b_proj, absorbed
            if inside is None:
                inside = mla_absorption.decodes_in_latents(attention.module)
            if inside:
                width = 2 * attention.latent_dim + attention.rope_dim
                inner = expansion.inner.weight.numel() if isinstance(expansion, FactoredLinear) else 0
                flops += 2 * inner * (2 * attention.heads - 1)
            else:
                flops += 2 * _size(expansion, None, skip_zeros).dense * (context - 1)
        flops += 2 * attention.heads * width * min(read, attention.attended_tokens(context))
    return flops


def step_bytes(
    model: nn.Module,
    batch: int,
    context: float,
    *,
    tokens: int | None = None,
    hit: dict[int, float] | None = None,
    overhead: float = 0.0,
    skip_zeros: bool = False,
    attended: float | None = None,
) -> float:
    """Return the bytes of one step: dense weights + Σ (experts hit × their bytes + shared) + B·c·cache + overhead.

    `tokens` is the number of tokens that pass through the model in this step (B by default). `hit` maps a block to its
    counted distinct experts; for other blocks uniform routing is assumed. `overhead` counts the bytes that a weight
    format needs beyond its tensors. `attended` is the number of cached tokens that are read (all by default).
    """
    view = anatomy(model)
    read = context if attended is None else min(context, attended)
    total = _head_size(view, skip_zeros).dense_bytes + overhead + batch * kv_cache_bytes(model, read)
    for block in view.blocks:
        size = _block_size(block, skip_zeros)
        total += size.dense_bytes
        if size.count:
            uniform = expert_usage.expected(size.count, size.top_k, tokens or batch)
            total += size.expert_bytes * (hit or {}).get(block.index, uniform)
    return total


def of(
    model: nn.Module,
    work: Workload,
    *,
    hit: dict[int, float] | None = None,
    read_hit: dict[int, float] | None = None,
    absorbed: bool | None = None,
    overhead: float = 0.0,
    skip_zeros: bool = False,
    density: float = 1.0,
    stride: int = 0,
    attended: float | None = None,
) -> Cost:
    """Return FLOPs and bytes of one call of a workload on `model`; of the mean call where several make up the whole
    work (`Workload.turns`).

    `hit` is that of `step_bytes` for decoding steps, `read_hit` for the pass that reads the prompts: real text does not
    spread over all experts. `absorbed`, `attended`: see `decode_flops`. `density`, `stride`: see `prefill_flops`.
    `skip_zeros` counts the work of a kernel for which exact zeros are free, so that zeros stored dense show as an
    unrealised gain. Raises ValueError for a workload without a formula.
    """
    prefill, steps = _parts(work)
    flops = bytes_ = 0.0
    if prefill:
        flops += prefill_flops(
            model,
            work.prompt_tokens,
            work.batch,
            logits=1,
            skip_zeros=skip_zeros,
            density=density,
            stride=stride,
        )
        bytes_ += step_bytes(
            model,
            work.batch,
            work.prompt_tokens,
            tokens=work.batch * work.prompt_tokens,
            hit=read_hit,
            overhead=overhead,
            skip_zeros=skip_zeros,
        )
    if steps:
        # Cost is linear in the context, so the middle step represents all steps of all turns.
        context = work.prompt_tokens + (steps * work.turns + 1) / 2
        step_flops = decode_flops(model, context, absorbed=absorbed, skip_zeros=skip_zeros, attended=attended)
        flops += steps * work.batch * step_flops
        bytes_ += steps * step_bytes(
            model, work.batch, context, hit=hit, overhead=overhead, skip_zeros=skip_zeros, attended=attended
        )
    return Cost(flops, bytes_)


def _parts(work: Workload) -> tuple[bool, int]:
    """Return whether a workload prefills, and how many steps it decodes."""
    if work.name == "prefill":
        return True, 0
    if work.name == "decode":
        return False, work.new_tokens
    if work.name == "generate":
        return True, work.new_tokens - 1
    raise ValueError(f'no formula for the workload "{work.name}"')

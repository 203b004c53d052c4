"""Block-sparse causal attention: choose the blocks of keys that a block of queries needs, and attend to those alone.

The pattern is computed per input and head from anti-diagonal scores (Xu et al. 2025, XAttention). Of every stride ×
stride square of the score matrix only the anti-diagonal is summed, by one small product of reshaped queries and keys. A
causal softmax over these sums, added up per block, estimates the block's share of attention mass. Each block of queries
keeps the first block, the diagonal block and the one before it, and the fewest others whose estimated mass reaches τ,
so the budget adapts.

Heads are not merged: query heads that share keys have their own patterns. (The union over such heads saves a copy of
keys but keeps more blocks; a copied block of keys serves a whole block of queries, so the copy is cheap.)

Shapes: H query heads, G key-value heads, T query tokens, K key tokens (the last T are the queries' own), D and V head
sizes, N and M blocks of queries and keys, P pairs of a head and a block of queries, B tokens of a block.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

ALWAYS = 3  # blocks that every row keeps: the first, the one before the diagonal, the diagonal
PATTERNS = ("antidiagonal", "window", "random", "oracle")
GATHERED_ELEMENTS = 2**20  # keys and values copied at a time: about the size of a CPU's cache
SCORED_ROWS = 1024  # rows of the small score matrix computed at a time
KERNEL_BLOCK = 128  # FlexAttention's kernels work on blocks of this size, or on smaller powers of two,
KERNEL_WIDTH = 16  # and on heads of at least this size
RECOMPILATIONS = 64  # a sweep over lengths and heads needs more kernels than torch's default of eight


def blocks_of(tokens: int, block: int) -> int:
    """Return the number of blocks that hold `tokens` tokens; the last one may be part-filled."""
    return -(-tokens // block)


def whole(tensor_HTD: torch.Tensor, block: int) -> torch.Tensor:
    """Return the tensor padded with zeros after its tokens to whole blocks."""
    missing = -tensor_HTD.shape[-2] % block
    return pad(tensor_HTD, (0, 0, 0, missing)) if missing else tensor_HTD


def causal_blocks(rows: int, columns: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return bool [N, M]: the blocks visible under the causal mask, with the last rows and columns aligned."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)


def scores(query_HTD: torch.Tensor, key_GKD: torch.Tensor, scaling: float, block: int, stride: int) -> torch.Tensor:
    """Return the estimated share of attention mass of every block, float32 [H, N, M]; each row sums to 1.

    Queries start at a block edge: K − T is a multiple of `block`, and `block` a multiple of `stride`. The mean over the
    last block excludes rows of the small matrix that hold no query.
    """
    real_rows = -(-query_HTD.shape[1] // stride)
    query_HTD, key_GKD = whole(query_HTD, block), whole(key_GKD, block)
    heads, tokens, width = query_HTD.shape
    groups, length, _ = key_GKD.shape
    small, offset = block // stride, (length - tokens) // stride
    shrunk = 1.0
    if query_HTD.dtype == torch.float16:  # at most 65,504: sums over a stride may overflow
        shrunk = 2.0 ** math.floor(math.log2(scaling / stride))  # a power of two loses no precision
        query_HTD = query_HTD * shrunk
    query_HTS = query_HTD.reshape(heads, tokens // stride, stride * width)
    key_GKS = key_GKD.reshape(groups, length // stride, stride, width).flip(2).reshape(groups, -1, stride * width)
    query_GRTS = query_HTS.view(groups, heads // groups, -1, stride * width)
    estimate_HNM = query_HTD.new_zeros(heads, tokens // block, length // block, dtype=torch.float32)
    step = max(small, SCORED_ROWS // small * small)
    for first in range(0, tokens // stride, step):
        last = min(first + step, tokens // stride)
        visible = offset + last  # columns that these rows may see
        rows_GXS = query_GRTS[:, :, first:last].reshape(groups, -1, stride * width)
        logits_HTK = (rows_GXS @ key_GKS[:, :visible].transpose(1, 2)).view(heads, last - first, visible).float()
        own = torch.ones(last - first, last - first, dtype=torch.bool, device=logits_HTK.device).triu(1)
        logits_HTK[:, :, offset + first :].masked_fill_(own, float("-inf"))
        share_HTK = torch.softmax(logits_HTK * (scaling / stride / shrunk), dim=-1)
        share_HTK[:, max(0, real_rows - first) :] = 0.0
        share_HNM = share_HTK.view(heads, (last - first) // small, small, visible // small, small).sum((2, 4))
        share_HNM /= (real_rows - torch.arange(first, last, small, device=share_HNM.device)).clamp(1, small)[:, None]
        estimate_HNM[:, first // small : last // small, : visible // small] = share_HNM
    return estimate_HNM


def choose(share_HNM: torch.Tensor, tau: float, most: float = 1.0) -> torch.Tensor:
    """Return bool [H, N, M]: for each block of queries the fewest blocks of keys whose share of mass reaches τ.

    The first block, the diagonal block and the one before it are always kept and count towards τ: the first token of a
    block often reads the token just before it, which hardly matters in the mass of a whole row. `most` limits the kept
    share of a row's visible blocks (but never below these three). τ = 1 keeps every visible block.
    """
    rows, columns = share_HNM.shape[1:]
    causal_NM = causal_blocks(rows, columns, share_HNM.device)
    if tau >= 1 and most >= 1:
        return causal_NM.expand_as(share_HNM).clone()
    diagonal_N = torch.arange(columns - rows, columns, device=share_HNM.device)
    ranked_HNM = share_HNM.masked_fill(~causal_NM, -1.0)
    ranked_HNM[:, torch.arange(rows), diagonal_N] = 4.0
    ranked_HNM[:, torch.arange(rows), (diagonal_N - 1).clamp_min(0)] = 3.0
    ranked_HNM[:, :, 0] = 2.0
    order_HNM = ranked_HNM.argsort(dim=-1, descending=True, stable=True)
    ordered_HNM = share_HNM.gather(-1, order_HNM)
    before_HNM = ordered_HNM.cumsum(-1) - ordered_HNM
    enough_HNM = before_HNM < tau * share_HNM.sum(-1, keepdim=True) if tau < 1 else order_HNM >= 0
    limit_N1 = ((diagonal_N + 1) * most).ceil().clamp_min(ALWAYS)[:, None]
    place_M = torch.arange(columns, device=share_HNM.device)
    kept_HNM = enough_HNM & (place_M < limit_N1) | (place_M < ALWAYS)
    return torch.zeros_like(kept_HNM).scatter(-1, order_HNM, kept_HNM) & causal_NM


def same_budget(
    kept_HNM: torch.Tensor, pattern: str, mass_HNM: torch.Tensor | None = None, seed: int = 0
) -> torch.Tensor:
    """Return a control, bool [H, N, M]: as many blocks in every row as `kept_HNM`, chosen in another way.

    `window`: the first block and the latest ones; `random`: others at random; `oracle`: the blocks with the most exact
    mass (`mass_HNM`). All keep the blocks that `choose` always keeps.
    """
    rows, columns = kept_HNM.shape[1:]
    causal_NM = causal_blocks(rows, columns, kept_HNM.device)
    if pattern == "window":
        rank_HNM = torch.arange(columns, device=kept_HNM.device).float().expand_as(kept_HNM).clone()
    elif pattern == "random":
        generator = torch.Generator().manual_seed(seed)
        rank_HNM = torch.rand(kept_HNM.shape, generator=generator).to(kept_HNM.device)
    else:
        assert mass_HNM is not None, "an oracle needs the exact mass"
        rank_HNM = mass_HNM.clone()
    rank_HNM.masked_fill_(~causal_NM, -1.0)
    diagonal_N = torch.arange(columns - rows, columns, device=kept_HNM.device)
    rank_HNM[:, torch.arange(rows), diagonal_N] = 3.0 * columns
    rank_HNM[:, torch.arange(rows), (diagonal_N - 1).clamp_min(0)] = 2.0 * columns
    rank_HNM[:, :, 0] = 4.0 * columns
    order_HNM = rank_HNM.argsort(dim=-1, descending=True)
    place_M = torch.arange(columns, device=kept_HNM.device)
    chosen_HNM = (place_M < kept_HNM.sum(-1, keepdim=True)).expand_as(kept_HNM)
    return torch.zeros_like(kept_HNM).scatter(-1, order_HNM, chosen_HNM) & causal_NM


def attend(query_HTD, key_GKD, value_GKV, kept_HNM, scaling: float, block: int) -> torch.Tensor:
    """Return causal attention [H, T, V] to the kept blocks alone.

    Pairs of a head and a block of queries with the same number of kept blocks are computed together: their keys and
    values are copied side by side, the diagonal block last, so that the end of one mask serves them all.
    """
    if query_HTD.is_cuda and flexible(block):
        return attend_flex(query_HTD, key_GKD, value_GKV, kept_HNM, scaling, block)
    device = query_HTD.device
    tokens, value_width = query_HTD.shape[1], value_GKV.shape[2]
    query_HTD, key_GKD, value_GKV = _equal_widths(*(whole(x, block) for x in (query_HTD, key_GKD, value_GKV)))
    heads, padded, width = query_HTD.shape
    groups, length, _ = key_GKD.shape
    columns = length // block
    query_PBD = query_HTD.reshape(-1, block, width)
    key_XF, value_XF = key_GKD.reshape(-1, block * width), value_GKV.reshape(-1, block * width)
    kept_PM = kept_HNM.flatten(0, 1)
    first_P = (torch.arange(heads, device=device) // (heads // groups) * columns).repeat_interleave(padded // block)
    count_P = kept_PM.sum(1)
    mask_BX = torch.ones(block, columns * block, dtype=torch.bool, device=device)
    mask_BX[:, -block:] = torch.ones(block, block, dtype=torch.bool, device=device).tril()
    out_PBD = torch.empty_like(query_PBD)
    for count in count_P.unique().tolist():
        for pair_C in (count_P == count).nonzero()[:, 0].split(max(1, GATHERED_ELEMENTS // (count * block * width))):
            block_X = (kept_PM[pair_C].nonzero()[:, 1].view(-1, count) + first_P[pair_C, None]).flatten()
            shape = len(pair_C), 1, count * block, width
            out_PBD[pair_C] = scaled_dot_product_attention(
                query_PBD[pair_C][:, None],
                key_XF.index_select(0, block_X).view(shape),
                value_XF.index_select(0, block_X).view(shape),
                attn_mask=mask_BX[:, -count * block :],
                scale=scaling,
            )[:, 0]
    return out_PBD.view(heads, padded, width)[:, :tokens, :value_width]


def attend_all(query_HTD, key_GKD, value_GKV, scaling: float) -> torch.Tensor:
    """Return full causal attention [H, T, V]; the last T of the K keys are the queries' own."""
    tokens, length = query_HTD.shape[1], key_GKD.shape[1]
    causal_TK = torch.ones(tokens, length, dtype=torch.bool, device=query_HTD.device).tril(length - tokens)
    query, key, value = (part[None] for part in (query_HTD, key_GKD, value_GKV))
    grouped = query_HTD.shape[0] != key_GKD.shape[0]
    return scaled_dot_product_attention(query, key, value, attn_mask=causal_TK, scale=scaling, enable_gqa=grouped)[0]


def _equal_widths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return all three padded to the widest: the fast kernels need one head size, and zeros change no result."""
    width = max(key.shape[-1], value.shape[-1])
    return tuple(wide(x, width) for x in (query, key, value))


def wide(tensor_HTD: torch.Tensor, width: int) -> torch.Tensor:
    """Return the tensor with each token padded with zeros to a width of at least `width`."""
    missing = width - tensor_HTD.shape[-1]
    return pad(tensor_HTD, (0, missing)) if missing > 0 else tensor_HTD


def flexible(block: int) -> bool:
    """Return whether FlexAttention's kernels can work on blocks of this size."""
    return block % KERNEL_BLOCK == 0 or (block >= 16 and block & (block - 1) == 0)


def attend_flex(query_HTD, key_GKD, value_GKV, kept_HNM, scaling: float, block: int) -> torch.Tensor:
    """Return the result of `attend` by FlexAttention with a block mask: compiled on CUDA, slow elsewhere.

    Diagonal blocks are masked, the others are read whole.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tokens = query_HTD.shape[1]
    query, key, value = (wide(whole(x, block), KERNEL_WIDTH)[None] for x in (query_HTD, key_GKD, value_GKV))
    offset = key.shape[2] - query.shape[2]
    rows, columns = kept_HNM.shape[1:]
    diagonal_NM = torch.eye(columns, dtype=torch.bool, device=query.device)[columns - rows :]
    masked_count, masked_index = _listed(kept_HNM & diagonal_NM)
    whole_count, whole_index = _listed(kept_HNM & ~diagonal_NM)

    def causal(b, h, q, k):
        return q + offset >= k

    def causal_and_kept(b, h, q, k):
        return (q + offset >= k) & kept_HNM[h, q // block, k // block]

    compiled = query.is_cuda  # compiled kernels read only the listed blocks; otherwise the mask must exclude the rest
    mask = BlockMask.from_kv_blocks(
        masked_count,
        masked_index,
        whole_count,
        whole_index,
        BLOCK_SIZE=block,
        mask_mod=causal if compiled else causal_and_kept,
        seq_lengths=(query.shape[2], key.shape[2]),
    )
    options = {"BLOCK_M": block, "BLOCK_N": block} if block < KERNEL_BLOCK else None
    run: Callable = flex_attention
    if compiled:
        run = _compiled()
    grouped = key.shape[1] != query.shape[1]
    output_BHTV = run(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped, kernel_options=options)
    return output_BHTV[0, :, :tokens, : value_GKV.shape[2]]


def _listed(kept_HNM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of kept blocks of each row [1, H, N], and all block indices, ascending, kept blocks first."""
    order_HNM = kept_HNM.int().argsort(dim=-1, descending=True, stable=True)
    return kept_HNM.sum(-1).int()[None], order_HNM.int()[None]


@functools.cache
def _compiled() -> Callable:
    """Return compiled FlexAttention, one per process, so that calls of one shape share a kernel."""
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    return torch.compile(flex_attention)


def exact_mass(query_HTD, key_GKD, scaling: float, block: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the exact share of attention mass of every block, float32 [H, N, M], from full probabilities.

    Averaged over the queries of a block. With `rows` [R] only these blocks of queries are computed: [H, R, M]. Always
    in single precision: rounded to half precision, a product is off by tenths of a nat where the mass lies.
    """
    query_HTD, key_GKD = query_HTD.float(), key_GKD.float()
    heads, tokens, _ = query_HTD.shape
    groups, length, _ = key_GKD.shape
    offset, columns = length - tokens, blocks_of(length, block)
    rows = torch.arange(blocks_of(tokens, block)) if rows is None else rows
    mass_HRM = query_HTD.new_zeros(heads, len(rows), columns, dtype=torch.float32)
    for place, row in enumerate(rows.tolist()):
        first, last = row * block, min((row + 1) * block, tokens)
        visible = offset + last
        query_GRD = query_HTD[:, first:last].reshape(groups, -1, query_HTD.shape[2])
        logits_HTK = (query_GRD @ key_GKD[:, :visible].transpose(1, 2)).view(heads, last - first, visible) * scaling
        own = torch.ones(last - first, last - first, dtype=torch.bool, device=logits_HTK.device).triu(1)
        logits_HTK[:, :, offset + first :].masked_fill_(own, float("-inf"))
        share_HK = logits_HTK.softmax(-1).mean(1)
        share_HK = pad(share_HK, (0, columns * block - visible))
        mass_HRM[:, place] = share_HK.view(heads, columns, block).sum(-1)
    return mass_HRM

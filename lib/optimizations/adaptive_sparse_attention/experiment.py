"""What a block pattern keeps of attention, what of its mass, and what it saves: the heads of one block, by themselves.

Recall of mass is always computed from exact probabilities (of a sample of the blocks of queries), never from the scores
that chose the pattern. Time includes finding the pattern. `planted` makes heads whose mass is concentrated by
construction, to show what finder and kernel do where attention is sparse. Knows no optimization beyond the pattern.

Shapes: H query heads, G key-value heads, T tokens, D head size, N and M blocks of queries and keys, R sampled rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from lib.measure.metrics.paired_stats import Pairs
from lib.measure.timing import disturbance, interleaved
from lib.measure.timing.interleaved import warm_up, with_control
from lib.models.decoding.attention_inputs import Heads
from lib.optimizations.adaptive_sparse_attention import block_pattern as blocks

SAMPLED_ROWS = 12  # blocks of queries whose exact mass is computed, spread evenly over the prompt
CONTEXTS = {"quick": (1024, 2048), "standard": (1024, 2048, 4096, 8192), "thorough": (1024, 2048, 4096, 8192, 16384)}
# At real dimensions, where reading the longest takes seconds and the shortest shows little.
AT_REAL_SIZE = {"quick": (2048,), "standard": (4096, 8192), "thorough": (4096, 8192, 16384)}


def contexts(effort: str, scale: str, longest: int = 0) -> list[int]:
    """Return the lengths of the curves: by effort and scale, or powers of two up to `longest`, and that length too."""
    if longest:
        return [2**i for i in range(10, 24) if 2**i < longest] + [longest]
    return list((CONTEXTS if scale == "proxy" else AT_REAL_SIZE)[effort])


@dataclass(frozen=True)
class Kept:
    """What a pattern keeps, per head: the share of causal blocks and the exact share of attention mass."""

    density_H: np.ndarray
    recall_H: np.ndarray

    @property
    def density(self) -> float:
        return float(self.density_H.mean())

    @property
    def recall(self) -> float:
        return float(self.recall_H.mean())


def sampled_rows(count: int, most: int = SAMPLED_ROWS) -> torch.Tensor:
    """Return at most `most` rows, spread evenly, the last one among them."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().unique()


@torch.inference_mode()
def judge(heads: Heads, kept_HNM: torch.Tensor, block: int, mass_HRM: torch.Tensor | None = None) -> Kept:
    """Return density and exact recall of mass of a pattern; `mass_HRM` is that of `mass`, where it is known already."""
    rows = sampled_rows(kept_HNM.shape[1])
    mass_HRM = mass(heads, block) if mass_HRM is None else mass_HRM
    causal = int(blocks.causal_blocks(*kept_HNM.shape[1:]).sum())
    density_H = kept_HNM.sum((1, 2)).float() / causal
    recall_H = (mass_HRM * kept_HNM[:, rows]).sum(-1).mean(1)
    return Kept(density_H.cpu().numpy(), recall_H.cpu().numpy())


@torch.inference_mode()
def mass(heads: Heads, block: int) -> torch.Tensor:
    """Return the exact share of mass [H, R, M] of every block for the sampled blocks of queries."""
    rows = sampled_rows(blocks.blocks_of(heads.tokens, block))
    return blocks.exact_mass(heads.query_HTD, heads.key_GTD, heads.scaling, block, rows)


@dataclass
class Finder:
    """How a pattern is found: heads → kept [H, N, M]."""

    tau: float
    block: int
    stride: int
    most: float = 1.0
    last: int = 0

    @torch.inference_mode()
    def __call__(self, heads: Heads) -> torch.Tensor:
        share_HNM = blocks.scores(heads.query_HTD, heads.key_GTD, heads.scaling, self.block, self.stride)
        return blocks.choose(share_HNM, self.tau, self.most, self.last)


def needed(heads: Heads, block: int, share: float, mass_HRM: torch.Tensor | None = None) -> float:
    """Return the least density at which an oracle reaches `share` of the mass: no pattern of blocks can do with less.

    The fewest blocks of most exact mass, over the sampled blocks of queries, weighed by what these rows may see.
    `mass_HRM`: see `judge`.
    """
    mass_HRM = mass(heads, block) if mass_HRM is None else mass_HRM
    rows = sampled_rows(blocks.blocks_of(heads.tokens, block))
    ordered_HRM = mass_HRM.sort(dim=-1, descending=True).values.cumsum(-1)
    count_HR = (ordered_HRM < share).sum(-1) + 1
    return float(count_HR.sum() / ((rows + 1).sum() * len(count_HR)))


@torch.inference_mode()
def time_attention(
    heads: Heads, find: Finder, count: int, seed: int = 0, control: bool = True
) -> tuple[Pairs, Pairs | None]:
    """Return pairs of (full attention, pattern found and attention to it), and the A/A control of full attention
    (None where not wanted).
    """
    parts = heads.query_HTD, heads.key_GTD, heads.value_GTV
    grouped = parts[0].shape[0] != parts[1].shape[0]

    def full() -> torch.Tensor:
        with torch.inference_mode():
            query, key, value = (part[None] for part in parts)
            options = {"is_causal": True, "scale": heads.scaling, "enable_gqa": grouped}
            return scaled_dot_product_attention(query, key, value, **options)

    def sparse() -> torch.Tensor:
        with torch.inference_mode():
            return blocks.attend(*parts, find(heads), heads.scaling, find.block)

    full.synchronize = torch.cuda.synchronize if parts[0].is_cuda else None
    options = {"blocks": count, "disturbance": disturbance.watch}
    if control:
        return with_control(full, sparse, lasted=warm_up(full, sparse), seconds=0.0, seed=seed, **options)
    return interleaved.paired(full, sparse, warmup=1, seed=seed, **options), None


def planted(heads: Heads, block: int, share: float = 0.15, seed: int = 0) -> Heads:
    """Return heads of the same shapes whose mass lies, nearly all of it, in a few blocks: by construction, known.

    Every block of keys points in a direction of its own; the queries of a block point along those of the first block,
    their own, and a random `share` of the blocks that they may see (more in some heads, fewer in others), so strongly
    that the rest is left with little mass.
    """
    random = torch.Generator().manual_seed(seed)
    count, tokens = heads.query_HTD.shape[0], heads.tokens
    groups, _, width = heads.key_GTD.shape
    total = blocks.blocks_of(tokens, block)
    direction_GMD = torch.randn(groups, total, width, generator=random)
    direction_GMD = direction_GMD / direction_GMD.norm(dim=-1, keepdim=True)
    portion_H = share * (0.5 + torch.rand(count, generator=random))
    wanted_HNM = torch.rand(count, total, total, generator=random) < portion_H[:, None, None]
    wanted_HNM[:, :, 0] = True
    wanted_HNM |= torch.eye(total, dtype=torch.bool)
    wanted_HNM &= blocks.causal_blocks(total, total)
    strength = 12 + 2 * float(np.log(total))  # in nats, above directions that only resemble
    member_HMD = direction_GMD.repeat_interleave(count // groups, 0)
    # Queries that give every wanted direction the same score and every other none: least squares, exactly or nearly.
    gram_HMM = member_HMD @ member_HMD.transpose(1, 2) + 1e-2 * torch.eye(total)
    query_HND = torch.linalg.solve(gram_HMM, wanted_HNM.float().transpose(1, 2)).transpose(1, 2) @ member_HMD
    query_HTD = (strength / heads.scaling) * query_HND.repeat_interleave(block, 1)[:, :tokens]
    key_GTD = direction_GMD.repeat_interleave(block, 1)[:, :tokens]
    noise_GTD = 0.02 * torch.randn(key_GTD.shape, generator=random)
    like = {"device": heads.query_HTD.device, "dtype": heads.query_HTD.dtype}
    return Heads(heads.index, query_HTD.to(**like), (key_GTD + noise_GTD).to(**like), heads.value_GTV, heads.scaling)


def time_calls(baseline: Callable, optimized: Callable, count: int, seed: int = 0) -> Pairs:
    """Return pairs of two calls that last long enough by themselves."""
    return interleaved.paired(baseline, optimized, blocks=count, warmup=1, seed=seed, disturbance=disturbance.watch)

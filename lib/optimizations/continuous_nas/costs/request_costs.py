"""The cost of a choice of replacements for one request: seconds and bytes, as tables whose entries add up.

Seconds come from `subblock_costs`, bytes are counted.

Shapes: B batch, P prompt tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from lib.measure.metrics.settings import Effort
from lib.measure.roofline import cost_model
from lib.models.structure.anatomy import attention as view_attention
from lib.optimizations.continuous_nas.costs import subblock_costs
from lib.optimizations.continuous_nas.costs.subblock_costs import BlockTimes
from lib.optimizations.continuous_nas.mip import Budget, CostTable
from lib.optimizations.continuous_nas.replacement_library import WHOLE, Choice, Library, locate

PREVIEW_DIVISOR = 4  # of the tokens and the batch of a request, at effort preview
ROOM = 0.25  # least budget after a drift, as a share of the way from the cheapest choice to the whole model


@dataclass(frozen=True)
class RequestProfile:
    """The shape of one request: `batch` sequences, each read and then answered. `limit` names the scarce resource,
    "time" or "memory".
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    limit: str

    def within(self, effort: Effort) -> "RequestProfile":
        """Return the profile as timed at `effort`: at preview with a quarter of its tokens and its batch."""
        if not effort.preview:
            return self
        names = "prompt_tokens", "new_tokens", "batch"
        return replace(self, **{name: max(1, getattr(self, name) // PREVIEW_DIVISOR) for name in names})

    @property
    def in_words(self) -> str:
        """The request in words."""
        shape = f"{self.prompt_tokens} tokens read, {self.new_tokens} written, batch of {self.batch}"
        return f"{shape}; scarce is {self.limit}"


PROFILES = {
    profile.name: profile
    for profile in (
        RequestProfile("prefill_heavy", 512, 8, 1, "time"),
        RequestProfile("decode_heavy", 64, 128, 1, "time"),
        RequestProfile("memory_limited", 256, 32, 8, "memory"),
    )
}


@dataclass(frozen=True)
class RequestCosts:
    """Tables of time and memory under one profile, and the whole model as a choice."""

    profile: RequestProfile
    time: CostTable
    memory: CostTable
    whole: Choice

    @property
    def scarce(self) -> CostTable:
        """The table of the profile's scarce resource, the cost axis of fronts."""
        return self.time if self.profile.limit == "time" else self.memory

    def share(self, choice: Choice, table: CostTable | None = None) -> float:
        """Return the cost of a choice as a share of the whole model's, by default of the scarce resource."""
        table = table or self.scarce
        return table.of(choice) / table.of(self.whole)

    def reach(self, table: CostTable) -> float:
        """Return the cost of the cheapest choice as a share of the whole model's."""
        cheapest = {slot: min(options, key=lambda name: options[name]) for slot, options in table.values.items()}
        return self.share(cheapest, table)

    def relative(self, table: CostTable, share: float) -> float:
        """Return a budget share that some choices meet: `share`, but at least ROOM of the way from the cheapest choice
        to the whole model.
        """
        reach = self.reach(table)
        return max(share, reach + ROOM * (1 - reach))

    def budgets(self, time_share: float = 1.0, memory_share: float = 1.0) -> list[Budget]:
        """Return the budgets for shares of the whole model's time and memory."""
        shares = ((self.time, time_share), (self.memory, memory_share))
        return [Budget(table, share * table.of(self.whole)) for table, share in shares]


def time_table(times: BlockTimes, profile: RequestProfile) -> CostTable:
    """Return the seconds of one request: one prefill, which gives the first new token, and a step per further token."""
    steps = profile.new_tokens - 1
    values = {
        slot: {name: seconds + steps * times.decode[slot][name] for name, seconds in options.items()}
        for slot, options in times.prefill.items()
    }
    return CostTable("time", values, times.prefill_rest + steps * times.decode_rest, "s")


def memory_table(model: nn.Module, library: Library, profile: RequestProfile) -> CostTable:
    """Return the bytes of weights and cache while a request is answered."""
    element = next(model.parameters()).element_size()
    context = profile.prompt_tokens + profile.new_tokens
    values: dict[str, dict[str, float]] = {}
    for slot, options in library.modules.items():
        values[slot] = {}
        for name, module in options.items():
            cached = 0.0
            if slot.endswith(".attention"):
                attention = view_attention(module)
                cached = attention.cache_elements_per_token * attention.cached_tokens(context)
            weights = sum(cost_model.tensor_bytes(tensor) for tensor in [*module.parameters(), *module.buffers()])
            values[slot][name] = float(weights + profile.batch * cached * element)
    whole = sum(options[WHOLE] for options in values.values())
    cache = profile.batch * cost_model.kv_cache_bytes(model, context)
    return CostTable("memory", values, cost_model.weights_bytes(model) + cache - whole, "bytes")


def measure(
    model: nn.Module,
    library: Library,
    profile: RequestProfile,
    prompt_BP: torch.Tensor,
    *,
    rounds: int = 7,
    seed: int = 0,
) -> dict:
    """Return the seconds of every replacement under this profile: the fields of `BlockTimes` as plain JSON."""
    prompt_BP = prompt_BP[:, : profile.prompt_tokens].repeat(profile.batch, 1)
    modules = {slot: dict(options) for slot, options in library.modules.items()}
    return asdict(subblock_costs.measure(model, modules, locate, prompt_BP, rounds=rounds, seed=seed))


def tables(model: nn.Module, library: Library, profile: RequestProfile, times: Mapping) -> RequestCosts:
    """Return the costs under a profile; `times` is the result of `measure`."""
    both = time_table(BlockTimes(**times), profile), memory_table(model, library, profile)
    return RequestCosts(profile, *both, library.whole)

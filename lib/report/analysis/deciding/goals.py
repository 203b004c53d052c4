"""The goals that a user may have: the metrics that serve each, and an optional limit in bytes. Knows no record."""

import re
from dataclasses import dataclass

from lib.errors import UserError, suggest

# Goal → the metrics that serve it, the most important first. A decision rests on the first one that is judged.
GOALS: dict[str, tuple[str, ...]] = {
    "latency": ("decode_tokens_per_second", "time_per_output_token_ms", "prefill_tokens_per_second",
                "time_to_first_token_ms", "generate_tokens_per_second"),
    "throughput": ("goodput_requests_per_second", "batch_decode_tokens_per_second", "requests_per_second",
                   "generate_tokens_per_second"),
    "memory": ("peak_tensor_bytes", "peak_memory_bytes", "kv_cache_peak_bytes", "kv_cache_bytes_per_token",
               "weights_bytes"),
    "energy": ("energy_joules_per_token", "cpu_seconds_per_token"),
    "size": ("checkpoint_bytes", "parameters", "weights_bytes"),
}  # fmt: skip
# Goals that may have a limit, and the metrics that it applies to.
LIMITED = {"memory": ("peak_memory_bytes",), "size": ("checkpoint_bytes", "weights_bytes")}
UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**n for n, p in enumerate(("k", "M", "G", "T"), 1)}
UNITS |= {f"{p}iB": 1024**n for n, p in enumerate(("K", "M", "G", "T"), 1)}
LIMIT = re.compile(r"(?P<name>[a-z]+)(?:<=(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*))?")


@dataclass(frozen=True)
class Goal:
    """What the user wants to improve, and the most bytes allowed (None: no limit), as `written` by the user."""

    name: str
    limit_bytes: float | None = None
    written: str = ""

    def __str__(self) -> str:
        if self.limit_bytes is None:
            return self.name
        return self.written or f"{self.name}<={self.limit_bytes:.0f}B"


def goal(text: str) -> Goal:
    """Return the goal that `text` names: `latency`, or `memory<=8GiB`. Raises UserError for anything else."""
    match = LIMIT.fullmatch(text.replace(" ", ""))
    name = match["name"] if match else re.split(r"[<=>]", text)[0]
    if name not in GOALS:
        raise UserError(f"--goal {text}: expected one of {', '.join(GOALS)}.{suggest(name, GOALS)}")
    if match is None:
        limit = f" or, with a limit, such as {name}<=8GiB" if name in LIMITED else ", which has no limit"
        raise UserError(f"--goal {text}: expected {name}{limit}")
    if match["number"] is None:
        return Goal(name)
    if name not in LIMITED:
        raise UserError(f"--goal {text}: only {' and '.join(LIMITED)} take a limit, such as memory<=8GiB")
    if match["unit"] not in UNITS:
        raise UserError(
            f'--goal {text}: unknown unit "{match["unit"]}"; expected one of {", ".join(filter(None, UNITS))}'
        )
    return Goal(name, float(match["number"]) * UNITS[match["unit"]], f"{name}<={match['number']}{match['unit']}")

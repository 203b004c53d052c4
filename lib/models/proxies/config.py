"""The training settings of a proxy model: the keys of `proxy.training` in a parameter file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lib.errors import suggest

AT_LEAST_ONE = ("steps", "text_every", "warmup_steps", "threads")
# Former key of `proxy.training`, still accepted → current key.
RENAMED = {
    "tokens": "text_tokens",
    "questions": "prompts",
    "warm_up": "warmup_steps",
    "guide_weight": "attention_weight",
    "joined": "joined_share",
    "advised": "teacher_share",
    "replaced": "replaced_share",
    "average": "average_decay",
}


@dataclass(frozen=True)
class TrainingConfig:
    """Training settings. After the warm-up, learning rates are constant up to the share `decay_from` of the steps, then
    fall linearly to 0.
    """

    steps: int
    seed: int = 0
    start_from: str = ""  # the proxy model whose weights are copied; none by default
    text_tokens: int = 2048  # of running text per step
    text_every: int = 1  # every how many steps there is running text
    prompts: int = 8  # per step
    muon_rate: float = 0.015
    adam_rate: float = 0.005
    weight_decay: float = 0.3
    warmup_steps: int = 20
    decay_from: float = 0.35
    answer_weight: float = 0.5
    repeat_weight: float = 1.0
    attention_weight: float = 2.0
    balance_weight: float = 0.02
    balance_rate: float = 0.01  # of the router's correction bias, if it has one
    copy_until: float = 0.22  # share of the steps that train only copying
    row_lengths: tuple[tuple[float, int], ...] = ((0.5, 256), (0.65, 512), (0.8, 1024), (1.0, 2048))
    joined_share: float = 0.0  # share of the prompts that are about two joined excerpts
    teacher_share: float = 0.0  # share of the prompts that are about unlabelled text, answered by the teacher
    replaced_share: float = 0.0  # largest share of a prompt's tokens that is replaced by random tokens
    dropout: float = 0.0  # of the outputs of attention and feed-forward parts
    average_decay: float = 0.0  # of the moving average of the weights; 0 keeps the last weights
    threads: int = 1
    refine: dict[str, Any] | None = None  # the keys in which the second phase differs from the first

    def rate(self, step: int) -> float:
        """Return the factor on the learning rates at `step`."""
        progress = step / self.steps
        decay = 1.0 if progress < self.decay_from else (1 - progress) / (1 - self.decay_from)
        return min(1.0, (step + 1) / self.warmup_steps) * decay

    def second_phase(self) -> "TrainingConfig":
        """Return the configuration of the second phase. Raises TypeError for an unknown key."""
        changes = present_keys(self.refine or {})
        return replace(self, **{"refine": None, "start_from": "", "copy_until": 0.0} | changes)


def present_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with former keys replaced by the current keys."""
    return {RENAMED.get(key, key): value for key, value in section.items()}


def fault(section: Mapping[str, Any], where: str = "section proxy.training") -> str | None:
    """Return None, or a message on a key of `proxy.training` that is unknown, missing or of a wrong type.

    The keys of the second phase are checked too, since it begins minutes or hours after the first.
    """
    second = where.endswith(".refine")
    kinds = {field.name: field.type for field in fields(TrainingConfig) if not (second and field.name == "refine")}
    for key, value in present_keys(section).items():
        if key not in kinds:
            return f'{where}: unknown key "{key}"; expected one of {", ".join(kinds)}.{suggest(str(key), kinds)}'
        if expected := _expected(key, kinds[key], value):
            return f'{where}: key "{key}": expected {expected}, got {value!r}'
    if not second and "steps" not in section:
        return f'{where}: missing key "steps"'
    return fault(section["refine"], f"{where}.refine") if section.get("refine") else None


def _expected(key: str, kind: Any, value: Any) -> str | None:
    """Return None if the value of a key is valid, else a phrase for what is expected."""
    if kind is int:
        least = 1 if key in AT_LEAST_ONE else 0
        return None if type(value) is int and value >= least else f"a whole number of at least {least}"
    if kind is float:
        return None if type(value) in (int, float) else "a number"
    if kind is str:
        return None if isinstance(value, str) else "the name of a model"
    if key == "refine":
        return None if value is None or isinstance(value, Mapping) else "a section of keys"
    pairs = isinstance(value, (list, tuple)) and value and all(isinstance(pair, (list, tuple)) for pair in value)
    right = pairs and all(len(pair) == 2 and all(type(n) in (int, float) for n in pair) for pair in value)
    return None if right else "a list of pairs: a share of the steps, and a number of tokens"

"""What a request may take: objectives by a rule that is fixed before anything is served, and whether they can be met.

Both objectives are multiples of what one request takes alone. Knows nothing of servers, traces and policies.
"""

from dataclasses import dataclass

from lib.errors import UserError
from lib.measure.serving.step_times import StepTimes
from lib.measure.serving.traffic import Lengths

FACTORS = (1.0, 100.0)  # of the objectives over the times of a request alone


@dataclass(frozen=True)
class Objectives:
    """Most seconds to the first token (queueing included), and most seconds per output token behind it (mean)."""

    first_token_seconds: float
    token_seconds: float

    def __post_init__(self) -> None:
        for name in ("first_token_seconds", "token_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"objectives: {name} {getattr(self, name)}; expected more than 0 s")


@dataclass(frozen=True)
class Single:
    """One request alone: seconds of its prefill and of a decode step, and its prompt's length."""

    prefill_seconds: float
    step_seconds: float
    prompt_tokens: int

    @classmethod
    def of(cls, times: StepTimes, lengths: Lengths) -> "Single":
        """Return the measured times of a request of these mean lengths."""
        step = times.decode(1, lengths.prompt_tokens + lengths.new_tokens / 2)
        return cls(times.prefill(1, lengths.prompt_tokens), step, lengths.prompt_tokens)


def objectives(single: Single, first_token_factor: float, token_factor: float) -> Objectives:
    """Return the objectives as multiples of what a request takes alone.

    Raises UserError where a factor is below 1: not even an idle server meets that.
    """
    for name, value in (("first_token_factor", first_token_factor), ("token_factor", token_factor)):
        if not FACTORS[0] <= value <= FACTORS[1]:
            raise UserError(f"objectives: {name} {value}; expected a value in [{FACTORS[0]:g}, {FACTORS[1]:g}]")
    return Objectives(single.prefill_seconds * first_token_factor, single.step_seconds * token_factor)


def unattainable(times: StepTimes, wanted: Objectives, lengths: Lengths) -> str | None:
    """Return why no batch size can meet the objectives for requests of these lengths, or None where size 1 does."""
    alone = Single.of(times, lengths)
    pairs = (
        ("a prompt", alone.prefill_seconds, wanted.first_token_seconds),
        ("a token", alone.step_seconds, wanted.token_seconds),
    )
    for what, seconds, most in pairs:
        if seconds > most:
            return f"no size can meet the objective: {what} alone takes {1000 * seconds:.3g} ms of {1000 * most:.3g} ms"
    return None

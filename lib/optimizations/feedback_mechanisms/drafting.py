"""Speculative decoding of one stream under several laws for the draft's length: tokens, times, equality with greedy.

The laws take turns, answer by answer, so that a slow spell of the machine falls on all of them. A law is called with
the rounds of the present answer and says how many tokens to draft; this module knows none.

Shapes: T prompt tokens, N new tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_stats
from lib.measure.metrics.measurement import Measurement
from lib.models.tasks import retrieval, tasks
from lib.optimizations.feedback_mechanisms import speculative
from lib.optimizations.feedback_mechanisms.speculative import Round

Law = Callable[[Sequence[Round]], int]


@dataclass
class Drafted:
    """What one law did: per answer its ids [N] and its rounds."""

    output: list[torch.Tensor] = field(default_factory=list)
    rounds: list[list[Round]] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Return tokens per second of each answer, the first token (which belongs to the prompt) left out."""
        return [(len(ids) - 1) / sum(r.seconds for r in rounds) for ids, rounds in zip(self.output, self.rounds)]


class Answer:
    """One prompt answered once per call: the workload that energy is read of. `tokens` are those of one call."""

    def __init__(self, model: nn.Module, draft: nn.Module, prompt_T: torch.Tensor, new_tokens: int, law: Law):
        self.model, self.draft, self.prompt_T, self.tokens, self.law = model, draft, prompt_T, new_tokens, law

    def __call__(self) -> None:
        speculative.generate(self.model, self.draft, self.prompt_T, self.tokens, self.law)


def two_domains(loaded: object, count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Return `count` prompts [T]: the first half held-out text of the model's own domain, the rest random signs."""
    own = list(tasks.text_windows(loaded, "final", count - count // 2, length, seed))
    other = retrieval.random_ids(loaded, (count - len(own), length), torch.Generator().manual_seed(seed))
    return own + list(other.to(own[0].device))


def compare(
    model: nn.Module, draft: nn.Module, prompts: Sequence[torch.Tensor], laws: dict[str, Law], new_tokens: int
) -> dict[str, Drafted]:
    """Answer every prompt under every law, in an order that moves on by one with every prompt."""
    found = {name: Drafted() for name in laws}
    names = list(laws)
    speculative.generate(model, draft, prompts[0], 4, lambda rounds: 1)
    for index, prompt_T in enumerate(prompts):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            ids_N, rounds = speculative.generate(model, draft, prompt_T, new_tokens, laws[name])
            found[name].output.append(ids_N.cpu())
            found[name].rounds.append(rounds)
    return found


def table(drafted: dict[str, Drafted], plain: str, change: int) -> list[dict[str, object]]:
    """Return a row per law: tokens per second before and after answer `change`, acceptance, equality with `plain`."""
    lines = []
    for name, one in drafted.items():
        rates = one.rates()
        rounds = [r for answer in one.rounds for r in answer]
        tried = sum(r.drafted for r in rounds)
        equal = [float((a == b).float().mean()) for a, b in zip(one.output, drafted[plain].output)]
        lines.append(
            {
                "law": name,
                "tokens/s, own domain": float(np.median(rates[:change])),
                "tokens/s, random signs": float(np.median(rates[change:])),
                "drafted per round": tried / len(rounds),
                "acceptance": sum(r.accepted for r in rounds) / tried if tried else None,
                "same tokens": float(np.mean(equal)),
                "same answers": sum(value == 1 for value in equal),
                "answers": len(equal),
            }
        )
    return lines


def course(one: Drafted) -> pd.DataFrame:
    """Return a row per round: `seconds` of drafting and checking so far, `drafted`, running `acceptance`, `answer`."""
    lines, now = [], 0.0
    for index, rounds in enumerate(one.rounds):
        for r in rounds:
            lines.append((now, r.drafted, r.accepted, index))
            now += r.seconds
    frame = pd.DataFrame(lines, columns=["seconds", "drafted", "accepted", "answer"])
    sums = frame[["accepted", "drafted"]].ewm(span=16).mean()
    return frame.assign(acceptance=sums.accepted / sums.drafted.clip(lower=1e-9))


def measurements(drafted: dict[str, Drafted], plain: str, law: str, again: str) -> list[Measurement]:
    """Return generation speed of plain against adaptive speculative decoding, answer by answer, and the acceptance.

    `again` is plain decoding a second time: the noise floor.
    """
    rates = [drafted[name].rates() for name in (plain, law, again)]
    floor = paired_stats.noise_floor(paired_stats.differences(rates[0], rates[2]))
    source = f"{len(rates[0])} answers under each law in turn, perf_counter"
    found = [
        measurement.from_samples(
            "generate_tokens_per_second", "generate, speculative", *rates[:2], source=source, floor=floor
        )
    ]
    rounds = [r for answer in drafted[law].rounds for r in answer if r.drafted]
    tried = sum(r.drafted for r in rounds)
    equal = [bool((a == b).all()) for a, b in zip(drafted[law].output, drafted[plain].output)]
    workload = "generate, speculative"
    found.append(measurement.informative("same_answers", workload, 1.0, float(np.mean(equal)), source, n=len(equal)))
    if tried:
        share = sum(r.accepted for r in rounds) / tried
        reason = "plain decoding drafts nothing"
        found.append(measurement.informative("draft_acceptance", workload, None, share, source, reason=reason))
    return found

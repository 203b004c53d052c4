"""Speculative decoding of one stream under several laws for the draft length: tokens, times, equality with greedy.

The laws take turns answer by answer, so that a slow spell of the machine affects all of them. A law is called with the
rounds of the present answer and returns the number of tokens to draft.

Shapes: T prompt tokens, N new tokens.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import measurement, paired_samples, paired_stats
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.measure.timing import disturbance
from lib.measure.timing.interleaved import balanced_orders
from lib.models.loading import Loaded
from lib.models.tasks import retrieval, tasks
from lib.optimizations.common.evidence.claims import ratio_in_words
from lib.optimizations.feedback_mechanisms.speculation import speculative
from lib.optimizations.feedback_mechanisms.speculation.draft_length import Bandit, DraftLength, Law, fixed
from lib.optimizations.feedback_mechanisms.speculation.speculative import Drafter, Ngram, Round

# Half of the answers are in the model's own domain; an interval needs at least six there.
ANSWERS = {"preview": 2, "quick": 12, "standard": 24, "thorough": 64}
NEW_TOKENS = {"preview": 8, "quick": 16, "standard": 24, "thorough": 24}
PROMPT_TOKENS = 48
STATIC = {"plain": 0, "always 1": 1, "always 2": 2, "always 4": 4}  # tokens drafted at a time
OWN, CHARACTERS = "own domain", "random characters"  # the domains, in the order of their answers
PLANTED = "an artificial domain: it shows whether the law adapts, but is never served"
PLAIN, AGAIN, ADAPTIVE, NGRAM = "plain", "plain again", "measured acceptance", "n-gram, measured acceptance"


@dataclass
class Drafted:
    """The results of one law: per answer its ids [N], its rounds, and what disturbed its turns (None: nothing)."""

    output: list[torch.Tensor] = field(default_factory=list)
    rounds: list[list[Round]] = field(default_factory=list)
    disturbed: list[str | None] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Return the tokens per second of each answer, without the first token, which belongs to the prompt."""
        return [(len(ids) - 1) / sum(r.seconds for r in rounds) for ids, rounds in zip(self.output, self.rounds)]


def two_domains(loaded: Loaded, count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Return `count` prompts [T]: half held-out text of the model's own domain, then random characters."""
    own = list(tasks.text_windows(loaded, "final", count - count // 2, length, seed))
    characters = retrieval.random_ids(loaded, (count - len(own), length), torch.Generator().manual_seed(seed))
    return own + list(characters.to(own[0].device))


def compare(
    model: nn.Module,
    prompts: Sequence[torch.Tensor],
    laws: Mapping[str, tuple[nn.Module | Drafter, Law]],
    new_tokens: int,
) -> dict[str, Drafted]:
    """Answer every prompt under every law with its drafter, and return the results by law.

    The order is random, with each of any two laws first equally often. If the machine is disturbed, the prompt is
    answered again by laws that have learned nothing from it; there are as many repeats in total as prompts.
    """
    drafted, repeats = {name: Drafted() for name in laws}, len(prompts)
    learned = {name: law for name, (_, law) in laws.items()}
    for drafter, _ in laws.values():
        speculative.generate(model, drafter, prompts[0], 4, lambda rounds: 1)
    for prompt_T, order in zip(prompts, balanced_orders(list(laws), len(prompts))):
        while True:
            following = copy.deepcopy(learned)
            close = disturbance.watch()
            answers = {
                name: speculative.generate(model, laws[name][0], prompt_T, new_tokens, following[name])
                for name in order
            }
            disturbed = close()
            if disturbed is None or not repeats:
                break
            repeats -= 1
        learned = following
        for name, (ids_N, rounds) in answers.items():
            drafted[name].output.append(ids_N.cpu())
            drafted[name].rounds.append(rounds)
            drafted[name].disturbed.append(disturbed)
    return drafted


def table(drafted: dict[str, Drafted], plain: str, change: int) -> list[dict[str, object]]:
    """Return a row per law: tokens per second before and after answer `change`, acceptance, and equality with `plain`.

    Equal answers are counted only among those in which tokens were drafted: the others are plain decoding too.
    """
    lines = []
    for name, answers in drafted.items():
        rates = answers.rates()
        rounds = [r for answer in answers.rounds for r in answer]
        tried = sum(r.drafted for r in rounds)
        equal = [float((a == b).float().mean()) for a, b in zip(answers.output, drafted[plain].output)]
        speculated = [any(r.drafted for r in answer) for answer in answers.rounds]
        lines.append(
            {
                "law": name,
                f"tokens/s, {OWN}": float(np.median(rates[:change])),
                f"tokens/s, {CHARACTERS}": float(np.median(rates[change:])),
                "drafted per round": tried / len(rounds),
                "acceptance": sum(r.accepted for r in rounds) / tried if tried else None,
                "same tokens": float(np.mean(equal)),
                "drafted answers": sum(speculated),
                "same answers": sum(share == 1 and drafts for share, drafts in zip(equal, speculated)),
            }
        )
    return lines


def course(answers: Drafted) -> pd.DataFrame:
    """Return a row per round: `seconds` of drafting and checking so far, `drafted`, running `acceptance`, `answer`."""
    lines, now = [], 0.0
    for index, rounds in enumerate(answers.rounds):
        for r in rounds:
            lines.append((now, r.drafted, r.accepted, index))
            now += r.seconds
    frame = pd.DataFrame(lines, columns=["seconds", "drafted", "accepted", "answer"])
    sums = frame[["accepted", "drafted"]].ewm(span=16).mean()
    return frame.assign(acceptance=sums.accepted / sums.drafted.clip(lower=1e-9))


def measurements(
    drafted: dict[str, Drafted], plain: str, law: str, again: str, workload: str, chosen: slice = slice(None)
) -> list[Measurement]:
    """Return the speed of plain against adaptive speculative decoding, the share of equal answers, and the acceptance.

    Speeds are paired answer by answer among those `chosen`: answers of different domains are not samples of one
    quantity. `again` is plain decoding a second time, for the noise floor.
    """
    rates = [drafted[name].rates()[chosen] for name in (plain, law, again)]
    floor = paired_stats.noise_floor(paired_stats.differences(rates[0], rates[2]))
    source = f"{len(rates[0])} answers under each law in turn, perf_counter"
    disturbed = [reason for reason in drafted[law].disturbed[chosen] if reason]
    options: dict[str, Any] = {"source": source, "floor": floor, "disturbed": disturbed}
    results = [paired_samples.from_samples("generate_tokens_per_second", workload, *rates[:2], **options)]
    rounds = [r for answer in drafted[law].rounds[chosen] for r in answer if r.drafted]
    tried = sum(r.drafted for r in rounds)
    outputs = drafted[law].output[chosen], drafted[plain].output[chosen]
    equal = [bool((a == b).all()) for a, b in zip(*outputs)]
    results.append(measurement.informative("same_answers", workload, 1.0, float(np.mean(equal)), source, n=len(equal)))
    if tried:
        share = sum(r.accepted for r in rounds) / tried
        reason = "plain decoding drafts nothing"
        results.append(measurement.informative("draft_acceptance", workload, None, share, source, reason=reason))
    return results


def repeated(prompt_T: torch.Tensor, answer_N: torch.Tensor) -> float:
    """Return the share of an answer's tokens whose pair with the previous token occurs earlier in prompt or answer."""
    ids = [*prompt_T.tolist(), *answer_N.tolist()]
    pairs = list(itertools.pairwise(ids))
    first = len(ids) - len(answer_N) - 1  # the pair that ends with the answer's first token
    return float(np.mean([pairs[at] in pairs[:at] for at in range(first, len(pairs))]))


@dataclass(frozen=True)
class DraftingStudy:
    """Every law on prompts of two domains: `prompts` [T], the results of each law, and a row per law (`laws`)."""

    prompts: list[torch.Tensor]
    drafted: dict[str, Drafted]
    laws: pd.DataFrame

    @property
    def change(self) -> int:
        """The index of the first answer of the other domain."""
        return len(self.prompts) // 2

    @property
    def course(self) -> pd.DataFrame:
        """The rounds of the law that uses measured acceptance."""
        return course(self.drafted[ADAPTIVE])

    @property
    def another_domain(self) -> list[torch.Tensor]:
        """The prompts of the other domain."""
        return self.prompts[self.change :]

    @property
    def panels(self) -> list[tuple[pd.DataFrame, str, str]]:
        """(frame, label, kind) of each panel of the figure: tokens drafted per round, and their acceptance."""
        rounds = self.course
        drafted, acceptance = rounds.assign(value=rounds.drafted), rounds.assign(value=rounds.acceptance)
        return [(drafted, "tokens drafted", "steps"), (acceptance, "acceptance", "line")]

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The second at which each domain begins in `course`."""
        rounds = self.course
        return [(0.0, OWN), (float(rounds.seconds[rounds.answer >= self.change].min()), CHARACTERS)]

    @property
    def measurements(self) -> list[Measurement]:
        """Speed of plain against adaptive drafting, equality and acceptance, for a draft model and for n-grams, on each
        domain. Speed on random characters has no verdict: nobody is served such text.
        """
        return [
            measurement.unjudged(item, PLANTED) if domain == CHARACTERS and item.margin is not None else item
            for law, drafter in ((ADAPTIVE, "speculative"), (NGRAM, "n-gram"))
            for domain, chosen in ((OWN, slice(0, self.change)), (CHARACTERS, slice(self.change, None)))
            for item in measurements(self.drafted, PLAIN, law, AGAIN, f"generate, {drafter}, {domain}", chosen)
        ]

    @property
    def caption(self) -> str:
        """One line on how much answers repeat the preceding text in each domain: repetition is easy to draft."""
        shares = [repeated(*pair) for pair in zip(self.prompts, self.drafted[PLAIN].output)]
        own, characters = float(np.mean(shares[: self.change])), float(np.mean(shares[self.change :]))
        own_domain = f"{percent(own)} of an answer's tokens on the model's {OWN}"
        text = f"The laws taking turns; {own_domain}, and {percent(characters)} on "
        return f"{text}{CHARACTERS}, form with the previous token a pair that occurs earlier in the text"

    def curve(self) -> list[dict[str, object]]:
        """Return the points of the record's impact curve: speed against plain decoding over tokens drafted."""
        by_law = self.laws.set_index("law")
        return [
            {"arm": column.split(", ")[1], "strength": tokens, "value": by_law[column][law] / by_law[column][PLAIN]}
            for column in (f"tokens/s, {OWN}", f"tokens/s, {CHARACTERS}")
            for law, tokens in STATIC.items()
        ]


def study(loaded: Loaded, draft: nn.Module, effort: str, seed: int) -> DraftingStudy:
    """Answer prompts of two domains under every law, the laws taking turns."""
    count = ANSWERS[effort]
    prompts = two_domains(loaded, count, PROMPT_TOKENS, seed)
    laws: dict[str, tuple[nn.Module | Drafter, Law]] = {PLAIN: (draft, fixed(0)), AGAIN: (draft, fixed(0))}
    laws |= {name: (draft, fixed(tokens)) for name, tokens in STATIC.items() if tokens}
    laws |= {ADAPTIVE: (draft, DraftLength()), "bandit": (draft, Bandit()), NGRAM: (Ngram(), DraftLength())}
    drafted = compare(loaded.model, prompts, laws, NEW_TOKENS[effort])
    return DraftingStudy(prompts, drafted, pd.DataFrame(table(drafted, PLAIN, count // 2)))


def read_course(drafting: DraftingStudy) -> tuple[str, str]:
    """Return two sentences on the figure of `course`."""
    rounds = drafting.course
    early = rounds.answer < drafting.change
    own, characters = rounds.drafted[early].mean(), rounds.drafted[~early].mean()
    rates = {m.workload: m for m in drafting.measurements if m.metric == "generate_tokens_per_second"}
    speeds = [ratio_in_words(rates[f"generate, speculative, {domain}"]) for domain in (OWN, CHARACTERS)]
    first = (
        f"The law drafts {own:.2f} tokens per round on the model's own domain, {characters:.2f} on random characters."
    )
    return first, f"Its speed against plain decoding is {speeds[0]} on the first domain and {speeds[1]} on the second."

"""Two profiles of a model: the admission of a faster one, and a server with both.

Only a model that stays within the margins is admitted as the fast profile: on text used neither for calibration nor for
judging, it must predict text nearly as well as the baseline and choose nearly the same tokens. New requests go to the
profile in charge; rows finish on the profile they started with. Each profile is its own engine
(`lib.measure.serving.engine` or `lib.measure.serving.simulator`) with its own cache; a step of the server is one step
of every profile that has rows, one after another. A share of the fast profile's answers is reread by the full one,
which takes the server's time like any other work; if these show that it is broken, the full one replaces it.
Independent of policies: a function returns the profile in charge.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from lib.errors import UserError
from lib.measure.metrics.catalogue import PERPLEXITY_MARGIN, SCORE_MARGIN
from lib.measure.metrics.digits import percent, signed
from lib.measure.quality import evaluate
from lib.measure.serving.protocol import Engine
from lib.measure.serving.traffic import ServingRequest
from lib.models.loading import Loaded
from lib.models.tasks import tasks
from lib.optimizations.feedback_mechanisms import shadow
from lib.optimizations.feedback_mechanisms.guarding.net_saving import NetSaving
from lib.optimizations.feedback_mechanisms.guarding.shadow_reads import ShadowReads
from lib.optimizations.feedback_mechanisms.method import FAST, FULL

ROOM = 0.5  # share of the guard's bound that a profile may use up when it is chosen
WINDOWS, WINDOW_TOKENS = 16, 128  # windows of text on which candidates are judged, and tokens of each
ITEMS = 32  # classified items per task
PROMPT_TOKENS, NEW_TOKENS = 48, 16
NO_FAST = "no fast profile was admitted"


# --- admission of a profile ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A faster profile, its differences on text of the split `search`, and why it is refused (None: it is admitted).

    perplexity: its own ÷ the full profile's. disagreement: share of its tokens that the full profile would not have
    chosen. flips: share of classified items that it answers differently. losses: the disagreement of each answer. net:
    its net saving of the server's time. Disagreement and flips are None if perplexity alone refuses it, `net` if it was
    not timed.
    """

    name: str
    model: nn.Module
    disagreement: float | None
    perplexity: float
    flips: float | None
    refused: str | None
    losses: tuple[float, ...] = ()
    net: NetSaving | None = None


def judge(
    loaded: Loaded,
    name: str,
    model: nn.Module,
    bound: float,
    prompts: int,
    seed: int = 0,
    *,
    windows: int = WINDOWS,
    items: int = ITEMS,
) -> Candidate:
    """Return `model` as a candidate with its measured differences.

    It is admitted if perplexity and classified items stay within their margins and its disagreement leaves the guard
    half of its absolute bound. If perplexity alone refuses it, nothing else is measured.
    """
    text_NT = tasks.text_windows(loaded, "search", windows, WINDOW_TOKENS, seed)
    losses = [float(np.mean(evaluate.read(arm, text_NT).loss_N)) for arm in (loaded.model, model)]
    perplexity = float(np.exp(losses[1] - losses[0]))
    if not perplexity <= 1 + PERPLEXITY_MARGIN:  # also refuses NaN
        reason = f"perplexity {signed(100 * (perplexity - 1))} %, margin {percent(PERPLEXITY_MARGIN)}"
        return Candidate(name, model, None, perplexity, None, reason)
    answered = losses_of(loaded, model, prompts, seed)
    disagreement = float(np.mean(answered))
    arms, flips = (loaded, replace(loaded, model=model)), 0.0
    for full, fast in evaluate.classified_by_all(arms, loaded.tasks, "search", items, seed):
        flips = max(flips, float(np.mean(full.chosen_N != fast.chosen_N)))
    reasons = []
    if disagreement > ROOM * bound:
        reasons.append(f"disagreement {disagreement:.3f}, at most {ROOM * bound:.3f}")
    if flips > SCORE_MARGIN:
        reasons.append(f"{percent(flips, 1)} of the items flip, margin {percent(SCORE_MARGIN)}")
    return Candidate(name, model, disagreement, perplexity, flips, "; ".join(reasons) or None, tuple(answered))


def losses_of(loaded: Loaded, model: nn.Module, prompts: int, seed: int = 0) -> list[float]:
    """Return the disagreement of each of a profile's answers to a number of `prompts` of the split `search`."""
    prompts_T = list(tasks.text_windows(loaded, "search", prompts, PROMPT_TOKENS, seed + 1))
    return shadow.disagreements(loaded.model, prompts_T, shadow.answers(model, prompts_T, NEW_TOKENS))


def first_admitted(
    loaded: Loaded,
    candidates: Iterable[tuple[str, nn.Module]],
    bound: float,
    prompts: int,
    seed: int = 0,
    saving: Callable[[nn.Module], NetSaving | None] | None = None,
    worth: Callable[[nn.Module], str | None] | None = None,
    **amounts: int,
) -> list[Candidate]:
    """Return the candidates considered, the admitted one last; if none is admitted, the full model itself comes last.

    `candidates` come in order, fewest parameters first. Those outside the margins are not timed. `saving` times one and
    returns its net saving; if that refuses it, the next is tried, since fewer parameters need not be faster. `worth`
    returns why a faster one is of no use to the loop, if so. `amounts` of text and items as in `judge`.
    """
    seen = []
    for name, model in candidates:
        candidate = judge(loaded, name, model, bound, prompts, seed, **amounts)
        if candidate.refused is None and saving and (net := saving(model)):
            candidate = replace(candidate, net=net, refused=net.refused)
            if candidate.refused is None and worth:
                candidate = replace(candidate, refused=worth(model))
        seen.append(candidate)
        if candidate.refused is None:
            return seen
    return [*seen, itself(loaded)]


def itself(loaded: Loaded) -> Candidate:
    """Return the full profile in place of a fast one: there is nothing to switch to."""
    return Candidate("the full profile itself", loaded.model, 0.0, 1.0, 0.0, None)


# --- a server with both profiles -------------------------------------------------------------------------------------


class Profiles:
    """Serves with `engines`; `current()` is the index of the engine for the next prompts.

    With one engine there is nothing to choose. `owner`: id of every request admitted so far → index of its engine.
    `shadow`: rereads answers of the fast profile and may roll it back (None: no guard).
    """

    def __init__(self, engines: Sequence[Engine], current: Callable[[], int], shadow: ShadowReads | None = None):
        self.engines, self.current, self.shadow = list(engines), current, shadow
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self.owner: dict[int, int] = {}
        self.requests: dict[int, ServingRequest] = {}
        self.running: list[set[int]] = [set() for _ in self.engines]
        for engine in self.engines:
            engine.clear()

    @property
    def bytes(self) -> float:
        """The bytes in all caches now."""
        return sum(engine.bytes for engine in self.engines)

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        """Read the prompts with the profile in charge, or with the full one if the guard has rolled back the fast one;
        return the seconds it took.
        """
        index = min(self.current(), len(self.engines) - 1)
        if index == FAST and self.shadow and not self.shadow.allows():
            index = FULL
        for request in requests:
            self.owner[request.id], self.requests[request.id] = index, request
            self.running[index].add(request.id)
        return self.engines[index].prefill(requests)

    def decode(self) -> float:
        """Produce one token of every row of every profile; return the seconds it took."""
        return sum(engine.decode() for engine, ids in zip(self.engines, self.running) if ids)

    def shared(self, parts: Sequence[tuple[ServingRequest, int]]) -> float:
        """Raise UserError: profiles read prompts at once and do not support a policy with chunks."""
        raise UserError("feedback: profiles read prompts at once; expected a policy that asks for no chunks")

    def leave(self, ids: Sequence[int]) -> float:
        """Take rows out of their batches and register the fast profile's answers; return the seconds it took."""
        seconds = 0.0
        for index, (engine, running) in enumerate(zip(self.engines, self.running)):
            if gone := [name for name in ids if name in running]:
                running.difference_update(gone)
                seconds += engine.leave(gone)
                if self.shadow and index == FAST:
                    for name in gone:
                        self.shadow.finished(self.requests[name])
        return seconds

    def aside(self, waiting: int, running: int) -> float:
        """Reread answers if that is due; return the seconds it took (`server.serve`)."""
        return self.shadow.work(waiting, running) if self.shadow else 0.0

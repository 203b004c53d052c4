"""Two profiles of a model: which faster one is admitted, and a server that has both.

Only a model that stays within the margins is admitted as the fast profile: on text used neither for calibration nor for
judging, it must read nearly as well as the baseline, and choose nearly the same tokens. New requests go to the profile
in charge; rows finish on the one they began with. Each profile is an engine of its own (`lib.measure.serving.engine` or
`lib.measure.serving.simulator`) with its own cache; a step of the server is one step of every profile that has rows,
one after another. A share of the fast profile's answers is read again by the full one, which takes the server's time
like any other work; where they show that it is broken, the full one takes its place. Knows no policy: a function
returns the profile in charge.
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
WINDOWS, WINDOW_TOKENS = 16, 128  # of text on which candidates are read
ITEMS = 32  # classified per task
PROMPT_TOKENS, NEW_TOKENS = 48, 16
NO_FAST = "no fast profile was admitted"


# --- which profile is admitted ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A faster profile, what it differs by on text of the split `search`, and why it is not admitted (None: it is).

    perplexity: its own ÷ the full one's; disagreement: share of its tokens that the full profile would not have chosen;
    flips: share of classified items that it answers otherwise; losses: the disagreement of each answer; net: how much
    of the server's time it saves. Disagreement and flips are None where perplexity alone refuses it, `net` where it was
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
    """Return a candidate with its figures: admitted where perplexity and classified items keep their margins, and its
    disagreement leaves the guard half of its absolute bound. Where perplexity alone refuses it nothing else is read.
    """
    text_NT = tasks.text_windows(loaded, "search", windows, WINDOW_TOKENS, seed)
    read = [float(np.mean(evaluate.read(each, text_NT).loss_N)) for each in (loaded.model, model)]
    perplexity = float(np.exp(read[1] - read[0]))
    if not perplexity <= 1 + PERPLEXITY_MARGIN:  # which is no number where the model gives none
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
    """Return the disagreement of each of a profile's answers to so many prompts of the split `search`."""
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
    """Return the candidates that were considered, the admitted one last; they come in order, the one with the fewest
    parameters first. `saving` times one and says what it saves: where that refuses it, the next one is tried, since
    fewer parameters need not be faster; and so where `worth` says why a faster one is of no use to the loop. None is
    timed that does not keep the margins. `amounts` of text and items as in `judge`.

    Where none is admitted the full model itself comes last: then there is nothing to switch to.
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
    """Return the full profile in the place of a fast one: there is nothing to switch to."""
    return Candidate("the full profile itself", loaded.model, 0.0, 1.0, 0.0, None)


# --- a server with both -----------------------------------------------------------------------------------------------


class Profiles:
    """Serves with `engines`; `current()` is the index of the one that reads the next prompts.

    With one engine there is nothing to choose. `owner` maps the id of every request admitted so far to the index of its
    engine. `shadow`: reads answers of the fast profile again and may take it back (None: nobody watches).
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
        """Bytes that all caches hold now."""
        return sum(engine.bytes for engine in self.engines)

    def prefill(self, requests: Sequence[ServingRequest]) -> float:
        """Let the profile in charge read the prompts, or the full one where the guard has taken the fast one back;
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
        """Prompts are read at once here. Raises UserError for a policy that asks for chunks."""
        raise UserError("feedback: profiles read prompts at once; expected a policy that asks for no chunks")

    def leave(self, ids: Sequence[int]) -> float:
        """Take rows out of their batches, and note what is to be read again; return the seconds it took."""
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
        """Read answers again where that is due; return the seconds it took (`server.serve`)."""
        return self.shadow.work(waiting, running) if self.shadow else 0.0

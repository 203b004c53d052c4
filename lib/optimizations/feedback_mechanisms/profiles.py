"""Two profiles of a model: which faster one is admitted, and a server that has both.

Only a model that stays within the margins is admitted as the fast profile: on text used neither for calibration nor for
judging, it must read nearly as well as the baseline, and choose nearly the same tokens. New requests go to the profile
in charge; rows finish on the one they began with. Each profile is an engine of its own (`lib.measure.serving.engine` or
`lib.measure.serving.simulator`) with its own cache; a step of the server is one step of every profile that has rows,
one after another. A share of the fast profile's answers is read again by the full one, which takes the server's time
like any other work. Knows no policy: a function returns the profile in charge.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from lib.errors import UserError
from lib.measure.metrics.catalogue import PERPLEXITY_MARGIN, SCORE_MARGIN
from lib.measure.quality import evaluate
from lib.measure.serving.protocol import Engine
from lib.measure.serving.traffic import ServingRequest
from lib.models.loading import Loaded
from lib.models.tasks import tasks
from lib.models.tasks.registry import classifies
from lib.optimizations.feedback_mechanisms import shadow
from lib.optimizations.feedback_mechanisms.method import FAST

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
    flips: share of classified items that it answers otherwise. The last two are None where perplexity alone refuses it.
    """

    name: str
    model: nn.Module
    disagreement: float | None
    perplexity: float
    flips: float | None
    refused: str | None


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
    losses = [float(np.mean(evaluate.read(each, text_NT).loss_N)) for each in (loaded.model, model)]
    perplexity = float(np.exp(losses[1] - losses[0]))
    if not perplexity <= 1 + PERPLEXITY_MARGIN:  # which is no number where the model gives none
        reason = f"perplexity {perplexity - 1:+.1%}, margin {PERPLEXITY_MARGIN:.0%}"
        return Candidate(name, model, None, perplexity, None, reason)
    asked = list(tasks.text_windows(loaded, "search", prompts, PROMPT_TOKENS, seed + 1))
    answered = shadow.answers(model, asked, NEW_TOKENS)
    disagreement = float(np.mean(shadow.disagreements(loaded.model, asked, answered)))
    arms, flips = (loaded, replace(loaded, model=model)), 0.0
    for task in filter(classifies, loaded.tasks):
        full, fast = (evaluate.classify(arm, task, "search", items, seed).chosen_N for arm in arms)
        flips = max(flips, float(np.mean(full != fast)))
    reasons = []
    if disagreement > ROOM * bound:
        reasons.append(f"disagreement {disagreement:.3f}, at most {ROOM * bound:.3f}")
    if flips > SCORE_MARGIN:
        reasons.append(f"{flips:.1%} of the items flip, margin {SCORE_MARGIN:.0%}")
    return Candidate(name, model, disagreement, perplexity, flips, "; ".join(reasons) or None)


def first_admitted(
    loaded: Loaded,
    candidates: Iterable[tuple[str, nn.Module]],
    bound: float,
    prompts: int,
    seed: int = 0,
    **amounts: int,
) -> list[Candidate]:
    """Return the candidates that were considered, the admitted one last; they come in order, the fastest first.
    `amounts` of text and items as in `judge`.

    Where none keeps the margins the full model itself comes last, admitted: then there is nothing to switch to.
    """
    seen = []
    for name, model in candidates:
        seen.append(judge(loaded, name, model, bound, prompts, seed, **amounts))
        if seen[-1].refused is None:
            return seen
    return [*seen, itself(loaded)]


def itself(loaded: Loaded) -> Candidate:
    """Return the full profile in the place of a fast one: there is nothing to switch to."""
    return Candidate("the full profile itself", loaded.model, 0.0, 1.0, 0.0, None)


# --- a server with both -----------------------------------------------------------------------------------------------


class ShadowReads:
    """Which answers of the fast profile the full one reads again, and the seconds of each such read.

    `share` of them, drawn by `seed` and the request's id alone; `read(request)` returns the seconds.
    """

    def __init__(self, share: float, read: Callable[[ServingRequest], float], seed: int = 0):
        self.share, self.read, self.seed, self.count, self.seconds = share, read, seed, 0, 0.0

    def __call__(self, request: ServingRequest) -> float:
        """Return the seconds that this answer's reading takes; 0 where it is not read."""
        if random.Random(f"{self.seed} {request.id}").random() >= self.share:
            return 0.0
        seconds = self.read(request)
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        return seconds


class Profiles:
    """Serves with `engines`; `current()` is the index of the one that reads the next prompts.

    With one engine there is nothing to choose. `owner` maps the id of every request admitted so far to the index of its
    engine. `shadow`: what is charged when an answer of the fast profile is done (None: nothing).
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
        """Let the profile in charge read the prompts; return the seconds it took."""
        index = min(self.current(), len(self.engines) - 1)
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
        """Take rows out of their batches, and read again what is to be read again; return the seconds it took."""
        seconds = 0.0
        for index, (engine, running) in enumerate(zip(self.engines, self.running)):
            if gone := [name for name in ids if name in running]:
                running.difference_update(gone)
                seconds += engine.leave(gone)
                if self.shadow and index == FAST:
                    seconds += sum(self.shadow(self.requests[name]) for name in gone)
        return seconds

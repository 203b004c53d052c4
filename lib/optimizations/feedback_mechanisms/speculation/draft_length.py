"""Laws for the draft length: called with the rounds of the present answer, they return the number of tokens to draft.

`DraftLength` uses the measured acceptance and times (Leviathan et al. 2023, section 3.5); `Bandit` learns by trying
(discounted UCB: Garivier and Moulines 2011). Both credit the length actually drafted, which may be less than requested.
Both back off exponentially while drafting does not pay, because every trial costs. One law serves one stream of
answers. Independent of models.
"""

import math
from collections.abc import Callable, Sequence

from lib.errors import UserError
from lib.optimizations.feedback_mechanisms.speculation.speculative import Round

LONGEST_DRAFT = 8
REMEMBERED = 0.97  # discount of earlier rounds, per round
PROBE_AFTER, MOST_PROBE_AFTER = 16, 1024  # plain steps before drafting is tried again, first and maximum
LEARNED = 0.2  # weight of a new time in its running mean

Law = Callable[[Sequence[Round]], int]


def fixed(count: int) -> Law:
    """Return the static law: always draft `count` tokens."""
    return lambda rounds: count


class _Backoff:
    """Counts plain steps; `due` returns whether to try drafting again, at growing intervals until drafting pays."""

    def __init__(self) -> None:
        self.plain, self.after = 0, PROBE_AFTER

    def due(self, pays: bool) -> bool:
        """Register whether drafting is expected to pay now; return whether to try it even though it is not."""
        if pays:
            self.plain, self.after = 0, PROBE_AFTER
            return False
        self.plain += 1
        if self.plain <= self.after:
            return False
        self.plain, self.after = 0, min(2 * self.after, MOST_PROBE_AFTER)
        return True


class DraftLength:
    """Drafts the number of tokens with the highest expected tokens per second, from measured acceptance and times.

    With acceptance a, a round of k drafted tokens yields (1 − a^(k+1)) / (1 − a) tokens on average. Earlier rounds are
    discounted, so that a change of text shows. If the drafter has not read the answer's prompt yet, the cost of reading
    is weighed against the saving over the rest of an answer of usual length. Reading later in an answer (the last
    drafted token if all were accepted, or the tokens of plain steps) is a cost of drafting like any other.
    """

    name = "measured acceptance"

    def __init__(self, most: int = LONGEST_DRAFT):
        self.most, self.learned, self.backoff = most, 0, _Backoff()
        self.accepted, self.tried = 1.0, 2.0
        self.draft_seconds, self.drafted = 0.0, 0.0
        self.check_seconds: dict[int, float] = {}
        self.catch_up_seconds, self.answer_tokens = 0.0, 0.0
        self.produced, self.looking = 0, False  # tokens of this answer; whether its prompt was read only for a trial
        self.has_read = False  # whether the drafter has read this answer's prompt
        self.course: list[tuple[int, float]] = []

    @property
    def acceptance(self) -> float:
        """The accepted share of the drafted tokens that were compared."""
        return self.accepted / self.tried

    def __call__(self, rounds: Sequence[Round]) -> int:
        """Return the number of tokens to draft next, given the `rounds` of the present answer."""
        if len(rounds) < self.learned or not rounds:
            if self.produced:  # another answer has begun
                first = not self.answer_tokens
                self.answer_tokens += (1.0 if first else LEARNED) * (self.produced - self.answer_tokens)
            self.learned, self.produced, self.looking, self.has_read = 0, 0, False, False
        for done in rounds[self.learned :]:
            self._learn(done)
        self.learned = len(rounds)
        count = max(range(self.most + 1), key=self.promise)
        if count and not any(done.drafted for done in rounds) and not self._worth_catching_up(count):
            count = 0
        if not self.drafted:
            count = 1 if self.check_seconds else 0  # a plain step first, then a trial of drafting
        elif not (self.looking and count) and self.backoff.due(count > 0):
            count, self.looking = 1, True
        self.course.append((count, self.acceptance))
        return count

    def promise(self, count: int) -> float:
        """Return the expected tokens per second of rounds with `count` drafted tokens; -1 if nothing is known."""
        if not self.check_seconds or (count and not self.drafted):
            return -1.0
        near = min(self.check_seconds, key=lambda known: abs(known - count))
        each = self.draft_seconds / self.drafted if count else 0.0
        a = min(self.acceptance, 0.999)
        return (1 - a ** (count + 1)) / (1 - a) / (self.check_seconds[near] + count * each)

    def _worth_catching_up(self, count: int) -> bool:
        """Return whether drafting finishes the rest of the answer sooner, the reading of the prompt included."""
        left = max(1.0, self.answer_tokens - self.produced)
        return self.catch_up_seconds + left / self.promise(count) < left / self.promise(0)

    def _learn(self, done: Round) -> None:
        self.produced += done.accepted + 1
        old = self.check_seconds.get(done.drafted, done.check_seconds)
        self.check_seconds[done.drafted] = old + LEARNED * (min(done.check_seconds, 3 * old) - old)
        reading = done.catch_up_seconds if self.has_read else 0.0
        if done.catch_up_seconds and not self.has_read:
            first = not self.catch_up_seconds
            change = done.catch_up_seconds - self.catch_up_seconds
            self.catch_up_seconds += (1.0 if first else LEARNED) * change
        if done.drafted:
            self.has_read = True
            checked = done.accepted + (done.accepted < done.drafted)
            self.accepted = REMEMBERED * self.accepted + done.accepted
            self.tried = REMEMBERED * self.tried + checked
            self.draft_seconds = REMEMBERED * self.draft_seconds + done.draft_seconds + reading
            self.drafted = REMEMBERED * self.drafted + done.drafted


class Bandit:
    """Drafts the length with the best recent reward, trying each length often enough: discounted UCB.

    A round is credited to the length actually drafted, not the length requested. A length that was requested but came
    out shorter (the answer was nearly done, or the text had no more to propose) is requested again in a later answer,
    and only while drafting pays. While plain decoding pays best, other lengths are tried ever more rarely.
    """

    name = "bandit"

    def __init__(self, arms: Sequence[int] = (0, 1, 2, 4, 8), curiosity: float = 0.15):
        if not arms:
            raise UserError("feedback_mechanisms: a bandit needs at least one draft length to choose from")
        self.arms, self.curiosity, self.learned, self.backoff = sorted(arms), curiosity, 0, _Backoff()
        self.reward, self.weight = dict.fromkeys(self.arms, 0.0), dict.fromkeys(self.arms, 0.0)
        self.asked, self.short = 0, set[int]()  # the last length requested; lengths that came out shorter

    def __call__(self, rounds: Sequence[Round]) -> int:
        """Return the number of tokens to draft next, given the `rounds` of the present answer."""
        if len(rounds) < self.learned:  # another answer has begun
            self.learned = 0
            if self._best():
                self.short.clear()
        for done in rounds[self.learned :]:
            self._learn(done)
        self.learned = len(rounds)
        self.asked = self._chosen()
        return self.asked

    def _chosen(self) -> int:
        untried = next((arm for arm in self.arms if not self.weight[arm] and arm not in self.short), None)
        if untried is not None:
            return untried
        mean, best = self._means(), self._best()
        if not self.backoff.due(best > 0) and best == 0:
            return 0
        total = sum(self.weight.values())
        bonus = {arm: self.curiosity * math.sqrt(math.log(1 + total) / self.weight[arm]) for arm in mean}
        tried = [arm for arm in mean if arm or best]  # a trial of drafting needs a length above 0
        return max(tried or mean, key=lambda arm: mean[arm] / mean[best] + bonus[arm])

    def _means(self) -> dict[int, float]:
        """Return the mean tokens per second of each length that was drafted."""
        return {arm: self.reward[arm] / self.weight[arm] for arm in self.arms if self.weight[arm]}

    def _best(self) -> int:
        """Return the length with the highest mean; 0 if none was drafted yet."""
        mean = self._means()
        return max(mean, key=mean.__getitem__, default=0)

    def _learn(self, done: Round) -> None:
        if done.drafted < self.asked:
            self.short.add(self.asked)
        for arm in self.arms:
            self.reward[arm] *= REMEMBERED
            self.weight[arm] *= REMEMBERED
        arm = max((arm for arm in self.arms if arm <= done.drafted), default=self.arms[0])
        self.reward[arm] += (done.accepted + 1) / max(done.seconds, 1e-9)
        self.weight[arm] += 1

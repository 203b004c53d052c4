"""Shadow runs: a profile's answers, a guard tested on resampled losses of these, and the quality of a server whose
answers come from two profiles.

Shapes: T prompt tokens, N new tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lib.measure.metrics import measurement
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate
from lib.models.decoding import batch_cache
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy, reset_rope_deltas
from lib.models.structure.sharing import sharing
from lib.optimizations.feedback_mechanisms.guarding import net_saving
from lib.optimizations.feedback_mechanisms.method import CLEAN_START, Guard

AT_ONCE = 16  # prompts answered together
READ_AT_ONCE = net_saving.AT_ONCE  # answers reread together
STRENGTHS = (1.0, 2.0, 4.0)  # noise that breaks a profile, in standard deviations of the weights


@torch.inference_mode()
def answers(model: nn.Module, prompts: Sequence[torch.Tensor], new_tokens: int) -> list[torch.Tensor]:
    """Return the greedy answer [N] of `model` to each prompt [T]."""
    answered: list[torch.Tensor] = []
    for start in range(0, len(prompts), AT_ONCE):
        state = batch_cache.prefill(model, prompts[start : start + AT_ONCE])
        steps = [state.token_B.cpu()]
        while len(steps) < new_tokens:
            steps.append(batch_cache.step(model, state).cpu())
        answered += list(torch.stack(steps, 1))
    return answered


@torch.inference_mode()
def disagreement(baseline: nn.Module, prompt_T: torch.Tensor, answer_N: torch.Tensor) -> float:
    """Return the share of an answer's tokens that the baseline would not have chosen, given the same preceding tokens.

    Takes one pass over prompt and answer: far cheaper than answering again.
    """
    reset_rope_deltas(baseline)
    device = next(baseline.parameters()).device
    ids_1T = torch.cat([prompt_T, answer_N])[None].to(device)
    logits_1NV = baseline(input_ids=ids_1T[:, :-1], use_cache=False, logits_to_keep=len(answer_N)).logits
    return float((logits_1NV[0].argmax(-1).cpu() != answer_N.cpu()).float().mean())


def disagreements(baseline: nn.Module, prompts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor]) -> list[float]:
    """Return the `disagreement` of each answer to its prompt, reading READ_AT_ONCE answers per pass."""
    losses: list[float] = []
    for start in range(0, len(prompts), READ_AT_ONCE):
        end = start + READ_AT_ONCE
        losses += _together(baseline, prompts[start:end], answers[start:end])
    return losses


@torch.inference_mode()
def _together(baseline: nn.Module, prompts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor]) -> list[float]:
    # Padded on the right, which no token of a causal model attends to.
    reset_rope_deltas(baseline)
    device = next(baseline.parameters()).device
    ids = [torch.cat([prompt_T, answer_N.to(prompt_T.device)])[:-1] for prompt_T, answer_N in zip(prompts, answers)]
    ids_BT = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
    starts = [len(prompt_T) - 1 for prompt_T in prompts]
    kept = ids_BT.shape[1] - min(starts)
    chosen_BT = baseline(input_ids=ids_BT, use_cache=False, logits_to_keep=kept).logits.argmax(-1).cpu()
    own = [row_T[start - min(starts) :][: len(answer_N)] for row_T, start, answer_N in zip(chosen_BT, starts, answers)]
    return [float((a_N != answer_N.cpu()).float().mean()) for a_N, answer_N in zip(own, answers)]


def broken(model: nn.Module, strength: float, seed: int = 0) -> nn.Module:
    """Return a model with noise of `strength` × their standard deviation added to its attention output weights.

    A packed matrix is restored first. Everything else is shared with `model`.
    """
    damaged = sharing(model)
    names = {module: name for name, module in damaged.named_modules()}
    random = torch.Generator().manual_seed(seed)
    for block in anatomy(damaged).blocks:
        if block.attention.kind != "none":
            output: Any = block.attention.output
            packed = hasattr(output, "restored")
            dtype = next(damaged.parameters()).dtype if packed else output.weight.dtype  # dtype of the embeddings
            weight = output.restored().to(dtype) if packed else output.weight.detach()
            noise = torch.randn(weight.shape, generator=random).to(weight.device, dtype)
            noisy = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            noisy.weight = nn.Parameter(weight + strength * weight.float().std().to(dtype) * noise, requires_grad=False)
            noisy.bias = output.bias
            damaged.set_submodule(names[output], noisy)
    return damaged


@dataclass(frozen=True)
class Watched:
    """A guarded stream: (second, trusted, estimate, true mean of the pool) per answer, and the guard's events."""

    course: list[tuple[float, bool, float | None, float]]
    events: list[tuple[float, str]]

    def first(self, what: str, since: float = 0.0) -> float | None:
        """Return the second of the first event `what` at or after `since`; None without one."""
        return next((second for second, name in self.events if name == what and second >= since), None)


def stream(
    guard: Guard, pools: Callable[[float], Sequence[float]], rate: float, seconds: float, seed: int = 0
) -> Watched:
    """Run the guard on `rate` answers per second; each loss is drawn from the pool of real losses for that second."""
    random = np.random.default_rng([seed, 0x5AD0])
    second, course = 0.0, []
    while (second := second + random.exponential(1 / rate)) < seconds:
        guard.ready(second)
        pool = pools(second)
        if guard.wants():
            guard.add(second, float(random.choice(pool)))
        course.append((second, guard.trusted, guard.estimate, float(np.mean(pool))))
    return Watched(course, list(guard.events))


def trials(
    make_guard: Callable[[int], Guard],
    pool: Sequence[float],
    count: int,
    length: int,
    seed: int = 0,
    before: Sequence[float] = (),
) -> dict[str, Any]:
    """Run `count` new guards on windows of `length` shadowed answers each, with losses drawn from `pool`.

    If `before` is given, a clean start of losses drawn from it precedes each window. Returns `caught` (share of windows
    with a rollback), `alarms` (their number), `delays` (shadowed answers until each rollback) and `error` (mean
    absolute error of the guard's estimate in windows without a rollback).
    """
    random = np.random.default_rng([seed, 0xC0DE])
    delays, errors = [], []
    truth = float(np.mean(pool))
    for index in range(count):
        guard = make_guard(index)
        for loss in random.choice(before, CLEAN_START).tolist() if len(before) else ():
            guard.add(0.0, loss)
        for at, loss in enumerate(random.choice(pool, length).tolist(), start=1):
            if guard.add(float(at), loss):
                delays.append(at)
                break
        else:
            errors.append(abs((guard.estimate or 0.0) - truth))
    return {
        "caught": len(delays) / count,
        "alarms": len(delays),
        "delays": delays,
        "error": float(np.mean(errors)) if errors else None,
    }


def peeking(bound: float, pool: Sequence[float], count: int, length: int, z: float = 2.326, seed: int = 0) -> float:
    """Return the share of windows in which a naive one-sided z-test (1 %), repeated after every answer, ever rejects.

    This is the control: a test designed to be consulted once, but consulted after every answer.
    """
    random = np.random.default_rng([seed, 0xC0DE])
    losses = random.choice(np.asarray(pool, dtype=float), (count, length))
    n = np.arange(1, length + 1)
    mean = losses.cumsum(1) / n
    spread = np.sqrt(np.maximum(1e-9, (losses**2).cumsum(1) / n - mean**2) / n)
    return float(((mean - bound) / spread > z)[:, 4:].any(1).mean())


def blended(
    loaded: Loaded, fast: nn.Module, shares: Sequence[float], effort: Effort, seed: int = 0
) -> list[list[Measurement]]:
    """Return, for each share, the quality of a blend with that share of `fast` answers, against the full profile.

    Classification and key-value retrieval; the profile that answers an item is drawn beforehand.
    """
    if loaded.random_weights:
        reason = "random weights: answers carry no information"
        return [
            [measurement.unavailable(name, "serve", reason) for name in ("f1_macro", "retrieval_exact_match")]
            for _ in shares
        ]
    options = {"resamples": effort.resamples, "seed": seed}
    arms = loaded, replace(loaded, model=fast)
    classified = evaluate.classified_by_all(arms, loaded.tasks, "final", effort.items, seed)
    distance, prompts = effort.retrieval_distance, effort.retrieval_prompts
    by_full, by_fast = (evaluate.retrieval(arm, distance, prompts, seed) for arm in arms)
    compared: list[list[Measurement]] = []
    for share in shares:
        random, results = np.random.default_rng([seed, 0xB1E]), []
        for full, quick in classified:
            draw_N = random.random(len(full.ids)) < share
            chosen_N = np.where(draw_N, quick.chosen_N, full.chosen_N)
            scores_NL = np.where(draw_N[:, None], quick.scores_NL, full.scores_NL)
            results += answer_comparison.compare_classified(
                full, replace(full, chosen_N=chosen_N, scores_NL=scores_NL, others={}), **options
            )
        draw_N = random.random(len(by_full.right_N)) < share
        blend = replace(by_full, right_N=np.where(draw_N, by_fast.right_N, by_full.right_N))
        if by_full.given_NV is not None and by_fast.given_NV is not None:
            blend = replace(blend, given_NV=np.where(draw_N[:, None], by_fast.given_NV, by_full.given_NV))
        compared.append([*results, answer_comparison.compare_retrieved(by_full, blend, **options)])
    return compared

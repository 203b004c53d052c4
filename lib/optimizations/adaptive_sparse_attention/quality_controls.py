"""Judge the quality of sparse attention at the length at which it is timed: the same questions to both arms, controls
of equal budget for prompts and for decoding, divergence by τ, and questions inside a prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from torch import nn

from lib.measure.metrics import measurement, settings
from lib.measure.metrics.measurement import Measurement
from lib.measure.metrics.settings import Effort
from lib.measure.quality import answer_comparison, evaluate, sanity
from lib.measure.quality.answers import Answers
from lib.models.loading import Loaded
from lib.models.tasks import tasks as task_list
from lib.models.tasks.retrieval import KEY, VALUE
from lib.optimizations.adaptive_sparse_attention import long_answers, method
from lib.optimizations.adaptive_sparse_attention.long_answers import LongAnswers, LongPrompts
from lib.optimizations.common import absorbed_baseline

DIVERGENCE = "kl_divergence_nats"
PURPOSES = {
    "antidiagonal": "found from each input",
    "window": "first and latest blocks",
    "random": "random blocks",
    "oracle": "blocks with the most exact mass",
}
PAGE_PURPOSES = {
    "recent": "first and latest pages",
    "random": "random pages",
    "observed": "pages that the prompt's end attended to",
}
AXES = {"x_label": "density: share of the causal blocks kept", "y_label": "KL, nats/token"}
PROMPTS = {"preview": 2, "quick": 6, "standard": 6, "thorough": 12}  # long prompts, each with many questions
PREVIEW_QUESTIONS = 9  # per prompt at effort preview
CONTROL_PROMPTS = 2  # for arms without a verdict
INSIDE, PREVIEW_INSIDE = 4, 2  # questions inside their prompt
INSIDE_ALL, INSIDE_SPARSE = "question inside the prompt", "question sparse"  # its queries attend to all; sparsely
FEWEST_REPEATED = 10  # values in the middle that full attention must repeat, or a loss among them means little
LOST_SHARE = 0.25  # a larger share of these counts as lost
MOST_ITEMS, FEWEST_ITEMS = 96, 12  # of the model's own tasks, most of which are too short to be exercised
WINDOWS, PREVIEW_WINDOWS = 6, 2  # the fewest that carry a verdict; a preview only shows numbers
CONTROL_WINDOWS = 2  # for arms without a verdict


@dataclass(frozen=True)
class Quality:
    """Answers of both arms and their measurements; `degenerate` says why the sparse output is degenerate (None: not).

    `prompts` are the long prompts, `answers` the answers of each arm to them; both are None if answers mean nothing.
    """

    full: Answers
    sparse: Answers
    measurements: list[Measurement]
    degenerate: str | None
    options: dict[str, int]  # for `answer_comparison.compare`
    prompts: LongPrompts | None = None
    answers: dict[str, LongAnswers] | None = None
    patterns: dict[tuple, tuple[list[Measurement], float | None]] = field(default_factory=dict)  # cache of `_read`


def quality(loaded: Loaded, optimized: nn.Module, effort: Effort, tokens: int, level: str, seed: int = 0) -> Quality:
    """Return the answers of both arms on text and long prompts of `tokens` tokens (PROMPTS, by effort `level`), and on
    the model's own tasks.

    Prompts that the sparse arm reads whole count as not exercised: their answers cannot change. Latent attention is
    decoded absorbed in both arms.
    """
    options = {"resamples": effort.resamples, "seed": seed}
    probe_BT = task_list.text_windows(loaded, "final", 2, tokens, seed).to(loaded.device)
    degenerate = sanity.check(optimized, probe_BT, random_weights=loaded.random_weights)
    items = FEWEST_ITEMS if loaded.scale == "full" and effort.brief else min(effort.items, MOST_ITEMS)
    windows = PREVIEW_WINDOWS if effort.preview else WINDOWS
    sizes = replace(effort, windows=windows, window_tokens=tokens, items=items, retrieval_prompts=1)
    full = evaluate.evaluate(loaded, sizes, seed=seed)
    sparse = evaluate.evaluate(
        loaded, sizes, model=optimized, seed=seed, acted=lambda: float(method.left_out(optimized))
    )
    measurements = answer_comparison.compare(full, sparse, **options)
    if full.reason:
        return Quality(full, sparse, measurements, degenerate, options)
    questions = PREVIEW_QUESTIONS if effort.preview else long_answers.QUESTIONS
    prompts = long_answers.prompts(loaded, tokens, PROMPTS[level], questions, seed)
    answers = {"full": long_answers.ask(absorbed_baseline.absorbed_baseline(loaded.model), prompts)}
    answers["sparse"] = _answers(optimized, prompts)
    measurements = [m for m in measurements if m.metric != "retrieval_exact_match"]  # long prompts measure it
    measurements += long_answers.compare(answers["full"], answers["sparse"], **options)
    if degenerate:
        measurements = [measurement.invalid(m.metric, m.workload, degenerate) for m in measurements]
    return Quality(full, sparse, measurements, degenerate, options, prompts, answers)


def patterns(loaded: Loaded, knobs: Mapping[str, Any], judged: Quality) -> list[dict[str, Any]]:
    """Return name, purpose and divergence of each pattern with as many blocks in every row; none for random weights."""
    if loaded.random_weights:
        return []
    return [
        {"name": name, "purpose": purpose, "measurements": _read(loaded, knobs, name, judged)[0]}
        for name, purpose in PURPOSES.items()
    ]


def _read(
    loaded: Loaded, knobs: Mapping[str, Any], pattern: str, judged: Quality
) -> tuple[list[Measurement], float | None]:
    """Return the divergence of an arm with this pattern on a few windows, and the density it kept; cached."""
    key = (pattern, *sorted(knobs.items()))
    if key not in judged.patterns:
        arm = method.apply(loaded.model, **knobs, pattern=pattern, seed=judged.options["seed"])
        judged.patterns[key] = _divergence(arm, judged), method.density(arm)["blocks"]
    return judged.patterns[key]


def _divergence(arm: nn.Module, judged: Quality) -> list[Measurement]:
    """Return the measurements of `arm` against full attention on a few of the windows read by both arms."""
    text = judged.full.text
    if text is None:
        raise ValueError("the baseline has read no text")
    few = slice(None, CONTROL_WINDOWS)
    sources = None if text.source_N is None else text.source_N[few]
    fewer = replace(text, ids_NT=text.ids_NT[few], loss_N=text.loss_N[few], hidden_NTH=text.hidden_NTH[few])
    fewer = replace(fewer, source_N=sources)
    return answer_comparison.compare_text(fewer, evaluate.read(arm, fewer.ids_NT), **judged.options)


def over_tau(
    loaded: Loaded, knobs: Mapping[str, Any], judged: Quality, taus: Sequence[float] = (0.5, 0.9)
) -> pd.DataFrame:
    """Return the divergence by kept density, for the anti-diagonal pattern and for a window of the same size: a row per
    τ and arm; empty for random weights and for prompts that are read whole.
    """
    rows = []
    for tau in () if loaded.random_weights else taus:
        for pattern in ("antidiagonal", "window"):
            measured, density = _read(loaded, {**knobs, "tau": tau}, pattern, judged)
            if density is None:  # prompts of at most two blocks are read whole
                continue
            divergence = next(m for m in measured if m.metric == DIVERGENCE)
            low, high = divergence.ci or (None, None)
            row = {"arm": pattern, "value": divergence.optimized, "low": low, "high": high}
            rows.append(row | {"tau": tau, "strength": density})
    return pd.DataFrame(rows)


def page_controls(loaded: Loaded, knobs: Mapping[str, Any], judged: Quality) -> dict[str, LongAnswers]:
    """Return the answers to a few prompts by both arms, and by arms that read as many pages chosen in other ways.

    Empty if answers mean nothing. Control arms that read all pages of a prompt have chosen nothing and are idle.
    """
    if judged.prompts is None or judged.answers is None:
        return {}
    seed = judged.options["seed"]
    arms = {f"{name} pages": method.apply(loaded.model, **knobs, page_choice=name, seed=seed) for name in PAGE_PURPOSES}
    few = judged.prompts.first(CONTROL_PROMPTS)
    answers = {name: answered.first(CONTROL_PROMPTS) for name, answered in judged.answers.items()}
    reads_all = not knobs["pages"] or knobs["pages"] * knobs["page_size"] >= few.tokens
    controls = {name: _answers(model, few) for name, model in arms.items()}
    return answers | {name: replace(control, idle=control.idle or reads_all) for name, control in controls.items()}


def _answers(arm: nn.Module, prompts: LongPrompts) -> LongAnswers:
    """Return the answers of a sparse arm; they are idle if it left nothing out."""
    return long_answers.ask(arm, prompts, lambda: float(method.left_out(arm)))


def place_bars(answers: Mapping[str, LongAnswers]) -> pd.DataFrame:
    """Return the shares of values repeated for `style.bars`; see `long_answers.bars`."""
    return long_answers.bars(answers)


def described(bars: pd.DataFrame) -> str:
    """Return the alternative text of a figure of `long_answers.bars`."""
    shares = ", ".join(f"{bar.arm} {bar.value:.2f}" for bar in bars.itertuples())
    return f"Values repeated by place: {shares}."


def dashed(answers: Mapping[str, LongAnswers]) -> list[str]:
    """Return the bars of `long_answers.bars` that are controls."""
    return [f"{place}, {arm}" for place in long_answers.PLACES for arm in [*answers][2:]]


def page_records(answers: Mapping[str, LongAnswers], options: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return name, purpose and measurements against full attention for every control arm."""
    return [
        {"name": arm, "purpose": PAGE_PURPOSES[arm.removesuffix(" pages")]}
        | {"measurements": long_answers.compare(answers["full"], answers[arm], **options)}
        for arm in [*answers][2:]
    ]


def question_inside(
    loaded: Loaded, optimized: nn.Module, knobs: Mapping[str, Any], tokens: int, effort: Effort, seed: int = 0
) -> list[dict[str, Any]]:
    """Return name, purpose and exact match against full attention on a few prompts of `tokens` tokens that end with
    their question, once with its queries attending to everything and once not.

    The value stands in the middle of the prompt. Empty for random weights.
    """
    if loaded.random_weights or not settings.wants("accuracy"):
        return []
    room = tokens - 2 * KEY - VALUE
    arms = {INSIDE_ALL: optimized, INSIDE_SPARSE: method.apply(loaded.model, **{**knobs, "full_last": 0})}
    ask: dict[str, Any] = {
        "distance": room - room // 2,
        "count": min(effort.retrieval_prompts, PREVIEW_INSIDE if effort.preview else INSIDE),
        "seed": seed,
        "lead": room // 2,
    }
    full = evaluate.retrieval(loaded, **ask)
    controls = []
    for name, arm in arms.items():
        before = method.left_out(arm)
        retrieved = evaluate.retrieval(replace(loaded, model=arm), **ask)
        match = answer_comparison.compare_retrieved(full, retrieved).model_copy(update={"workload": name})
        idle = method.left_out(arm) == before
        measurements = [answer_comparison.not_exercised(match) if idle else match]
        controls.append({"name": name, "purpose": "against full attention", "measurements": measurements})
    return controls


def read_inside(inside: Sequence[Mapping[str, Any]]) -> str:
    """Return two sentences on `question_inside`: the shares repeated, and whether so few answers show a difference."""
    if not inside:
        return "No question was asked inside a prompt."
    every, sparse = (value["measurements"][0] for value in inside)
    sentence = f"Full attention repeats {every.baseline:.3f} of {every.n} values, the sparse arm {every.optimized:.3f}"
    sentence += f" if the question attends to everything and {sparse.optimized:.3f} if it does not"
    same = every.optimized == sparse.optimized
    conclusion = "Between the last two no difference is shown." if same else "These are too few for a verdict."
    return f"{sentence}. {conclusion}"


def lost_in_the_middle(claim: str, judged: Quality) -> tuple[str, bool | None, str]:
    """Return the claim that values in the middle of a prompt are lost, whether they are, and the evidence, from the
    values of the middle third alone.

    They are lost if the arm misses more than LOST_SHARE of those that full attention repeats, net of those it gains.
    None if full attention repeats fewer than FEWEST_REPEATED or too few for a verdict, or if nothing was left out.
    """
    if judged.answers is None:
        return claim, None, judged.full.reason or "nothing was asked"
    if judged.answers["sparse"].idle:
        return claim, None, "nothing was left out of these prompts"
    full, sparse = (judged.answers[name].at("middle") for name in ("full", "sparse"))
    repeated, lost = int(full.right_N.sum()), int((full.right_N & ~sparse.right_N).sum())
    evidence = f"of {len(full.right_N)} values in the middle full attention repeats {repeated}; sparse attention loses "
    evidence += f"{lost} of these and repeats {int((sparse.right_N & ~full.right_N).sum())} others"
    if judged.degenerate:
        return claim, None, judged.degenerate
    if repeated < FEWEST_REPEATED:
        return claim, None, f"{evidence}: too few to lose"
    margin = LOST_SHARE * repeated / len(full.right_N)
    verdict = answer_comparison.compare_retrieved(full, sparse, margin=margin, **judged.options).verdict
    refuted = {"not_maintained": True, "maintained": False, "better": False}.get(verdict)
    limit = f"{100 * LOST_SHARE:.0f} %"
    shown: dict[bool | None, str] = {True: f"a loss of more than {limit}", False: f"a loss of less than {limit}"}
    return claim, refuted, f"{evidence}: {shown.get(refuted, f'cannot be told from a loss of {limit}')}"

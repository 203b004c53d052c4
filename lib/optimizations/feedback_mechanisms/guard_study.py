"""Tests the guard on losses of real answers: how soon it rolls back a broken profile, and how often a sound one.

Losses are measured once per profile; streams and windows are drawn from them. A broken profile is the fast one with
noise on its attention outputs. Independent of servers.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from lib.measure.metrics import measurement
from lib.measure.metrics.digits import percent
from lib.measure.metrics.measurement import Measurement
from lib.models.loading import Loaded
from lib.models.tasks import tasks
from lib.optimizations.feedback_mechanisms import scenarios, shadow
from lib.optimizations.feedback_mechanisms.guarding.net_saving import AT_ONCE
from lib.optimizations.feedback_mechanisms.method import CLEAN_START, LATER, SEARCH_SPACE, Guard
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST
from lib.optimizations.feedback_mechanisms.shadow import STRENGTHS, Watched

PROMPTS = {"preview": 8, "quick": 24, "standard": 96, "thorough": 256}  # prompts whose answers are reread
WINDOWS = {"preview": 100, "quick": 300, "standard": 1000, "thorough": 5000}
PROMPT_TOKENS, NEW_TOKENS = 48, 16
WINDOW_ANSWERS = 100  # shadowed answers in a window
STREAM_ANSWERS = 1500  # in the scripted stream
FROM_START, AFTERWARDS = "shadowed answers until then", "until then, after a clean start"
SOUND, ANOTHER_DOMAIN, AT_THE_BOUND = "sound", "sound, text of another domain", "exactly at the bound"
BROKEN = f"noise {STRENGTHS[-1]}"


def _losses(full: nn.Module, profile: nn.Module, prompts: list[torch.Tensor]) -> list[float]:
    return shadow.disagreements(full, prompts, shadow.answers(profile, prompts, NEW_TOKENS))


@dataclass(frozen=True)
class GuardStudy:
    """Real losses of each profile (`pools`), the guard's settings, and a row per profile over many windows (`rows`).

    bound: maximum mean loss of a profile, whatever its loss was when it was chosen. rate: answers per second of the
    server. shadow_seconds: time to reread one answer. alone: no fast profile was admitted, so the sound one is the full
    profile itself. fast_share: share of the quiet server's answers given by the fast profile (None: no server was
    simulated); only those answers can show that it is broken.
    """

    bound: float
    share: float
    rate: float
    pools: dict[str, list[float]]
    shadow_seconds: float
    prompts: int
    windows: int
    seed: int
    rows: list[dict[str, object]] = field(default_factory=list)
    alone: bool = False
    fast_share: float | None = None

    @property
    def seconds(self) -> float:
        """The length of the scripted stream."""
        return STREAM_ANSWERS / self.rate

    @property
    def source(self) -> str:
        """The source of the results over windows."""
        return (
            f"{self.windows} windows of {WINDOW_ANSWERS} answers drawn from {self.prompts} real losses of each profile"
        )

    @property
    def caption(self) -> str:
        """The source, with a note on the sound profile if there is no fast one."""
        full = f"; {NO_FAST}: the sound one is the full profile itself, which loses nothing"
        return self.source + (full if self.alone else "")

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The second at which each part of the stream begins."""
        third = self.seconds / 3
        return [(0.0, "sound"), (third, "broken"), (2 * third, "sound again")]

    @property
    def shadow_cost(self) -> str:
        """One line on the time to reread one answer."""
        charged = f"none is run, since {NO_FAST}" if self.alone else "charged to the server"
        return f"A shadow run takes {1000 * self.shadow_seconds:.1f} ms per shadowed answer; {charged}"

    def guard(self, index: int = 0, bound: float | None = None) -> Guard:
        """Return a new guard; `index` offsets its seed."""
        bound = self.bound if bound is None else bound
        return Guard(bound, self.share, self.seconds / 10, self.seed + index, later=LATER * self.share)

    def disagreement(self, profile: str) -> float:
        """Return the mean loss of a profile."""
        return float(np.mean(self.pools[profile]))

    def excess(self, profile: str) -> float:
        """Return the excess of a profile's mean loss over the bound; negative within the bound."""
        return self.disagreement(profile) - self.bound

    def taken_back(self, profile: str) -> float:
        """Return the share of windows in which a profile was rolled back."""
        return float(str(self._row(profile)["taken back"]))

    def alarms(self, profile: str) -> int:
        """Return the number of windows in which a profile was rolled back."""
        return round(self.taken_back(profile) * self.windows)

    def _row(self, profile: str) -> dict[str, object]:
        return next(row for row in self.rows if row["profile"] == profile)


def prepare(
    loaded: Loaded,
    fast: nn.Module,
    another_domain: list[torch.Tensor],
    effort: str,
    *,
    quality_bound: float,
    shadow_share: float,
    capacity: float,
    fast_share: float,
    seed: int,
) -> GuardStudy:
    """Measure the losses of sound and broken profiles and on `another_domain`, and run the guard on many windows.

    `capacity`: requests per second of the full profile; the stream has the calm share of it. `fast_share`: share of the
    quiet server's answers given by the fast profile.
    """
    full = loaded.model
    prompts = list(tasks.text_windows(loaded, "final", PROMPTS[effort], PROMPT_TOKENS, seed + 1))
    pools: dict[str, list[float]] = {}
    shadow_seconds = 0.0
    for strength in (0.0, *STRENGTHS):
        profile = shadow.broken(fast, strength, seed) if strength else fast
        answers = shadow.answers(profile, prompts, NEW_TOKENS)
        start = time.perf_counter()
        pools[f"noise {strength}" if strength else SOUND] = shadow.disagreements(full, prompts, answers)
        shadow_seconds = (time.perf_counter() - start) / len(prompts)
    pools[ANOTHER_DOMAIN] = _losses(full, fast, another_domain)
    rate = scenarios.CALM * capacity
    counts = PROMPTS[effort], WINDOWS[effort]
    about_fast: dict[str, Any] = {"alone": fast is full, "fast_share": fast_share}
    study = GuardStudy(quality_bound, shadow_share, rate, pools, shadow_seconds, *counts, seed, **about_fast)
    study.rows.extend(_watch_windows(study))
    return study


def _watch_windows(study: GuardStudy) -> list[dict[str, object]]:
    """Return a row per profile: how often and how soon it is rolled back, and how often by a plain test consulted as
    often as the guard.

    The last row is for a mean loss exactly at the bound.
    """
    rows: list[dict[str, object]] = []
    windows, seed = study.windows, study.seed
    for profile, pool in study.pools.items():
        trial = shadow.trials(study.guard, pool, windows, WINDOW_ANSWERS, seed)
        delays = trial["delays"]
        row: dict[str, object] = {"profile": profile, "disagreement": study.disagreement(profile)}
        row |= {"beyond the bound": study.excess(profile), "taken back": trial["caught"]}
        row |= {FROM_START: _median(delays, windows), AFTERWARDS: None}
        if profile not in (SOUND, ANOTHER_DOMAIN):
            after_start = shadow.trials(study.guard, pool, windows, WINDOW_ANSWERS, seed, study.pools[SOUND])
            row[AFTERWARDS] = _median(after_start["delays"], windows)
        row["plain test"] = shadow.peeking(study.bound, pool, windows, WINDOW_ANSWERS, seed=seed)
        rows.append(row | {"estimate's error": trial["error"]})
    mean, pool = _at_the_bound(study)
    trial = shadow.trials(lambda index: study.guard(index, mean), pool, windows, WINDOW_ANSWERS, seed)
    row = {"profile": AT_THE_BOUND, "disagreement": mean, "beyond the bound": 0.0, "taken back": trial["caught"]}
    row["plain test"] = shadow.peeking(mean, pool, windows, WINDOW_ANSWERS, seed=seed)
    return [*rows, row | {FROM_START: None, "estimate's error": trial["error"]}]


def _median(delays: list[int], windows: int) -> float | None:
    """Return the median delay over all windows; None if the profile was rolled back in less than half of them."""
    median = float(np.median([*delays, *[np.inf] * (windows - len(delays))]))
    return median if np.isfinite(median) else None


def _at_the_bound(study: GuardStudy) -> tuple[float, list[float]]:
    """Return a bound, and losses whose mean is that bound.

    The losses are the sound profile's or, if their mean is outside the range of a bound, those of the most broken
    profile, scaled to the study's own bound.
    """
    low, high = SEARCH_SPACE["quality_bound"]["range"]
    mean, pool = study.disagreement(SOUND), study.pools[SOUND]
    if low <= mean <= high:
        return mean, pool
    scale = study.bound / max(study.disagreement(BROKEN), study.bound)
    scaled = [scale * loss for loss in study.pools[BROKEN]]
    return min(high, max(low, float(np.mean(scaled)))), scaled


def scripted_stream(study: GuardStudy) -> Watched:
    """Return a guarded stream whose profile is sound, then broken in the middle third, then sound again."""
    third = study.seconds / 3

    def pool(second: float) -> list[float]:
        return study.pools[BROKEN if third <= second < 2 * third else SOUND]

    return shadow.stream(study.guard(), pool, study.rate, study.seconds, study.seed)


def stream_panels(study: GuardStudy, watched: Watched) -> list[tuple[pd.DataFrame, str, str, float | None, str]]:
    """Return (frame, label, kind, bound, name of the bound) of the two panels of the stream's figure: estimate and
    truth, and the profile in use.
    """
    frame = pd.DataFrame(watched.course, columns=["seconds", "trusted", "estimate", "truth"])
    curves = pd.concat([frame.assign(value=frame[name], arm=name) for name in ("estimate", "truth")])
    in_use = frame.assign(value=frame.trusted.astype(float))
    name = "bound of the guard"
    return [(curves, "disagreement", "line", study.bound, name), (in_use, "fast in use", "steps", None, name)]


def read_stream(study: GuardStudy, watched: Watched) -> tuple[str, str]:
    """Return two sentences on the stream's figure."""
    third = study.seconds / 3
    back = watched.first("rolled back", third)
    early = sum(second < third for second, name in watched.events if name == "rolled back")
    first = (
        f"The profile broke at {third:.2f} s and was never rolled back."
        if back is None
        else f"Answering everything, the profile broke at {third:.2f} s and was rolled back {back - third:.2f} s later."
    )
    tries = sum(name == "tried again" for _, name in watched.events)
    return first, f"Rollbacks before it broke: {early}; further trials after a rollback: {tries}."


def measurements(study: GuardStudy) -> list[Measurement]:
    """Return disagreement, false rollbacks, the estimate's error, and the seconds until a fault is detected.

    Measurements of a sound fast profile are unavailable if there is none.
    """
    sound, worst = study._row(SOUND), study._row(BROKEN)
    reason, by = "the baseline has no guard", f"{study.prompts} answers, reread by the full profile"
    serve, quiet = "serve", "serve, quiet"
    if study.alone:
        names = (("profile_disagreement", serve), ("false_rollback_share", quiet), ("quality_estimate_error", quiet))
        results = [measurement.unavailable(metric, workload, NO_FAST) for metric, workload in names]
    else:
        results = [
            _shown("profile_disagreement", serve, 0.0, study.disagreement(SOUND), by, "measured"),
            _shown("false_rollback_share", quiet, 0.0, study.taken_back(SOUND), study.source),
        ]
        if isinstance(error := sound["estimate's error"], float):
            results.append(_shown("quality_estimate_error", quiet, None, error, study.source, reason=reason))
    if study.fast_share is not None and not study.fast_share:
        why = "the fast profile answers nothing under a quiet load, so nothing shows whether it is broken"
        why = NO_FAST if study.alone else why
        results.append(measurement.unavailable("fault_detection_seconds", "serve, broken", why))
    elif isinstance(answers := worst.get(AFTERWARDS), float) and answers:
        fast = 1.0 if study.fast_share is None else study.fast_share
        later = LATER * study.share
        fast_answers = "all of them" if study.fast_share is None else f"{percent(fast)} of them"
        source = f"{study.source}; {study.rate:.1f} answers/s, {fast_answers} by the fast profile, {later:g} of those "
        source += f"reread after a clean start of {CLEAN_START}, {AT_ONCE} at a time; later while requests wait"
        if isinstance(first := worst[FROM_START], float):
            source += f"; {first / (study.share * study.rate * fast):.3g} s if it is broken from the start"
        groups = AT_ONCE * math.ceil(answers / AT_ONCE)
        delay = groups / (later * study.rate * fast)
        results.append(_shown("fault_detection_seconds", "serve, broken", None, delay, source, reason=reason))
    else:
        why = "the broken profile was rolled back in less than half of the windows"
        results.append(measurement.unavailable("fault_detection_seconds", "serve, broken", why))
    return results


def _shown(
    metric: str, workload: str, baseline: float | None, value: float, source: str, provenance: Any = "estimated",
    reason: str | None = None,
) -> Measurement:  # fmt: skip
    options: dict[str, Any] = {"ratio": None} | ({"reason": reason} if reason else {})
    return measurement.informative(metric, workload, baseline, value, source, provenance, **options)

"""The guard on real losses of real answers: how soon it takes back a broken profile, how often a sound one.

The losses are measured once per profile; streams and windows are drawn from them. A broken profile is the fast one with
noise on its attention outputs. Knows no server.
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

PROMPTS = {"preview": 8, "quick": 24, "standard": 96, "thorough": 256}  # whose answers are read again
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
    """Real losses of each profile (`pools`), the guard's settings, and a row per profile of many windows (`rows`).

    bound: the most that a profile may lose, whatever it lost when it was chosen. rate: answers per second of the
    server; shadow_seconds: of reading one answer again; alone: no fast profile was admitted, so the sound one is the
    full profile itself; fast_share: of the quiet server's answers that the fast profile gives (None: no server was
    asked): only those can show that it is broken.
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
        """Length of the scripted stream."""
        return STREAM_ANSWERS / self.rate

    @property
    def source(self) -> str:
        """Source of what the windows showed."""
        return (
            f"{self.windows} windows of {WINDOW_ANSWERS} answers drawn from {self.prompts} real losses of each profile"
        )

    @property
    def caption(self) -> str:
        """The source, and what the sound profile is without a fast one."""
        full = f"; {NO_FAST}: the sound one is the full profile itself, which loses nothing"
        return self.source + (full if self.alone else "")

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The second at which each part of the stream begins."""
        third = self.seconds / 3
        return [(0.0, "sound"), (third, "broken"), (2 * third, "sound again")]

    @property
    def shadow_cost(self) -> str:
        """What reading one answer again takes, as one line."""
        charged = f"none is made, since {NO_FAST}" if self.alone else "charged to the server"
        return f"A shadow run takes {1000 * self.shadow_seconds:.1f} ms per shadowed answer; {charged}"

    def guard(self, index: int = 0, bound: float | None = None) -> Guard:
        """Return a new guard; `index` moves its seed."""
        bound = self.bound if bound is None else bound
        return Guard(bound, self.share, self.seconds / 10, self.seed + index, later=LATER * self.share)

    def disagreement(self, profile: str) -> float:
        """Return the mean loss of a profile."""
        return float(np.mean(self.pools[profile]))

    def excess(self, profile: str) -> float:
        """Return by how much a profile's mean loss exceeds what is allowed; negative within the bound."""
        return self.disagreement(profile) - self.bound

    def taken_back(self, profile: str) -> float:
        """Return the share of windows in which a profile was taken back."""
        return float(str(self._row(profile)["taken back"]))

    def alarms(self, profile: str) -> int:
        """Return the number of windows in which a profile was taken back."""
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
    """Measure the losses of the sound profile, of the broken ones and of `another_domain`, and watch many windows.

    `capacity`: requests per second of the full profile; the stream has the calm share of it. `fast_share`: of the quiet
    server's answers, given by the fast profile.
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
    who: dict[str, Any] = {"alone": fast is full, "fast_share": fast_share}
    study = GuardStudy(quality_bound, shadow_share, rate, pools, shadow_seconds, *counts, seed, **who)
    study.rows.extend(_watch_windows(study))
    return study


def _watch_windows(study: GuardStudy) -> list[dict[str, object]]:
    """Return a row per profile: how often it is taken back, how soon, and what a plain test does that is consulted as
    often.

    The last row is a loss exactly at the bound.
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
            behind = shadow.trials(study.guard, pool, windows, WINDOW_ANSWERS, seed, study.pools[SOUND])["delays"]
            row[AFTERWARDS] = _median(behind, windows)
        row["plain test"] = shadow.peeking(study.bound, pool, windows, WINDOW_ANSWERS, seed=seed)
        rows.append(row | {"estimate's error": trial["error"]})
    mean, pool = _at_the_bound(study)
    trial = shadow.trials(lambda index: study.guard(index, mean), pool, windows, WINDOW_ANSWERS, seed)
    row = {"profile": AT_THE_BOUND, "disagreement": mean, "beyond the bound": 0.0, "taken back": trial["caught"]}
    row["plain test"] = shadow.peeking(mean, pool, windows, WINDOW_ANSWERS, seed=seed)
    return [*rows, row | {FROM_START: None, "estimate's error": trial["error"]}]


def _median(delays: list[int], windows: int) -> float | None:
    """Return the median over all windows; None where the profile was not taken back in half of them."""
    median = float(np.median([*delays, *[np.inf] * (windows - len(delays))]))
    return median if np.isfinite(median) else None


def _at_the_bound(study: GuardStudy) -> tuple[float, list[float]]:
    """Return a bound and losses whose mean is that bound: the sound profile's; or, where it loses too little or too
    much for a bound, the most broken one's, scaled to the study's own bound.
    """
    low, high = SEARCH_SPACE["quality_bound"]["range"]
    mean, pool = study.disagreement(SOUND), study.pools[SOUND]
    if low <= mean <= high:
        return mean, pool
    scale = study.bound / max(study.disagreement(BROKEN), study.bound)
    scaled = [scale * loss for loss in study.pools[BROKEN]]
    return min(high, max(low, float(np.mean(scaled)))), scaled


def scripted_stream(study: GuardStudy) -> Watched:
    """Return a guarded stream whose profile is sound, broken in the middle third, and sound again."""
    third = study.seconds / 3

    def pool(second: float) -> list[float]:
        return study.pools[BROKEN if third <= second < 2 * third else SOUND]

    return shadow.stream(study.guard(), pool, study.rate, study.seconds, study.seed)


def stream_panels(study: GuardStudy, watched: Watched) -> list[tuple[pd.DataFrame, str, str, float | None, str]]:
    """Return (frame, label, kind, bound, the bound's name) of each panel of the stream's figure: estimate and truth,
    profile in use.
    """
    frame = pd.DataFrame(watched.course, columns=["seconds", "trusted", "estimate", "truth"])
    curves = pd.concat([frame.assign(value=frame[name], arm=name) for name in ("estimate", "truth")])
    in_use = frame.assign(value=frame.trusted.astype(float))
    name = "bound of the guard"
    return [(curves, "disagreement", "line", study.bound, name), (in_use, "fast in use", "steps", None, name)]


def read_stream(study: GuardStudy, watched: Watched) -> tuple[str, str]:
    """Return two sentences on how to read the stream's figure."""
    third = study.seconds / 3
    back = watched.first("rolled back", third)
    early = sum(second < third for second, name in watched.events if name == "rolled back")
    first = (
        f"The profile broke at {third:.2f} s and was never taken back."
        if back is None
        else f"Answering everything, the profile broke at {third:.2f} s and was taken back {back - third:.2f} s later."
    )
    tries = sum(name == "tried again" for _, name in watched.events)
    return first, f"Rollbacks before it broke: {early}; further trials after a rollback: {tries}."


def measurements(study: GuardStudy) -> list[Measurement]:
    """Return disagreement, false rollbacks, the estimate's error, and the seconds until a fault is noticed. What says
    something about a sound fast profile is unavailable where there is none.
    """
    sound, worst = study._row(SOUND), study._row(BROKEN)
    reason, by = "the baseline has no guard", f"{study.prompts} answers, read again"
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
        why = "the fast profile answers nothing while it is quiet, so nothing shows whether it is broken"
        why = NO_FAST if study.alone else why
        results.append(measurement.unavailable("fault_detection_seconds", "serve, broken", why))
    elif isinstance(answers := worst.get(AFTERWARDS), float) and answers:
        fast = 1.0 if study.fast_share is None else study.fast_share
        later = LATER * study.share
        who = "all of them" if study.fast_share is None else f"{percent(fast)} of them"
        source = f"{study.source}; {study.rate:.1f} answers/s, {who} by the fast profile, {later:g} of those read "
        source += f"after a clean start of {CLEAN_START}, {AT_ONCE} at a time; where requests wait, later"
        if isinstance(first := worst[FROM_START], float):
            source += f"; {first / (study.share * study.rate * fast):.3g} s where it is broken from the start"
        groups = AT_ONCE * math.ceil(answers / AT_ONCE)
        delay = groups / (later * study.rate * fast)
        results.append(_shown("fault_detection_seconds", "serve, broken", None, delay, source, reason=reason))
    else:
        why = "in less than half of the windows was the broken profile taken back"
        results.append(measurement.unavailable("fault_detection_seconds", "serve, broken", why))
    return results


def _shown(
    metric: str, workload: str, baseline: float | None, value: float, source: str, provenance: Any = "estimated",
    reason: str | None = None,
) -> Measurement:  # fmt: skip
    options: dict[str, Any] = {"ratio": None} | ({"reason": reason} if reason else {})
    return measurement.informative(metric, workload, baseline, value, source, provenance, **options)

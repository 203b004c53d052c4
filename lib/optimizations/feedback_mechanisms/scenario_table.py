"""The table of all settings on all scripts: seconds missed, loop against static limit, its figure and how to read it.

Works on rows that were measured; serves nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from lib.measure.metrics.digits import percent
from lib.optimizations.feedback_mechanisms import disturbance_comparison
from lib.optimizations.feedback_mechanisms.disturbance_comparison import MOST_IN_TIME, Row
from lib.optimizations.feedback_mechanisms.guarding.net_saving import NetSaving
from lib.optimizations.feedback_mechanisms.profiles import NO_FAST
from lib.optimizations.feedback_mechanisms.scenarios import GOOD_SHARE

LOOP, PI_LOOP, LIMIT_ALONE = "AIMD loop", "PI loop", "AIMD, limit alone"
BANDIT_LOOP = "AIMD, bandit over profiles"
ORACLE, FAST_ALONE, ROUTED = "oracle", "fast alone", "routed, the loop's share"


@dataclass(frozen=True)
class ScenarioTable:
    """A row per scenario and setting, the static limit that is the baseline of all of them, and a row per static limit
    that was `tried`; `broken` are the rows of scripts whose fast profile breaks, which count for nothing but the guard;
    `net` is what the fast profile saves at the usual lengths, guard charged (None: no candidate was timed), `nets` at
    the lengths of each scenario.
    """

    rows: list[Row]
    best: int
    tried: list[Row] = field(default_factory=list)
    net: NetSaving | None = None
    broken: list[Row] = field(default_factory=list)
    nets: Mapping[str, NetSaving] = field(default_factory=dict)

    @property
    def static(self) -> str:
        """The baseline's name."""
        return f"static {self.best}"

    @property
    def alone(self) -> bool:
        """Whether there is no fast profile."""
        return FAST_ALONE not in self.sums

    @property
    def sums(self) -> dict[str, dict[str, float]]:
        """Means of each setting over all scenarios."""
        return disturbance_comparison.totals(self.rows)

    @property
    def caption(self) -> str:
        """The static limit as one line, and what is left out without a fast profile."""
        text = f"baseline: static limit of {self.best} rows, chosen on scripts of other seeds"
        left_out = "oracle, routing and fast profile would be that limit, and the loops have the limit alone"
        text += f"; net saving of the fast candidate, guard charged: {self.net}" if self.net else ""
        text += "".join(f", {name} {net}" for name, net in self.nets.items() if net != self.net)
        return f"{text}; {NO_FAST}: {left_out}" if self.alone else text

    @property
    def shown(self) -> list[Row]:
        """All rows, those of a broken profile last."""
        return [*self.rows, *self.broken]

    @property
    def caught(self) -> float | None:
        """The share of the loop's scripts with a broken profile in which the guard took it back, of those in which it
        answered anything; None without any.
        """
        row = next((row for row in self.broken if row["setting"] == LOOP), None)
        return None if row is None or row["taken back"] is None else float(str(row["taken back"]))

    @property
    def hardest(self) -> tuple[NetSaving | None, float | None]:
        """What the fast candidate saves in the scenario that requires most beyond that, and what is required there
        (None where no profile could meet it); (`net`, None) where no scenario says what it requires.
        """
        key = "required net saving"
        required = {str(row["scenario"]): row[key] for row in self.rows if key in row}
        lacking: list[tuple[float, NetSaving | None, float | None]] = []
        for name, needed in required.items():
            net = self.nets.get(name, self.net)
            if needed is None:
                return net, None
            factor = float(str(needed))
            lacking.append((factor / net.middle if net else factor, net, factor))
        return max(lacking, key=lambda each: each[0])[1:] if lacking else (self.net, None)

    @property
    def beyond(self) -> dict[str, float]:
        """Scenario → share of the requests that the full profile can keep in time at its worst, where that is less than
        must be: there no limit of rows saves a second, only a faster profile.
        """
        most = {str(row["scenario"]): float(str(row[MOST_IN_TIME])) for row in self.rows if MOST_IN_TIME in row}
        return {name: share for name, share in most.items() if share < GOOD_SHARE}

    def share(self, scenario: str) -> float:
        """Return the share of the answers that the loop gave with the fast profile in one scenario."""
        row = next(row for row in self.rows if row["setting"] == LOOP and row["scenario"] == scenario)
        return float(str(row["fast share"]))

    @property
    def finding(self) -> str:
        """The seconds missed of the loop and its rivals against the static limit."""
        by = {LOOP: "the loop", LIMIT_ALONE: "its limit alone", ROUTED: "routing the same share"}
        by |= {FAST_ALONE: "the fast profile alone"}
        if self.alone:
            by = {LOOP: f"the loop, which has the limit alone ({NO_FAST})", PI_LOOP: "the PI loop"}
        shares = {who: self.missed_ratio(name) for name, who in by.items()}
        parts = [f"{'unknown' if share is None else f'{share:.2f}'} by {who}" for who, share in shares.items()]
        text = f"Seconds missed ÷ static limit: {', '.join(parts)}."
        sums = self.sums
        static = sums[self.static]["goodput share"]
        more = f"{sums[LOOP]['goodput share'] / static:.2f}" if static else "unknown"
        return f"{text} Requests in time against it: {more} by the loop."

    @property
    def ratio(self) -> float | None:
        """Seconds missed, loop ÷ static limit; None where the static limit misses none."""
        return self.missed_ratio(LOOP)

    def missed_ratio(self, setting: str) -> float | None:
        """Return the seconds missed of a setting ÷ those of the static limit."""
        sums = self.sums
        static = sums[self.static]["missed s"]
        return sums[setting]["missed s"] / static if static else None

    def points(self) -> pd.DataFrame:
        """Return a point per setting: `x` answers by the fast profile in percent, `y` seconds missed."""
        points = [
            {"x": 100 * means["fast share"], "y": means["missed s"], "arm": name} for name, means in self.sums.items()
        ]
        return pd.DataFrame(points)

    def reading(self) -> tuple[str, str]:
        """Return two sentences on how to read `points`; without a fast profile, what the limit alone does."""
        sums = self.sums
        loop, static = sums[LOOP], sums[self.static]
        missed = {name: f"{means['missed s']:.2f} s" for name, means in sums.items()}
        if self.alone:
            first = (
                f"{NO_FAST.capitalize()}: the loop misses {missed[LOOP]} of a script, the PI loop {missed[PI_LOOP]} "
                f"and the static limit {missed[self.static]}."
            )
            second = "Whatever differs comes from its limit"
            if self.beyond:
                worst = ", ".join(f"{name} ({percent(share)})" for name, share in self.beyond.items())
                return first, f"{second}; no limit keeps {percent(GOOD_SHARE)} in time at the worst of: {worst}."
            served = f"{percent(loop['goodput share'])} of the requests are in time"
            return first, f"{second}: {served}, and {percent(static['goodput share'])} with the static one."
        first = (
            f"The loop misses {missed[LOOP]} of a script with {percent(loop['fast share'])} of the answers by the fast "
            f"profile, the static limit {missed[self.static]} with none."
        )
        second = (
            f"The loop's limit alone misses {missed[LIMIT_ALONE]}, routing the same share {missed[ROUTED]}, the oracle "
            f"{missed[ORACLE]} and the fast profile alone {missed[FAST_ALONE]}."
        )
        return first, second

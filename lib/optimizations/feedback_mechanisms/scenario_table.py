"""The table of all settings on all scripts: seconds missed, loop against static limit, with its figure and reading.

Works on measured rows; serves nothing itself.
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
    """The measured rows, one per scenario and setting, and the baseline of all of them.

    `best`: the baseline's static limit. `tried`: a row per static limit tried. `broken`: rows of scripts whose fast
    profile breaks, which count only for the guard. `net`: net saving of the fast profile at the usual lengths, guard
    charged (None: no candidate was timed). `nets`: the same at the lengths of each scenario.
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
        """The means of each setting over all scenarios."""
        return disturbance_comparison.totals(self.rows)

    @property
    def caption(self) -> str:
        """One line on the static limit, the net savings, and the settings left out without a fast profile."""
        text = f"baseline: static limit of {self.best} rows, chosen on scripts of other seeds"
        left_out = "oracle, routing and fast profile would equal that limit, and the loops only move the limit"
        text += f"; net saving of the fast candidate, guard charged: {self.net}" if self.net else ""
        text += "".join(f", {name} {net}" for name, net in self.nets.items() if net != self.net)
        return f"{text}; {NO_FAST}: {left_out}" if self.alone else text

    @property
    def shown(self) -> list[Row]:
        """All rows, with those of a broken profile last."""
        return [*self.rows, *self.broken]

    @property
    def caught(self) -> float | None:
        """The share of the loop's scripts with an active broken profile in which the guard rolled it back.

        Active means that it answered at least one request; None without such scripts.
        """
        row = next((row for row in self.broken if row["setting"] == LOOP), None)
        return None if row is None or row["taken back"] is None else float(str(row["taken back"]))

    @property
    def hardest(self) -> tuple[NetSaving | None, float | None]:
        """The fast candidate's net saving in the scenario where it falls shortest, and the net saving required there.

        The latter is None if no profile could meet it; (`net`, None) if no scenario states a requirement.
        """
        key = "required net saving"
        required = {str(row["scenario"]): row[key] for row in self.rows if key in row}
        shortfalls: list[tuple[float, NetSaving | None, float | None]] = []
        for name, needed in required.items():
            net = self.nets.get(name, self.net)
            if needed is None:
                return net, None
            factor = float(str(needed))
            shortfalls.append((factor / net.middle if net else factor, net, factor))
        return max(shortfalls, key=lambda shortfall: shortfall[0])[1:] if shortfalls else (self.net, None)

    @property
    def beyond(self) -> dict[str, float]:
        """Scenario → largest share of requests that the full profile can keep in time at the scenario's peak.

        Only scenarios below GOOD_SHARE: in these no limit of rows saves a second, only a faster profile does.
        """
        most = {str(row["scenario"]): float(str(row[MOST_IN_TIME])) for row in self.rows if MOST_IN_TIME in row}
        return {name: share for name, share in most.items() if share < GOOD_SHARE}

    def share(self, scenario: str) -> float:
        """Return the share of the loop's answers given by the fast profile in one scenario."""
        row = next(row for row in self.rows if row["setting"] == LOOP and row["scenario"] == scenario)
        return float(str(row["fast share"]))

    @property
    def finding(self) -> str:
        """A sentence on the seconds missed by the loop and its rivals, against the static limit."""
        by = {LOOP: "the loop", LIMIT_ALONE: "its limit alone", ROUTED: "routing the same share"}
        by |= {FAST_ALONE: "the fast profile alone"}
        if self.alone:
            by = {LOOP: f"the loop, which only moves the limit ({NO_FAST})", PI_LOOP: "the PI loop"}
        ratios = {arm: self.missed_ratio(name) for name, arm in by.items()}
        parts = [f"{'unknown' if ratio is None else f'{ratio:.2f}'} by {arm}" for arm, ratio in ratios.items()]
        text = f"Seconds missed ÷ static limit: {', '.join(parts)}."
        sums = self.sums
        static = sums[self.static]["goodput share"]
        in_time = f"{sums[LOOP]['goodput share'] / static:.2f}" if static else "unknown"
        return f"{text} Requests in time against it: {in_time} by the loop."

    @property
    def ratio(self) -> float | None:
        """Seconds missed, loop ÷ static limit; None if the static limit misses none."""
        return self.missed_ratio(LOOP)

    def missed_ratio(self, setting: str) -> float | None:
        """Return the seconds missed by a setting ÷ those of the static limit; None if these are none."""
        sums = self.sums
        static = sums[self.static]["missed s"]
        return sums[setting]["missed s"] / static if static else None

    def points(self) -> pd.DataFrame:
        """Return a point per setting: `x` percent of answers by the fast profile, `y` seconds missed."""
        points = [
            {"x": 100 * means["fast share"], "y": means["missed s"], "arm": name} for name, means in self.sums.items()
        ]
        return pd.DataFrame(points)

    def reading(self) -> tuple[str, str]:
        """Return two sentences on `points`; without a fast profile, on the effect of the limit alone."""
        sums = self.sums
        loop, static = sums[LOOP], sums[self.static]
        missed = {name: f"{means['missed s']:.2f} s" for name, means in sums.items()}
        if self.alone:
            first = (
                f"{NO_FAST.capitalize()}: the loop misses {missed[LOOP]} per script, the PI loop {missed[PI_LOOP]} "
                f"and the static limit {missed[self.static]}."
            )
            second = "Any difference comes from its limit"
            if self.beyond:
                worst = ", ".join(f"{name} ({percent(share)})" for name, share in self.beyond.items())
                return first, f"{second}; no limit keeps {percent(GOOD_SHARE)} in time at the peak of: {worst}."
            served = f"{percent(loop['goodput share'])} of the requests are in time"
            return first, f"{second}: {served}, against {percent(static['goodput share'])} with the static one."
        first = (
            f"The loop misses {missed[LOOP]} per script with {percent(loop['fast share'])} of the answers by the fast "
            f"profile, the static limit {missed[self.static]} with none."
        )
        second = (
            f"The loop's limit alone misses {missed[LIMIT_ALONE]}, routing the same share {missed[ROUTED]}, the oracle "
            f"{missed[ORACLE]} and the fast profile alone {missed[FAST_ALONE]}."
        )
        return first, second

"""The outcome of the search over configurations: targets, the answer to each claim, controls and details of the record.

Everything is computed from the measurements of `experiment` and `controls`.
"""

import pandas as pd

from lib.measure.compare.speed import Compared
from lib.measure.metrics.digits import percent
from lib.optimizations.automl_components import controls
from lib.optimizations.automl_components.controls import OPTIMUM_SHARE, EqualSeconds, SmallGrid, seconds
from lib.optimizations.automl_components.experiment import PAIRS, SearchStudy
from lib.optimizations.common.evidence.claims import ClaimAnswer, ThirdArm
from lib.optimizations.common.recipe import LOSING, Recipe

CLAIMS = (
    "Random configurations are as good in the same time.",
    "The defaults, each component alone, are as good.",
    "On a small grid, judged whole, a quarter of the evaluations finds less than 95 % of the optimum.",
)


def targets(equal: EqualSeconds, grid: SmallGrid, recipe: Recipe) -> pd.DataFrame:
    """Return each target, its value, and whether it was reached; targets were fixed before the first run.

    Areas without a sure gain in time reach no target, and a stack judged to lose is no better than nothing.
    """
    improved = bool(recipe.stack) and recipe.accuracy not in LOSING
    gain, own, defaults = equal.gain, equal.volumes["search"], equal.volumes["defaults"]
    above, least = own / defaults if defaults else None, 1 + controls.VOLUME_MARGIN
    share = f"{percent(OPTIMUM_SHARE)} of the grid's optimum in a quarter of its evaluations"
    lines = [
        (
            f"hypervolume more than {least:.2f} of random's in equal time",
            gain,
            not equal.unsure and (own > 0 if gain is None else gain > least),
        ),
        (f"hypervolume more than {least:.2f} of the defaults'", above, not equal.unsure and own > least * defaults),
        (share, grid.reached, grid.sure is not False and grid.reached >= OPTIMUM_SHARE),
        ("a stack better than no change was found", float(len(recipe.stack)), improved),
    ]
    return pd.DataFrame(lines, columns=["target", "value", "reached"])


def refutations(equal: EqualSeconds, grid: SmallGrid) -> list[ClaimAnswer]:
    """Return (claim, whether it is refuted, evidence) for each of CLAIMS."""
    answers = (equal.random_refuted(), equal.defaults_refuted(), grid.refuted())
    return [(claim, *answer) for claim, answer in zip(CLAIMS, answers)]


def arms(compared: Compared, equal: EqualSeconds) -> list[ThirdArm]:
    """Return the controls of a record: A/A, chance and the defaults."""
    return [ThirdArm("A/A", "a copy of the baseline", compared.control()), *equal.controls()]


def details(
    file: SearchStudy,
    recipe: Recipe,
    best: pd.DataFrame,
    equal: EqualSeconds,
    grid: SmallGrid,
    reached: pd.DataFrame,
    automation: float,
) -> dict[str, tuple[object, str, str, dict[str, str]]]:
    """Return the record's details: name → (value, provenance, source, names of axes)."""
    took = f"{seconds(equal.arms['search']):.1f} s each"
    steps = [step.model_dump() for step in recipe.stack]
    study = [file.name, file.trials, file.notes, file.served]
    axes = {"x": "configurations judged", "y": "area that the best of them dominate"}
    timed, curves = equal.points().to_dict("records"), {"search": grid.curves, "chance": grid.chance}
    return {
        "stack": (steps, "derived", "chosen by the rule", {}),
        "finalists": (best.to_dict("records"), "measured", "timed again in common rounds; split search", {}),
        "study": (study, "derived", "its file; trials it started with", {}),
        "targets": (reached.to_dict("records"), "measured", "computed from this record's numbers", {}),
        "hypervolumes": (equal.volumes, "measured", took, {}),
        "configurations": (timed, "measured", f"{PAIRS[recipe.effort]} balanced pairs each; KL on search text", {}),
        "impact": (equal.impact(), "measured", "time and KL on search text, equal seconds", axes),
        "grid": (grid.areas_LL.tolist(), "measured", f"dominated area, {grid.pair}", {}),
        "regret": (curves, "measured", "3 seeds; 200 draws", {}),
        "automation": (automation, "derived", "decisions made by the search over all decisions", {}),
        "crashed": (equal.crashed, "measured", "configurations that raised no request error", {}),
    }

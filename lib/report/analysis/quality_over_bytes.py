"""Quality against bytes: every arm of every record that has both, so that all compressions share one axis.

Controls count as well as optimized models: weight-only int8 and int4, rounded or by GPTQ, are controls. Weights that
are partly held in memory and streamed from a full-size file are not compressed. Draws nothing.
"""

from collections.abc import Iterable, Sequence

import pandas as pd

from lib.measure.metrics.measurement import Measurement
from lib.report.records.record import Record
from lib.report.text import brief
from lib.report.text.quantities import counted
from lib.report.text.wording import title

BYTES, FILE_BYTES, DIVERGENCE = "weights_bytes", "checkpoint_bytes", "kl_divergence_nats"
COLUMNS = ("arm", "name", "label", "x", "x_low", "x_high", "y", "y_low", "y_high")
YARDSTICKS = ("int8", "int4, groups of 128", "int4, GPTQ")  # keep their names in every record


def points(records: Iterable[Record]) -> pd.DataFrame:
    """Return a row per arm whose weights take fewer bytes than the baseline's, in memory and, where known, on disk: `x`
    is the share of the baseline's bytes (the larger of the two), `y` the divergence from the baseline in nats per token
    with its interval, `label` the model, `name` the arm, `arm` its family.

    A yardstick is the same in every record of a model that quantizes all matrices, so only its smallest point is kept.
    """
    lines: list[dict[str, object]] = []
    for record in records:
        family = title(record.optimization)
        arms = [(family, family, record.measurements)]
        arms += [
            (name if name in YARDSTICKS else f"{family}: other arms", name, control.measurements)
            for control in record.controls
            if (name := control.name)
        ]
        for arm, name, measurements in arms:
            if point := _point(measurements):
                lines.append({"arm": arm, "name": name, "label": record.model, **point})
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    known = frame["arm"].isin(YARDSTICKS)
    smallest = frame[known].sort_values("x").drop_duplicates(["arm", "label"])
    return pd.concat([frame[~known], smallest]).astype(dict.fromkeys(COLUMNS[3:], float)).reset_index(drop=True)


def _point(measurements: Iterable[Measurement]) -> dict[str, float | None] | None:
    wanted = (BYTES, FILE_BYTES, DIVERGENCE)
    chosen = {m.metric: m for m in measurements if m.metric in wanted and m.verdict != "invalid"}
    if not {BYTES, DIVERGENCE} <= set(chosen):
        return None
    ratios, divergence = [chosen[name].ratio for name in (BYTES, FILE_BYTES) if name in chosen], chosen[DIVERGENCE]
    share = max((ratio for ratio in ratios if ratio is not None), default=1.0)
    if chosen[BYTES].ratio is None or share >= 1 or not divergence.optimized or divergence.optimized <= 0:
        return None
    low, high = divergence.ci or (None, None)
    return {"x": share, "y": divergence.optimized, "y_low": low or None, "y_high": high}


def read(frame: pd.DataFrame) -> tuple[str, str]:
    """Return two sentences: which arms are on the Pareto front of their model, and how many of these are yardsticks."""
    if frame.empty:
        return "No record has both bytes and divergence.", "Nothing can be compared at equal bytes."
    best = [index for index, row in frame.iterrows() if not _beaten(row, frame[frame["label"] == row["label"]])]
    counts = frame.loc[best, "arm"].value_counts()
    names = [f"{count} {arm}" for arm, count in counts.items()]
    yardsticks = int(sum(count for arm, count in counts.items() if arm in YARDSTICKS))
    start = f"{len(best)} of {len(frame)} points lie on the Pareto front of bytes and divergence"
    return _named(start, names), f"{yardsticks} of them are weight-only quantization."


def _named(start: str, names: Sequence[str]) -> str:
    """Return a sentence that begins with `start` and lists the names; if it is too long, the last ones are counted."""
    texts = [f"{start}: {', '.join(names)}."]
    for shown in range(len(names) - 1, -1, -1):
        rest = counted(len(names) - shown, "other kind")
        texts.append(f"{start}: {', '.join([*names[:shown], rest])}.")
    return next((text for text in texts if brief.count(text) <= brief.MOST_WORDS), texts[-1])


def _beaten(row: pd.Series, others: pd.DataFrame) -> bool:
    better = (others["x"] <= row["x"]) & (others["y"] <= row["y"])
    strictly = (others["x"] < row["x"]) | (others["y"] < row["y"])
    return bool((better & strictly).any())

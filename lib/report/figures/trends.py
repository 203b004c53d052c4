"""Each metric over the builds in the history: the frame, its figure, and the changes in words.

A line joins builds of the same effort on the same machine and workload (for a policy, the fixed size that it is
compared with); others are not comparable. Knows the history's rows (`lib.report.records.history.over_time`) and no
notebook.
"""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lib.measure.metrics.catalogue import METRICS
from lib.report.figures.theme import INK, applied, legend_columns, look, new_axes, whiskers
from lib.report.records import history
from lib.report.text.quantities import counted, times
from lib.report.text.wording import label, title

MOST = 30  # builds
MOST_MODELS, WITH_TIMES = 6, 4  # models side by side; the most that leave room for times of day below their panels
RUN = ["optimization", "model", "metric"]
CONDITIONS = ["effort", "machine", "workload"]


def read(path: Path, scale: str) -> pd.DataFrame:
    """Return the judged metrics of the last MOST builds: `at` (the build's number, from 0), `build` (its date),
    `optimization`, `model`, `metric`, `dimension`, `effort`, `machine`, `gain` (above 1 is better), `low`, `high`.

    Of several workloads of a metric the first counts. Empty where there is no history. Raises UserError where the file
    is not a history.
    """
    frame = pd.DataFrame(history.over_time(path, scale))
    if frame.empty:
        return frame
    frame = frame[[METRICS[name].margin is not None if name in METRICS else False for name in frame["metric"]]]
    frame = frame.drop_duplicates(["build", *RUN])
    order = list(dict.fromkeys(frame["build"]))[-MOST:]
    frame = frame[frame["build"].isin(order)]
    dimensions = [METRICS[name].dimension for name in frame["metric"]]
    return frame.assign(at=[order.index(build) for build in frame["build"]], dimension=dimensions).astype(
        dict.fromkeys(["gain", "low", "high"], float)
    )


def of(frame: pd.DataFrame, dimension: str) -> pd.DataFrame:
    """Return the rows of one dimension of a frame from `read`, which may be empty."""
    return frame[frame["dimension"] == dimension] if len(frame) else frame


def draw(frame: pd.DataFrame) -> Figure:
    """Return a panel per metric and model (the first MOST_MODELS models): the gain of each optimization over the
    builds, with its interval.
    """
    models = sorted(set(frame["model"]))[:MOST_MODELS]
    frame = frame[frame["model"].isin(models)]
    metrics = [name for name in METRICS if name in set(frame["metric"])]
    arms, written = sorted(set(frame["optimization"])), 16 if len(models) <= WITH_TIMES else 10
    days = frame.drop_duplicates("at").set_index("at")["build"].str[5:written].str.replace("T", " ").sort_index()
    shown = days.iloc[[0, -1]] if len(days) > 1 else days
    with applied():
        figure, axes = new_axes(
            1.25 * len(metrics) + 1, len(models), len(metrics), sharex=True, sharey="row", squeeze=False
        )
        for index, (panel, metric, model) in enumerate(
            (axes[row * len(models) + column], metric, model)
            for row, metric in enumerate(metrics)
            for column, model in enumerate(models)
        ):
            panel.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
            here = frame[(frame["metric"] == metric) & (frame["model"] == model)]
            for (name, *_), rows in here.groupby(["optimization", *CONDITIONS], sort=True):
                colour, marker = look(arms.index(name))
                panel.plot(rows["at"], rows["gain"], color=colour, marker=marker, markersize=3.5, linewidth=1)
                whiskers(panel, rows, "at", "gain", "low", "high", fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6)
            if index < len(models):
                panel.set_title(model, fontsize=8)
            if index % len(models) == 0:
                panel.set_ylabel(label(metric).replace(", ", ",\n"), fontsize=7, rotation=0, ha="right", va="center")
            panel.set_xticks(list(shown.index), list(shown), fontsize=6.5)
            for text, side in zip(panel.get_xticklabels(), ("left", "right")):
                text.set_ha(side if len(shown) > 1 else "center")
            panel.tick_params(axis="y", labelsize=7)
        figure.suptitle("Gain over the baseline, above 1 is better; from the first build to the last", fontsize=8.5)
        looks = [look(index) for index in range(len(arms))]
        handles = [axes[0].plot([], [], color=colour, marker=marker)[0] for colour, marker in looks]
        names = [title(name) for name in arms]
        columns = legend_columns(names, 7.5, most=4)
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=7.5)
    return figure


def words(frame: pd.DataFrame) -> str:
    """Return the figure's alternative text: the number of builds and metrics, and the changes since the last build."""
    days = sorted(frame["build"])
    about = f"{counted(frame['metric'].nunique(), 'metric')} of {counted(len(frame.groupby(RUN[:2])), 'run')}"
    span = days[0][:10] if days[0][:10] == days[-1][:10] else f"{days[0][:10]} to {days[-1][:10]}"
    moved = _moved(frame)
    changes = "; ".join(moved[:6]) + (f"; and {len(moved) - 6} more" if len(moved) > 6 else "")
    last = f"since the previous build, intervals that no longer overlap: {changes or 'none'}"
    builds, models = frame["at"].nunique(), frame["model"].nunique()
    drawn = f" Only the first {MOST_MODELS} of {models} models are drawn." if models > MOST_MODELS else ""
    return f"{about} over {counted(builds, 'build')}, {span}" + (
        f"; {last}.{drawn}" if builds > 1 else f"; nothing to compare.{drawn}"
    )


def _moved(frame: pd.DataFrame) -> list[str]:
    """Return the runs whose last interval does not overlap the previous one, under the same conditions."""
    changes = []
    last = frame["at"].max()
    for (optimization, model, metric, *_), rows in frame.groupby([*RUN, *CONDITIONS], sort=True):
        rows = rows.sort_values("at").tail(2)
        if len(rows) < 2 or rows["at"].iloc[1] != last:
            continue
        before, after = rows.fillna({"low": rows["gain"], "high": rows["gain"]}).to_dict("records")
        if after["low"] > before["high"] or after["high"] < before["low"]:
            values = f"{times(before['gain'])} to {times(after['gain'])}"
            changes.append(f"{label(str(metric))} of {title(str(optimization))} on {model} {values}")
    return changes

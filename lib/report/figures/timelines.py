"""Several quantities over one time axis, one panel per quantity: the behaviour of a server over time.

`timeline` takes tidy frames and returns a matplotlib Figure in the style of `lib.report.figures.theme`; `serving` and
`loop` build the panels of a run of the server loop. Independent of models and policies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.report.figures.theme import (
    BAND,
    GREY,
    INK,
    STYLE,
    VERMILLION,
    applied,
    legend_columns,
    log_y_axis,
    look,
    new_axes,
)

KINDS = ("line", "steps", "points", "bars")


@dataclass(frozen=True)
class Panel:
    """One quantity: `frame` has the columns `seconds`, `value` and, for several curves, `arm`.

    kind: "line", "steps" (holds until the next point), "points" or "bars" (`width` seconds each, first arm only).
    `objective` is drawn as a dashed line labelled `objective_name`; `log` makes the axis logarithmic.
    """

    frame: pd.DataFrame
    label: str
    kind: str = "line"
    objective: float | None = None
    objective_name: str = "objective"
    log: bool = False
    width: float = 1.0


def timeline(panels: Sequence[Panel], *, marks: Sequence[tuple[float, str]] = (), title: str = "") -> Figure:
    """Return a figure of the panels stacked over one time axis; `marks` are (second, text) of events.

    Raises ValueError for no panel, an unknown kind, or a panel without its columns.
    """
    if not panels:
        raise ValueError("a timeline needs at least one panel")
    for panel in panels:
        if panel.kind not in KINDS or not {"seconds", "value"} <= set(panel.frame):
            raise ValueError(f"panel {panel.label}: kind one of {', '.join(KINDS)}; columns seconds and value")
    arms = list(dict.fromkeys(arm for panel in panels if "arm" in panel.frame for arm in panel.frame["arm"]))
    with applied():
        figure, axes = new_axes(1.2 + 1.35 * len(panels), rows=len(panels), sharex=True)
        for place, panel in zip(axes, panels):
            _draw(place, panel, arms)
        for index, (second, text) in enumerate(marks):
            for place in axes:
                place.axvline(second, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
            axes[0].annotate(text, (second, 1), xycoords=("data", "axes fraction"), xytext=(3, 3 + 10 * (index % 2)),
                             textcoords="offset points", fontsize=8, color=GREY)  # fmt: skip
        axes[0].set_title(title, pad=28 if marks else None)
        axes[-1].set_xlabel("time (s)")
        figure.align_ylabels(list(axes))
        handles = {label: handle for place in axes for handle, label in zip(*place.get_legend_handles_labels())}
        if handles:
            columns = legend_columns(handles, 8.5, most=4)
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8.5)
    return figure


def serving(served, *, first_token_ms: float, token_ms: float, names: Sequence[str] = (), title: str = "") -> Figure:
    """Return the timeline of a run of the server loop: arrivals, queue, batch, and latency against the objectives.

    `served` is a `lib.measure.serving.server.Served` with at least one step; `names` label the phases of its trace.
    """
    steps = pd.DataFrame([step._asdict() for step in served.steps])
    decode = steps[steps.kind == "decode"]
    width = max(served.end / 60, 1e-3)
    arrived = pd.Series([outcome.request.arrival for outcome in served.outcomes]) // width * width
    arrivals = arrived.value_counts().rename_axis("seconds").reset_index(name="value")
    done = [outcome for outcome in served.outcomes if outcome.finished is not None]
    at = [outcome.request.arrival for outcome in done]
    first = pd.DataFrame({"seconds": at, "value": [1000 * outcome.first_token_seconds for outcome in done]})
    token = pd.DataFrame({"seconds": at, "value": [1000 * outcome.token_seconds for outcome in done]})
    panels = [
        Panel(arrivals.assign(value=arrivals.value / width), "arrivals/s", "bars", width=width),
        Panel(pd.DataFrame({"seconds": steps.start, "value": steps.waiting}), "waiting", "steps"),
        Panel(pd.DataFrame({"seconds": decode.start, "value": decode.batch}), "batch (rows)", "steps"),
        Panel(first, "first token (ms)", "points", first_token_ms),
        Panel(token, "per token (ms)", "points", token_ms),
    ]
    return timeline(panels, marks=list(zip(served.trace.starts, names)), title=title)


def loop(served, course: Sequence[tuple], profiles: Sequence[tuple], objectives) -> list[Panel]:
    """Return the panels of a closed loop: signal, limit, active profile, and the latencies of requests by arrival.

    `course` has (second, limit in rows, seconds per token) of every decision, `profiles` (second, profile) of every
    change; `objectives` has the attributes `first_token_seconds` and `token_seconds`.
    """
    signals = pd.DataFrame(course, columns=["seconds", "limit", "signal"])
    switched = pd.DataFrame([(0.0, 0), *profiles, (served.end, profiles[-1][1] if profiles else 0)],
                            columns=["seconds", "value"])  # fmt: skip
    done = [outcome for outcome in served.outcomes if outcome.finished is not None]
    at = [outcome.request.arrival for outcome in done]
    first = pd.DataFrame({"seconds": at, "value": [1000 * outcome.first_token_seconds for outcome in done]})
    token = pd.DataFrame({"seconds": at, "value": [1000 * outcome.token_seconds for outcome in done]})
    return [
        Panel(
            signals.assign(value=1000 * signals.signal),
            "signal (ms/token)",
            "line",
            1000 * objectives.token_seconds,
        ),
        Panel(signals.assign(value=signals.limit), "limit (rows)", "steps"),
        Panel(switched, "fast in charge", "steps"),
        Panel(first, "first token (ms)", "points", 1000 * objectives.first_token_seconds),
        Panel(token, "per token (ms)", "points", 1000 * objectives.token_seconds),
    ]


def _draw(axes: Axes, panel: Panel, arms: list[str]) -> None:
    groups = panel.frame.groupby("arm", sort=False) if "arm" in panel.frame else [(None, panel.frame)]
    for arm, rows in groups:
        name = None if arm is None else str(arm)
        colour, marker = look(arms.index(name)) if name in arms else (INK, "o")
        x, y = rows["seconds"], rows["value"]
        if panel.kind == "bars":
            axes.bar(x, y, width=panel.width, align="edge", color=BAND, edgecolor=GREY, linewidth=0.6)
        elif panel.kind == "points":
            size = 9 if len(rows) < 400 else 4
            axes.scatter(x, y, s=size, color=colour, marker=marker, alpha=0.65, linewidths=0, label=name)
        else:
            style = "steps-post" if panel.kind == "steps" else "default"
            axes.plot(x, y, color=colour, linewidth=1.4, drawstyle=style, label=name)
    if panel.objective is not None:
        axes.axhline(panel.objective, color=VERMILLION, linestyle="--", linewidth=1.2, label=panel.objective_name)
    if panel.log:
        log_y_axis(axes)
    else:  # matplotlib would scale an axis of zeros to hundredths
        has_values = panel.objective is not None or (panel.frame["value"] > 0).any()
        axes.set_ylim(bottom=0, top=None if has_values else 1)
    axes.set_ylabel(panel.label, fontsize=STYLE["font.size"] - 1)

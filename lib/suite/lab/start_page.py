"""JupyterLab's start page: the notebooks, how many minutes each takes, and its last result.

Markdown from the templates and the records of a result folder; notebooks that were never run are marked. Runs nothing.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType

from lib.errors import UserError
from lib.files import write_atomically
from lib.report.analysis.noise import discoveries
from lib.report.records.record import Record, read_folder
from lib.report.records.setting import facts, stand_in
from lib.report.text.wording import one_line, title, untagged, words
from lib.suite.plan import plan
from lib.suite.plan import template as templates
from lib.suite.plan.plan import Job
from lib.suite.plan.template import Template
from lib.suite.run.kernel_process import RUN_SECONDS

NAME = "start.md"
LONGEST = 260  # characters of a result in the table
INTRODUCTION = """# Model optimizations, hands-on

These notebooks are copies: edit them, run them, break them. The templates and the results of builds stay unchanged,
and a copy in which you edited cells is never overwritten.

Open a notebook below, change a parameter in its first code cell, then *Run → Run All Cells*. The status bar counts the
cells, and its button leads to the running one, which shows the run's progress. After the last cell, this run is shown
next to the previous one."""


@dataclass(frozen=True)
class ListedNotebook:
    """A notebook on the page: the copy's file name, its template, and the model, scale and effort it is set to."""

    file: str
    template: Template
    model: str
    scale: str
    effort: str


def entries(jobs: Sequence[Job]) -> list[ListedNotebook]:
    """Return an entry for each job, or, without jobs, for each template with its defaults."""
    if jobs:
        return [ListedNotebook(f"{job.stem}.ipynb", job.template, job.model, job.scale, job.effort) for job in jobs]
    listed = []
    for stem in plan.optimizations():
        with contextlib.suppress(UserError, KeyError):  # a notebook that is still being written
            template = templates.read(plan.NOTEBOOKS / f"{stem}.ipynb")
            model, scale, effort = (str(template.parameters[name].default) for name in ("model", "scale", "effort"))
            listed.append(ListedNotebook(template.path.name, template, model, scale, effort))
    return listed


def write(listed: Sequence[ListedNotebook], results: Path, folder: Path) -> Path:
    """Write the page of these entries into `folder`; return its path. `results` has a result folder per scale."""
    known = {scale: read_folder(results / scale) for scale in {entry.scale for entry in listed}}
    records = {scale: discoveries.settled(read) for scale, (read, _) in known.items()}
    return write_atomically(folder / NAME, text(listed, records, {scale: bad for scale, (_, bad) in known.items()}))


def text(
    listed: Sequence[ListedNotebook],
    records: dict[str, list[Record]],
    damaged: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> str:
    """Return the page as Markdown. `records` maps a scale to its records, with verdicts corrected over the set;
    `damaged` maps a scale to stem → fault of records that cannot be read.
    """
    parts = [INTRODUCTION]
    for scale, model in dict.fromkeys((entry.scale, entry.model) for entry in listed):
        own = [entry for entry in listed if (entry.scale, entry.model) == (scale, model)]
        parts += _section(own, records.get(scale, []), damaged.get(scale, {}), scale, model)
    others = [f"`{name}`" for name in plan.models() if name not in {entry.model for entry in listed}]
    named = ", ".join([*others, "or a checkpoint" if others else "a checkpoint"])
    parts.append(
        f"## Another model\n\n`python build.py lab --model M` makes copies that are set to it: {named}: a folder, a "
        "`.gguf` file, a hub id."
    )
    if (plan.NOTEBOOKS / f"{plan.OVERVIEW}.ipynb").is_file():
        parts.append(
            f"## All results\n\n[{title(plan.OVERVIEW)}]({plan.OVERVIEW}.ipynb) reads the records of all builds; there "
            "you choose model, metric and margin."
        )
    return "\n\n".join(parts) + "\n"


def _section(
    listed: Sequence[ListedNotebook], records: Sequence[Record], damaged: Mapping[str, str], scale: str, model: str
) -> list[str]:
    sizes = stand_in.sizes(record for record in records if record.model == model)
    about = stand_in.of_model(scale, model, sizes.get(model))
    lines = ["| notebook | what it does | takes | last result |", "| --- | --- | --- | --- |"]
    for entry in listed:
        name = f"[{title(entry.template.stem)}]({entry.file})"
        cells = (name, what_it_does(entry.template), _takes(entry, records), _last(entry, records, damaged))
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return [f"## {model}, scale {scale}", *([f"> {untagged(about)}"] if about else []), "\n".join(lines)]


def _cell(text: str) -> str:
    return untagged(text.replace("|", "\\|"))


def what_it_does(template: Template) -> str:
    """Return the first sentence below a template's title; empty where there is none."""
    prose = (source for kind, source, _ in template.cells if kind == "markdown")
    paragraphs = [part for part in next(prose, "").split("\n\n") if not part.startswith("#")]
    first = " ".join(paragraphs[0].split()) if paragraphs else ""
    sentence, stop, _ = first.partition(". ")
    return sentence + stop.strip()


def _takes(entry: ListedNotebook, records: Sequence[Record]) -> str:
    """Return how long a run takes: from its own record, from those of other models, or its time limit."""
    alike = [r for r in records if r.optimization == entry.template.stem and r.seconds and r.status == "ok"]
    same = [r for r in alike if r.effort == entry.effort] or alike
    own = [r for r in same if r.model == entry.model] or same
    if not own:
        return f"no run yet; its limit is {_minutes(RUN_SECONDS[entry.effort])}"
    own = [r for r in own if r.effort == own[0].effort]  # never a median over two efforts
    about = "" if own[0].model == entry.model else ", on other models"
    return f"{_minutes(median(r.seconds for r in own if r.seconds))} at {own[0].effort}{about}"


def _minutes(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 10 else f"{minutes:.0f} min"


def _last(entry: ListedNotebook, records: Iterable[Record], damaged: Mapping[str, str]) -> str:
    if fault := damaged.get(f"{entry.template.stem}--{entry.model}"):
        return one_line(fault, LONGEST)
    run = next((r for r in records if (r.optimization, r.model) == (entry.template.stem, entry.model)), None)
    if run is None:
        return "not run yet"
    result = run.verdict.sentence if run.status == "ok" else f"{words(run.status)}: {run.reason}"
    when = ", ".join(part for part in (facts.day(run.started)[:10], run.effort) if part)
    return f"{one_line(result or 'no verdict', LONGEST)} ({when})"

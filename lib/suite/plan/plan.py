"""The plan: turns a request and the contents of the folders into jobs with checked parameters.

Folders are the registry: an optimization is a notebook in `notebooks/`, a model is a file in `parameters/` or a
checkpoint named on the command line. A model takes part at the scales that it describes. Independent of what has
already been run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib.errors import UserError, suggest
from lib.files import expanded, visible
from lib.models import parameters as parameter_files
from lib.models.checkpoints import folder as checkpoint
from lib.models.checkpoints import validate
from lib.models.sources import fetch as sources
from lib.models.sources import reference
from lib.models.tasks import text_file
from lib.models.tasks.benchmarks import BENCHMARKS
from lib.models.tasks.registry import check_tasks
from lib.suite.plan import fetching
from lib.suite.plan import template as templates
from lib.suite.plan.template import Template
from lib.suite.plan.values import resolve

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOKS = ROOT / "notebooks"
OVERVIEW = "overview"
SCALES = parameter_files.SCALES
EFFORTS = ("preview", "quick", "standard", "thorough")
# At real dimensions one call takes as long as many calls of a proxy model, and is just as informative.
DEFAULT_EFFORT = {"proxy": "standard", "slice": "quick", "full": "standard"}
FIRST_PASS = "preview"  # of a whole build at a larger effort: the site is complete early
DEVICES = ("cpu", "cuda")
PICTURES = "digits"  # the task with pictures
# As in lib/measure/metrics/catalogue.py, which a listing need not load; a test checks that both agree.
DIMENSIONS = ("performance", "accuracy", "resources", "efficiency")


@dataclass(frozen=True)
class Request:
    """What the command line requests. Empty `optimizations`, `models` or `dimensions` mean all of them."""

    optimizations: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    scale: str = "proxy"
    effort: str = "standard"
    device: str = "cpu"
    checkpoints: str = ""
    random_weights: bool = False
    dimensions: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One notebook to be run on one model, every parameter resolved and checked."""

    template: Template
    model: str
    scale: str
    effort: str
    parameters: Mapping[str, Any]
    dimensions: tuple[str, ...] = ()

    @property
    def optimization(self) -> str:
        """The optimization's name."""
        return self.template.stem

    @property
    def stem(self) -> str:
        """The name of this job's files, without suffix."""
        return f"{self.optimization}--{self.model}"


def at_effort(job: Job, effort: str) -> Job:
    """Return the job at another effort; its key differs, so that neither result counts for the other."""
    return replace(job, effort=effort, parameters={**job.parameters, "effort": effort})


def optimizations() -> list[str]:
    """Return the optimizations that have a template, sorted."""
    return sorted(path.stem for path in visible(NOTEBOOKS, "*.ipynb") if path.stem != OVERVIEW)


def models(scale: str | None = None) -> list[str]:
    """Return the models with a parameter file, sorted; with `scale`, only those that take part at it."""
    return parameter_files.names_at(scale) if scale in SCALES else parameter_files.names()


def model_named(text: str) -> str:
    """Return the name of a model given on the command line by its name or its checkpoint, which is then registered.

    A checkpoint is a folder, a `.gguf` file, `package:NAME==VERSION/PATH` or a hub id with a slash. Raises UserError.
    """
    known = models()
    if text in known or text in parameter_files.registered():
        return text
    if "/" in text or text.startswith(reference.PACKAGE) or reference.is_path(text):
        return parameter_files.register(text)
    hint = suggest(text, known) or f" Known: {', '.join(known)}; or a checkpoint: a folder, a .gguf file, a hub id."
    raise UserError(f'unknown model "{text}".{hint}')


def recorded_name(text: str) -> str:
    """Return the name under which the results of a model are stored, given its name or its checkpoint; `text` itself if
    no model has that checkpoint. Raises UserError for an invalid reference.
    """
    if "/" in text or text.startswith(reference.PACKAGE) or reference.is_path(text):
        return parameter_files.known_as(text) or text
    return text


def implied_scale(chosen: Sequence[str]) -> str:
    """Return the scale of a request that names none: `proxy`, or `full` for models without a proxy model.

    Raises UserError if only some of the models have one.
    """
    part = parameter_files.takes_part(chosen)
    without = [name for name, scales in part.items() if scales and "proxy" not in scales]
    if without and len(without) < len(chosen):
        raise UserError(f"{without[0]} takes part at {', '.join(part[without[0]])} only; give --scale, or one model")
    return "full" if without else "proxy"


def assignments(pairs: list[str]) -> dict[str, str]:
    """Return `["ratio=0.5"]` as a mapping. Raises UserError for anything that is not NAME=VALUE or is given twice."""
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise UserError(f'-p {pair}: expected NAME=VALUE, for example "-p seed=1"')
        if name in values:
            raise UserError(f'-p {pair}: "{name}" is given twice')
        values[name] = value.strip()
    return values


def plan(request: Request, to_run: bool = True, here: bool = True) -> list[Job]:
    """Return the jobs of a request in the order of running. Raises UserError, before anything runs.

    Without `to_run` neither the device nor the weights need to be present; without `here` (on a cluster) the device
    need not be.
    """
    chosen = _chosen("optimization", request.optimizations, optimizations(), "notebooks/*.ipynb")
    on = _models(request)
    if to_run and here:
        check_device(request.device)
    dimensions = _dimensions(request.dimensions)
    read = [templates.read(NOTEBOOKS / f"{name}.ipynb") for name in chosen]
    files = {name: parameter_files.read(name) for name in on}
    for name in on:
        _check_sections(name, files[name].optimizations)
        _check_own_tasks(name, files[name].tasks)
    # All checks that need no downloads come before the first download.
    values = {
        (template.stem, name): resolve(
            template, _options(name, request), files[name].optimizations.get(template.stem, {}), request.parameters
        )
        for template in read
        for name in on
    }
    for (_, name), parameters in values.items():
        _check_pictures(name, files[name], parameters)
    if to_run:
        folders = {name: folder for name in on if (folder := _weights(name, request))}
        if request.scale == "full":
            validate.check(folders.values())
        validate.check_described([name for name in on if name not in folders], request.scale)
        for (_, name), parameters in values.items():
            _check_pictures(name, parameter_files.completed(files[name], folders.get(name)), parameters)
        _bring_data(
            {(name, _text_and_tasks(parameters, files[name].tasks)) for (_, name), parameters in values.items()},
            folders,
        )
    return [
        Job(template, name, request.scale, request.effort, values[template.stem, name], dimensions)
        for template in read
        for name in on
    ]


def _check_pictures(model: str, description: parameter_files.ModelParameters, values: Mapping[str, Any]) -> None:
    """Raise UserError where a model without vision has a task with pictures."""
    _, tasks = _text_and_tasks(values, description.tasks)
    if PICTURES in tasks and description.full and description.full.get("vision_config") is None:
        raise UserError(f'{model}: the task "{PICTURES}" shows pictures, but this model has no vision; leave it out')


def _text_and_tasks(values: Mapping[str, Any], tasks: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the user's own text of a run, or "", and its tasks, by default those of its model."""
    return values.get("text", ""), tuple(values.get("tasks") or tasks)


def _bring_data(questions: Iterable[tuple[str, tuple[str, tuple[str, ...]]]], folders: Mapping[str, Path]) -> None:
    """Check that the user's own text fills its windows for each model; fetch and verify the benchmarks of the tasks.

    `folders` maps a model to the folder of its weights; models with random weights are skipped. Raises UserError.
    """
    for name, (text, tasks) in sorted(questions):
        if name in folders and text:
            text_file.check(text, folders[name])
        for task in tasks if name in folders else ():
            if task in BENCHMARKS:
                fetching.bring(BENCHMARKS[task].reference)
                if fault := sources.verify(BENCHMARKS[task].reference):
                    raise UserError(f"{task}: {fault}; build.py fetch {task} fetches it again")


def plan_each(request: Request) -> tuple[list[Job], list[str]]:
    """Return the jobs of a request that is only listed, and the faults of models that cannot be planned. Raises
    UserError where no model can be planned.
    """
    jobs: list[Job] = []
    faults: dict[str, None] = {}
    on = [*dict.fromkeys(request.models)] or models(request.scale)
    for name in on:
        try:
            jobs += plan(replace(request, models=(name,)), to_run=False)
        except UserError as error:
            faults[str(error)] = None
    if not jobs:
        raise UserError(next(iter(faults), f"no model takes part at scale {request.scale}"))
    order = {name: at for at, name in enumerate(optimizations())}
    return sorted(jobs, key=lambda job: (order[job.optimization], on.index(job.model))), [*faults]


def _models(request: Request) -> list[str]:
    """Return the names of a request's models. Raises UserError for a model that is unknown or not of this scale."""
    if not request.models:
        return _chosen("model", (), models(request.scale), f"parameters/*.yaml for scale {request.scale}")
    chosen = list(dict.fromkeys(model_named(text) for text in request.models))
    for name in chosen:
        if request.scale not in (there := parameter_files.read(name).scales):
            raise UserError(f"{name}: describes no scale {request.scale}; it takes part at {', '.join(there)}")
    return chosen


def _dimensions(requested: tuple[str, ...]) -> tuple[str, ...]:
    """Return the requested dimensions in the order of DIMENSIONS; empty for all four. Raises UserError."""
    for name in requested:
        if name not in DIMENSIONS:
            raise UserError(f"--dimension {name}: expected one of {', '.join(DIMENSIONS)}.{suggest(name, DIMENSIONS)}")
    chosen = tuple(name for name in DIMENSIONS if name in requested)
    return () if chosen == DIMENSIONS else chosen


def _chosen(what: str, requested: tuple[str, ...], known: list[str], where: str) -> list[str]:
    if not known:
        raise UserError(f"no {what} found: {where} is empty")
    for name in requested:
        if name not in known:
            hint = suggest(name, known) or f" Known: {', '.join(known)}."
            raise UserError(f'unknown {what} "{name}".{hint}')
    return list(dict.fromkeys(requested)) if requested else known


def check_device(device: str) -> None:
    """Raise UserError if the device does not exist here. Asks the driver rather than torch, which is slow to import."""
    if device != "cuda":
        return
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception as error:  # no package, no driver, no permission
        raise UserError(f"--device cuda: no NVIDIA device can be used here ({error})") from None
    if not count:
        raise UserError("--device cuda: the driver lists no NVIDIA device")


def _check_sections(model: str, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError where a section of a model file does not name an optimization."""
    known = optimizations()
    for name in sections:
        if name not in known:
            raise UserError(
                f'parameters/{model}.yaml: section "{name}" of "optimizations" is not an optimization.'
                f"{suggest(name, known)}"
            )


def _check_own_tasks(model: str, tasks: Sequence[str]) -> None:
    """Raise UserError where a model file names an unknown task, before a notebook would fail on it."""
    try:
        check_tasks(tasks)
    except UserError as error:
        raise UserError(f'parameters/{model}.yaml: key "tasks": {error}') from None


def described(model: str) -> parameter_files.ModelParameters | None:
    """Return the content of a model's file; None where it cannot be read, which `plan` reports."""
    try:
        return parameter_files.read(model)
    except UserError:
        return None


def _weights(model: str, request: Request) -> Path | None:
    """Return the folder of the weights to load, fetched if needed, or None for random weights. Raises UserError.

    Missing or incomplete weights are found here rather than in a notebook's tenth cell.
    """
    if request.checkpoints and request.scale != "full":
        raise UserError(f'--checkpoints is for "--scale full"; the scale is "{request.scale}"')
    if request.checkpoints and request.random_weights:
        raise UserError("--checkpoints and --random-weights contradict each other; give one of them")
    if request.random_weights or request.scale == "slice":
        parameter_files.read(model).config(request.scale)  # raises where it is unknown
        return None
    if request.scale == "proxy":
        folder = proxy_folder(model)
        if not folder.is_dir():
            raise UserError(
                f"parameters/proxies/{model}: there is no proxy model for {model}; "
                f'train it with "python build.py proxies --model {model}"'
            )
    elif request.checkpoints:
        folder = expanded(checkpoint.folder_of(model, request.checkpoints))
    else:
        try:
            folder = fetching.weights(model)
        except UserError:
            parameter_files.forget(model)  # named on the command line, but not a checkpoint
            raise
    return checkpoint.check_checkpoint(model, folder)


def largest_checkpoint(request: Request) -> int | None:
    """Return the parameter count of the largest checkpoint of a planned request at scale full; None for other scales,
    for random weights, and where a checkpoint is not here.
    """
    if request.scale != "full" or request.random_weights:
        return None
    folders: list[Path | None] = [
        expanded(checkpoint.folder_of(name, request.checkpoints))
        if request.checkpoints
        else sources.local(parameter_files.read(name).source)
        for name in _models(request)
    ]
    counts = [
        sum(math.prod(shape) for shape in checkpoint.tensor_shapes(folder).values()) if folder else None
        for folder in folders
    ]
    return None if None in counts else max(count or 0 for count in counts)


def _options(model: str, request: Request) -> dict[str, Any]:
    """Return the parameters of every template that are set by command-line options."""
    return {
        "model": model,
        "scale": request.scale,
        "effort": request.effort,
        "device": request.device,
        "checkpoints": str(expanded(request.checkpoints)) if request.checkpoints else "",
        "random_weights": request.random_weights,
    }


def proxy_folder(model: str) -> Path:
    """Return the folder of the trained proxy model of `model`."""
    return parameter_files.PARAMETERS / "proxies" / model

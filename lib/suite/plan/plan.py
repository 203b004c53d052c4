"""What is to be run: the folders' contents and a request, turned into jobs whose every parameter is checked.

The folder is the registry: an optimization is a notebook in `notebooks/`, a model a file in `parameters/`. Precedence
of a parameter: template default < model file's section for the optimization < `-p name=value`; what the options set
(model, scale, effort, device, checkpoints, random_weights) is set by them alone. Knows nothing of what has been run
already.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lib.errors import UserError, suggest
from lib.models import parameters as parameter_files
from lib.models.checkpoints import folder as checkpoint
from lib.models.checkpoints import validate
from lib.models.tasks.registry import check_tasks
from lib.report.records import migration
from lib.suite.plan import template as templates
from lib.suite.plan.template import Template

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOKS = ROOT / "notebooks"
OVERVIEW = "overview"
SCALES = parameter_files.SCALES
EFFORTS = ("quick", "standard", "thorough")
# At real dimensions one call takes as long as many calls of a proxy model, and is as informative.
DEFAULT_EFFORT = {"proxy": "standard", "slice": "quick", "full": "standard"}
DEVICES = ("cpu", "cuda")
# As in lib/measure/metrics/catalogue.py, which a listing need not load; a test holds both together.
DIMENSIONS = ("performance", "accuracy", "resources", "efficiency")
OPTIONS = {
    "model": "--model",
    "scale": "--scale",
    "effort": "--effort",
    "device": "--device",
    "checkpoints": "--checkpoints",
    "random_weights": "--random-weights",
}


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line. Empty `optimizations`, `models` or `dimensions` mean all of them."""

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
        """The name of this job's files, without ending."""
        return f"{self.optimization}--{self.model}"


def optimizations() -> list[str]:
    """Return the optimizations that have a template, sorted."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if path.stem != OVERVIEW)


def models() -> list[str]:
    """Return the models that have a parameter file, sorted."""
    return parameter_files.names()


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
    """Return the jobs of a request, in the order in which they are run. Raises UserError; nothing has run by then.

    Where nothing is `to_run`, the device and the weights need not be there; where it is not `here`, the device.
    """
    chosen = _chosen("optimization", request.optimizations, optimizations(), "notebooks/*.ipynb")
    on = _chosen("model", request.models, models(), "parameters/*.yaml")
    if to_run and here:
        check_device(request.device)
    dimensions = _dimensions(request.dimensions)
    read = [templates.read(NOTEBOOKS / f"{name}.ipynb") for name in chosen]
    files = {name: parameter_files.read(name) for name in on}
    for name in on:
        _check_sections(name, files[name].optimizations)
        if to_run:
            _check_weights(name, request)
    if to_run and request.checkpoints:
        validate.check(os.path.abspath(checkpoint.folder_of(name, request.checkpoints)) for name in on)
    return [
        Job(template, name, request.scale, request.effort, values, dimensions)
        for template in read
        for name in on
        for values in [resolve(template, name, files[name].optimizations, request)]
    ]


def _dimensions(requested: tuple[str, ...]) -> tuple[str, ...]:
    """Return the dimensions that were asked for, in their order; empty where all four are meant."""
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
    """Every section of a model file must name an optimization."""
    known = optimizations()
    for name in sections:
        if name not in known:
            raise UserError(
                f'parameters/{model}.yaml: section "{name}" of "optimizations" names no optimization.'
                f"{suggest(name, known)}"
            )


def _check_weights(model: str, request: Request) -> None:
    """Check now, rather than in the tenth cell of a notebook, that the weights to be loaded exist and are complete."""
    if request.checkpoints and request.scale != "full":
        raise UserError(f'--checkpoints is for "--scale full"; the scale is "{request.scale}"')
    if request.checkpoints and request.random_weights:
        raise UserError("--checkpoints and --random-weights contradict each other; give one of them")
    if request.random_weights or request.scale == "slice":
        return
    if request.checkpoints:
        checkpoint.check_checkpoint(model, checkpoint.folder_of(model, request.checkpoints))
    if request.scale == "proxy":
        folder = proxy_folder(model)
        if not folder.is_dir():
            raise UserError(
                f"parameters/proxies/{model}: there is no proxy model for {model};  "
                f'train it with "python build.py proxies --model {model}"'
            )
        checkpoint.check_checkpoint(model, folder)


def proxy_folder(model: str) -> Path:
    """Return the folder of the trained proxy model of `model`."""
    return parameter_files.PARAMETERS / "proxies" / model


def resolve(
    template: Template, model: str, sections: Mapping[str, Mapping[str, Any]], request: Request
) -> dict[str, Any]:
    """Return the value of every parameter that the template declares. Raises UserError for a name, type or range."""
    declared = template.parameters
    values = {name: parameter.default for name, parameter in declared.items()}
    options = {
        "model": model,
        "scale": request.scale,
        "effort": request.effort,
        "device": request.device,
        "checkpoints": os.path.abspath(os.path.expanduser(request.checkpoints)) if request.checkpoints else "",
        "random_weights": request.random_weights,
    }
    for name in OPTIONS:
        if name not in declared:
            raise UserError(f'notebooks/{template.path.name}: the cell "parameters" does not declare "{name}"')
    section = sections.get(template.stem, {})
    where = f'parameters/{model}.yaml: section "{template.stem}"'
    for source, overrides in ((where, section), ("-p", request.parameters)):
        for name, value in _present_names(source, overrides, declared).items():
            values[name] = _checked(source, name, value, template)
    if "tasks" in values:
        values["tasks"] = check_tasks(values["tasks"])
    return values | options


def _present_names(source: str, values: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters under their present names; a former name is accepted, with one log line."""
    present = {}
    for name, value in values.items():
        current = name if name in declared else migration.PARAMETERS.get(name, name)
        if current != name:
            _say_renamed(f'{source}: parameter "{name}"', current)
        present[current] = value
    return present


@cache
def _say_renamed(what: str, current: str) -> None:
    """Log the present name, once per former name."""
    log.warning('%s is now called "%s"; please use the new name', what, current)


def _checked(source: str, name: str, value: Any, template: Template) -> Any:
    declared = template.parameters
    if name in OPTIONS:
        raise UserError(f'{source}: "{name}" is set by the option {OPTIONS[name]}')
    if name not in declared:
        own = [key for key in declared if key not in OPTIONS]
        raise UserError(
            f'{source}: unknown parameter "{name}": notebooks/{template.path.name} declares {", ".join(own)}.'
            f"{suggest(name, own)}"
        )
    return templates.check(value, declared[name], f'{source}: "{name}"')

"""The value of every parameter of a run. Precedence: template default < model file's section for the optimization <
`-p name=value`. OPTIONS (model, scale, effort, device, checkpoints, random_weights) are set only by their options.
"""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from lib.errors import UserError, suggest
from lib.files import expanded
from lib.models.tasks import text_file
from lib.models.tasks.registry import check_tasks
from lib.report.records import migration
from lib.suite.plan import template as templates
from lib.suite.plan.template import Template

log = logging.getLogger(__name__)

OPTIONS = {
    "model": "--model",
    "scale": "--scale",
    "effort": "--effort",
    "device": "--device",
    "checkpoints": "--checkpoints",
    "random_weights": "--random-weights",
}
PATHS = ("text", "studies", "stacks", "history")  # made absolute: a notebook runs in another folder
SEEDS = 2**31  # accepted by all random generators in use, even after small offsets are added


def resolve(
    template: Template, options: Mapping[str, Any], section: Mapping[str, Any], from_command_line: Mapping[str, str]
) -> dict[str, Any]:
    """Return the value of every parameter that the template declares. Raises UserError for a wrong name, type or range.

    `options` are the values set by options, `section` the model file's overrides, `from_command_line` those after -p.
    """
    declared = template.parameters
    values = {name: parameter.default for name, parameter in declared.items()}
    for name in OPTIONS:
        if name not in declared:
            raise UserError(f'notebooks/{template.path.name}: the cell "parameters" does not declare "{name}"')
    where = f'parameters/{options["model"]}.yaml: section "{template.stem}"'
    for source, overrides in ((where, section), ("-p", from_command_line)):
        for name, value in _present_names(source, overrides, declared).items():
            values[name] = _checked(source, name, value, template)
    if "tasks" in values:
        values["tasks"] = check_tasks(values["tasks"])
    for name in PATHS:
        if isinstance(value := values.get(name), str) and value:
            values[name] = str(expanded(value))
    if values.get("text"):
        text_file.check(values["text"])
    templates.check_divisors(values, template)
    templates.check_stems(values, template)
    if isinstance(seed := values.get("seed"), int) and not 0 <= seed < SEEDS:
        raise UserError(f'{template.stem}: "seed": expected a whole number from 0 to {SEEDS - 1}, got {seed}')
    return values | dict(options)


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

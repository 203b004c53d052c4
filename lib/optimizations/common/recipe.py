"""The chosen stack of one model: which optimizations, in which order, with which knobs; read, checked, written.

A stack is a YAML file, `executed/<scale>/stacks/<model>.yaml`, that a search leaves behind and other runs take up:

    model: qwen3-4b-instruct-2507
    scale: proxy
    effort: standard
    chosen_by: automl_components
    study: automl_components--qwen3-4b-instruct-2507--standard
    stack:
      - optimization: structured_pruning
        knobs: {ratio: 0.2}

A knob has the name of the template's parameter, so every step is also a request of `build.py run STEM -p NAME=VALUE`.
Knows nothing of what an optimization does with its knobs, and nothing of torch.
"""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lib import files
from lib.errors import UserError, suggest
from lib.models.parameters import ROOT, SCALES

Knob = bool | int | float | str
EFFORTS = ("", "quick", "standard", "thorough")  # from the least trusted on; empty: not stated


class Step(BaseModel):
    """One optimization of a stack: its stem, and the knobs that differ from its defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    optimization: str = Field(min_length=1, pattern=r"^[a-z][a-z0-9_]*$")
    knobs: dict[str, Knob] = {}

    def request(self) -> list[str]:
        """Return the step as arguments of `build.py run`: its stem, then `-p NAME=VALUE` for each knob."""
        return [self.optimization, *(part for name, value in self.knobs.items() for part in ("-p", f"{name}={value}"))]


class Stack(BaseModel):
    """The file. `chosen_by` is who chose it, `study` where the trials lie, `effort` how much measuring went into it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(min_length=1)
    scale: str
    stack: list[Step]
    chosen_by: str = Field(min_length=1)
    study: str = ""
    effort: str = ""


def path_of(model: str, scale: str, folder: Path | str | None = None) -> Path:
    """Return where the stack of `model` lies: in `folder`, by default `executed/<scale>/stacks`."""
    place = Path(folder) if folder else ROOT / "executed" / scale / "stacks"
    return place / f"{model}.yaml"


def read(path: Path | str) -> Stack:
    """Read a stack. Raises UserError, in one line, for a file that is missing, no YAML, or no stack."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path.name}: no stack can be read there ({error.strerror}); run automl_components") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        at = getattr(error, "problem_mark", None)
        where = f" at line {at.line + 1}" if at else ""
        raise UserError(f"{path.name}: not YAML{where}; expected the keys model, scale, stack, chosen_by") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: not a stack; expected the keys model, scale, stack, chosen_by")
    return _checked(content, path.name)


def _checked(content: dict, where: str) -> Stack:
    unknown = next((str(key) for key in content if key not in Stack.model_fields), None)
    if unknown:
        raise UserError(f'{where}: unknown key "{unknown}".{suggest(unknown, Stack.model_fields)}')
    try:
        found = Stack.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise UserError(f'{where}: "{place}": {fault["msg"][0].lower()}{fault["msg"][1:]}') from None
    for name, valid in (("scale", SCALES), ("effort", EFFORTS)):
        value = getattr(found, name)
        if value not in valid:
            raise UserError(f'{where}: {name} "{value}"; expected one of {", ".join(filter(None, valid))}')
    return found


def find(model: str, scale: str, folder: Path | str | None = None) -> Stack | None:
    """Return the stack of `model`, or None where there is none. Raises UserError for a damaged one, or another's."""
    path = path_of(model, scale, folder)
    if not path.is_file():
        return None
    found = read(path)
    if (found.model, found.scale) != (model, scale):
        raise UserError(f"{path.name}: a stack of {found.model} at scale {found.scale}; expected {model} at {scale}")
    return found


def write(stack: Stack, folder: Path | str | None = None, *, replace_better: bool = False) -> Path:
    """Write `stack` where `path_of` says, whole or not at all; return the path.

    A stack chosen with more effort stays, unless `replace_better`: then the path comes back and nothing is written. A
    damaged file is kept aside under another name.
    """
    path = path_of(stack.model, stack.scale, folder)
    try:
        there = find(stack.model, stack.scale, folder)
    except UserError:
        there = None
        path.rename(files.aside(path))
    if there and EFFORTS.index(there.effort) > EFFORTS.index(stack.effort) and not replace_better:
        return path
    text = yaml.safe_dump(stack.model_dump(), sort_keys=False, allow_unicode=True)
    return files.write_atomically(path, text)

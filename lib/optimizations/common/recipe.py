"""Read, check and write recipes: the ordered stack of optimizations chosen for one model, with their knobs.

A recipe is a YAML file, `stacks/<model>.yaml` in the results of a scale. A search writes it and other runs read it:

    model: qwen3-4b-instruct-2507
    scale: proxy
    effort: standard
    chosen_by: automl_components
    weights: 3f2a…  # hash of the weights the stack was chosen for
    accuracy: maintained  # the verdict on items not used in the search
    study: automl_components--qwen3-4b-instruct-2507--standard
    stack:
      - optimization: structured_pruning
        knobs: {ratio: 0.2}

Knobs are named like the template's parameters, so every step can be run as `build.py run STEM -p NAME=VALUE`. This
module gives knobs no meaning and needs no torch.
"""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib.errors import UserError, suggest
from lib.files import aside, hash_of, results_folder, write_atomically
from lib.models.parameters import SCALES

STACKS = "stacks"  # the folder of recipes within the results
EARLIER_KNOBS = {"recovery_steps": "finetune_steps", "fine_tuning_steps": "finetune_steps"}  # old name → present name
Knob = bool | int | float | str
LOSING = ("not_maintained", "invalid")  # accuracy verdicts that bar a stack from use
EFFORTS = ("", "preview", "quick", "standard", "thorough")  # least trusted first; empty: not stated


class RecipeStep(BaseModel):
    """One optimization of a stack: its stem, and the knobs that differ from its defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    optimization: str = Field(min_length=1, pattern=r"^[a-z][a-z0-9_]*$")
    knobs: dict[str, Knob] = {}

    @field_validator("knobs", mode="before")
    @classmethod
    def _present_names(cls, knobs: object) -> object:
        """Read the knobs of earlier recipes and studies under their present names."""
        if not isinstance(knobs, dict):
            return knobs
        return {EARLIER_KNOBS.get(name, name): value for name, value in knobs.items()}

    def request(self) -> list[str]:
        """Return the step as arguments of `build.py run`: its stem, then `-p NAME=VALUE` for each knob."""
        return [self.optimization, *(part for name, value in self.knobs.items() for part in ("-p", f"{name}={value}"))]


class Recipe(BaseModel):
    """The content of a recipe file. `chosen_by` names the search, `study` its trials, `effort` how much was measured.

    `weights` is the hash of the weights the stack was chosen for, `optimized` the hash of the weights after it, and
    `accuracy` the final verdict on the stack.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str = Field(min_length=1)
    scale: str
    stack: list[RecipeStep]
    chosen_by: str = Field(min_length=1)
    study: str = ""
    effort: str = ""
    weights: str = ""
    optimized: str = ""
    accuracy: str = ""

    def settings(self) -> list[tuple[str, str, Knob]]:
        """Return (stem, knob, value) for every knob of the stack, in order."""
        return [(step.optimization, knob, value) for step in self.stack for knob, value in step.knobs.items()]


def path_of(model: str, scale: str, folder: Path | str | None = None) -> Path:
    """Return the path of the recipe of `model` in `folder`, by default the results folder of `scale`."""
    recipes = Path(folder) if folder else results_folder(scale) / STACKS
    return recipes / f"{model}.yaml"


def hashed(model: str, scale: str) -> dict[str, str]:
    """Return {path of the recipe within the results: hash of its file}; the hash is empty if there is no file.

    A record keeps it (`details["inputs"]`), so that a run that read a different recipe is recognised as stale.
    """
    path = path_of(model, scale)
    return {f"{STACKS}/{path.name}": hash_of(path)}


def read(path: Path | str) -> Recipe:
    """Read a recipe. Raises a one-line UserError if the file is missing, not YAML, or not a recipe."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path.name}: the recipe cannot be read ({error.strerror}); run automl_components") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        at = getattr(error, "problem_mark", None)
        where = f" at line {at.line + 1}" if at else ""
        raise UserError(f"{path.name}: not YAML{where}; expected the keys model, scale, stack, chosen_by") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: not a recipe; expected the keys model, scale, stack, chosen_by")
    return _checked(content, path.name)


def _checked(content: dict, where: str) -> Recipe:
    unknown = next((str(key) for key in content if key not in Recipe.model_fields), None)
    if unknown:
        raise UserError(f'{where}: unknown key "{unknown}".{suggest(unknown, Recipe.model_fields)}')
    try:
        checked = Recipe.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise UserError(f'{where}: "{place}": {fault["msg"][0].lower()}{fault["msg"][1:]}') from None
    for name, valid in (("scale", SCALES), ("effort", EFFORTS)):
        value = getattr(checked, name)
        if value not in valid:
            raise UserError(f'{where}: {name} "{value}"; expected one of {", ".join(filter(None, valid))}')
    return checked


def find(model: str, scale: str, folder: Path | str | None = None) -> Recipe | None:
    """Return the recipe of `model`, or None if there is none.

    Raises UserError if the file is damaged, or belongs to another model or scale.
    """
    path = path_of(model, scale, folder)
    if not path.is_file():
        return None
    checked = read(path)
    if (checked.model, checked.scale) != (model, scale):
        owner = f"{checked.model} at scale {checked.scale}"
        raise UserError(f"{path.name}: a recipe of {owner}; expected {model} at {scale}")
    return checked


def unfit(stored: Recipe, weights: str) -> str | None:
    """Return why a stored recipe must not be used for weights with the hash `weights`, or None if it may.

    A recipe is unfit if it was chosen for other weights, or judged to lose more than the margins.
    """
    if stored.weights != weights:
        chosen_for = f"weights {stored.weights[:8]}" if stored.weights else "weights that are not recorded"
        return f"its stack was chosen for {chosen_for}, not for {weights[:8] or 'these'}; run {stored.chosen_by} again"
    if stored.accuracy in LOSING:
        return f"its stack was judged {stored.accuracy.replace('_', ' ')}"
    return None


def write(chosen: Recipe, folder: Path | str | None = None, *, replace_better: bool = False) -> Path:
    """Write a recipe atomically to `path_of` its model and scale; return the path.

    A stored recipe for the same weights, chosen with more effort, is not overwritten unless `replace_better`; the path
    is returned all the same. A damaged file is renamed and kept.
    """
    path = path_of(chosen.model, chosen.scale, folder)
    try:
        stored = find(chosen.model, chosen.scale, folder)
    except UserError:
        stored = None
        path.rename(aside(path))
    better = stored and EFFORTS.index(stored.effort) > EFFORTS.index(chosen.effort)
    if stored and better and stored.weights == chosen.weights and not replace_better:
        return path
    return write_atomically(path, yaml.safe_dump(chosen.model_dump(), sort_keys=False, allow_unicode=True))

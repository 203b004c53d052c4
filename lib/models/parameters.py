"""Parameter files: the configuration of a model at its three scales, and its overrides of the templates' defaults.

Reads and validates `parameters/<model>.yaml`. Knows nothing of torch or transformers, so that it is fast to import;
`lib.models.loading` finds out whether the dimensions make a working model, and `lib.suite.plan.plan` whether the
template declares an overridden parameter.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib.errors import NotApplicable, UserError, suggest

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = Path(os.environ.get("WORKBENCH_PARAMETERS", ROOT / "parameters"))
SCALES = ("proxy", "slice", "full")
NO_INFORMATION = "random weights: answers carry no information"


class Section(BaseModel):
    """A part of a parameter file. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Slice(Section):
    """The scale `slice`: the first `layers` decoder blocks at the real dimensions."""

    layers: int = Field(ge=1)


class Proxy(Section):
    """The scale `proxy`: what differs from the real configuration, and how the proxy model is trained."""

    config: dict[str, Any] = Field(min_length=1)
    training: dict[str, Any] = Field(min_length=1)


class ModelParameters(Section):
    """One validated parameter file."""

    name: str = Field(min_length=1)
    checkpoint: str = Field(min_length=1)
    architecture: str = Field(min_length=1)
    full: dict[str, Any] = Field(min_length=1)
    slice: Slice
    proxy: Proxy
    tasks: list[str] = Field(min_length=1)
    optimizations: dict[str, dict[str, Any]] = {}

    @field_validator("optimizations", mode="before")
    @classmethod
    def empty_section_is_none(cls, value: Any) -> Any:
        """Read an empty `optimizations:` or an empty section in it as: no override."""
        if isinstance(value, dict):
            return {key: {} if section is None else section for key, section in value.items()}
        return {} if value is None else value

    def config(self, scale: str) -> dict[str, Any]:
        """Return the configuration of this model at `scale` as keyword arguments of its transformers configuration."""
        if scale == "full":
            return self.full
        if scale == "slice":
            return _cut(self.full, self.slice.layers)
        return merge(self.full, self.proxy.config)


def require_answers(what: str, scale: str, random_weights: bool) -> None:
    """Raise NotApplicable if the model's answers carry no information. `what` names what is steered by them."""
    if random_weights or scale == "slice":
        raise NotApplicable(f"{what} is steered by answers; {NO_INFORMATION}")


def about_slice_parameters(description: ModelParameters) -> float:
    """Return an estimate of the slice's number of parameters: embeddings, head, and the large matrices of its blocks.

    From the configuration alone, to within about a tenth; for deciding which jobs fit into memory together.
    """
    config, vision = description.full.get("text_config", description.full), description.full.get("vision_config", {})

    def count(*names: str) -> int:
        return next((config[name] for name in names if config.get(name)), 0)

    experts = count("n_routed_experts", "num_experts")
    layers, experts_width = description.slice.layers, experts * count("moe_intermediate_size")
    # Architectures with shared experts have a dense first block (DeepSeek-AI 2024).
    dense = min(layers, 1 if count("n_shared_experts") else 0) if experts else layers
    widths = dense * count("intermediate_size") + (layers - dense) * experts_width
    heads = count("num_attention_heads") + count("num_key_value_heads")
    blocks = 3 * widths + 2 * layers * heads * count("head_dim", "v_head_dim")
    ends = count("vocab_size") * (1 if count("tie_word_embeddings") else 2)
    tower = 12 * vision.get("hidden_size", 0) ** 2 * vision.get("depth", 0)
    return count("hidden_size") * (ends + blocks) + tower


def _cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return `config` with its decoder cut to the first `layers` blocks."""
    if "text_config" in config:
        return config | {"text_config": _cut(config["text_config"], layers)}
    return config | {"num_hidden_layers": layers}


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `override`, section by section."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def names(folder: Path | None = None) -> list[str]:
    """Return the names of the models that have a parameter file, sorted: the stems of `*.yaml` in the folder."""
    return sorted(path.stem for path in (folder or PARAMETERS).glob("*.yaml"))


def read(name: str, folder: Path | None = None) -> ModelParameters:
    """Read and validate `<folder>/<name>.yaml`. Raises UserError naming file, key and what was expected."""
    path = (folder or PARAMETERS) / f"{name}.yaml"
    if not path.is_file():
        known = names(folder)
        raise UserError(
            f'unknown model "{name}": there is no {path.name} in {path.parent.name}/.{suggest(name, known)}'
        )
    where = f"{path.parent.name}/{path.name}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f", line {line + 1}"
        raise UserError(f"{where}{at}: not readable as YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"{where}: {what}; expected the keys {', '.join(ModelParameters.model_fields)}")
    try:
        return ModelParameters.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """Return the first fault of a validation error as one clause."""
    fault = error.errors()[0]
    *above, key = [str(part) for part in fault["loc"]]
    section = f' in section "{".".join(above)}"' if above else ""
    if fault["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"": ModelParameters, "slice": Slice, "proxy": Proxy}
        fields = sections.get(".".join(above), ModelParameters).model_fields
        return f'unknown key "{key}"{section}; expected one of {", ".join(fields)}.{suggest(key, fields)}'
    if fault["type"] == "missing":
        return f'missing key "{key}"{section}'
    return f'key "{key}"{section}: {fault["msg"].lower()}, got {fault["input"]!r}'

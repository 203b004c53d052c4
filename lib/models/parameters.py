"""Parameter files: what a model is at its scales, and its overrides of the templates' defaults.

Reads and validates `parameters/<model>.yaml`. Only `checkpoint` must be there: configuration, architecture and tasks
are read from the checkpoint where the file does not name them, and a model takes part at the scales that it describes.
A checkpoint given on the command line gets such a file in the cache (`register`). Knows nothing of torch or
transformers, so that it is fast to import; `lib.models.loading` finds out whether the dimensions make a working model,
and `lib.suite.plan.plan` whether the template declares an overridden parameter.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lib.errors import NotApplicable, UserError, suggest
from lib.files import cache_folder, expanded, visible, write_atomically
from lib.models import dimensions
from lib.models.dimensions import cut, merge, per_block
from lib.models.sources import fetch as sources
from lib.models.sources import reference, store
from lib.models.sources.reference import Reference
from lib.models.yaml_file import content_of

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = Path(os.environ.get("WORKBENCH_PARAMETERS", ROOT / "parameters"))
SCALES = ("proxy", "slice", "full")
MOST_SHOWN = 120  # characters of a value that is wrong
MOST_NAME = 80  # characters of a name that is made of a path's: files of results begin with it
NO_INFORMATION = "random weights: answers carry no information"
TASKS = {False: ("topic", "retrieval"), True: ("digits", "retrieval")}  # by whether the model sees pictures
# What a checkpoint's configuration says of its files and its history rather than of the model.
NOT_DIMENSIONS = {
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "auto_map", "quantization_config",
    "attn_implementation",
}  # fmt: skip


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
    """One validated parameter file. `full` and `architecture` are empty until a checkpoint that names them is here.

    `sha256`: of the file that `checkpoint` refers to, where it is a single one.
    """

    name: str = ""
    checkpoint: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    architecture: str = ""
    full: dict[str, Any] = {}
    slice: Slice | None = None
    proxy: Proxy | None = None
    tasks: list[str] = []
    optimizations: dict[str, dict[str, Any]] = {}

    @field_validator("optimizations", mode="before")
    @classmethod
    def empty_section_is_none(cls, value: Any) -> Any:
        """Read an empty `optimizations:` or an empty section in it as: no override."""
        if isinstance(value, dict):
            return {key: {} if section is None else section for key, section in value.items()}
        return {} if value is None else value

    @property
    def scales(self) -> tuple[str, ...]:
        """The scales at which this model takes part: those that its file describes, and `full`."""
        described = {"proxy": self.proxy is not None, "slice": self.slice is not None, "full": True}
        return tuple(scale for scale in SCALES if described[scale])

    @property
    def source(self) -> Reference:
        """What `checkpoint` refers to."""
        return reference.parse(self.checkpoint)

    def config(self, scale: str) -> dict[str, Any]:
        """Return the configuration of this model at `scale` as keyword arguments of its transformers configuration.

        Raises UserError for a scale that it does not describe, and where its checkpoint has to be fetched first.
        """
        if not self.full:
            raise UserError(f"{self.name}: its configuration comes with its checkpoint, which has to be fetched first")
        if scale == "slice" and self.slice is not None:
            return cut(self.full, self.slice.layers)
        if scale == "proxy" and self.proxy is not None:
            return per_block(self.full, merge(self.full, self.proxy.config))
        if scale != "full":
            raise UserError(f"{self.name}: describes no scale {scale}; it takes part at {', '.join(self.scales)}")
        return self.full

    def training(self) -> dict[str, Any]:
        """Return how the proxy model is trained. Raises UserError where the file describes none."""
        if self.proxy is None:
            raise UserError(f"{self.name}: describes no proxy model; its parameter file has no section proxy")
        return self.proxy.training


def require_answers(what: str, scale: str, random_weights: bool) -> None:
    """Raise NotApplicable if the model's answers carry no information. `what` names what is steered by them."""
    if random_weights or scale == "slice":
        raise NotApplicable(f"{what} is steered by answers; {NO_INFORMATION}")


def about_slice_parameters(description: ModelParameters) -> float:
    """Return an estimate of the slice's number of parameters: embeddings, head, and the large matrices of its blocks.

    From the configuration alone, to within about a tenth; for deciding which jobs fit into memory together.
    """
    config = description.full.get("text_config") or description.full
    vision = description.full.get("vision_config") or {}

    def count(*names: str) -> int:
        return next((config[name] for name in names if config.get(name)), 0)

    experts = count("n_routed_experts", "num_experts", "num_local_experts")
    layers = description.slice.layers if description.slice else count("num_hidden_layers")
    experts_width = experts * count("moe_intermediate_size", "intermediate_size")
    # Architectures with shared experts have a dense first block (DeepSeek-AI 2024).
    dense = min(layers, 1 if count("n_shared_experts") else 0) if experts else layers
    widths = dense * count("intermediate_size") + (layers - dense) * experts_width
    heads = count("num_attention_heads") + count("num_key_value_heads")
    size = count("head_dim", "v_head_dim") or count("hidden_size") // (count("num_attention_heads") or 1)
    blocks = 3 * widths + 2 * layers * heads * size
    ends = count("vocab_size") * (1 if count("tie_word_embeddings") else 2)
    tower = 12 * vision.get("hidden_size", 0) ** 2 * vision.get("depth", 0)
    return count("hidden_size") * (ends + blocks) + tower


def names(folder: Path | None = None) -> list[str]:
    """Return the names of the models that have a parameter file, sorted: the stems of `*.yaml` in the folder."""
    return sorted(path.stem for path in visible(folder or PARAMETERS, "*.yaml"))


def names_at(scale: str) -> list[str]:
    """Return the names of the models that take part at `scale`, sorted.

    A damaged file counts as one that does: reading it raises the error.
    """
    return [name for name, scales in takes_part(names()).items() if scale in (scales or SCALES)]


def takes_part(chosen: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the scales at which each model takes part; none for a damaged parameter file."""
    part: dict[str, tuple[str, ...]] = {}
    for name in chosen:
        try:
            part[name] = read(name).scales
        except UserError:
            part[name] = ()
    return part


def registered() -> list[str]:
    """Return the names of the checkpoints that were given on the command line, sorted."""
    return sorted(set(names(_registry())) - set(names()))


def _registry() -> Path:
    return cache_folder() / "models"


def register(text: str) -> str:
    """Return the name of the model whose checkpoint `text` refers to: that of its parameter file, or of one that this
    makes in the cache.

    Raises UserError for what is no reference, and for a path at which no checkpoint lies.
    """
    source = reference.parse(text)
    sources.require(source)
    stem = re.sub(r"[^a-z0-9.]+", "-", source.title.lower())[:MOST_NAME].strip("-.") or "model"
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 1000))):
        known = _path(name)
        if known is None:
            break
        if _checkpoint(known) == source.text:
            return name
    else:
        raise UserError(f"{text}: a thousand checkpoints have this name; write a parameter file with another one")
    named = {"name": source.title, "checkpoint": source.text}
    # Quoted, since `content_of` reads more as numbers than the writer knows: a folder may be called 1e-5.
    content = yaml.safe_dump(named, sort_keys=False, allow_unicode=True, default_style='"')
    try:
        write_atomically(_registry() / f"{name}.yaml", content)
    except OSError as error:
        raise store.unwritable(_registry(), error) from None
    return name


def known_as(text: str) -> str | None:
    """Return the name of the model whose checkpoint `text` refers to, None where none has it; makes no file.

    Raises UserError for what is no reference.
    """
    source = reference.parse(text)
    every = [(name, _path(name)) for name in [*names(), *registered()]]
    return next((name for name, path in every if path and _checkpoint(path) == source.text), None)


def forget(name: str) -> None:
    """Remove what `register` made, where nothing could be fetched for it."""
    with contextlib.suppress(OSError):  # where nothing can be written, nothing was made
        (_registry() / f"{name}.yaml").unlink(missing_ok=True)


def forget_unfetched(chosen: Iterable[str]) -> None:
    """Remove what `register` made for those of the models whose checkpoint is not here: a wrong hub id, perhaps."""
    for name in sorted({*chosen} & {*registered()}):
        with contextlib.suppress(UserError):  # a damaged file, which whoever reads it is told of
            if sources.local(read(name).source) is None:
                forget(name)


def _path(name: str, folder: Path | None = None) -> Path | None:
    """Return the parameter file of a model: in the folder, else among the registered ones; None where there is none."""
    folders = [folder] if folder else [PARAMETERS, _registry()]
    return next((path for place in folders if (path := place / f"{name}.yaml").is_file()), None)


def _checkpoint(path: Path) -> str | None:
    """Return what a parameter file's checkpoint refers to, None where the file is damaged."""
    try:
        return _resolved(content_of(path, ModelParameters.model_fields)["checkpoint"], path)
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _resolved(checkpoint: str, path: Path) -> str:
    """Return a checkpoint as it is seen from anywhere: a relative path begins at the parameter file's folder."""
    return reference.parse(checkpoint, path.parent).text


def _beside(task: str, folder: Path) -> str:
    """Return a task as it is seen from anywhere: what is described in a file (`lm_eval:FILE.yaml`) begins at `folder`.

    Raises UserError for a path at a home that is not there.
    """
    asked_by, colon, file = task.partition(":")
    if not colon or Path(file).suffix not in (".yaml", ".yml"):
        return task
    return f"{asked_by}:{expanded(file if file.startswith('~') else folder / file)}"


def read(name: str, folder: Path | None = None) -> ModelParameters:
    """Read and validate `<folder>/<name>.yaml`; what it leaves out is read from its checkpoint, where that is here.

    Raises UserError naming file, key and what was expected.
    """
    path = _path(name, folder)
    if path is None:
        home = folder or PARAMETERS
        hint = suggest(name, names(folder))
        raise UserError(f'unknown model "{name}": there is no {name}.yaml in {home.name}/.{hint}')
    where = f"{path.parent.name}/{path.name}"
    content = content_of(path, ModelParameters.model_fields)
    try:
        description = ModelParameters.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None
    try:
        checkpoint = _resolved(description.checkpoint, path)
    except UserError as error:
        raise UserError(f'{where}: key "checkpoint": {error}') from None
    tasks = [_beside(task, path.parent) for task in description.tasks]
    update = {"name": description.name or path.stem, "checkpoint": checkpoint, "tasks": tasks}
    description = description.model_copy(update=update)
    if description.sha256 and description.source.kind in ("folder", "hub"):
        raise UserError(
            f'{where}: key "sha256": {checkpoint} is no single file: nothing would be checked; leave it out'
        )
    if (description.proxy or description.slice) and bool(description.full) != bool(description.architecture):
        lacking = "architecture" if description.full else "full"
        raise UserError(f'{where}: missing key "{lacking}": the scales proxy and slice need full and architecture')
    if description.proxy and not description.full:
        raise UserError(f'{where}: missing key "full": the scale proxy changes some of its dimensions')
    if reason := _dimension_fault(description):
        raise UserError(f"{where}: {reason}")
    named = bool(description.full and description.architecture)
    description = completed(description, None if named else sources.local(description.source))
    if reason := _slice_fault(description):
        raise UserError(f"{where}: {reason}")
    return description


def _dimension_fault(description: ModelParameters) -> str | None:
    """Return None, or which dimension that a file states, of the model or of its proxy, can be none."""
    sections = [(description.full, "full")]
    if description.proxy is not None:
        sections += [(config, "proxy.config") for config in (description.proxy.config, description.config("proxy"))]
    return next((reason for config, name in sections if (reason := dimensions.fault(config, name))), None)


def _slice_fault(description: ModelParameters) -> str | None:
    """Return None, or why the first blocks of a model cannot be so many: it has fewer."""
    whole = dimensions.blocks(description.full)
    if description.slice is None or whole is None or description.slice.layers <= whole:
        return None
    beyond = f"expected at most the {whole} blocks of the model, got {description.slice.layers}"
    return f'key "layers" in section "slice": {beyond}'


def completed(description: ModelParameters, folder: Path | None) -> ModelParameters:
    """Return a description with what it leaves out read from a checkpoint folder, as far as there is one."""
    config = _configuration(folder) if folder else {}
    full = description.full or {
        key: value for key, value in config.items() if key not in NOT_DIMENSIONS and not key.startswith("_")
    }
    update = {
        "full": full,
        "architecture": description.architecture or str(config.get("model_type") or ""),
        "tasks": description.tasks or [*TASKS[full.get("vision_config") is not None]],
    }
    return description.model_copy(update=update)


def _configuration(folder: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint folder, empty where it cannot be read: who loads it is told why."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
    value = repr(fault["input"])
    value = value if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]}…"
    return f'key "{key}"{section}: {fault["msg"].lower()}, got {value}'

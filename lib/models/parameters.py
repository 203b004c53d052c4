"""Parameter files: a model's dimensions at each scale, its tasks, and its overrides of the templates' defaults.

Reads and validates `parameters/<model>.yaml`. Only `checkpoint` is required: configuration, architecture and tasks are
read from the checkpoint if the file does not state them, and a model takes part at the scales that its file describes.
A checkpoint given on the command line gets such a file in the cache (`register`). Imports neither torch nor
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
MOST_SHOWN = 120  # characters of an invalid value in a message
MOST_NAME = 80  # characters of a name derived from a path, since names of result files begin with it
NO_INFORMATION = "random weights: answers carry no information"
TASKS = {False: ("topic", "retrieval"), True: ("digits", "retrieval")}  # default tasks without and with vision
# Keys of a checkpoint's configuration that describe its files and history, not the model.
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
    """The scale `proxy`: differences from the real configuration, and the training of the proxy model."""

    config: dict[str, Any] = Field(min_length=1)
    training: dict[str, Any] = Field(min_length=1)


class ModelParameters(Section):
    """One validated parameter file. If the file omits them, `full` and `architecture` are empty until the checkpoint
    has been fetched.

    `sha256`: hash of the file that `checkpoint` refers to, if it is a single file.
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
        """Read an empty `optimizations:`, or an empty section in it, as no override."""
        if isinstance(value, dict):
            return {key: {} if section is None else section for key, section in value.items()}
        return {} if value is None else value

    @property
    def scales(self) -> tuple[str, ...]:
        """The scales at which this model takes part: `full`, and the others that its file describes."""
        described = {"proxy": self.proxy is not None, "slice": self.slice is not None, "full": True}
        return tuple(scale for scale in SCALES if described[scale])

    @property
    def source(self) -> Reference:
        """The parsed reference in `checkpoint`."""
        return reference.parse(self.checkpoint)

    def config(self, scale: str) -> dict[str, Any]:
        """Return the configuration of this model at `scale` as keyword arguments of its transformers configuration.

        Raises UserError for a scale that the file does not describe, and if the checkpoint must be fetched first.
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
        """Return the training settings of the proxy model. Raises UserError if the file describes no proxy model."""
        if self.proxy is None:
            raise UserError(f"{self.name}: describes no proxy model; its parameter file has no section proxy")
        return self.proxy.training


def require_answers(what: str, scale: str, random_weights: bool) -> None:
    """Raise NotApplicable if the model's answers carry no information. `what`: the method that depends on them."""
    if random_weights or scale == "slice":
        raise NotApplicable(f"{what} depends on the model's answers; {NO_INFORMATION}")


def about_slice_parameters(description: ModelParameters) -> float:
    """Return an estimate of the slice's number of parameters: embeddings, head, and the large matrices of its blocks.

    Uses the configuration alone and is accurate to about a tenth, enough to decide which jobs fit into memory together.
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
    """Return the names of the models with a parameter file, sorted: the stems of `*.yaml` in `folder`."""
    return sorted(path.stem for path in visible(folder or PARAMETERS, "*.yaml"))


def names_at(scale: str) -> list[str]:
    """Return the names of the models that take part at `scale`, sorted.

    A model with a damaged file is included, so that reading the file raises the error.
    """
    return [name for name, scales in takes_part(names()).items() if scale in (scales or SCALES)]


def takes_part(chosen: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the scales at which each model takes part; an empty tuple for a damaged parameter file."""
    scales: dict[str, tuple[str, ...]] = {}
    for name in chosen:
        try:
            scales[name] = read(name).scales
        except UserError:
            scales[name] = ()
    return scales


_registered_here: set[str] = set()  # names that `register` wrote in this process


def registered() -> list[str]:
    """Return the names of the models whose checkpoints were given on the command line, sorted."""
    return sorted(set(names(_registry())) - set(names()))


def _registry() -> Path:
    return cache_folder() / "models"


def register(text: str) -> str:
    """Return the name of the model whose checkpoint `text` refers to. Without a parameter file for it, writes one into
    the cache.

    Raises UserError for an invalid reference, and for a path without a checkpoint.
    """
    source = reference.parse(text)
    sources.require(source)
    stem = re.sub(r"[^a-z0-9.]+", "-", source.title.lower())[:MOST_NAME].strip("-.") or "model"
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 1000))):
        path = _path(name)
        if path is None:
            break
        if _checkpoint(path) == source.text:
            return name
    else:
        raise UserError(f"{text}: a thousand checkpoints have this name; write a parameter file under another name")
    earlier = next((known for known in registered() if _checkpoint(_registry() / f"{known}.yaml") == source.text), None)
    if earlier is not None:  # under another name, because another checkpoint had this one then
        return earlier
    entries = {"name": source.title, "checkpoint": source.text}
    # Quoted, since `content_of` reads more texts as numbers than the writer expects: a folder may be called 1e-5.
    content = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, default_style='"')
    try:
        write_atomically(_registry() / f"{name}.yaml", content)
    except OSError as error:
        raise store.unwritable(_registry(), error) from None
    _registered_here.add(name)
    return name


def known_as(text: str) -> str | None:
    """Return the name of the model whose checkpoint `text` refers to, or None if there is none. Writes no file.

    Raises UserError for an invalid reference.
    """
    source = reference.parse(text)
    # As in `register`: a model that was run by its checkpoint has its results under its registered name.
    paths = [(name, _path(name)) for name in [*registered(), *names()]]
    return next((name for name, path in paths if path and _checkpoint(path) == source.text), None)


def forget(name: str) -> None:
    """Remove the parameter file that `register` wrote in this process for a checkpoint that could not be fetched. An
    earlier file may have results, and its checkpoint may be away only for now.
    """
    if name in _registered_here:
        with contextlib.suppress(OSError):  # if the cache is not writable, there is no file either
            (_registry() / f"{name}.yaml").unlink(missing_ok=True)


def forget_unfetched(chosen: Iterable[str]) -> None:
    """Remove the files that `register` wrote for models whose checkpoint was not fetched, perhaps a wrong hub id."""
    for name in sorted({*chosen} & {*registered()}):
        with contextlib.suppress(UserError):  # a damaged file, reported when it is read for use
            if sources.local(read(name).source) is None:
                forget(name)


def _path(name: str, folder: Path | None = None) -> Path | None:
    """Return the parameter file of a model: in `folder`, else in PARAMETERS or among the registered ones; or None."""
    folders = [folder] if folder else [PARAMETERS, _registry()]
    return next((path for place in folders if (path := place / f"{name}.yaml").is_file()), None)


def _checkpoint(path: Path) -> str | None:
    """Return the resolved checkpoint reference of a parameter file, or None if the file is damaged."""
    try:
        return _resolved(content_of(path, ModelParameters.model_fields)["checkpoint"], path)
    except (UserError, KeyError, TypeError, AttributeError):
        return None


def _resolved(checkpoint: str, path: Path) -> str:
    """Return a checkpoint reference with relative paths resolved against the folder of the parameter file `path`."""
    return reference.parse(checkpoint, path.parent).text


def _beside(task: str, folder: Path) -> str:
    """Return a task with the path of its file (`lm_eval:FILE.yaml`), if it has one, resolved against `folder`.

    Raises UserError for a path in a home directory that does not exist.
    """
    prefix, colon, file = task.partition(":")
    if not colon or Path(file).suffix not in (".yaml", ".yml"):
        return task
    return f"{prefix}:{expanded(file if file.startswith('~') else folder / file)}"


def read(name: str, folder: Path | None = None) -> ModelParameters:
    """Return the validated content of `<folder>/<name>.yaml`, completed from its checkpoint if that has been fetched.

    Raises UserError naming the file, the key and what was expected.
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
            f'{where}: key "sha256": {checkpoint} is not a single file, so nothing would be checked; remove the key'
        )
    if (description.proxy or description.slice) and bool(description.full) != bool(description.architecture):
        lacking = "architecture" if description.full else "full"
        raise UserError(f'{where}: missing key "{lacking}": the scales proxy and slice need full and architecture')
    if description.proxy and not description.full:
        raise UserError(f'{where}: missing key "full": the scale proxy changes some of its dimensions')
    if reason := _dimension_fault(description):
        raise UserError(f"{where}: {reason}")
    complete = bool(description.full and description.architecture)
    description = completed(description, None if complete else sources.local(description.source))
    if reason := _slice_fault(description):
        raise UserError(f"{where}: {reason}")
    return description


def _dimension_fault(description: ModelParameters) -> str | None:
    """Return None, or a message on an invalid dimension of the model or its proxy in the file."""
    sections = [(description.full, "full")]
    if description.proxy is not None:
        sections += [(config, "proxy.config") for config in (description.proxy.config, description.config("proxy"))]
    return next((reason for config, name in sections if (reason := dimensions.fault(config, name))), None)


def _slice_fault(description: ModelParameters) -> str | None:
    """Return None, or a message if the slice has more blocks than the model."""
    blocks = dimensions.blocks(description.full)
    if description.slice is None or blocks is None or description.slice.layers <= blocks:
        return None
    expected = f"expected at most the {blocks} blocks of the model, got {description.slice.layers}"
    return f'key "layers" in section "slice": {expected}'


def completed(description: ModelParameters, folder: Path | None) -> ModelParameters:
    """Return a description whose missing fields are read from the checkpoint folder, if there is one."""
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
    """Return the configuration of a checkpoint folder; empty if it is unreadable, which loading it reports."""
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

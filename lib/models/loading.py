"""Loads any model at any scale with one function, `load`.

A proxy model is an ordinary checkpoint folder and takes the same path as real checkpoints. Offline, except for a
checkpoint that has not been fetched yet. Knows nothing of measuring or optimizations.
"""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from lib import cpu_limits
from lib.errors import UserError
from lib.models import parameters as parameter_files
from lib.models import tokenizing
from lib.models.checkpoints import fastest_dtype, io, placement
from lib.models.checkpoints.folder import check_checkpoint, folder_of
from lib.models.checkpoints.io import DTYPES
from lib.models.offload import streamer
from lib.models.sources import fetch as sources
from lib.models.structure import slice_depth
from lib.models.structure.anatomy import anatomy
from lib.models.structure.support import unsupported
from lib.models.tasks.registry import check_tasks


@dataclass
class Loaded:
    """A model ready to run, and its origin. `folder` and `tokenizer` are None for random weights.

    `original` returns the model as loaded, even if `model` was reassigned, or None once that model is deleted.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    image_processor: BaseImageProcessor | None
    parameters: parameter_files.ModelParameters
    name: str
    scale: str
    device: str
    dtype: torch.dtype
    folder: Path | None
    random_weights: bool
    seconds: float
    chosen_tasks: tuple[str, ...] = ()
    text: str = ""  # the user's own file on which perplexity is measured, if given
    original: Callable[[], nn.Module | None] | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks chosen for this run, else those of the model's parameter file."""
        return [*self.chosen_tasks] or self.parameters.tasks

    @property
    def quality_unavailable(self) -> str | None:
        """The reason why this model's answers carry no information, or None if they do."""
        return parameter_files.NO_INFORMATION if self.random_weights else None


def load(
    name: str,
    scale: str = "proxy",
    *,
    device: str = "cpu",
    dtype: str | None = None,
    checkpoints: str | Path | None = None,
    random_weights: bool = False,
    tasks: Sequence[str] = (),
    text: str = "",
    seed: int = 0,
    copies: int = 1,
) -> Loaded:
    """Return model `name` at `scale`, loaded for inference.

    `scale`: "proxy", the proxy model in `parameters/proxies/<name>`; "slice", the first blocks at real dimensions with
    random weights; "full", the checkpoint `<checkpoints>/<name>`, else the `checkpoint` of the parameter file, or
    random weights. `dtype`: "float32", "bfloat16" or "float16". The default is bfloat16 on a GPU. On a CPU it is
    float32 for a proxy model (bfloat16 does not pay at its widths), else the faster one on this machine
    (`checkpoints.fastest_dtype`), but bfloat16 if only that fits into memory. `tasks` replace those of the parameter
    file; perplexity is measured on the file `text`, if given, instead of held-out text.

    A checkpoint of which `copies` do not fit into the device's memory is streamed from its files, in their own dtype.
    If a control group limits processor time, torch gets no more threads than the limit allows. Raises UserError for an
    invalid scale, dtype, device, checkpoint, task or text.
    """
    start = time.perf_counter()
    _heed_quota()
    if scale not in parameter_files.SCALES:
        raise UserError(f'unknown scale "{scale}"; expected one of {", ".join(parameter_files.SCALES)}')
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f'device "{device}" is not available here; use --device cpu')
    tasks = check_tasks(tasks)
    random_weights = random_weights or scale == "slice"
    folder = None if random_weights else source(name, scale, checkpoints)
    description = parameter_files.completed(parameter_files.read(name), folder)
    description = description.model_copy(update={"tasks": check_tasks(description.tasks)})
    dtype = dtype or _default_dtype(description, scale, device, folder)
    if dtype not in DTYPES:
        raise UserError(f'unknown dtype "{dtype}"; expected one of {", ".join(DTYPES)}')
    if folder is None:
        model = io.build(
            description.config(scale),
            description.architecture,
            device=device,
            dtype=DTYPES[dtype],
            seed=seed,
            tiled=True,
        )
        if scale == "slice":
            slice_depth.state(model, description.full, description.architecture)
    elif (allowance := placement.allowance_bytes(folder, DTYPES[dtype], device, copies=copies)) is None:
        model = io.load_folder(folder, dtype=DTYPES[dtype], device=device)
    else:
        model = streamer.open_streamed(folder, allowance_bytes=allowance, device=device)
    if reason := unsupported(model):
        raise UserError(f"{name}: {reason}")
    return Loaded(
        model=model,
        tokenizer=None if folder is None else _tokenizer(folder, model),
        image_processor=None if folder is None or anatomy(model).vision is None else io.load_image_processor(folder),
        parameters=description,
        name=name,
        scale=scale,
        device=device,
        dtype=DTYPES[dtype] if streamer.streamer(model) is None else next(model.parameters()).dtype,
        folder=folder,
        random_weights=random_weights,
        seconds=time.perf_counter() - start,
        chosen_tasks=tuple(tasks),
        text=text,
        original=weakref.ref(model),
    )


def _heed_quota() -> None:
    """Limit torch to as many threads as this process may keep busy, as a build does before it starts a process."""
    threads = torch.get_num_threads()
    if (allowed := cpu_limits.within_quota(threads)) < threads:
        torch.set_num_threads(allowed)


def _default_dtype(
    description: parameter_files.ModelParameters, scale: str, device: str, folder: Path | None = None
) -> str:
    if device != "cpu":
        return "bfloat16"
    dtype = "float32" if scale == "proxy" else fastest_dtype.fastest(description.full)
    if folder is None or dtype != "float32" or _fits(folder, "float32", device):
        return dtype
    return "bfloat16" if _fits(folder, "bfloat16", device) else dtype  # rather in memory than streamed


def _fits(folder: Path, dtype: str, device: str) -> bool:
    return placement.allowance_bytes(folder, DTYPES[dtype], device) is None


def _tokenizer(folder: Path, model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, with end-of-text and padding tokens that the model has embeddings for."""
    configurations = (getattr(model, "generation_config", None), anatomy(model).config)
    return tokenizing.with_end(AutoTokenizer.from_pretrained(folder), anatomy(model).vocabulary, *configurations)


def source(name: str, scale: str, checkpoints: str | Path | None = None) -> Path:
    """Return the checked folder of the weights, fetched if necessary at scale `full` without `checkpoints`."""
    if scale == "proxy":
        return check_checkpoint(name, parameter_files.PARAMETERS / "proxies" / name)
    if checkpoints:
        return check_checkpoint(name, folder_of(name, checkpoints))
    description = parameter_files.read(name)
    return check_checkpoint(name, sources.fetch(description.source, sha256=description.sha256))

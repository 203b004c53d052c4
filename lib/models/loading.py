"""One function that loads any model at any scale: `load`.

A proxy model is an ordinary checkpoint folder, so that it takes the path of real checkpoints. Offline, except for a
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

    `original` returns the unchanged model, which `model` may have replaced, or None once it is deleted.
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
    text: str = ""  # a file of the user's own on which perplexity is measured
    original: Callable[[], nn.Module | None] | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks of this model: those chosen for this run, else those of its parameter file."""
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
) -> Loaded:
    """Load model `name` at `scale` for inference.

    proxy: the proxy model in `parameters/proxies/<name>`; slice: the first blocks at real dimensions, random weights;
    full: `<checkpoints>/<name>`, else what `checkpoint` of the parameter file refers to, or random weights. dtype:
    "float32", "bfloat16" or "float16"; by default float32 for a proxy model on a CPU (bfloat16 does not pay at its
    widths), on a GPU bfloat16, else what is quickest on this machine (`checkpoints.fastest_dtype`), but bfloat16 where
    float32 would not fit into memory and it does. A checkpoint that does not fit into the device's memory is streamed
    from its files, in their own dtype. `tasks` replace those of the parameter file; `text` is a file on which
    perplexity is measured instead of held-out text. Where a control group limits the processor's time, torch is left no
    more threads than that is worth. Raises UserError for an invalid scale, dtype, device, checkpoint, task or text.
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
    elif (allowance := placement.allowance_bytes(folder, DTYPES[dtype], device)) is None:
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
    """Leave torch as many threads as this process may keep busy; a build has done so before the process started."""
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
    return "bfloat16" if _fits(folder, "bfloat16", device) else dtype  # from memory rather than from its file


def _fits(folder: Path, dtype: str, device: str) -> bool:
    return placement.allowance_bytes(folder, DTYPES[dtype], device) is None


def _tokenizer(folder: Path, model: nn.Module) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, with an end of text where it names none, and padding that the model has."""
    configurations = (getattr(model, "generation_config", None), anatomy(model).config)
    return tokenizing.with_end(AutoTokenizer.from_pretrained(folder), anatomy(model).vocabulary, *configurations)


def source(name: str, scale: str, checkpoints: str | Path | None = None) -> Path:
    """Return the folder of the weights, checked. At scale `full` without `checkpoints` it is fetched if necessary."""
    if scale == "proxy":
        return check_checkpoint(name, parameter_files.PARAMETERS / "proxies" / name)
    if checkpoints:
        return check_checkpoint(name, folder_of(name, checkpoints))
    description = parameter_files.read(name)
    return check_checkpoint(name, sources.fetch(description.source, sha256=description.sha256))

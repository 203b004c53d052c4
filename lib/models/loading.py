"""One function that loads any model at any scale: `load`. Beside it: building, saving, loading pruned models, hashing.

A proxy is an ordinary checkpoint folder, so the path that real checkpoints take runs everywhere. Knows nothing of
tasks, measuring or optimizations. Offline unless a hub id is asked for at scale `full`.
"""

import hashlib
import json
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lib.errors import UserError
from lib.models import absent, depth, factors, placement, sparse, weightfile
from lib.models import parameters as parameter_files
from lib.models.anatomy import anatomy, synchronise
from lib.models.checkpoint import ALIGNMENT, MANIFEST, check_checkpoint, folder_of
from lib.models.random_weights import Tiled
from lib.models.tasknames import check_tasks

transformers_logging.disable_progress_bar()

HASHED_BYTES = 2**26  # at a time
WEIGHTS = "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model ready to run, and where it came from. `folder` and `tokenizer` are None for random weights.

    `original` leads to the model as it was loaded, which `model` need no longer be.
    """

    model: nn.Module
    tokenizer: object | None
    processor: object | None
    parameters: parameter_files.ModelParameters
    name: str
    scale: str
    device: str
    dtype: torch.dtype
    folder: Path | None
    random_weights: bool
    seconds: float
    chosen_tasks: tuple[str, ...] = ()
    original: Callable[[], nn.Module | None] | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks that it is asked: those chosen for this run, else those of its parameter file."""
        return [*self.chosen_tasks] or self.parameters.tasks

    @property
    def quality_unavailable(self) -> str | None:
        """The reason why this model's answers mean nothing, or None where they do."""
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
    seed: int = 0,
) -> Loaded:
    """Load model `name` at `scale` for inference.

    proxy: the stand-in in `parameters/proxies/<name>`; slice: the first blocks at real dimensions, random weights;
    full: `<checkpoints>/<name>`, else the folder or hub id of the parameter file, or random weights. dtype: "float32",
    "bfloat16" or "float16"; by default float32 for a proxy on a processor (bfloat16 does not pay at its widths), else
    bfloat16. A checkpoint that does not fit into the device's memory is streamed from its files, in their own dtype.
    `tasks` replace those of the parameter file. Raises UserError for a scale, dtype, device, checkpoint or task that
    cannot be used.
    """
    start = time.perf_counter()
    description = parameter_files.read(name)
    if scale not in parameter_files.SCALES:
        raise UserError(f'unknown scale "{scale}"; expected one of {", ".join(parameter_files.SCALES)}')
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f'device "{device}" is not available here; use --device cpu')
    check_tasks(tasks)
    dtype = dtype or ("float32" if scale == "proxy" and device == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise UserError(f'unknown dtype "{dtype}"; expected one of {", ".join(DTYPES)}')
    random_weights = random_weights or scale == "slice"
    folder = None if random_weights else source(name, scale, checkpoints)
    if folder is None:
        model = build(
            description.config(scale),
            description.architecture,
            device=device,
            dtype=DTYPES[dtype],
            seed=seed,
            tiled=True,
        )
        if scale == "slice":
            depth.state(model, description.full, description.architecture)
    elif (allowance := placement.allowance_bytes(folder, DTYPES[dtype], device)) is None:
        model = load_folder(folder, dtype=DTYPES[dtype], device=device)
    else:
        from lib.models import streamed  # which rests on this module

        model = streamed.open_streamed(folder, allowance_bytes=allowance, device=device)
    return Loaded(
        model=model,
        tokenizer=None if folder is None else AutoTokenizer.from_pretrained(folder),
        processor=None if folder is None or anatomy(model).vision is None else load_image_processor(folder),
        parameters=description,
        name=name,
        scale=scale,
        device=device,
        dtype=DTYPES[dtype],
        folder=folder,
        random_weights=random_weights,
        seconds=time.perf_counter() - start,
        chosen_tasks=tuple(tasks),
        original=weakref.ref(model),
    )


def source(name: str, scale: str, checkpoints: str | Path | None = None) -> Path:
    """Return the checked folder that the weights come from; for `full` without `checkpoints`, fetched from the hub."""
    if scale == "proxy":
        return check_checkpoint(name, parameter_files.PARAMETERS / "proxies" / name)
    given = parameter_files.read(name).checkpoint
    if checkpoints:
        return check_checkpoint(name, folder_of(name, checkpoints))
    return check_checkpoint(name, given if Path(given).is_dir() else placement.fetch(given))


def build(
    config: dict,
    architecture: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tiled: bool = False,
) -> nn.Module:
    """Build a model from a configuration with random weights (none at all on device `meta`), ready for inference.

    `tiled`: large tensors repeat a tile, for models that are only timed; what is to be trained is drawn in full.
    """
    configuration = AutoConfig.for_model(architecture, **config)
    with torch.random.fork_rng(devices=[]), torch.device(device), Tiled() if tiled else nullcontext():
        torch.manual_seed(seed)
        model = auto_class(configuration).from_config(configuration, dtype=dtype)
    return _ready(model)


def auto_class(configuration: object) -> type:
    """Return the transformers class that builds a model of this configuration."""
    return AutoModelForImageTextToText if hasattr(configuration, "vision_config") else AutoModelForCausalLM


def load_image_processor(folder: Path | str) -> object:
    """Load the picture processor of a vision-language checkpoint on the PIL path, which needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def save(model: nn.Module, folder: Path | str, *, tokenizer: object = None, processor: object = None) -> Path:
    """Save a model as a checkpoint folder that `load_folder` reads, with a manifest of its widths and of its factored
    matrices; return the folder. Tied weights are stored once, and tensors begin at aligned bytes.

    Where every block has the shapes that the configuration implies, and nothing is factored, transformers reads the
    folder as well.
    """
    folder = Path(folder)
    model.save_pretrained(folder, state_dict={})  # its configurations; the weights are written as we want them
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    weightfile.write(folder / WEIGHTS, stored)
    blocks = [
        {
            "heads": block.attention.heads,
            "key_value_heads": block.attention.key_value_heads,
            "channels": block.feed_forward.channels,
            "experts": block.feed_forward.experts.count if block.feed_forward.experts else 0,
        }
        | told
        for block, told in zip(anatomy(model).blocks, absent.describe(model))
    ]
    manifest: dict[str, object] = {"blocks": blocks}
    manifest |= {
        name: found for name, found in (("factors", factors.ranks(model)), ("sparse", sparse.describe(model))) if found
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for part in (tokenizer, processor):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def load_folder(folder: Path | str, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """Load a checkpoint folder (or hub id) for inference; with our manifest each block may have a shape of its own, and
    matrices may be stored in factors.
    """
    if (Path(folder) / MANIFEST).is_file():
        model = _load_with_manifest(Path(folder), dtype, device)
    else:
        configuration = AutoConfig.from_pretrained(folder)
        model, report = auto_class(configuration).from_pretrained(
            folder, config=configuration, dtype=dtype or "auto", output_loading_info=True
        )
        model = model.to(device)
        if report["missing_keys"]:
            raise UserError(f"{folder}: the checkpoint lacks {sorted(report['missing_keys'])[0]}")
    return _aligned(_ready(model))


def _ready(model: nn.Module) -> nn.Module:
    """Make a model ready for inference; return it.

    Its head is given hidden states of their own. Those of a prompt's last token are a view into a larger tensor, and
    for its strides torch (2.13, on a processor) copies the whole head before it multiplies: seconds at real
    vocabularies.
    """
    head = getattr(model, "lm_head", None)
    if head is not None:
        head.register_forward_pre_hook(own)
    return model.eval().requires_grad_(False)


def own(module: nn.Module, args: tuple) -> tuple:
    """Return a module's arguments with hidden states that are no view."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def _aligned(model: nn.Module) -> nn.Module:
    """Move weights that lie askew in a mapped file into memory of their own, aligned as fresh tensors are.

    Products round differently, and run slower, over misaligned memory: an arm read from disk would differ from the same
    arm in memory.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and sparse.is_dense(tensor) and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _load_with_manifest(folder: Path, dtype: torch.dtype | None, device: str) -> nn.Module:
    """Build the configuration's model without weights, give every parameter the stored tensor, whatever its shape.

    Tensors are read one by one into memory of their own, as a model has them that was built in memory: of a mapped file
    the system may take pages away, and then a peak lacks them.
    """
    configuration = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = auto_class(configuration).from_config(configuration, dtype=dtype or configuration.dtype)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    absent.restore(model, manifest.get("blocks", []))
    factors.restore(model, manifest.get("factors", {}))
    with closing(weightfile.WeightFile(folder)) as file:
        stored = {name: partial(file.tensor, place) for name, place in file.places.items()}
        sparse.restore(model, manifest.get("sparse", {}), stored, dtype)
        for name, old in [*model.named_parameters(), *model.named_buffers()]:
            if name in stored:
                _place(model, name, old, stored.pop(name)(), dtype, device)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left or stored:
        raise UserError(f"{folder}: weights and configuration do not fit at {(left or sorted(stored))[0]}")
    return synchronise(model.to(device))


def _place(model: nn.Module, name: str, old: torch.Tensor, tensor: torch.Tensor, dtype, device: str) -> None:
    """Put a stored tensor where `old` is; parameters take `dtype`, buffers keep their own."""
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if isinstance(old, nn.Parameter):
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, leaf, tensor.to(device=device, dtype=old.dtype))


def weights_hash(model: nn.Module) -> str:
    """Return a hash of the effective weights: names, shapes, dtypes and bytes of every parameter and stored buffer.

    Pieces of at most HASHED_BYTES are hashed side by side, wherever they lie; the hash is of theirs, in order.
    """

    def digest(piece: torch.Tensor) -> bytes:
        return hashlib.sha256(piece.cpu().numpy()).digest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, tensor in sorted(model.state_dict().items()):
            whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            pieces = tensor.detach().contiguous().flatten().view(torch.uint8).split(HASHED_BYTES)
            for found in pool.map(digest, pieces):
                whole.update(found)
    return whole.hexdigest()

"""Builds, saves, loads and hashes models, including pruned and factored ones.

A proxy model is an ordinary checkpoint folder and takes the same path as real checkpoints. Knows nothing of scales,
parameter files, tasks, measuring or optimizations. Offline unless a hub id is given.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, FineGrainedFP8Config
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging as transformers_logging

from lib.errors import UserError
from lib.models.checkpoints import finite, quantization, tying, weight_file
from lib.models.checkpoints.folder import ALIGNMENT, MANIFEST
from lib.models.checkpoints.random_weights import Tiled
from lib.models.structure import manifest
from lib.models.structure.anatomy import anatomy
from lib.models.structure.architecture import auto_class, ready, with_generation
from lib.models.structure.replacements import factored, no_op, sparse
from lib.models.structure.surgery import synchronise

transformers_logging.disable_progress_bar()

log = logging.getLogger(__name__)

HASHED_BYTES = 2**26  # at a time
WEIGHTS = "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(
    config: dict,
    architecture: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tiled: bool = False,
) -> nn.Module:
    """Return a model built from a configuration with random weights (none on device `meta`), ready for inference.

    `tiled`: large tensors repeat a tile of random values, which suffices for models that are only timed; otherwise
    every weight is drawn.
    """
    configuration = AutoConfig.for_model(architecture, **config)
    with torch.random.fork_rng(devices=[]), torch.device(device), Tiled() if tiled else nullcontext():
        torch.manual_seed(seed)
        model = auto_class(configuration).from_config(configuration, dtype=dtype)
    return ready(model)


def load_image_processor(folder: Path | str) -> BaseImageProcessor:
    """Return the image processor of a vision-language checkpoint; it uses PIL and needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def save(model: Any, folder: Path | str, *, tokenizer: Any = None, image_processor: Any = None) -> Path:
    """Save a model as a checkpoint folder for `load_folder`; return the folder.

    A manifest lists the widths of each block and the factored and sparse matrices. Tied weights are stored once, and
    tensors begin at aligned bytes. Transformers can read the folder too if every block has the shapes that the
    configuration implies and nothing is factored or sparse.
    """
    folder, described = Path(folder), manifest.describe(model)
    save_configuration(model, folder)  # the weights are written aligned below
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    weight_file.write(folder / WEIGHTS, stored)
    (folder / MANIFEST).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    for part in (tokenizer, image_processor):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def save_configuration(model: Any, folder: Path | str) -> None:
    """Write the configuration files of a model into a folder, without weights."""
    with _accepted(anatomy(model).config):
        model.save_pretrained(folder, state_dict={})


@contextmanager
def _accepted(config: Any) -> Iterator[None]:
    """Make the configuration state a number of heads that its class accepts, while the context is open.

    Some classes accept only divisors of the hidden size, which a model with pruned heads may not have. Loading takes
    the number of heads from the shapes of the stored tensors.
    """
    heads, hidden = config.num_attention_heads, config.hidden_size
    try:
        config.validate_architecture()
    except ValueError:
        config.num_attention_heads = next(count for count in range(heads, hidden + 1) if hidden % count == 0)
    try:
        yield
    finally:
        config.num_attention_heads = heads


def load_folder(folder: Path | str, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """Return the model of a checkpoint folder (or hub id), ready for inference.

    In a folder written by `save`, blocks may differ in shape and matrices may be factored or sparse. Raises UserError
    for missing weights and for weights that are not finite.
    """
    if (Path(folder) / MANIFEST).is_file():
        model = _load_with_manifest(Path(folder), dtype, device)
    else:
        model, report = _load_plain(folder, dtype)
        model = model.to(device)
        if report["missing_keys"]:
            raise UserError(f"{folder}: the checkpoint lacks {sorted(report['missing_keys'])[0]}")
    finite.require(model, folder)
    return _aligned(ready(model))


def _load_plain(folder: Path | str, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder in the hub's layout, dequantized if necessary, and transformers' loading report.

    Raises UserError if transformers cannot build the model here.
    """
    options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
    if quantized := quantization.method(Path(folder)):
        log.warning("%s: its weights are quantized (%s) and are dequantized while they are loaded", folder, quantized)
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    try:
        configuration = tying.settle(AutoConfig.from_pretrained(folder), folder)
        model, report = auto_class(configuration).from_pretrained(folder, config=configuration, **options)
    except (ImportError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: transformers cannot build its model ({why})") from None
    if quantized:  # from here on an ordinary model that can be saved
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    return model, report


def _aligned(model: nn.Module) -> nn.Module:
    """Copy weights that are misaligned in a mapped file into aligned memory; return the model.

    Products over misaligned memory round differently and run slower, so an arm loaded from disk would differ from the
    same arm built in memory.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and sparse.is_dense(tensor) and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model


def _load_with_manifest(folder: Path, dtype: torch.dtype | None, device: str) -> nn.Module:
    """Return the model of a folder with a manifest: built without weights, then given the stored tensors of any shape.

    Tensors are read one by one into memory of their own, as in a model built in memory. The system may evict pages of
    a mapped file, which a measured memory peak would then miss.
    """
    model, described = _without_weights(folder, dtype)
    with closing(weight_file.WeightFile(folder)) as file:
        stored: dict[str, Callable[[], torch.Tensor]] = {
            name: partial(file.tensor, place) for name, place in file.places.items()
        }
        sparse.restore(model, described.get("sparse", {}), stored, dtype, device)
        for name, old in [*model.named_parameters(), *model.named_buffers()]:
            if name in stored:
                _place(model, name, old, stored.pop(name)(), dtype, device)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing or stored:
        raise UserError(f"{folder}: weights and configuration do not match at {(missing or sorted(stored))[0]}")
    return synchronise(model.to(device))


def _without_weights(folder: Path, dtype: torch.dtype | None) -> tuple[Any, dict[str, Any]]:
    """Return (model without weights, manifest) as the configuration and the manifest of `folder` describe the model."""
    configuration = tying.settle(AutoConfig.from_pretrained(folder), folder)
    with init_empty_weights(include_buffers=False):
        built = auto_class(configuration).from_config(configuration, dtype=dtype or configuration.dtype)
    model = with_generation(built, folder)
    described = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    no_op.restore(model, described.get("blocks", []))
    factored.restore(model, described.get("factors", {}))
    return model, described


def manifest_fault(folder: Path, stored: Collection[str]) -> str | None:
    """Return None, or a message on the first tensor in which `stored` (names in the files) and the description of the
    model by configuration and manifest of `folder` differ. Reads no weights.
    """
    model, described = _without_weights(folder, None)
    kept_sparse = tuple(f"{name}." for name in described.get("sparse", {}))
    model.tie_weights()
    named = {name for name, _ in model.named_parameters() if name not in described.get("sparse", {})}
    known = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    if missing := sorted(named - set(stored)):
        return f"the checkpoint lacks {missing[0]}, which {MANIFEST} and config.json describe"
    if further := sorted(name for name in set(stored) - known if not name.startswith(kept_sparse)):
        return f"the checkpoint holds {further[0]}, which {MANIFEST} and config.json do not describe"
    return None


def _place(
    model: nn.Module, name: str, old: torch.Tensor, tensor: torch.Tensor, dtype: torch.dtype | None, device: str
) -> None:
    """Replace the tensor `old` of `model`, named `name`, by `tensor`; parameters take `dtype`, buffers keep theirs."""
    owner = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    if isinstance(old, nn.Parameter):
        tensor = tensor.to(device=device, dtype=dtype or tensor.dtype)
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(owner, leaf, tensor.to(device=device, dtype=old.dtype))


def weights_hash(model: nn.Module) -> str:
    """Return a hash of the weights: names, shapes, dtypes and bytes of every parameter and persistent buffer.

    Pieces of at most HASHED_BYTES are hashed in parallel; the result is the hash of their hashes, in order.
    """

    def digest(piece: torch.Tensor) -> bytes:
        return hashlib.sha256(piece.cpu().numpy().data).digest()

    whole = hashlib.sha256()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, tensor in sorted(model.state_dict().items()):
            whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            pieces = tensor.detach().contiguous().flatten().view(torch.uint8).split(HASHED_BYTES)
            for piece_digest in pool.map(digest, pieces):
                whole.update(piece_digest)
    return whole.hexdigest()

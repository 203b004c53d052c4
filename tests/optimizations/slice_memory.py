"""Memory while a compression is applied, on slices of real dimensions with more and more blocks, and what the whole
model would need by it.

    python -m tests.optimizations.slice_memory [--model NAME …] [--method NAME …] [--blocks 2 4 8] [--from file]

Counted are the bytes of live tensors (`lib.measure.trackers.live_tensors`), weights of bfloat16 and random. Beside the
weights, which grow with the blocks, what is held should not. The line for the whole model is derived: its weights from
its configuration, the new weights in the proportion of the largest slice, and the most that was held beside. With
`--from file` a checkpoint is changed from file to file, and one block of it is in memory at a time.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.measure.trackers.live_tensors import LiveTensors
from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.dimensions import cut
from lib.models.structure.anatomy import anatomy
from lib.optimizations.sparse_neural_networks import method as sparse
from lib.optimizations.sparse_neural_networks import out_of_core as sparse_file
from lib.optimizations.structured_pruning import method as pruning
from lib.optimizations.structured_pruning import out_of_core as pruning_file
from lib.optimizations.tensor_decomposition import analysis
from lib.optimizations.tensor_decomposition import method as decomposition
from lib.optimizations.tensor_decomposition import out_of_core as decomposition_file

MODELS = ("qwen3-4b-instruct-2507", "qwen3-coder-30b")
GIB = 2**30
Text = list[dict[str, torch.Tensor]]


def _whitened(model: nn.Module, text: Text) -> nn.Module:
    spectra = analysis.Spectra(model, text, weighed=False, room=0)  # nothing is kept only to save time
    return decomposition.apply(model, text, method="whitened", budget="uniform", spectra=spectra)


@dataclass(frozen=True)
class Method:
    """A compression in memory, (model, text) → model, and from file to file, (source, target, text) → folder."""

    in_memory: Callable[[nn.Module, Text], nn.Module]
    from_file: Callable[..., Path]
    options: dict[str, Any]


def _in_memory(apply: Callable[..., nn.Module], **options: Any) -> Callable[[nn.Module, Text], nn.Module]:
    return lambda model, text: apply(model, text, **options)


ZEROS: dict[str, Any] = {"sparsity": 0.5, "execute": "dense"}
CHANNELS: dict[str, Any] = {"ratio": 0.2, "granularity": "channels", "compensate": True}
METHODS = {
    "wanda": Method(
        _in_memory(sparse.apply, method="wanda", **ZEROS), sparse_file.apply_to_file, ZEROS | {"method": "wanda"}
    ),
    "sparsegpt": Method(_in_memory(sparse.apply, **ZEROS), sparse_file.apply_to_file, ZEROS),
    "whitened": Method(_whitened, decomposition_file.apply_to_file, {}),
    "auto": Method(_in_memory(pruning.apply, ratio=0.3), pruning_file.apply_to_file, {"ratio": 0.3}),  # REAP
    "channels": Method(_in_memory(pruning.apply, **CHANNELS), pruning_file.apply_to_file, CHANNELS),
}


@dataclass(frozen=True)
class Reading:
    """Bytes of one run: the model's weights, of them those of its blocks, those that were made, and the peak."""

    blocks: int
    weights: int
    in_blocks: int
    made: int
    peak: int
    from_file: bool
    seconds: float = 0.0

    @property
    def beside(self) -> int:
        """The bytes held besides weights: those of the model and the new ones, or, from a file, all but the blocks."""
        if self.from_file:
            return self.peak - (self.weights - self.in_blocks)
        return self.peak - self.weights - self.made


def measure(config: dict[str, Any], architecture: str, method: Method, text: Text, from_file: bool) -> Reading:
    """Return the bytes of one run on a model with random bfloat16 weights."""
    model = io.build(config, architecture, dtype=torch.bfloat16, tiled=True)
    blocks, weights, in_blocks = len(anatomy(model).blocks), nbytes(model), bytes_of_blocks(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    live, start = LiveTensors(), time.perf_counter()
    if not from_file:
        gc.collect()  # so that the next collection does not depend on earlier work
        live.hold(model)
        with live:
            changed = method.in_memory(model, text)
        each = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in changed.parameters()}
        new_bytes = sum(size for at, size in each.items() if at not in own)
        return Reading(blocks, weights, in_blocks, new_bytes, live.peak_bytes, False, time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        io.save(model, Path(folder) / "whole")
        del model
        gc.collect()
        start = time.perf_counter()
        with live:
            made_at = method.from_file(Path(folder) / "whole", Path(folder) / "made", text, **method.options)
        new_bytes = sum(file.stat().st_size for file in made_at.glob("model-0*.safetensors"))
        return Reading(blocks, weights, in_blocks, new_bytes, live.peak_bytes, True, time.perf_counter() - start)


def nbytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, counting tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def bytes_of_blocks(model: nn.Module) -> int:
    """Return the bytes of the weights of a model's decoder blocks."""
    return sum(parameter.nbytes for block in anatomy(model).blocks for parameter in block.module.parameters())


def whole(readings: Sequence[Reading], config: dict[str, Any], architecture: str) -> float:
    """Return the bytes that the whole model would need: its weights (from a file, without its blocks), new ones in
    proportion to the largest slice, and the most that any slice held besides.
    """
    model = io.build(config, architecture, device="meta", dtype=torch.bfloat16)
    largest, beside = max(readings, key=lambda reading: reading.blocks), max(reading.beside for reading in readings)
    if largest.from_file:
        return nbytes(model) - bytes_of_blocks(model) + beside
    return nbytes(model) + bytes_of_blocks(model) * largest.made / largest.in_blocks + beside


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: print one line per run and one derived for the whole model."""
    parser = argparse.ArgumentParser(prog="python -m tests.optimizations.slice_memory")
    parser.add_argument("--model", nargs="+", default=MODELS)
    parser.add_argument("--method", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=512, help="of calibration text, in sequences of 128")
    parser.add_argument("--from", dest="origin", choices=("memory", "file"), default="memory")
    chosen = parser.parse_args(arguments)
    rows_NT = torch.randint(8, 1000, (chosen.tokens // 128, 128), generator=torch.Generator().manual_seed(0))
    text = [{"input_ids": part_BT} for part_BT in rows_NT.split(2)]
    for name in chosen.model:
        described = parameters.read(name)
        for method in chosen.method:
            readings = []
            for blocks in chosen.blocks:
                config, from_file = cut(described.full, blocks), chosen.origin == "file"
                reading = measure(config, described.architecture, METHODS[method], text, from_file)
                readings.append(reading)
                gc.collect()
                new_gib, beside = reading.made / GIB, reading.beside / GIB
                sizes = f"weights {reading.weights / GIB:.2f} GiB, new {new_gib:.2f}, beside {beside:.2f}"
                about = f"{name}, {method}, from {chosen.origin}, {blocks} blocks"
                print(
                    f"{about}: {sizes}, peak {reading.peak / GIB:.2f} (measured), {reading.seconds:.0f} s", flush=True
                )
            total = whole(readings, described.full, described.architecture)
            print(f"{name}, {method}, from {chosen.origin}, whole: {total / GIB:.1f} GiB (derived)", flush=True)


if __name__ == "__main__":
    main()

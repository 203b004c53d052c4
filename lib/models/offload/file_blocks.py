"""A checkpoint that need not fit into memory: one block is in memory at a time, read from the source or, once changed,
from its shard. Changed blocks are written to shards. Embeddings, head, norms and a vision tower stay in memory.

`lib.models.offload.rewriting` changes all blocks in turn. Knows nothing of what is changed.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.files import write_atomically
from lib.models.checkpoints import finite, io, weight_file
from lib.models.checkpoints.folder import INDEX, MANIFEST
from lib.models.offload.layout import layout
from lib.models.sources.store import RECEIPT
from lib.models.structure import manifest
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import factored, sparse
from lib.models.structure.surgery import synchronise

REST = "model-rest.safetensors"  # the weights outside the decoder blocks
BEHIND = ("*.json", "*.jinja", "*.txt", "*.model")  # files of tokenizers and processors that are copied to the target
ABOUT = "rewriting.json"  # identifies the run that wrote the shards


class FileBlocks:
    """The model of a folder with one block in memory at a time; the `BlockStore` of a walk.

    `shards`: the folder to which changed blocks are written; without it nothing is written. Raises UserError for a
    checkpoint with factored or sparse matrices.
    """

    def __init__(self, source: Path | str, shards: Path | None = None, device: str = "cpu"):
        self.source, self.shards, self.device = Path(source), shards, device
        if (self.source / MANIFEST).is_file():
            content = json.loads((self.source / MANIFEST).read_text(encoding="utf-8"))
            if content.get("factors") or content.get("sparse"):
                raise UserError(f"{source}: holds factored or sparse matrices; give the dense checkpoint")
        parts = layout(self.source, False, device)  # not stored, since its units refer to modules that may be replaced
        self.model, self.file, self._experts = parts.model, parts.file, parts.experts
        layers = anatomy(self.model).decoder.layers
        names = {id(module): name for name, module in self.model.named_modules()}
        self.prefixes = [names[id(layer)] for layer in layers]
        self._load_rest()

    def _in_block(self, name: str) -> bool:
        return any(name.startswith(f"{prefix}.") for prefix in self.prefixes)

    def _read(self, name: str) -> torch.Tensor:
        if name not in self.file.places:
            raise UserError(f"{self.source}: the checkpoint lacks {name}")
        return self.file.tensor(self.file.places[name]).to(self.device)

    def _load_rest(self) -> None:
        """Read all weights outside the decoder blocks, and all stored buffers."""
        shared: dict[int, nn.Parameter] = {}
        for module_name, module in self.model.named_modules():
            for leaf, old in module._parameters.items():
                name = f"{module_name}.{leaf}"
                if old is None or self._in_block(name):
                    continue
                if id(old) not in shared:
                    stored = next(n for n in self._names_of(old) if n in self.file.places)
                    shared[id(old)] = nn.Parameter(self._read(stored).to(old.dtype), requires_grad=False)
                    finite.require_tensor(shared[id(old)], stored, self.source)
                module._parameters[leaf] = shared[id(old)]
            for leaf, buffer in module._buffers.items():
                name = f"{module_name}.{leaf}"
                if buffer is not None and name in self.file.places:
                    module._buffers[leaf] = self._read(name).to(buffer.dtype)

    def _names_of(self, parameter: nn.Parameter) -> list[str]:
        named = self.model.named_parameters(remove_duplicate=False)
        names = [name for name, other in named if other is parameter]
        if not any(name in self.file.places for name in names):
            raise UserError(f"{self.source}: the checkpoint lacks {names[0]}")
        return names

    # --- a block in memory -------------------------------------------------------------------------------------------

    def load(self, index: int) -> None:
        """Read a block into memory: from its shard if it is complete, else from the source."""
        if self.done(index):
            self._restore(index)
            return
        module, prefix = self._module(index), self.prefixes[index]
        for owner_name, owner in module.named_modules():
            for leaf, old in owner._parameters.items():
                name = ".".join(part for part in (prefix, owner_name, leaf) if part)
                if old is not None:
                    weight = self._read(name) if name in self.file.places else self._stack(index, leaf, name)
                    owner._parameters[leaf] = nn.Parameter(weight.to(old.dtype), requires_grad=False)

    def _stack(self, index: int, leaf: str, name: str) -> torch.Tensor:
        """Return a stack of experts whose matrices are stored individually."""
        if index not in self._experts:
            raise UserError(f"{self.source}: the checkpoint lacks {name}")
        experts = anatomy(self.model).blocks[index].feed_forward.experts
        assert experts is not None
        slices = []
        for expert in range(experts.count):
            *gate_up, down = self._experts[index](expert)
            places = gate_up if leaf == "gate_up_proj" else [down]
            slices.append(torch.cat([self.file.tensor(place) for place in places]))
        return torch.stack(slices).to(self.device)

    def release(self, index: int) -> None:
        """Write a block to its shard, unless that is complete, and free its weights."""
        if self.shards is not None and not self.done(index):
            self._write(index)
        for owner in self._module(index).modules():
            for leaf, old in owner._parameters.items():
                if old is not None:
                    empty = torch.empty(old.shape, dtype=old.dtype, device="meta")
                    owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _module(self, index: int) -> nn.Module:
        return anatomy(self.model).blocks[index].module

    # --- shards ------------------------------------------------------------------------------------------------------

    def _paths(self, index: int) -> tuple[Path, Path]:
        assert self.shards is not None
        return self.shards / f"model-{index:05d}.safetensors", self.shards / f"block-{index:05d}.json"

    def done(self, index: int) -> bool:
        """Return whether the shard of a block is complete, that is, has its description, which is written last."""
        return self.shards is not None and self._paths(index)[1].is_file()

    def _write(self, index: int) -> None:
        shard, description = self._paths(index)
        prefix, described = self.prefixes[index], manifest.describe(self.model)
        entry: dict[str, Any] = {"block": described["blocks"][index]}
        for section in ("factors", "sparse"):
            own = {name: value for name, value in described.get(section, {}).items() if name.startswith(f"{prefix}.")}
            entry |= {section: own}
        tensors = {f"{prefix}.{name}": tensor for name, tensor in self._module(index).state_dict().items()}
        weight_file.write(shard, tensors)
        with closing(_Shard(shard)) as written:
            for name, tensor in tensors.items():
                if not torch.equal(written.read(name), tensor.cpu()):
                    raise UserError(f"{shard}: {name} differs from what was written; check the disk")
        _flush(shard)  # its description, which is flushed too, must not outlive it in a power loss
        write_atomically(description, json.dumps(entry))

    def _restore(self, index: int) -> None:
        """Read a changed block from its shard."""
        shard, description = self._paths(index)
        entry = json.loads(description.read_text(encoding="utf-8"))
        factored.restore(self.model, entry["factors"])
        with closing(_Shard(shard)) as opened:
            stored: dict[str, Callable[[], torch.Tensor]] = {
                name: partial(opened.read, name) for name in opened.tensors
            }
            sparse.restore(self.model, entry["sparse"], stored, device=self.device)
            for name, read in stored.items():
                owner, leaf = self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                if leaf in owner._parameters:
                    owner._parameters[leaf] = nn.Parameter(read().to(self.device), requires_grad=False)
                else:
                    owner._buffers[leaf] = read().to(self.device)
        synchronise(self.model)

    def finish(self, target: Path) -> Path:
        """Write the remaining weights, index, configuration and manifest; move the folder to `target` and return it."""
        assert self.shards is not None
        synchronise(self.model)
        tied = dict(self.model.named_parameters(remove_duplicate=False)).keys() - dict(self.model.named_parameters())
        rest = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in tied and not self._in_block(name)
        }
        weight_file.write(self.shards / REST, rest)
        _flush(self.shards / REST)
        files = {name: REST for name in rest}
        for index in range(len(self.prefixes)):
            shard = self._paths(index)[0]
            with closing(_Shard(shard)) as opened:
                files |= {name: shard.name for name in opened.tensors}
        index_file = {"metadata": {}, "weight_map": files}
        write_atomically(self.shards / INDEX, json.dumps(index_file, indent=1))
        for pattern in BEHIND:
            for path in self.source.glob(pattern):
                if path.name not in (MANIFEST, INDEX, RECEIPT):
                    shutil.copyfile(path, self.shards / path.name)
        io.save_configuration(self.model, self.shards)
        paths = [self._paths(index)[1] for index in range(len(self.prefixes))]
        entries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        sections: dict[str, Any] = {"blocks": [entry["block"] for entry in entries]}
        for section in ("factors", "sparse"):
            merged = {name: value for entry in entries for name, value in entry[section].items()}
            sections |= {section: merged} if merged else {}
        write_atomically(self.shards / MANIFEST, json.dumps(sections, indent=1) + "\n")
        self.shards.rename(target)  # before the files from which an unfinished run resumes are removed
        for leftover in (*target.glob("block-*.json"), target / ABOUT):
            leftover.unlink()
        return target

    def close(self) -> None:
        """Close the source."""
        self.file.close()


class _Shard:
    """One open safetensors file of changed tensors."""

    def __init__(self, path: Path):
        from safetensors import safe_open

        self._file = safe_open(path, framework="pt").__enter__()
        self.tensors = list(self._file.keys())

    def read(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)

    def close(self) -> None:
        self._file.__exit__(None, None, None)


def _flush(path: Path) -> None:
    """Write a file's pages to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())

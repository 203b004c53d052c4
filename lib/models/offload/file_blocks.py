"""A checkpoint that need not fit into memory, changed block by block, from file to file.

`rewrite` walks calibration text through the blocks (`lib.models.calibration.walk`); each is read from the source when
its turn comes, changed, used to carry the text on, written to a shard of the target, and leaves memory. Embeddings,
head, norms and a vision tower stay in memory. Shards are written into a folder beside the target, which becomes the
target when all are there and were read again: an interrupted run leaves no half checkpoint, and the next one resumes
after the last shard. Knows nothing of what is changed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.files import write_atomically
from lib.models.calibration.walk import NO_NUMBERS, Walk
from lib.models.checkpoints import finite, io, weight_file
from lib.models.checkpoints.folder import INDEX, MANIFEST, weight_files
from lib.models.offload.layout import layout
from lib.models.sources.store import RECEIPT
from lib.models.structure import manifest
from lib.models.structure.anatomy import Block, anatomy
from lib.models.structure.replacements import factored, sparse
from lib.models.structure.surgery import synchronise

REST = "model-rest.safetensors"  # what is no decoder block
BEHIND = ("*.json", "*.jinja", "*.txt", "*.model")  # files of tokenizers and processors that the target takes over
Change = Callable[[nn.Module, Walk, Block], None]


class FileBlocks:
    """A model in a folder of which one block is in memory at a time: the `BlockStore` of a walk.

    `shards`: the folder that changed blocks are written to; without one nothing is written.
    """

    def __init__(self, source: Path | str, shards: Path | None = None, device: str = "cpu"):
        self.source, self.shards, self.device = Path(source), shards, device
        if (self.source / MANIFEST).is_file():
            content = json.loads((self.source / MANIFEST).read_text(encoding="utf-8"))
            if content.get("factors") or content.get("sparse"):
                raise UserError(f"{source}: holds factored or sparse matrices; give the dense checkpoint")
        parts = layout(self.source, False, device)  # not kept: its units hold modules that a change replaces
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
        """Read everything that is no decoder block, and the stored buffers of the blocks."""
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
        """Read a block: from its shard where it is done already, else from the source."""
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
        """Return a stack of experts that are stored one by one."""
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
        """Write a block to its shard, unless it is there, and take its weights out of memory."""
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
        """Return whether the shard of a block is complete: its description is written last."""
        return self.shards is not None and self._paths(index)[1].is_file()

    def _write(self, index: int) -> None:
        shard, description = self._paths(index)
        prefix, every = self.prefixes[index], manifest.describe(self.model)
        entry: dict[str, Any] = {"block": every["blocks"][index]}
        for section in ("factors", "sparse"):
            own = {name: value for name, value in every.get(section, {}).items() if name.startswith(f"{prefix}.")}
            entry |= {section: own}
        tensors = {f"{prefix}.{name}": tensor for name, tensor in self._module(index).state_dict().items()}
        weight_file.write(shard, tensors)
        with closing(_Shard(shard)) as written:
            for name, tensor in tensors.items():
                if not torch.equal(written.read(name), tensor.cpu()):
                    raise UserError(f"{shard}: {name} reads otherwise than it was written; check the disk")
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
        """Write what is no decoder block, index, configuration and manifest; move everything to `target`."""
        assert self.shards is not None
        synchronise(self.model)
        tied = dict(self.model.named_parameters(remove_duplicate=False)).keys() - dict(self.model.named_parameters())
        rest = {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in tied and not self._in_block(name)
        }
        weight_file.write(self.shards / REST, rest)
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
        self.shards.rename(target)  # before anything that an unfinished run resumes by is taken away
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


ABOUT = "rewriting.json"  # what the shards of an unfinished run were made by


def rewrite(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    change: Change,
    *,
    about: dict[str, Any],
    device: str = "cpu",
    shards: Path | None = None,
) -> Path:
    """Write the checkpoint in `source`, changed, to the new folder `target`; return it.

    `change(model, walk, block)` changes in place the block in front of which the walk stands. `about` says what is
    changed, as plain JSON: an unfinished run of the same change, on the same text and source, resumes after its last
    block; a different one is refused. `shards`: the folder of an unfinished run, on the disk of `target` (default:
    beside it, `.part` behind its name). Raises UserError as `require_free` does, for a block that cannot be read, for
    answers that are not finite, and for a disk that is full. However it ends early, the blocks before are kept, and
    without one nothing is.
    """
    source, target = Path(source), Path(target)
    shards = require_free(source, target, calibration, about=about, shards=shards)
    _begin(shards, _made_by(source, calibration, about))
    try:
        with closing(FileBlocks(source, shards, device)) as store:
            _change_blocks(store, calibration, change)
        del store  # and what it holds in memory
        with closing(FileBlocks(source, shards, device)) as written:
            _require_answers(written, calibration[:1])
            return written.finish(target)
    except BaseException as error:
        begun = any(shards.glob("block-*.json"))
        if not begun:
            shutil.rmtree(shards, ignore_errors=True)
        if not isinstance(error, (UserError, OSError)):
            raise
        what = str(error) if isinstance(error, UserError) else _not_written(error, shards)
        if begun and isinstance(error, _Unusable):
            what += f"; delete {shards}"
        elif begun:
            what += f"; {shards} keeps the blocks before it, and the same command resumes there"
        raise UserError(what) from None


class _Unusable(UserError):
    """What was written is of no use, so that resuming would end in the same way."""


def require_free(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    about: dict[str, Any],
    shards: Path | None = None,
) -> Path:
    """Return the folder of shards of a `rewrite` with these arguments, for callers with long work ahead of it.

    Raises UserError for an existing target, shards on another disk, and a folder that holds another unfinished run.
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target}: exists already; name a new folder")
    shards = Path(shards) if shards else target.with_name(f"{target.name}.part")
    if _disk(shards) != _disk(target):
        raise UserError(f"{shards}: lies on another disk than {target}; name a folder on the same one")
    if shards.is_dir() and any(shards.iterdir()):
        about_path = shards / ABOUT
        expected = _made_by(Path(source), calibration, about)
        if not about_path.is_file() or about_path.read_text(encoding="utf-8") != expected:
            raise UserError(f"{shards}: holds an unfinished run of something else; delete it")
    return shards


def _disk(path: Path) -> int:
    """Return the number of the disk on which a path lies, or would lie."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists()).stat().st_dev


def _not_written(error: OSError, shards: Path) -> str:
    return f"{error.filename or shards}: cannot be written ({error.strerror or error})"


def _change_blocks(store: FileBlocks, calibration: Sequence[dict[str, torch.Tensor]], change: Change) -> None:
    walk = Walk(store.model, calibration, store=store)
    for block in walk:
        if not store.done(block.index):
            change(store.model, walk, block)


def _begin(shards: Path, made_by: str) -> None:
    """Make the folder of shards, or resume in it."""
    try:
        shards.mkdir(parents=True, exist_ok=True)
        write_atomically(shards / ABOUT, made_by)
    except OSError as error:
        raise UserError(_not_written(error, shards)) from None


def _made_by(source: Path, calibration: Sequence[dict[str, torch.Tensor]], about: dict[str, Any]) -> str:
    """Return as JSON what tells one run from another."""
    made_by = {"about": about, "text": _digest(calibration), "source": _identity(source)}
    return json.dumps(made_by, sort_keys=True)


def _digest(calibration: Sequence[dict[str, torch.Tensor]]) -> str:
    """Return a hash of calibration text."""
    whole = hashlib.sha256()
    for batch in calibration:
        for name, tensor in sorted(batch.items()):
            whole.update(f"{name} {tuple(tensor.shape)}".encode())
            whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _identity(source: Path) -> list[list[Any]]:
    """Return what tells one state of a checkpoint from another: its path, and size and time of every weight file."""
    files = sorted(weight_files(source.resolve()))
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _require_answers(written: FileBlocks, text: Sequence[dict[str, torch.Tensor]]) -> None:
    """Raise UserError unless the blocks that were written, read again one by one, give finite states."""
    walk = Walk(written.model, text, store=written)
    last = len(written.prefixes) - 1
    try:
        for block in walk:
            if block.index == last and not all(bool(states.isfinite().all()) for states in walk.outputs()):
                raise UserError(f"block {last}: its outputs {NO_NUMBERS}")
    except UserError as error:
        raise _Unusable(f"what was written cannot be used: {error}") from None

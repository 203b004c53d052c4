"""Changes a checkpoint that need not fit into memory, block by block, from file to file.

`rewrite` passes calibration text through the blocks (`lib.models.calibration.walk`). Each block in turn is read from
the source, changed, run on the text, written to a shard of the target and freed (`lib.models.offload.file_blocks`).
Shards are written into a folder next to the target, which becomes the target once all shards are complete and were read
back: an interrupted run leaves no half checkpoint, and the next run resumes after the last shard. Only one run at a
time writes into the folder. Knows nothing of what is changed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.errors import UserError
from lib.files import Held, locked, write_atomically
from lib.models.calibration.walk import NO_NUMBERS, Walk
from lib.models.checkpoints.folder import weight_files
from lib.models.offload.file_blocks import ABOUT, FileBlocks
from lib.models.structure.anatomy import Block

Change = Callable[[nn.Module, Walk, Block], None]


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
    """Write a changed copy of the checkpoint in `source` to the new folder `target`; return `target`.

    `change(model, walk, block)` changes the current block of the walk in place. `about` describes the change as plain
    JSON: an unfinished run with the same change, text and source resumes after its last block; a different one is
    refused. `shards`: the folder of an unfinished run, on the same disk as `target` (default: next to it, with `.part`
    added to its name). Raises UserError as `reserved` and `write_into` do.
    """
    with reserved(source, target, calibration, about=about, shards=shards) as free:
        return write_into(free, source, target, calibration, change, about=about, device=device)


def write_into(
    shards: Path,
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    change: Change,
    *,
    about: dict[str, Any],
    device: str = "cpu",
) -> Path:
    """Do what `rewrite` does, in a folder of shards that the caller has `reserved` for the same arguments.

    Raises UserError for a block that cannot be read, for outputs that are not finite, and for a full disk. After any
    error, finished blocks are kept; without a finished block the folder is removed.
    """
    source, target = Path(source), Path(target)
    _begin(shards, _run_description(source, calibration, about))
    try:
        with closing(FileBlocks(source, shards, device)) as store:
            _change_blocks(store, calibration, change)
        del store  # to free its memory
        with closing(FileBlocks(source, shards, device)) as written:
            _require_answers(written, calibration[:1])
            return written.finish(target)
    except BaseException as error:
        begun = any(shards.glob("block-*.json"))
        if not begun:
            shutil.rmtree(shards, ignore_errors=True)
        if not isinstance(error, (UserError, OSError)):
            raise
        message = str(error) if isinstance(error, UserError) else _not_written(error, shards)
        if begun and isinstance(error, _Unusable):
            message += f"; delete {shards}"
        elif begun:
            message += f"; {shards} keeps the blocks before it, and the same command resumes there"
        raise UserError(message) from None


class _Unusable(UserError):
    """The written blocks cannot be used, and resuming would end the same way."""


@contextmanager
def reserved(
    source: Path | str,
    target: Path | str,
    calibration: Sequence[dict[str, torch.Tensor]],
    *,
    about: dict[str, Any],
    shards: Path | None = None,
) -> Iterator[Path]:
    """Yield the folder of shards of a `rewrite` with these arguments, locked against other processes while the context
    is open; for callers that work for a long time before they write.

    Raises UserError if another run holds the lock, for an existing target, for shards on another disk, and for a folder
    with another unfinished run. The lock file lies next to the folder as long as the folder exists.
    """
    target = Path(target)
    shards = Path(shards) if shards else target.with_name(f"{target.name}.part")
    lock = shards.with_name(f".{shards.name}.lock")
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock))
        except Held as holder:
            busy = f"another run writes into it ({holder}); wait for it, or name another folder"
            raise UserError(f"{shards}: {busy}") from None
        except OSError as error:
            raise UserError(_not_written(error, shards)) from None
        try:
            _require_free(Path(source), target, shards, calibration, about)
            yield shards
        finally:
            if not shards.exists():
                for leftover in (lock, lock.with_name(f"{lock.name}.holder")):
                    with suppress(OSError):  # some systems cannot remove open files
                        leftover.unlink(missing_ok=True)


def _require_free(
    source: Path, target: Path, shards: Path, calibration: Sequence[dict[str, torch.Tensor]], about: dict[str, Any]
) -> None:
    if target.exists():
        raise UserError(f"{target}: exists already; name a new folder")
    if _disk(shards) != _disk(target):
        raise UserError(f"{shards}: lies on another disk than {target}; name a folder on the same one")
    if shards.is_dir() and any(shards.iterdir()):
        about_path = shards / ABOUT
        expected = _run_description(source, calibration, about)
        if not about_path.is_file() or about_path.read_text(encoding="utf-8") != expected:
            raise UserError(f"{shards}: holds an unfinished run of something else; delete it")


def _disk(path: Path) -> int:
    """Return the device number of the disk of a path, which need not exist."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists()).stat().st_dev


def _not_written(error: OSError, shards: Path) -> str:
    return f"{error.filename or shards}: cannot be written ({error.strerror or error})"


def _change_blocks(store: FileBlocks, calibration: Sequence[dict[str, torch.Tensor]], change: Change) -> None:
    walk = Walk(store.model, calibration, store=store)
    for block in walk:
        if not store.done(block.index):
            change(store.model, walk, block)


def _begin(shards: Path, description: str) -> None:
    """Create the folder of shards if necessary, and write the description of the run into it."""
    try:
        shards.mkdir(parents=True, exist_ok=True)
        write_atomically(shards / ABOUT, description)
    except OSError as error:
        raise UserError(_not_written(error, shards)) from None


def _run_description(source: Path, calibration: Sequence[dict[str, torch.Tensor]], about: dict[str, Any]) -> str:
    """Return the JSON that identifies a run."""
    description = {"about": about, "text": _digest(calibration), "source": _identity(source)}
    return json.dumps(description, sort_keys=True)


def _digest(calibration: Sequence[dict[str, torch.Tensor]]) -> str:
    """Return a hash of calibration text."""
    whole = hashlib.sha256()
    for batch in calibration:
        for name, tensor in sorted(batch.items()):
            whole.update(f"{name} {tuple(tensor.shape)}".encode())
            whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _identity(source: Path) -> list[list[Any]]:
    """Return what identifies a state of a checkpoint: path, size and modification time of every weight file."""
    files = sorted(weight_files(source.resolve()))
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _require_answers(written: FileBlocks, text: Sequence[dict[str, torch.Tensor]]) -> None:
    """Raise UserError unless the written blocks, read back one by one, give finite outputs on `text`."""
    walk = Walk(written.model, text, store=written)
    last = len(written.prefixes) - 1
    try:
        for block in walk:
            if block.index == last and not all(bool(states.isfinite().all()) for states in walk.outputs()):
                raise UserError(f"block {last}: its outputs {NO_NUMBERS}")
    except UserError as error:
        raise _Unusable(f"what was written cannot be used: {error}") from None

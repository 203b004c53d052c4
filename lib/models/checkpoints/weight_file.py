"""Weights read from safetensors files piece by piece, straight into memory that already exists; every byte is counted.
And written so that they may be used where the file is mapped.

A read takes any number of places at once: neighbours in the file are fetched by one system call, scattered to aligned
destinations, without a copy in between (the page cache's own copy aside). Whether a byte came from the disk or from
the page cache is the system's affair; with `drop` each read is forgotten by the page cache, so that the next one comes
from the disk. Knows nothing of models.
"""

import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from lib.errors import UserError
from lib.models.checkpoints import folder as checkpoint
from lib.models.checkpoints.folder import ALIGNMENT

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WRITTEN = 2**22  # bytes at a time
MOST_AT_ONCE = 512  # destinations of one system call; the system's own limit is 1024


@dataclass(frozen=True)
class Place:
    """Where a tensor, or some rows of one, lies in a file."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, first: int, last: int) -> "Place":
        """Return the place of rows `first` to `last` (not included) along the first dimension."""
        row = self.nbytes // self.shape[0]
        return Place(
            self.file, self.offset + first * row, (last - first) * row, self.dtype, (last - first, *self.shape[1:])
        )

    def element(self, index: int) -> "Place":
        """Return the place of one entry along the first dimension, without that dimension."""
        one = self.rows(index, index + 1)
        return Place(one.file, one.offset, one.nbytes, one.dtype, one.shape[1:])


Piece = tuple[Place, torch.Tensor]  # what to read, and the uint8 memory [nbytes] on the processor to read it into


def places(folder: str | Path) -> dict[str, Place]:
    """Return the place of every tensor of a checkpoint folder. Raises UserError for a damaged file or unknown dtype."""
    found = {}
    for name, (file, offset, nbytes, dtype, shape) in checkpoint.tensor_places(folder).items():
        if dtype not in DTYPES:
            raise UserError(f"{file}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)}")
        found[name] = Place(file, offset, nbytes, DTYPES[dtype], shape)
    return found


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def buffer(nbytes: int, pinned: bool = False) -> torch.Tensor:
    """Return uninitialised memory [nbytes] on the processor whose first byte is aligned."""
    room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    start = -room.data_ptr() % ALIGNMENT
    return room[start : start + nbytes]


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as one safetensors file, each at an aligned byte. (Behind one whose size is no multiple, others lie
    askew, since the format allows no gaps: such come last.)

    Products over memory that lies askew are slower and round differently, and a mapped file is such memory: what reads
    it would have to hold all weights twice for a moment. Raises UserError for a dtype that is not among DTYPES.
    """
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors, key=lambda name: tensors[name].nbytes % ALIGNMENT > 0)
    for name in ordered:
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise UserError(f"{path}: {name} cannot be stored as {tensor.dtype}; expected one of {', '.join(DTYPES)}")
        place = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-(8 + len(told)) % ALIGNMENT)
    beside = path.with_suffix(".writing")  # what is mapped from an older file of this name stays whole
    with beside.open("wb") as file:
        for piece in _whole_pieces(struct.pack("<Q", len(told)) + told, (tensors[name] for name in ordered)):
            file.write(piece)
    beside.replace(path)


def _whole_pieces(begun: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """Yield all bytes of a file in pieces of WRITTEN, only the last one shorter: the page cache keeps a file that is
    written so in large pages, which are mapped ten times as fast (1,600 against 160 GB/s, ext4, Linux 6.18).
    """
    staged, filled = memoryview(bytearray(WRITTEN)), 0
    for data in chain([begun], (piece for tensor in tensors for piece in _bytes(tensor))):
        rest = memoryview(data)
        while len(rest):
            taken = rest[: WRITTEN - filled]
            staged[filled : filled + len(taken)] = taken
            filled, rest = filled + len(taken), rest[len(taken) :]
            if filled == WRITTEN:
                yield staged
                filled = 0
    yield staged[:filled]


def _bytes(tensor: torch.Tensor) -> Iterator[np.ndarray]:
    flat = tensor.detach().contiguous().flatten()
    for piece in flat.view(torch.uint8).split(WRITTEN) if flat.numel() else ():
        yield piece.cpu().numpy()


class WeightFile:
    """The open weight files of one checkpoint folder. `bytes_read` counts what was read since it was opened; while
    `log` is a list, every call of `read` leaves there what reads the same once more.
    """

    def __init__(self, folder: str | Path, *, drop: bool = False):
        self.folder, self.drop = Path(folder), drop
        if drop and not hasattr(os, "posix_fadvise"):
            raise UserError("page_cache drop: this system cannot forget what it has read; use keep")
        self.places = places(folder)
        self.bytes_read = 0
        self.log: list[Callable[[], None]] | None = None
        self._counting = threading.Lock()
        self._open = {file: os.open(file, os.O_RDONLY) for file in {place.file for place in self.places.values()}}

    def tensor(self, place: Place) -> torch.Tensor:
        """Return one tensor, read into memory of its own."""
        memory = torch.empty(place.nbytes, dtype=torch.uint8)
        self.read([(place, memory)])
        return memory.view(place.dtype).view(place.shape)

    def read(self, pieces: Iterable[Piece]) -> None:
        """Read every piece into its memory. Raises UserError where a file ends early or cannot be read: then no piece
        of this call may be used.
        """
        total, pieces = 0, list(pieces)
        for run in _runs(pieces):
            place, _ = run[0]
            self._fill(place.file, place.offset, [memory for _, memory in run])
            length = sum(piece.nbytes for piece, _ in run)
            if self.drop:
                os.posix_fadvise(self._open[place.file], place.offset, length, os.POSIX_FADV_DONTNEED)
            total += length
        self.count(total, lambda: self.read(pieces))

    def count(self, nbytes: int, again: Callable[[], None]) -> None:
        """Count bytes that were read, and note what reads them once more."""
        with self._counting:
            self.bytes_read += nbytes
            if self.log is not None:
                self.log.append(again)

    def size(self, file: Path) -> int:
        """Return the bytes that a file has now."""
        return os.fstat(self._open[file]).st_size

    def _fill(self, file: Path, offset: int, memories: list[torch.Tensor]) -> None:
        waiting = [memoryview(memory.numpy()) for memory in memories if memory.numel()]
        while waiting:
            try:
                got = _read_into(self._open[file], waiting, offset)
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror}) at byte {offset}") from None
            if got == 0:
                missing = sum(map(len, waiting))
                raise UserError(
                    f"{file}: truncated while it was being streamed: it ends at byte {offset}, {missing} bytes early; "
                    "copy it again"
                )
            offset += got
            while waiting and got >= len(waiting[0]):
                got -= len(waiting.pop(0))
            if got:
                waiting[0] = waiting[0][got:]

    def forget(self) -> None:
        """Let the page cache forget the files, so that the next reads come from the disk (written pages only)."""
        if not hasattr(os, "posix_fadvise"):
            raise UserError("this system cannot forget what it has read")
        for handle in self._open.values():
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files; reading is an error from here on."""
        while self._open:
            os.close(self._open.popitem()[1])


def _read_into(handle: int, memories: list[memoryview], offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, memories[:MOST_AT_ONCE], offset)
    data = (
        os.pread(handle, len(memories[0]), offset) if hasattr(os, "pread") else _seek_and_read(handle, memories, offset)
    )
    memories[0][: len(data)] = data
    return len(data)


def _seek_and_read(handle: int, memories: list[memoryview], offset: int) -> bytes:
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, len(memories[0]))


def _runs(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Return the pieces grouped into stretches without a gap, in the order of the files."""
    runs: list[list[Piece]] = []
    end = None
    for place, memory in sorted(pieces, key=lambda piece: (str(piece[0].file), piece[0].offset)):
        if runs and end == (place.file, place.offset):
            runs[-1].append((place, memory))
        else:
            runs.append([(place, memory)])
        end = place.file, place.offset + place.nbytes
    return runs

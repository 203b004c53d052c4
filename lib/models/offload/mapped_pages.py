"""Uses weights directly in the page cache: pages of a mapped file are made present, used, and released.

Reading copies every byte from the page cache into private memory, at half the bandwidth that computing needs. A mapping
exposes the same pages without a copy. `hold` makes the pages of some places present at once (MADV_POPULATE_READ, Linux
5.14), from the disk if the page cache lacks them, and `release` unmaps them again, so that the process's resident
memory contains only what is held. The system decides what stays in the page cache, as with reading. Only expected or
held pages are read, and none around them (MADV_RANDOM): with scarce memory, pages beyond the end of a unit would evict
those of the next unit, which would then be read twice.

`hold` raises UserError for a file that has become too short. A file truncated between `hold` and use, while one unit
computes, ends the process (SIGBUS). Knows nothing of models.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lib.errors import UserError
from lib.models.checkpoints.weight_file import TensorPlace, WeightFile

PAGE = mmap.PAGESIZE
WILLNEED, DONTNEED, POPULATE_READ = 3, 4, 22  # <linux/mman.h>


def available() -> bool:
    """Return whether this system can populate mapped pages and report failures."""
    if not sys.platform.startswith("linux"):
        return False
    probe = torch.zeros(2 * PAGE, dtype=torch.uint8)
    page = ctypes.c_void_p(-(-probe.data_ptr() // PAGE) * PAGE)
    return _library().madvise(page, ctypes.c_size_t(PAGE), POPULATE_READ) == 0


class Span(NamedTuple):
    """Bytes `first` to `end` (not included) of a file."""

    file: Path
    first: int
    end: int


def spans(places: Sequence[TensorPlace]) -> tuple[Span, ...]:
    """Return the spans of `places` with neighbours merged, since a system call costs as much as a small tensor."""
    merged: list[Span] = []
    for place in sorted(places, key=lambda place: (str(place.file), place.offset)):
        end = place.offset + place.nbytes
        if merged and (merged[-1].file, merged[-1].end) == (place.file, place.offset):
            merged[-1] = merged[-1]._replace(end=end)
        else:
            merged.append(Span(place.file, place.offset, end))
    return tuple(merged)


class FilePages:
    """The mapped files of an open `WeightFile`, which counts and logs the bytes held.

    With `read_around`, the system may also read pages around an accessed page, as it does by default.
    """

    def __init__(self, file: WeightFile, *, read_around: bool = False):
        self.file = file
        self._expected: set[tuple[Span, ...]] = set()
        self._maps: dict[Path, mmap.mmap] = {}
        self._bytes: dict[Path, torch.Tensor] = {}
        for path in sorted({place.file for place in file.places.values()}):
            with path.open("rb") as opened:
                # A private mapping, never written to: torch warns about tensors over read-only memory.
                self._maps[path] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            if not read_around:
                self._maps[path].madvise(mmap.MADV_RANDOM)
            self._bytes[path] = torch.frombuffer(self._maps[path], dtype=torch.uint8)

    def view(self, place: TensorPlace) -> torch.Tensor:
        """Return the tensor at a place, valid only while the place is held. Raises UserError if it is misaligned."""
        raw = self._bytes[place.file][place.offset : place.offset + place.nbytes]
        if place.offset % place.dtype.itemsize:
            raise UserError(
                f"{place.file}: a tensor begins at byte {place.offset}, which is not a multiple of its element size"
            )
        return raw.view(place.dtype).view(place.shape)

    def hold(self, spans: tuple[Span, ...]) -> None:
        """Make the pages of `spans` present. Raises UserError if a file ends early or cannot be read."""
        if spans not in self._expected:  # otherwise the pages would be read one by one, which is slow
            self.expect(spans)
        self._expected.discard(spans)
        for span in spans:
            size = self.file.size(span.file)
            if span.end > size:  # within the last page, which it fills with zeros, the system reports no error
                raise UserError(
                    f"{span.file}: truncated while it was being streamed: it ends at byte {size}, {span.end - size} "
                    "bytes early; copy it again"
                )
            if error := self._advise(span.file, span.first // PAGE * PAGE, span.end, POPULATE_READ):
                raise UserError(f"{span.file}: cannot be read ({os.strerror(error)}) at byte {span.first}")
        self.file.count(sum(span.end - span.first for span in spans), lambda: self._again(spans))

    def expect(self, spans: tuple[Span, ...]) -> None:
        """Announce to the system that `spans` are needed soon, so that it reads missing pages ahead."""
        for span in spans:
            self._advise(span.file, span.first // PAGE * PAGE, span.end, WILLNEED)
        self._expected.add(spans)

    def release(self, spans: Sequence[Span]) -> None:
        """Remove `spans` from the memory of the process; pages shared with neighbours stay."""
        for span in spans:
            self._advise(span.file, -(-span.first // PAGE) * PAGE, span.end // PAGE * PAGE, DONTNEED)

    def _advise(self, file: Path, first: int, end: int, advice: int) -> int:
        """Call madvise on a range of a file; return 0 or the error number. Other threads can run meanwhile."""
        if end <= first:
            return 0
        address = ctypes.c_void_p(self._bytes[file].data_ptr() + first)
        while _library().madvise(address, ctypes.c_size_t(end - first), advice):
            if (error := ctypes.get_errno()) != errno.EAGAIN:
                return error
        return 0

    def _again(self, spans: tuple[Span, ...]) -> None:
        self.hold(spans)
        self.release(spans)


def _library() -> ctypes.CDLL:
    global _LIBRARY
    if _LIBRARY is None:
        _LIBRARY = ctypes.CDLL(None, use_errno=True)
    return _LIBRARY


_LIBRARY: ctypes.CDLL | None = None

"""Weights used where the page cache holds them: a mapped file whose pages are made present, used, and given back.

Reading copies every byte from the page cache into memory of one's own, at half the bandwidth that computing needs. A
mapping shows the same pages without a copy; `hold` makes those of some places present at once (MADV_POPULATE_READ,
Linux 5.14), from the disk where the page cache lacks them, and `release` takes them out of the process again, so that
its resident memory is what is held and no more. What the page cache keeps is the system's affair, as with reading.

Holding, not the first use, meets a file that has become too short. One that is cut off between the two ends the
process (SIGBUS): the time of one unit's computation. Knows nothing of models.
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
from lib.models.checkpoints.weight_file import Place, WeightFile

PAGE = mmap.PAGESIZE
WILLNEED, DONTNEED, POPULATE_READ = 3, 4, 22  # <linux/mman.h>


def available() -> bool:
    """Return whether this system can make mapped pages present and say where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    some = torch.zeros(2 * PAGE, dtype=torch.uint8)
    page = ctypes.c_void_p(-(-some.data_ptr() // PAGE) * PAGE)
    return _library().madvise(page, ctypes.c_size_t(PAGE), POPULATE_READ) == 0


class Span(NamedTuple):
    """Bytes `first` to `end` (not included) of a file."""

    file: Path
    first: int
    end: int


def spans(places: Sequence[Place]) -> tuple[Span, ...]:
    """Return what these places cover, neighbours together: a call to the system costs as much as a small tensor."""
    found: list[Span] = []
    for place in sorted(places, key=lambda place: (str(place.file), place.offset)):
        end = place.offset + place.nbytes
        if found and (found[-1].file, found[-1].end) == (place.file, place.offset):
            found[-1] = found[-1]._replace(end=end)
        else:
            found.append(Span(place.file, place.offset, end))
    return tuple(found)


class FilePages:
    """The mapped files of an open `WeightFile`, whose count of bytes and whose log go on here."""

    def __init__(self, file: WeightFile):
        self.file = file
        self._maps: dict[Path, mmap.mmap] = {}
        self._bytes: dict[Path, torch.Tensor] = {}
        for path in sorted({place.file for place in file.places.values()}):
            with path.open("rb") as opened:
                # A private mapping, never written to: tensors over one that forbids writing are warned about.
                self._maps[path] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            self._bytes[path] = torch.frombuffer(self._maps[path], dtype=torch.uint8)

    def view(self, place: Place) -> torch.Tensor:
        """Return the tensor at a place. It may be read only while the place is held."""
        raw = self._bytes[place.file][place.offset : place.offset + place.nbytes]
        if place.offset % place.dtype.itemsize:
            raise UserError(f"{place.file}: a tensor at byte {place.offset}, which is no multiple of its numbers' size")
        return raw.view(place.dtype).view(place.shape)

    def hold(self, spans: Sequence[Span]) -> None:
        """Make the pages of these spans present. Raises UserError where a file ends early or cannot be read."""
        for span in spans:
            size = self.file.size(span.file)
            if span.end > size:  # the page in which a file ends is present, and zero behind the end
                raise UserError(
                    f"{span.file}: truncated while it was being streamed: it ends at byte {size}, {span.end - size} "
                    "bytes early; copy it again"
                )
            if error := self._advise(span.file, span.first // PAGE * PAGE, span.end, POPULATE_READ):
                raise UserError(f"{span.file}: cannot be read ({os.strerror(error)}) at byte {span.first}")
        self.file.count(sum(span.end - span.first for span in spans), lambda: self._again(spans))

    def expect(self, spans: Sequence[Span]) -> None:
        """Tell the system that these spans will be needed soon: what it lacks of them it reads meanwhile."""
        for span in spans:
            self._advise(span.file, span.first // PAGE * PAGE, span.end, WILLNEED)

    def release(self, spans: Sequence[Span]) -> None:
        """Take these spans out of the process's memory; pages that they share with neighbours stay."""
        for span in spans:
            self._advise(span.file, -(-span.first // PAGE) * PAGE, span.end // PAGE * PAGE, DONTNEED)

    def _advise(self, file: Path, first: int, end: int, advice: int) -> int:
        """Return 0, or the error number. Other threads run meanwhile."""
        if end <= first:
            return 0
        address = ctypes.c_void_p(self._bytes[file].data_ptr() + first)
        while _library().madvise(address, ctypes.c_size_t(end - first), advice):
            if (error := ctypes.get_errno()) != errno.EAGAIN:
                return error
        return 0

    def _again(self, spans: Sequence[Span]) -> None:
        self.hold(spans)
        self.release(spans)


def _library() -> ctypes.CDLL:
    global _LIBRARY
    if _LIBRARY is None:
        _LIBRARY = ctypes.CDLL(None, use_errno=True)
    return _LIBRARY


_LIBRARY: ctypes.CDLL | None = None

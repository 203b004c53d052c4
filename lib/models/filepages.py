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

import torch

from lib.errors import UserError
from lib.models.weightfile import Place, WeightFile

PAGE = mmap.PAGESIZE
WILLNEED, DONTNEED, POPULATE_READ = 3, 4, 22  # <linux/mman.h>


def available() -> bool:
    """Return whether this system can make mapped pages present and say where it cannot."""
    if not sys.platform.startswith("linux"):
        return False
    with mmap.mmap(-1, PAGE) as some:
        return _advise(_address(some), PAGE, POPULATE_READ) == 0


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

    def hold(self, places: Sequence[Place]) -> None:
        """Make the pages of these places present. Raises UserError where a file ends early or cannot be read."""
        for place in places:
            end, size = place.offset + place.nbytes, self.file.size(place.file)
            if end > size:  # the page in which a file ends is present, and zero behind the end
                raise UserError(
                    f"{place.file}: truncated while it was being streamed: it ends at byte {size}, {end - size} bytes "
                    "early; copy it again"
                )
            first = place.offset // PAGE * PAGE
            if error := _advise(self._bytes[place.file].data_ptr() + first, end - first, POPULATE_READ):
                raise UserError(f"{place.file}: cannot be read ({os.strerror(error)}) at byte {place.offset}")
        self.file.count(sum(place.nbytes for place in places), lambda: self._again(places))

    def expect(self, places: Sequence[Place]) -> None:
        """Tell the system that these places will be needed soon: what it lacks of them it reads meanwhile."""
        for place in places:
            first = place.offset // PAGE * PAGE
            _advise(self._bytes[place.file].data_ptr() + first, place.offset + place.nbytes - first, WILLNEED)

    def release(self, places: Sequence[Place]) -> None:
        """Take these places out of the process's memory; pages that they share with neighbours stay."""
        for place in places:
            first, last = -(-place.offset // PAGE) * PAGE, (place.offset + place.nbytes) // PAGE * PAGE
            if last > first:
                _advise(self._bytes[place.file].data_ptr() + first, last - first, DONTNEED)

    def _again(self, places: Sequence[Place]) -> None:
        self.hold(places)
        self.release(places)


def _address(some: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(some))


def _advise(address: int, length: int, advice: int) -> int:
    """Return 0, or the error number. Other threads run meanwhile."""
    madvise = _library().madvise
    while madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice)):
        if (error := ctypes.get_errno()) != errno.EAGAIN:
            return error
    return 0


def _library() -> ctypes.CDLL:
    global _LIBRARY
    if _LIBRARY is None:
        _LIBRARY = ctypes.CDLL(None, use_errno=True)
    return _LIBRARY


_LIBRARY: ctypes.CDLL | None = None

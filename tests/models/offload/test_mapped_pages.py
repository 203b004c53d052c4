"""Mapped weights have the right values, are in memory only while held, and report a truncated file to the byte."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import UserError
from lib.models.checkpoints import weight_file
from lib.models.checkpoints.weight_file import WeightFile, write
from lib.models.offload import mapped_pages
from lib.models.offload.mapped_pages import FilePages, spans

pytestmark = pytest.mark.skipif(not mapped_pages.available(), reason="this system cannot make mapped pages present")
MEGABYTE = 2**20


def file_bytes_in_memory(path: Path) -> int:
    """Return the bytes of this file's mappings that are in memory. Library pages come and go as they are used, and
    where the folder lies in memory the process counts no file's pages.
    """
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            ours = line.endswith(f" {path}")
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.fixture
def folder(tmp_path):
    tensors = {f"t{index}": torch.randn(4 * MEGABYTE) for index in range(3)} | {"z": torch.randn(1000, 3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_pages_are_in_memory_only_while_held(folder):
    file = WeightFile(folder)
    pages = FilePages(file)
    path = folder / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped
    for name in ("t0", "t1", "t2"):
        place, before = file.places[name], file_bytes_in_memory(path)
        pages.hold(spans([place]))
        assert 15 * MEGABYTE < file_bytes_in_memory(path) - before < 18 * MEGABYTE, name
        assert torch.equal(pages.view(place), whole[name])
        pages.release(spans([place]))
        assert file_bytes_in_memory(path) - before < 2 * MEGABYTE, name
    assert file.bytes_read == 3 * 16 * MEGABYTE


def bytes_from_disk() -> int:
    counts = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in counts if line.startswith("read_bytes")))


@pytest.mark.parametrize("expected", [True, False])
def test_only_held_bytes_are_read(folder, expected):
    file = WeightFile(folder)
    pages, held = FilePages(file), spans([file.places["t1"]])
    file.forget()
    before = bytes_from_disk()
    if expected:
        pages.expect(held)
    pages.hold(held)
    read = bytes_from_disk() - before
    if read == 0:
        pytest.skip("the temporary folder lies in memory")
    assert 15 * MEGABYTE < read < 17 * MEGABYTE


def test_neighbors_form_one_span_and_gaps_are_kept(folder):
    places = WeightFile(folder).places
    (merged,) = spans([places["t1"], places["t0"]])
    assert merged.end - merged.first == 32 * MEGABYTE and merged.first == places["t0"].offset
    assert len(spans([places["t2"], places["t0"]])) == 2


def test_released_weights_can_be_held_again(folder):
    file = WeightFile(folder)
    pages, file.log = FilePages(file), []
    pages.hold(spans([file.places["z"], file.places["t1"]]))
    (again,) = file.log
    file.log = None
    before = file.bytes_read
    again()
    assert file.bytes_read - before == 16 * MEGABYTE + 12000


@pytest.mark.parametrize("missing", [1, 5000, 20 * MEGABYTE])
def test_a_truncated_file_is_reported_before_its_values_are_used(folder, missing):
    file = WeightFile(folder)
    pages, path = FilePages(file), folder / "model.safetensors"
    last = max(file.places.values(), key=lambda place: place.offset)
    pages.hold(spans([last]))
    size = path.stat().st_size - missing
    os.truncate(path, size)
    with pytest.raises(UserError, match=f"truncated while it was being streamed: it ends at byte {size}, {missing} b"):
        pages.hold(spans([last]))


def test_files_are_written_in_whole_pieces(monkeypatch):
    monkeypatch.setattr(weight_file, "WRITTEN", 100)
    tensors = [torch.arange(256, dtype=torch.uint8), torch.tensor([], dtype=torch.float32), torch.ones(3)]
    pieces = [bytes(piece) for piece in weight_file._whole_pieces(b"x" * 30, tensors)]
    assert [len(piece) for piece in pieces] == [100, 100, 98]
    assert b"".join(pieces) == b"x" * 30 + bytes(range(256)) + tensors[2].numpy().tobytes()


@pytest.mark.parametrize("length", range(1, 17))
def test_written_files_hold_the_same_data_aligned(tmp_path, length):
    path, name = tmp_path / "model.safetensors", "n" * length  # headers of several lengths
    odd = {"askew": torch.arange(3, dtype=torch.uint8), "one": torch.tensor(2.5), "none": torch.empty(0, 4)}
    whole = odd | {name: torch.randn(64, 3).bfloat16().T, "truth": torch.tensor([True, False] * 32)}
    for _ in range(2):  # again, over a file that is still mapped
        write(path, whole)
        read_back = load_file(path)
        assert read_back.keys() == whole.keys() and all(
            torch.equal(read_back[tensor_name], whole[tensor_name]) for tensor_name in whole
        )
        assert {tensor_name: tensor.dtype for tensor_name, tensor in read_back.items()} == {
            tensor_name: whole[tensor_name].dtype for tensor_name in whole
        }
    assert all(
        place.offset % 64 == 0 for tensor_name, place in WeightFile(tmp_path).places.items() if tensor_name not in odd
    )
    assert os.listdir(tmp_path) == ["model.safetensors"]
    with pytest.raises(UserError, match="complex cannot be stored as"):
        write(path, {"complex": torch.zeros(2, dtype=torch.complex64)})

"""The peak of live tensors in cases counted by hand: views, in-place, temporaries, caches, sparse weights."""

import gc

import pytest
import torch

from lib.measure.roofline import cost_model
from lib.measure.timing import workloads
from lib.measure.trackers.live_tensors import LiveTensors
from lib.models.structure.replacements import sparse

KB = 1024
F32 = 4  # bytes


def peak(work) -> int:
    with LiveTensors() as live:
        kept = work()
    del kept
    return live.peak_bytes


def kilobyte(count: int = 1) -> torch.Tensor:
    return torch.ones(count * KB // F32)


@pytest.mark.parametrize(
    ("work", "kilobytes"),
    [
        (lambda: kilobyte(), 1),
        (lambda: [kilobyte() for _ in range(5)], 5),
        (lambda: kilobyte(4).view(2, -1).t()[:1], 4),  # views have no memory of their own
        (lambda: kilobyte(4).view(2, -1).t().contiguous(), 8),
        (lambda: kilobyte(4).add_(1).mul_(2), 4),
        (lambda: kilobyte(4) + 1, 8),
        (lambda: (kilobyte(4) + 1) * 2 - 3, 8),  # a temporary is freed before the next is made
        (lambda: [kilobyte(8), None][1] or kilobyte(2), 8),
        (lambda: torch.cat([kilobyte(1), kilobyte(3)]), 8),
        (lambda: kilobyte(4).to(torch.bfloat16), 6),
        (lambda: torch.ones(1).expand(1000), F32 / KB),
        (lambda: torch.empty(10, device="meta"), 0),
    ],
)
def test_peaks_match_hand_counts(work, kilobytes):
    assert peak(work) == kilobytes * KB


def test_freed_memory_is_subtracted_and_may_be_allocated_again():
    with LiveTensors() as live:
        for _ in range(10):
            tensor = kilobyte(3)
            assert live.bytes == 3 * KB
            del tensor
            assert live.bytes == 0
        kept = kilobyte(2)
    assert live.peak_bytes == 3 * KB and live.bytes == 2 * KB
    del kept
    assert live.bytes == 0


def test_a_cache_that_grows_by_copying_briefly_holds_both_copies():
    def grow():
        cache = kilobyte(1)
        for _ in range(4):
            cache = torch.cat([cache, kilobyte(1)])
        return cache

    # The last step: 4 held, 1 appended, 5 made.
    assert peak(grow) == 10 * KB


def test_a_resized_storage_counts_at_its_current_size():
    def resize():
        tensor = kilobyte(1)
        return tensor.resize_(3 * KB // F32)

    assert peak(resize) == 3 * KB


def test_parts_of_a_composite_operation_are_seen():
    left, right = torch.ones(2, 8, 16), torch.ones(16, 32)
    arguments = (left.numel() + right.numel()) * F32
    assert peak(lambda: torch.matmul(left, right)) == arguments + 2 * 8 * 32 * F32
    x = torch.ones(4, KB)
    # mean, difference, its square, their mean: more than argument and result.
    assert peak(lambda: torch.nn.functional.silu(x) * x) == 3 * x.nbytes


def test_weights_made_elsewhere_are_counted_once_even_if_tied():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with LiveTensors() as live:
        live.hold(model)
    assert live.bytes == (8 * 8 + 2 * 8) * F32 == cost_model.weights_bytes(model)


def test_sparse_weights_count_with_their_indices():
    dense = torch.eye(64)
    stored = sparse.compress(dense, dense != 0)
    with LiveTensors() as live:
        live.hold(torch.nn.ParameterList([torch.nn.Parameter(stored, requires_grad=False)]))
    assert live.bytes == cost_model.tensor_bytes(stored) == 64 * F32 + 64 * 4 + 65 * 4


def test_a_model_peaks_above_its_weights_by_cache_and_activations(tiny, name):
    model = tiny(name)
    prompt_BT = workloads.random_prompt(model, 2, 24)
    gc.collect()
    gc.disable()  # as a child process does: here garbage collection would depend on everything that ran before
    try:
        peaks = []
        for prompt in (prompt_BT, prompt_BT, prompt_BT.repeat(1, 2)):
            with LiveTensors() as live:
                live.hold(model)
                weights = live.bytes
                workloads.generate(model, prompt, 3)()
            peaks.append(live.peak_bytes)
    finally:
        gc.enable()
    cache = 2 * 24 * cost_model.kv_cache_bytes_per_token(model)
    assert weights == cost_model.weights_bytes(model)
    assert peaks[0] == peaks[1] > weights + cache and peaks[2] > peaks[0] + cache

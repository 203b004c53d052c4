"""Children that decode under a limit where this system permits one, and why they do not elsewhere."""

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement
from lib.measure.timing import interleaved
from lib.models import parameters
from lib.models.checkpoints import io
from lib.optimizations.streaming_computation.limited import children, control_group, decoding


def test_a_model_smaller_than_process_memory_variation_is_not_limited(tiny, tmp_path):
    folder = io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "model")
    limited = decoding.compare(folder, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {})
    assert limited.rate.verdict == "unavailable" and "would not bind" in limited.rate.reason


def test_shards_left_by_an_earlier_checkpoint_are_not_counted(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(900))
    assert decoding.weights_bytes(tmp_path) == 100


def test_without_a_group_the_rate_is_unavailable_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(control_group, "candidates", lambda: [])
    (tmp_path / "model.safetensors").write_bytes(bytes(10 * children.SLACK))
    limited = decoding.compare(tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {"device": "cpu"})
    assert limited.rate.verdict == "unavailable" and "Delegate=yes" in limited.rate.reason
    assert "Under a limit" in limited.reading() and limited.same_tokens is None
    on_gpu = decoding.compare(tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {"device": "cuda"})
    assert "not held by page cache" in on_gpu.rate.reason


def test_both_arms_decode_the_same_tokens_under_one_limit(tmp_path):
    """In real groups, where this system permits them: the memory held never exceeds the limit."""
    try:
        with control_group.group():
            pass
    except UserError as reason:
        pytest.skip(str(reason))
    if children.in_memory(str(tmp_path)):
        pytest.skip("the temporary folder lies in memory")
    described = parameters.read("qwen3-4b-instruct-2507")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}
    config = parameters.merge(described.full, sizes)
    folder = io.save(io.build(config, described.architecture), tmp_path / "model")
    prompt_1T = torch.arange(8, 24)[None]
    limited = decoding.compare(folder, prompt_1T, 1, 0.3, {"prefill_chunk": 64, "absorbed": True})
    assert limited.rate.ratio is not None, limited.rate.reason
    assert limited.same_tokens and limited.rate.n == decoding.BLOCKS
    assert limited.control[0].n == decoding.BLOCKS and len(limited.details["limit_bytes"]) == 3
    details = limited.details
    assert details["allowance_bytes"] == round(0.3 * details["weights_bytes"])
    for arm, limit in details["limit_bytes"].items():
        own, weights = (details[name][arm] for name in ("private_memory_bytes", "weights_in_private_memory_bytes"))
        assert details["page_cache_bytes"][arm] + own <= limit
        # Left for weights once the process's other memory, which varies by SLACK, is taken off the limit.
        for_weights = limit - (own - weights)
        scatter = for_weights - details["allowance_bytes"] - children.SLACK
        assert abs(scatter) <= children.SLACK, "weights in private memory count too"
    assert details["weights_in_private_memory_bytes"]["baseline"] == 0, "a plain mapping copies nothing"
    assert details["disk_bytes_of_a_call"]["baseline"] > 0, "what does not fit is read again"
    assert limited.reading().count(". ") == 1 + (limited.rate.verdict == "inconclusive")
    assert not list(Path(control_group.candidates()[0][0]).glob(f"{control_group.NAME}-{os.getpid()}-*")), "left behind"


def _no_groups(tmp_path: Path) -> str | None:
    """Return why nothing can be limited here, or None."""
    try:
        with control_group.group():
            return "the temporary folder lies in memory" if children.in_memory(str(tmp_path)) else None
    except UserError as reason:
        return str(reason)


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507", "glm-4.7-flash"])
def test_accelerates_offloaded_model_decodes_the_same_tokens_in_a_child(tiny, tmp_path, name):
    """Without a limit, so on any Linux; includes absorbed decoding and buffers that the checkpoint holds."""
    if not Path("/proc").is_dir():
        pytest.skip("children are forked on Linux")
    folder = io.save(tiny(name), tmp_path / "checkpoint")
    request = {"path": str(folder), "steps": 6, "prompt": [list(range(8, 24))], "threads": 1}
    said = []
    for options in ({"offloaded": True, "absorbed": True}, {"mapped": True, "absorbed": True}):
        with children.started(children.module("child"), {**request, "options": options}) as child:
            child()
            said.append(child.answers[-1]["tokens"])
    assert said[0] == said[1] and len(said[0]) >= 6
    assert (tmp_path / "offloaded" / "index.json").is_file()


def test_accelerate_decodes_under_the_same_limit(tmp_path):
    if reason := _no_groups(tmp_path):
        pytest.skip(reason)
    described = parameters.read("qwen3-4b-instruct-2507")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}
    config = parameters.merge(described.full, sizes)
    folder = io.save(io.build(config, described.architecture), tmp_path / "model")
    rate, details = decoding.against_offloading(folder, torch.arange(8, 24)[None], 1, 0.45, {"prefill_chunk": 64})
    assert rate.ratio is not None, rate.reason
    assert details["same_tokens"] and rate.n == decoding.BLOCKS and rate.noise_floor is not None
    assert details["disk_bytes_of_a_call"]["baseline"] > 0, "what does not fit is read again"


def test_offloading_without_room_or_group_says_why(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(10 * children.SLACK))
    job = tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {}
    monkeypatch.setattr(control_group, "candidates", lambda: [])
    rate, details = decoding.against_offloading(*job)
    assert rate.verdict == "unavailable" and "Delegate=yes" in rate.reason == details["reason"]
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    assert "copies of 0.1 GB do not fit" in decoding.against_offloading(*job)[0].reason


def test_the_reading_names_accelerates_rate():
    rate = measurement.informative(decoding.METRIC, decoding.WORKLOAD, 3.0, 4.0, "timed")
    limited = decoding.LimitedDecoding(rate, {"allowance_bytes": 35, "weights_bytes": 100})
    assert limited.reading().endswith("A plain mapping of the same file decodes 3.")
    rival = measurement.informative(decoding.METRIC, decoding.OFFLOADING, 1.5, 4.0, "timed")
    beside = replace(limited, offloading=[rival]).reading()
    assert beside.endswith("decodes 3, accelerate's offloading 1.5.")
    assert all(len(sentence.split()) <= 25 for sentence in beside.split(". "))
    unsure = replace(limited, rate=rate.model_copy(update={"verdict": "inconclusive"}))
    assert unsure.reading() == f"{limited.reading()} This run does not tell the first two apart."


class _Process:
    """A child that decodes at once and has its own number."""

    count, group = 0, None

    def __init__(self):
        _Process.count += 1
        self.number, self.private_bytes = _Process.count, 0
        self.answers = [{"disk_bytes": 0, "tokens": [1]}]

    def __call__(self):
        time.sleep(1e-4)

    def limit(self, allowance):
        return allowance

    def cpu_seconds(self):
        return 0.0


def _planted(monkeypatch, tmp_path, opened: list, turns: dict):
    """Plant children that decode at once; their opening arguments and turns are written into the last two."""
    (tmp_path / "model.safetensors").write_bytes(bytes(10 * children.SLACK))
    rounds = interleaved.rounds

    @contextlib.contextmanager
    def child(folder, prompt_1T, steps, options):
        opened.append(options)
        yield _Process()

    def watched(arms, *arguments, **options):
        turns.update(arms)
        return rounds(arms, *arguments, **options)

    monkeypatch.setattr(decoding, "_child", child)
    monkeypatch.setattr(interleaved, "rounds", watched)
    ample = 1000 * children.SLACK  # whatever memory is free
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda _: SimpleNamespace(free=ample))
    monkeypatch.setattr(decoding.memory_limits, "free_memory_bytes", lambda: ample)


def test_the_control_is_a_separate_process(tmp_path, monkeypatch):
    opened, turns = [], {}
    _planted(monkeypatch, tmp_path, opened, turns)
    limited = decoding.compare(tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {"absorbed": False})
    assert len({process.number for process in turns.values()}) == len(turns) == 3
    assert opened[0] == opened[2] == {"absorbed": True, "mapped": True} and opened[1]["memory_ratio"] == 0.5
    assert set(limited.details["limit_bytes"]) == {"baseline", "optimized", decoding.AGAIN}
    (control,) = limited.control
    assert (control.workload, control.n) == (decoding.WORKLOAD, decoding.BLOCKS)
    assert limited.control_is == limited.details["control"] == decoding.SECOND_PROCESS


@pytest.mark.parametrize("cached", [0, 4 * children.SLACK])
def test_a_limit_that_misses_the_page_cache_does_not_count(tmp_path, monkeypatch, cached):
    """Planted: pages counted in another group, as on disks that cannot drop copied pages."""
    _planted(monkeypatch, tmp_path, [], {})
    group = SimpleNamespace(cached_bytes=lambda: cached, private_bytes=lambda: 0)
    monkeypatch.setattr(_Process, "group", group)
    limited = decoding.compare(tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {"absorbed": False})
    assert (limited.rate.ratio is None) == (cached == 0)
    assert ("counted in no control group" in (limited.rate.reason or "")) == (cached == 0)


@pytest.mark.parametrize(("cached", "read", "counted"), [(0, 0, False), (0, None, False), (0, 50, True), (50, 0, True)])
def test_pages_read_from_disk_at_every_call_count_as_limited(cached, read, counted):
    """Also where the process's own memory grew into the allowance, so that its group holds almost no pages."""
    reason = contextlib.nullcontext() if counted else pytest.raises(UserError, match="counted in no control group")
    with reason:
        decoding.require_counted(cached, read, allowance=60)


@pytest.mark.parametrize("short", ["disk", "memory"])
def test_without_room_for_a_third_copy_a_process_is_its_own_control_and_says_so(tmp_path, monkeypatch, short):
    opened, turns = [], {}
    _planted(monkeypatch, tmp_path, opened, turns)
    total, ample = 10 * children.SLACK, 1000 * children.SLACK
    disk, memory = (2 * total + 1, ample) if short == "disk" else (ample, 2 * (total // 2 + children.SLACK) + 1)
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    monkeypatch.setattr(decoding.memory_limits, "free_memory_bytes", lambda: memory)
    limited = decoding.compare(tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {"absorbed": False})
    assert len(opened) == 2 and limited.rate.ratio is not None
    assert turns[decoding.AGAIN] is turns["baseline"] and limited.control[0].n == decoding.BLOCKS
    assert limited.control_is == limited.details["control"]
    assert "timed a second time: 3 " in limited.control_is
    assert ("copies" in limited.control_is) is (short == "disk")

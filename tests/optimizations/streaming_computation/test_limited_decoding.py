"""Control groups in planted folders, and children that decode under a limit where this system lets one be made."""

from pathlib import Path

import pytest
import torch

from lib.errors import UserError
from lib.models import parameters
from lib.models.checkpoints import io
from lib.optimizations.streaming_computation import control_group, limited_decoding

MIB = 2**20


def _planted(monkeypatch, tmp_path: Path, version: control_group.Version) -> Path:
    """Plant a group of this process whose new groups have the files of `version`."""
    parent = tmp_path / "own"
    parent.mkdir()
    monkeypatch.setattr(control_group, "candidates", lambda: [(parent, version)])
    make = Path.mkdir

    def mkdir(folder, *arguments, **options):
        make(folder, *arguments, **options)
        if folder.parent == parent:
            (folder / version.limit).write_text("max")
            (folder / version.usage).write_text(str(50 * MIB))
            (folder / "memory.stat").write_text(f"{version.cached[0]} {20 * MIB}\nother 3\n")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return parent


@pytest.mark.parametrize("version", [control_group.ONE, control_group.TWO])
def test_a_group_counts_what_is_no_page_cache_and_takes_a_limit(monkeypatch, tmp_path, version):
    _planted(monkeypatch, tmp_path, version)
    made = control_group.make()
    assert (made.private_bytes(), made.cached_bytes()) == (30 * MIB, 20 * MIB)
    made.limit(33 * MIB)
    assert (made.folder / version.limit).read_text() == str(33 * MIB)
    assert made.folder != control_group.make().folder, "two groups at a time"


def test_why_there_is_no_group_is_said_with_what_would_help(monkeypatch, tmp_path):
    monkeypatch.setattr(control_group, "candidates", lambda: [])
    with pytest.raises(UserError, match=r"no control groups with memory\); run it in a group .* Delegate=yes"):
        control_group.make()
    parent = tmp_path / "own"
    parent.mkdir()
    monkeypatch.setattr(control_group, "candidates", lambda: [(parent, control_group.TWO)])
    with pytest.raises(UserError, match="its groups have no limit of memory"):
        control_group.make()
    assert list(parent.iterdir()) in ([], [parent / "cgroup.subtree_control"])


def test_a_model_smaller_than_the_scatter_of_a_process_is_not_limited(tiny, tmp_path):
    folder = io.save(tiny("qwen3-4b-instruct-2507"), tmp_path / "model")
    limited = limited_decoding.compare(folder, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {})
    assert limited.rate.verdict == "unavailable" and "would not bind" in limited.rate.reason


def test_where_no_group_can_be_made_the_rate_is_unavailable_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(control_group, "candidates", lambda: [])
    (tmp_path / "model.safetensors").write_bytes(bytes(10 * limited_decoding.SLACK))
    limited = limited_decoding.compare(tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {"device": "cpu"})
    assert limited.rate.verdict == "unavailable" and "Delegate=yes" in limited.rate.reason
    assert "Under a limit" in limited.reading() and limited.same_tokens is None
    on_gpu = limited_decoding.compare(tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, {"device": "cuda"})
    assert "not held by page cache" in on_gpu.rate.reason


def test_a_tree_in_memory_is_no_disk(monkeypatch):
    assert limited_decoding._in_memory("/dev/shm") in (True, False)
    monkeypatch.setattr(limited_decoding.Path, "read_text", lambda *_, **__: "a / ext4 rw\nb /fast tmpfs rw\n")
    assert limited_decoding._in_memory("/fast/place") and not limited_decoding._in_memory("/tmp/place")


def test_both_arms_decode_the_same_tokens_under_one_limit(tmp_path):
    """In real groups, where this system lets them be made: what is held never exceeds the limit."""
    try:
        with control_group.group():
            pass
    except UserError as reason:
        pytest.skip(str(reason))
    if limited_decoding._in_memory(str(tmp_path)):
        pytest.skip("the temporary folder lies in memory")
    described = parameters.read("qwen3-4b-instruct-2507")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512}
    config = parameters.merge(described.full, sizes)
    folder = io.save(io.build(config, described.architecture), tmp_path / "model")
    prompt_1T = torch.arange(8, 24)[None]
    limited = limited_decoding.compare(folder, prompt_1T, 2, 0.5, {"prefill_chunk": 64, "absorbed": True})
    assert limited.rate.ratio is not None, limited.rate.reason
    assert limited.same_tokens and limited.rate.n == limited_decoding.BLOCKS
    details = limited.details
    assert details["allowance_bytes"] == round(0.5 * details["weights_bytes"])
    for arm, limit in details["limit_bytes"].items():
        assert details["page_cache_bytes"][arm] <= limit
    assert limited.reading().count(". ") == 1
    assert not list(Path(control_group.candidates()[0][0]).glob(f"{control_group.NAME}-*")), "a group was left behind"

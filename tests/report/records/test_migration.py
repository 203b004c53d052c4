"""A record of an earlier schema is read with the current names, and nothing of it is lost."""

import json
from pathlib import Path

import pytest

from lib.report.analysis import acceptance, compare
from lib.report.records import history, migration, record

OLD = Path(__file__).with_name("schema_1.json")  # written by a build, shortened


@pytest.fixture
def old():
    return json.loads(OLD.read_text(encoding="utf-8"))


@pytest.fixture
def folder(old, tmp_path):
    """A result folder that holds the old record under the name that a build gave it."""
    (tmp_path / f"{old['optimization']}--{old['model']}.json").write_text(json.dumps(old), encoding="utf-8")
    return tmp_path


WORDS = migration.METRICS | migration.TASKS
NAMES = migration.PARAMETERS | {"processor": "cpu", "processor_percent": "cpu_percent"}


def _leaves(value, place=()):
    """Return every value by its path, with current names."""
    if isinstance(value, dict) and value:
        parts = [(NAMES.get(key, key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        parts = list(enumerate(value))
    else:
        return {place: WORDS.get(value, value) if isinstance(value, str) else value}
    return {at: leaf for key, item in parts for at, leaf in _leaves(item, (*place, key)).items()}


def test_an_old_record_gets_the_current_names(folder):
    [upgraded], damaged = record.read_folder(folder)
    assert not damaged and upgraded.schema_version == record.SCHEMA
    metrics = {m.metric for m in upgraded.measurements}
    assert {"retrieval_exact_match", "cpu_utilisation", "recall_macro"} <= metrics
    assert not metrics & set(migration.METRICS)
    assert {m.metric for control in upgraded.controls for m in control.measurements} & {"cpu_utilisation"}
    assert upgraded.parameters["finetune_steps"] == 40 and "fine_tuning_steps" not in upgraded.parameters
    assert upgraded.parameters["tasks"] == ["retrieval"]
    assert upgraded.environment["cpu"] == "AMD EPYC" and upgraded.process.cpu_percent
    assert upgraded.refutations == []


def test_nothing_is_lost(old, folder):
    [upgraded], _ = record.read_folder(folder)
    before, after = _leaves(old), _leaves(record.to_json(upgraded))
    assert (before.pop(("schema",)), after["schema",]) == (1, record.SCHEMA)
    assert {place: after.get(place, "lost") for place in before} == before


def test_a_migrated_record_is_read_like_any_other(folder):
    [upgraded], _ = record.read_folder(folder)
    path = record.write(upgraded, folder / f"{upgraded.stem}.json")
    assert record.read(path) == upgraded
    assert migration.upgrade(record.to_json(upgraded)) == record.to_json(upgraded)


def test_old_and_new_runs_are_compared_metric_by_metric(folder):
    [old], _ = record.read_folder(folder)
    new = record.Record.model_validate(record.to_json(old)).model_copy(update={"key": "new", "started": "later"})
    changes = {change.metric: change for change in compare.compare([old], [new])}
    assert changes["retrieval_exact_match"].verdict in compare.ORDER[:-1]
    assert not any(change.reason.startswith("not measured in") for change in changes.values())


def test_a_build_of_old_records_stays_in_the_history(folder):
    [old], _ = record.read_folder(folder)
    path = folder / history.NAME
    assert history.keep(path, [old], "proxy", "run")
    with history._open(path) as connection:  # as it was stored before the metric was renamed
        connection.execute("UPDATE numbers SET metric = 'recall_exact_match' WHERE metric = 'retrieval_exact_match'")
    assert {row["metric"] for row in history.over_time(path, "proxy")} & {"retrieval_exact_match"}
    [build] = history.builds(path)
    assert history.records(path, build)[0].measurements == old.measurements


def test_check_does_not_call_an_old_record_unsound(folder):
    points = {point.name: point for point in acceptance.check(folder)}
    assert points["the files are sound"].holds and points["every number has its provenance"].holds


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {"schema": 4}, {"schema": 2, "verdict": 3},
     {"schema": 1, "measurements": [1, {"metric": 2}], "controls": [None, {}, 3],
                                   "parameters": [], "environment": "x", "process": 4}],
)  # fmt: skip
def test_files_other_than_records_are_left_to_the_reader(content):
    upgraded = migration.upgrade(content)
    assert upgraded == (content | {"schema": 3} if content and content.get("schema") in (1, 2) else content)

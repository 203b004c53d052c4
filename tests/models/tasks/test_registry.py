"""Task names: unknown ones are refused, former ones are accepted and reported once."""

import logging

import pytest

from lib.errors import UserError
from lib.models import loading, parameters
from lib.models.tasks import registry
from lib.report.records import migration
from lib.suite.plan import plan


@pytest.fixture(autouse=True)
def nothing_reported():
    registry._current.cache_clear()


def test_a_former_name_is_accepted_and_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert registry.check_tasks(["topic", "recall"]) == ["topic", "retrieval"]
        assert registry.check_tasks(["recall"]) == ["retrieval"]
    assert [entry.getMessage() for entry in caplog.records] == [
        'task "recall" is now called "retrieval"; please use the new name'
    ]


def test_a_task_named_twice_runs_once():
    assert registry.check_tasks(["topic", "retrieval", "topic", "recall"]) == ["topic", "retrieval"]


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r'unknown task "topics".*Did you mean "topic"'):
        registry.check_tasks(["topics"])


def test_requests_and_stored_records_agree_on_former_names():
    assert registry.RENAMED == migration.TASKS
    assert set(registry.RENAMED.values()) <= {*registry.CLASSIFY, *registry.GENERATE}


def test_a_former_name_in_a_request_runs_the_renamed_task():
    request = plan.Request(("structured_pruning",), ("qwen3-4b-instruct-2507",), parameters={"tasks": "recall"})
    (job,) = plan.plan(request)
    assert job.parameters["tasks"] == ["retrieval"]


def test_a_parameter_file_with_a_former_task_name_is_read(monkeypatch):
    name = "qwen3-4b-instruct-2507"
    former = parameters.read(name).model_copy(update={"tasks": ["topic", "recall"]})
    monkeypatch.setattr(loading.parameter_files, "read", lambda _: former)
    assert loading.load(name).tasks == ["topic", "retrieval"]

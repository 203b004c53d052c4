"""Efforts: every table by effort has all efforts. `--dimension`: only the requested dimensions are measured and
recorded, and the record states this.
"""

import ast
import itertools
from dataclasses import astuple
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.measure.compare import costs, speed
from lib.measure.metrics import settings
from lib.measure.metrics.catalogue import DIMENSIONS
from lib.measure.quality import answer_comparison, evaluate
from lib.optimizations.common import recipe
from lib.report.records import record
from lib.suite.plan import plan
from tests.report import samples

LIB = Path(settings.__file__).resolve().parents[2]


def test_every_table_by_effort_has_every_effort():
    assert plan.EFFORTS == tuple(settings.EFFORTS) == recipe.EFFORTS[1:]
    tables = 0
    for path in LIB.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            keys = (
                [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
            )
            if "quick" in keys:
                assert keys == [*settings.EFFORTS], f"{path.relative_to(LIB)}:{node.lineno}"
                tables += 1
    assert tables > 10


def test_a_larger_effort_requests_no_less_of_anything():
    efforts = list(settings.EFFORTS.values())
    for small, large in itertools.pairwise(efforts):
        assert all(before <= after for before, after in zip(astuple(small), astuple(large)))
    assert settings.BRIEF == ("preview", "quick")


def _ask(monkeypatch, *names):
    monkeypatch.setenv(settings.DIMENSIONS_VARIABLE, ",".join(names))


def test_selecting_all_dimensions_equals_selecting_none(monkeypatch):
    for text in ("", "efficiency, accuracy,resources,performance"):
        monkeypatch.setenv(settings.DIMENSIONS_VARIABLE, text)
        assert settings.requested_dimensions() is None and settings.wants("accuracy")
    _ask(monkeypatch, "resources", "performance")
    assert settings.requested_dimensions() == ("performance", "resources")
    assert settings.wants("accuracy", "resources") and not settings.wants("accuracy", "efficiency")
    _ask(monkeypatch, "speed")
    with pytest.raises(UserError, match="unknown dimension"):
        settings.requested_dimensions()


def test_the_command_line_knows_the_same_dimensions():
    assert plan.DIMENSIONS == DIMENSIONS


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_record_keeps_and_states_the_requested_dimensions(name, monkeypatch):
    _ask(monkeypatch, name)
    recorded = samples.run()
    assert recorded.dimensions == [name] and {m.dimension for m in recorded.measurements} == {name}
    assert all(m.dimension == name for control in recorded.controls for m in control.measurements)
    others = [other for other in DIMENSIONS if other != name]
    assert f"Not requested: {', '.join(others)}." in recorded.verdict.sentence
    assert {getattr(recorded.verdict, other) for other in others} == {"unavailable"}
    assert record.from_json(record.to_json(recorded), "x") == recorded


def test_a_complete_record_names_no_dimensions():
    assert samples.run().dimensions is None and "not asked" not in samples.run().verdict.sentence


def test_nothing_is_timed_if_no_timing_was_requested(tiny, monkeypatch):
    def timed(*_, **__):
        raise AssertionError("something was timed")

    _ask(monkeypatch, "accuracy", "resources")
    monkeypatch.setattr(speed, "with_control", timed)
    model = tiny("qwen3-4b-instruct-2507")
    measurements = speed.compare(model, model, None, "quick").measurements
    assert (
        measurements
        and {m.verdict for m in measurements} == {"unavailable"}
        and "accuracy and resources" in measurements[0].reason
    )
    assert costs.break_even(1.0, measurements[0])[1].verdict == "unavailable"


def test_no_question_is_asked_if_no_answers_were_requested(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a question was asked")

    _ask(monkeypatch, "performance")
    for name in ("classify", "retrieval"):
        monkeypatch.setattr(evaluate, name, refused)
    monkeypatch.setattr(evaluate, "read_text", lambda *_: "ids")
    loaded = type("Loaded", (), {"random_weights": False, "model": None})()
    answers = evaluate.evaluate(loaded, settings.read("quick"))
    assert answers.text == "ids" and answers.reason == "left out: only performance was requested"
    assert {m.verdict for m in answer_comparison.compare(answers, answers)} == {"unavailable"}

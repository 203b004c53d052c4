"""The page shows what `advise` decides, and needs neither a network nor, for the usual margin, a script."""

import re

from lib.report.analysis import advice
from lib.report.pages import advice_page, index
from lib.report.records import record
from tests.report import samples


def test_every_decision_of_every_margin_is_on_the_page(tmp_path):
    samples.good(tmp_path)
    index.write(tmp_path)
    page = (tmp_path / advice_page.NAME).read_text(encoding="utf-8")
    rows = re.findall(r'<tr data-model="([^"]+)" data-goal="([^"]+)" data-keep="([^"]+)"( hidden)?>', page)
    expected = len(samples.MODELS) * len(samples.OPTIMIZATIONS) * len(advice.GOALS)
    assert len(rows) == expected * len(advice_page.MARGINS)
    assert sum(not hidden for *_, hidden in rows) == expected
    assert f'href="{advice_page.NAME}"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page


def test_the_rows_are_those_of_the_command(tmp_path):
    records = [record.read(path) for path in sorted(samples.good(tmp_path).glob("*--*.json"))]
    shown = advice_page.rows(records, samples.MODELS[0], 0.02)
    goals = [advice.goal(name) for name in advice.GOALS]
    decided = advice.advise(records, samples.MODELS[0], goals, 0.02)
    assert [(row["goal"], row["decision"]) for row in shown] == [(row.goal, row.decision) for row in decided]
    assert any("×" in row["numbers"] for row in shown)


def test_names_are_escaped(tmp_path):
    made = samples.whole("structured_pruning", "<b>model</b>")
    assert "<b>model</b>" not in advice_page.text([made])

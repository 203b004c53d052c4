"""The knobs of a module and the parameters of its template must agree."""

from pathlib import Path

import pytest

from lib.optimizations.common import discovery
from lib.suite.plan import template

ROOT = Path(__file__).resolve().parents[2]
STEMS = discovery.stems()
BY_SCALE, BY_SCALE_NUMBER = "auto", -1  # template only: the scale's default; a search names the values it tries


@pytest.mark.parametrize("stem", STEMS)
def test_knobs_agree_with_the_template(stem):
    declared = template.read(ROOT / "notebooks" / f"{stem}.ipynb").parameters
    module = discovery.method(stem)
    assert callable(module.applies_to)
    shared = {name: knob for name, knob in getattr(module, "SEARCH_SPACE", {}).items() if name in declared}
    for name, knob in shared.items():
        if "choices" in knob:
            assert knob["default"] in knob["choices"]
            own = {BY_SCALE} - {*knob["choices"]} if declared[name].default == BY_SCALE else set()
            offered = tuple(choice for choice in declared[name].choices if choice not in own)
            assert tuple(map(str, knob["choices"])) == offered, name
        else:
            low, high = knob["range"]
            assert low <= knob["default"] <= high
            least = BY_SCALE_NUMBER if declared[name].default == BY_SCALE_NUMBER else low
            assert declared[name].interval[:2] == (least, high), name
            levels = knob.get("levels", (knob["default"],))  # the values that a search tries
            assert knob["default"] in levels and all(low <= level <= high for level in levels), name


def test_every_template_has_its_module():
    templates = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"overview"}
    assert templates == set(STEMS)

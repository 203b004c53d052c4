"""What a module says of its knobs and what its template says of the same parameters must be one thing."""

from pathlib import Path

import pytest

from lib.optimizations.common import discovery
from lib.suite.plan import template

ROOT = Path(__file__).resolve().parents[2]
STEMS = discovery.stems()


@pytest.mark.parametrize("stem", STEMS)
def test_knobs_agree_with_the_template(stem):
    declared = template.read(ROOT / "notebooks" / f"{stem}.ipynb").parameters
    module = discovery.method(stem)
    assert callable(module.applies_to)
    shared = {name: knob for name, knob in getattr(module, "SEARCH_SPACE", {}).items() if name in declared}
    for name, knob in shared.items():
        if "choices" in knob:
            assert knob["default"] in knob["choices"]
            assert tuple(map(str, knob["choices"])) == declared[name].choices, name
        else:
            low, high = knob["range"]
            assert low <= knob["default"] <= high
            assert declared[name].interval[:2] == (low, high), name
            levels = knob.get("levels", (knob["default"],))  # what a search tries, where not every number is worth it
            assert knob["default"] in levels and all(low <= level <= high for level in levels), name


def test_every_template_has_its_module():
    templates = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"overview"}
    assert templates == set(STEMS)

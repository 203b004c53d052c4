"""The notebook tests run every template at effort preview and change nothing else."""

import json
from types import SimpleNamespace

import pytest

from lib.suite.cli import nbval_at_preview as plugin
from lib.suite.plan import plan


def _items(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        yield SimpleNamespace(cell=SimpleNamespace(metadata=cell["metadata"], source="".join(cell["source"])))


@pytest.mark.parametrize("name", plan.optimizations())
def test_template_parameters_request_a_preview(name):
    path = plan.NOTEBOOKS / f"{name}.ipynb"
    before, after = list(_items(path)), [*_items(path), SimpleNamespace(name="a test of another kind")]
    plugin.pytest_collection_modifyitems(after)
    changed = [(old.cell.source, new.cell.source) for old, new in zip(before, after) if old.cell != new.cell]
    [(old, new)] = changed
    assert plugin.DEFAULT in old and new == old.replace(plugin.DEFAULT, plugin.PREVIEW)

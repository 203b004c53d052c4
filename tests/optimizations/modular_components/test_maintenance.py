"""An optimization is really added: two files, no edit, and the framework finds it."""

import importlib.util

import torch

from lib.models.calibration.second_moments import matrices
from lib.optimizations.modular_components import maintenance
from lib.optimizations.modular_components import method as composing
from lib.suite.plan import template


def test_an_addition_takes_two_files_and_no_edit(tmp_path):
    place = maintenance.copy_of_project(tmp_path / "project")
    added, changed, lines = maintenance.add(place)
    assert added == [f"lib/optimizations/{maintenance.STEM}.py", f"notebooks/{maintenance.STEM}.ipynb"]
    assert changed == [] and 20 < lines < 60
    read = template.read(place / added[1])
    assert read.parameters["bits"].interval[:2] == (1, 23)
    file = place / "lib" / "measure" / "metrics" / "catalogue.py"
    before = maintenance._fingerprints(place)
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert maintenance._fingerprints(place) != before, "an edit would be seen"


def test_the_added_optimization_rounds_weights_as_documented(tiny, name, tmp_path):
    path = tmp_path / f"{maintenance.STEM}.py"
    path.write_text(maintenance.MODULE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(maintenance.STEM, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    composing.check(maintenance.STEM, module)
    model = tiny(name)
    rounded = module.apply(model, None, bits=4)
    for before, after in zip(matrices(model), matrices(rounded)):
        mantissa = torch.frexp(after.weight).mantissa * 16
        assert torch.equal(mantissa, mantissa.round())
        torch.testing.assert_close(after.weight, before.weight, rtol=1 / 16, atol=0)


def test_the_copy_finds_orders_and_runs_it():
    grown = maintenance.measure("qwen3-4b-instruct-2507")
    assert grown.touched == 2 and grown.listed and grown.state == "works"
    assert maintenance.STEM in grown.order and set(grown.order) <= set(grown.parts)

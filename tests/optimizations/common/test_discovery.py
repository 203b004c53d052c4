"""Modules are found by location alone, including those beside a method in a folder."""

import lib.optimizations
from lib.optimizations.common import discovery


def test_a_module_beside_the_method_is_returned_or_none():
    module = discovery.beside_method("structured_pruning", "out_of_core")
    assert module is not None and hasattr(module, "apply_to_file")
    assert discovery.beside_method("automl_components", "out_of_core") is None


def test_a_single_file_optimization_has_no_module_beside_it(tmp_path, monkeypatch):
    (tmp_path / "twelfth.py").write_text("def applies_to(model):\n    return None\n")
    monkeypatch.setattr(lib.optimizations, "__path__", [str(tmp_path)])
    assert discovery.stems() == ["twelfth"]
    assert discovery.beside_method("twelfth", "experiment") is None

"""What is read from an optimization's source matches what its module declares and what `apply` uses."""

from lib.optimizations.common import discovery
from lib.optimizations.modular_components import saving
from lib.suite.plan import declared


def test_the_source_matches_the_modules_declarations():
    assert declared.HELD == saving.HELD
    seen = {stem: declared.touches(stem) for stem in discovery.stems()}
    assert seen == {stem: tuple(getattr(discovery.method(stem), "COMPOSES", {}).get("touches", ())) for stem in seen}
    assert [stem for stem in seen if declared.savable(stem)] == [
        "sparse_neural_networks",
        "structured_pruning",
        "tensor_decomposition",
    ]


def test_a_single_file_module_and_a_missing_one(tmp_path):
    (tmp_path / "one.py").write_text('COMPOSES: dict = {"needs": (), "touches": ("weights",)}\n')
    (tmp_path / "other.py").write_text('COMPOSES = {"needs": ()}\n')
    assert declared.touches("one", tmp_path) == ("weights",) and declared.savable("one", tmp_path)
    assert declared.touches("other", tmp_path) == () == declared.touches("none", tmp_path)

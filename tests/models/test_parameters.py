"""Parameter files: valid ones are read, faults are named in one line."""

import pytest
import yaml

from lib.errors import UserError
from lib.models import parameters


@pytest.fixture
def content() -> dict:
    path = parameters.PARAMETERS / "qwen3-4b-instruct-2507.yaml"
    return yaml.safe_load(path.read_text())


def refused(tmp_path, content, raw: str | None = None) -> str:
    (tmp_path / "phi.yaml").write_text(yaml.safe_dump(content) if raw is None else raw)
    with pytest.raises(UserError) as caught:
        parameters.read("phi", tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_four_are_there_and_valid():
    assert parameters.names() == ["glm-4.7-flash", "qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b"]
    for name in parameters.names():
        assert parameters.read(name).tasks


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match='Did you mean "qwen3-vl-2b"'):
        parameters.read("qwen3-vl-2")


def test_faults_are_named(tmp_path, content):
    assert "is empty" in refused(tmp_path, None, "")
    assert "not readable as YAML" in refused(tmp_path, None, "name: [unclosed")
    assert "holds a list" in refused(tmp_path, None, "- a\n- b\n")
    assert 'Did you mean "architecture"' in refused(tmp_path, content | {"architectur": "x"})
    assert 'section "slice"' in refused(tmp_path, content | {"slice": {"layer": 2}})
    assert 'key "layers"' in refused(tmp_path, content | {"slice": {"layers": 0}})
    del content["checkpoint"]
    assert 'missing key "checkpoint"' in refused(tmp_path, content)


def test_scales_differ_as_described(content):
    described = parameters.ModelParameters.model_validate(content)
    assert described.config("slice") == described.full | {"num_hidden_layers": described.slice.layers}
    assert described.config("proxy")["hidden_size"] < described.full["hidden_size"]
    assert described.config("proxy")["tie_word_embeddings"] is True, "what the proxy does not name stays as it is"


def test_empty_sections_mean_no_override(content):
    described = parameters.ModelParameters.model_validate(content | {"optimizations": {"structured_pruning": None}})
    assert described.optimizations == {"structured_pruning": {}}

"""Parameter files: valid ones are read, errors are reported in one line."""

import json

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


def test_shipped_files_exist_and_are_valid():
    four = ["glm-4.7-flash", "qwen3-4b-instruct-2507", "qwen3-coder-30b", "qwen3-vl-2b"]
    assert parameters.names_at("proxy") == parameters.names_at("slice") == four
    assert parameters.names() == parameters.names_at("full") == [*four, "smollm2-135m-instruct"]
    for name in parameters.names():
        assert parameters.read(name).tasks


def test_an_unknown_model_suggests_the_nearest_name():
    with pytest.raises(UserError, match='Did you mean "qwen3-vl-2b"'):
        parameters.read("qwen3-vl-2")


def test_faults_are_named(tmp_path, content):
    assert "is empty" in refused(tmp_path, None, "")
    assert "not readable as YAML" in refused(tmp_path, None, "name: [unclosed")
    assert "holds a list" in refused(tmp_path, None, "- a\n- b\n")
    assert "phi.yaml, line 2: not readable as YAML (found character '\\t'" in refused(tmp_path, None, "full:\n\tx: 1\n")
    twice = "checkpoint: a/b\nfull: {a: 1}\ntasks: []\nfull:\n  b: 2\n"
    assert 'phi.yaml, line 4: not readable as YAML (the key "full" occurs twice)' in refused(tmp_path, None, twice)
    assert 'line 1: not readable as YAML (the key "a" occurs twice)' in refused(tmp_path, None, "full: {a: 1, a: 2}")
    assert 'Did you mean "architecture"' in refused(tmp_path, content | {"architectur": "x"})
    assert 'section "slice"' in refused(tmp_path, content | {"slice": {"layer": 2}})
    assert 'key "layers"' in refused(tmp_path, content | {"slice": {"layers": 0}})
    message = refused(tmp_path, content | {"full": [["a long list"] * 500]})
    assert 'key "full"' in message and len(message) < 300
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


@pytest.fixture
def checkpoint(tmp_path):
    """Return a folder that contains only the configuration of a checkpoint."""
    folder = tmp_path / "weights" / "Tiny Llama (new)"
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    return folder


def test_a_file_may_contain_only_a_checkpoint(tmp_path, checkpoint):
    (tmp_path / "phi.yaml").write_text(yaml.safe_dump({"checkpoint": str(checkpoint)}))
    described = parameters.read("phi", tmp_path)
    assert (described.name, described.architecture, described.scales) == ("phi", "llama", ("full",))
    assert described.config("full") == {"hidden_size": 64, "num_hidden_layers": 3}
    assert described.tasks == ["topic", "retrieval"]
    (tmp_path / "phi.yaml").write_text(f"checkpoint: weights/{checkpoint.name}\nslice: {{layers: 2}}\n")
    described = parameters.read("phi", tmp_path)
    assert described.checkpoint == str(checkpoint), "a relative path begins at the file"
    assert described.scales == ("slice", "full") and described.config("slice")["num_hidden_layers"] == 2
    with pytest.raises(UserError, match="describes no scale proxy; it takes part at slice, full"):
        described.config("proxy")
    with pytest.raises(UserError, match="describes no proxy model"):
        described.training()


def test_vision_models_get_picture_tasks(tmp_path, checkpoint):
    config = {"model_type": "qwen3_vl", "vision_config": {}, "text_config": {"num_hidden_layers": 2}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (tmp_path / "phi.yaml").write_text(yaml.safe_dump({"checkpoint": str(checkpoint)}))
    assert parameters.read("phi", tmp_path).tasks == ["digits", "retrieval"]
    (checkpoint / "config.json").write_text(json.dumps(config | {"vision_config": None}))
    assert parameters.read("phi", tmp_path).tasks == ["topic", "retrieval"], "a text model cut out of another"


def test_unfetched_checkpoints_get_no_invented_configuration(tmp_path):
    (tmp_path / "phi.yaml").write_text("checkpoint: package:nothing-here==1.0/model.gguf\n")
    described = parameters.read("phi", tmp_path)
    assert described.architecture == "" and described.scales == ("full",)
    with pytest.raises(UserError, match="has to be fetched first"):
        described.config("full")


def test_interdependent_keys_are_required_together(tmp_path, content):
    del content["architecture"]
    assert 'missing key "architecture"' in refused(tmp_path, content)
    assert 'missing key "full"' in refused(tmp_path, {"checkpoint": "a/b", "proxy": content["proxy"]})
    assert 'key "checkpoint": package:x: expected' in refused(tmp_path, {"checkpoint": "package:x"})
    assert 'key "sha256"' in refused(tmp_path, {"checkpoint": "a/b", "sha256": "abc"})
    pinned = {"sha256": "0" * 64}
    for checkpoint in ("a/b", str(tmp_path)):
        message = refused(tmp_path, {"checkpoint": checkpoint} | pinned)
        assert f'key "sha256": {checkpoint} is not a single file, so nothing would be checked' in message
    (tmp_path / "phi.yaml").write_text(yaml.safe_dump({"checkpoint": "./x.gguf"} | pinned))
    assert parameters.read("phi", tmp_path).sha256 == pinned["sha256"]


def test_common_number_notations_are_read(tmp_path, content):
    text = yaml.safe_dump(content).replace("rms_norm_eps: 1.0e-06", "rms_norm_eps: 1e-06")
    text = text.replace("rope_theta: 5000000", "rope_theta: 5e6").replace("muon_rate: 0.008", "muon_rate: 8e-3")
    assert "1e-06" in text and "5e6" in text and "8e-3" in text
    (tmp_path / "phi.yaml").write_text(text)
    described = parameters.read("phi", tmp_path)
    assert described.full["rms_norm_eps"] == 1e-6 and described.training()["refine"]["muon_rate"] == 0.008
    theta = described.full["rope_parameters"]["rope_theta"]
    assert theta == 5_000_000 and isinstance(theta, int)
    assert refused(tmp_path, None, "checkpoint: a/b\nfull: {x: 1e9999}\n").startswith(tmp_path.name)


def test_per_block_lists_match_the_number_of_blocks(content):
    kinds = ["full_attention", "sliding_attention"] * 18
    content["full"] |= {"layer_types": kinds, "no_rope_layers": [1, 0] * 18, "mlp_only_layers": [*range(36)]}
    described = parameters.ModelParameters.model_validate(content)
    assert described.config("slice")["layer_types"] == kinds[:2]
    assert described.config("slice")["no_rope_layers"] == [1, 0]
    assert described.config("proxy")["layer_types"] == kinds[:6]
    assert described.config("full")["layer_types"] == kinds
    assert described.config("slice")["mlp_only_layers"] == [*range(36)], "numbers of blocks, not one for each"


def test_a_checkpoint_gets_a_stable_name(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    name = parameters.register(str(checkpoint))
    assert name == "tiny-llama-new" and parameters.registered() == [name]
    assert parameters.register(f"{checkpoint}/") == name and parameters.read(name).architecture == "llama"
    long = tmp_path / ("long-" * 49 + "long")
    long.mkdir()
    (long / "config.json").write_text("{}")
    assert parameters.register(str(long)) == "long-" * 15 + "long", "names of results begin with it"
    for called, stem in (("1e-5", "1e-5"), ("2E3", "2e3"), ("007", "007"), ("模型", "model"), ('a "b": #c', "a-b-c")):
        odd = tmp_path / "sweep" / called
        odd.mkdir(parents=True)
        (odd / "config.json").write_text("{}")
        assert parameters.register(str(odd)) == stem == parameters.register(str(odd))
        assert (parameters.read(stem).name, parameters.read(stem).checkpoint) == (called, str(odd))
    other = tmp_path / "elsewhere" / checkpoint.name
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    assert parameters.register(str(other)) == f"{name}-2", "another checkpoint of the same name"
    assert parameters.register("Qwen/Qwen3-VL-2B-Instruct") == "qwen3-vl-2b-instruct"
    assert "qwen3-vl-2b" not in parameters.registered()
    with pytest.raises(UserError, match="no such folder or file; expected a folder"):
        parameters.register(str(tmp_path / "nowhere"))
    monkeypatch.setenv("WORKBENCH_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match="cannot be written to"):
        parameters.register(str(checkpoint))


def test_a_name_is_kept_while_its_checkpoint_is_away(tmp_path, checkpoint, monkeypatch):
    """Previously `list` deleted it, and the next checkpoint of the same name inherited its records."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    other = tmp_path / "elsewhere" / checkpoint.name
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    first, second = parameters.register(str(checkpoint)), parameters.register(str(other))
    monkeypatch.setattr(parameters, "_registered_here", set())  # as in a later command
    checkpoint.rename(tmp_path / "unmounted")
    parameters.forget_unfetched([first])
    parameters.forget(first)
    assert parameters.registered() == sorted([first, second])
    (tmp_path / "cache" / "models" / f"{first}.yaml").unlink()
    assert parameters.register(str(other)) == parameters.known_as(str(other)) == second, "one checkpoint, one name"


def test_records_are_looked_up_under_the_name_under_which_a_checkpoint_ran(tmp_path, monkeypatch):
    """Previously `run` and `advise` gave the hub id of a model in parameters/ two names, and two scales."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    hub_id = "Qwen/Qwen3-VL-2B-Instruct"
    assert parameters.known_as(hub_id) == "qwen3-vl-2b", "never run by its id"
    assert parameters.register(hub_id) == parameters.known_as(hub_id) == "qwen3-vl-2b-instruct"


def test_slice_size_counts_experts_and_heads_under_other_names():
    full = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    full |= {"intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
    mixtral = parameters.ModelParameters(checkpoint="a/b", architecture="mixtral", full=full, slice={"layers": 2})
    attention, experts, ends = 2 * 40 * 128 * 4096, 8 * 3 * 14336 * 4096, 2 * 32000 * 4096
    assert parameters.about_slice_parameters(mixtral) == 2 * (attention + experts) + ends


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("full", {"hidden_size": "2560"}, 'key "hidden_size" in section "full": expected a number'),
        ("full", {"rms_norm_eps": "1.0e-6"}, "got the text '1.0e-6'; leave out the quotation marks"),
        ("full", {"tie_word_embeddings": "true"}, 'key "tie_word_embeddings" in section "full": expected a number'),
        ("full", {"num_hidden_layers": 36.0}, "expected a whole number of at least 1, got 36.0"),
        ("full", {"vocab_size": 0}, 'key "vocab_size" in section "full": expected a whole number of at least 1'),
        ("full", {"layer_types": ["full_attention"] * 35}, "expected an entry for each of the 36 blocks, got 35"),
        ("full", {"num_key_value_heads": 5}, "expected a divisor of num_attention_heads, which is 32, got 5"),
        ("full", {"rope_parameters": {"rope_theta": "5000000"}}, 'key "rope_theta" in section "full.rope_parameters"'),
        ("proxy", {"num_attention_heads": 6}, '"num_key_value_heads" in section "proxy.config": expected a divisor'),
        ("proxy", {"hidden_size": "192"}, 'key "hidden_size" in section "proxy.config"'),
        ("full", {"hidden_size": ..., "hiden_size": 2560}, 'key "hiden_size" in section "full": no dimension has this'),
        ("proxy", {"vocab_size": ..., "vocabsize": 2048}, '"proxy.config": no dimension has this name; did you mean'),
        ("slice", {"layers": 37}, 'key "layers" in section "slice": expected at most the 36 blocks of the model'),
    ],
)
def test_invalid_dimensions_are_refused_before_a_model_is_built(tmp_path, content, section, change, says):
    """Previously, with random weights, the error surfaced as a failed run in the notebook; a slice of 37 of 36 blocks
    ran, and a dimension under another name was the default of transformers.
    """
    changed = content["proxy"]["config"] if section == "proxy" else content[section]
    changed |= change
    for key in [key for key, value in changed.items() if value is ...]:
        del changed[key]
    assert says in refused(tmp_path, content)


def test_a_slice_has_no_more_blocks_than_its_checkpoint(tmp_path, checkpoint):
    assert "expected at most the 3 blocks" in refused(tmp_path, {"checkpoint": str(checkpoint), "slice": {"layers": 4}})
    (tmp_path / "phi.yaml").write_text(yaml.safe_dump({"checkpoint": str(checkpoint), "slice": {"layers": 3}}))
    assert parameters.read("phi", tmp_path).config("slice")["num_hidden_layers"] == 3


def test_null_sections_count_as_absent(tmp_path, checkpoint):
    """A text model that was cut out of one with pictures has such sections in its configuration."""
    config = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {"intermediate_size": 128, "vocab_size": 96, "vision_config": None, "text_config": None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (tmp_path / "phi.yaml").write_text(yaml.safe_dump({"checkpoint": str(checkpoint), "slice": {"layers": 2}}))
    described = parameters.read("phi", tmp_path)
    assert described.config("slice")["num_hidden_layers"] == 2
    assert parameters.about_slice_parameters(described) > 0

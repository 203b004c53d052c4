"""Optimized checkpoints of every architecture: reloaded with equal logits, by transformers alone where stated."""

import io as io_text
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.measure.roofline import cost_model
from lib.models import loading, parameters
from lib.models.checkpoints import io, validate
from lib.models.structure.anatomy import anatomy
from lib.models.structure.architecture import auto_class
from lib.optimizations.automl_components import experiment as searching
from lib.optimizations.automl_components.successive_filtering import Bench
from lib.optimizations.common import recipe
from lib.optimizations.common.compression import calibration_text
from lib.optimizations.common.recipe import RecipeStep
from lib.optimizations.modular_components import method as composing
from lib.optimizations.modular_components import saving
from lib.optimizations.structured_pruning import experiment as pruning
from tests.models import architectures
from tests.models.sources import gguf_files

SMALL = {"calibration_sequences": 4, "calibration_tokens": 48}
STEPS = {
    "structured_pruning": {"ratio": 0.3, "granularity": "auto", "finetune_steps": 2},
    "tensor_decomposition": {"compression": 0.2, "method": "auto", "budget": "global", "refine_steps": 2},
    "sparse_neural_networks": {
        "sparsity": -1.0, "method": "sparsegpt", "pattern": "unstructured", "within": "row", "parts": "all",
        "finetune_steps": 2,
    },
}  # fmt: skip
COMMON = {"scale": "full", "effort": "quick", "device": "cpu", "checkpoints": "", "random_weights": False, "seed": 0}
PICTURES = "qwen3_vl"


@pytest.fixture(scope="module")
def tokenizer():
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=gguf_files.tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast_tokenizer.chat_template = gguf_files.CHAT
    return fast_tokenizer


@pytest.fixture(autouse=True)
def little(tmp_path, monkeypatch):
    """Use little text, and register checkpoints in a folder of this test."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    read = settings.read
    monkeypatch.setattr(settings, "read", lambda *arguments: replace(read(*arguments), **SMALL))


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """Return a function that writes a tiny checkpoint of an architecture in its maker's format and names the model."""

    def make(name: str) -> str:
        folder, tokens = tmp_path / name, tokenizer
        if name == PICTURES:  # its images need the tokens and the processor of its configuration
            proxy = parameters.PARAMETERS / "proxies" / "qwen3-vl-2b"
            described = parameters.read("qwen3-vl-2b")
            model = io.build(described.config("proxy"), described.architecture)
            io.load_image_processor(proxy).save_pretrained(folder)
            tokens = AutoTokenizer.from_pretrained(proxy)
        else:
            model = architectures.build(name, vocab_size=len(tokenizer))
        model.save_pretrained(folder)
        tokens.save_pretrained(folder)
        return parameters.register(str(folder))

    return make


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=architectures.prompt(), use_cache=False).logits


@pytest.mark.parametrize("optimization", sorted(STEPS))
@pytest.mark.parametrize("name", [*sorted(architectures.MODELS), PICTURES])
def test_the_saved_model_is_the_optimized_one(name, optimization, checkpoint, tmp_path):
    model = checkpoint(name)
    place = tmp_path / "saved"
    saved = saving.save(model, optimization, None, COMMON | STEPS[optimization], place)
    again = io.load_folder(place, torch.float32)
    assert validate.fault(place) is None
    assert not torch.allclose(logits(again), logits(loading.load(model, "full", dtype="float32").model), atol=1e-3)
    if saved.loads is not None:
        kind = auto_class(AutoConfig.from_pretrained(place))
        assert kind.__name__ == saved.loads
        plain, report = kind.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(plain), logits(again), atol=1e-4, rtol=1e-4)
    if optimization == "structured_pruning":  # blocks stay alike, so the configuration describes them
        assert saved.loads is not None
    else:  # no transformers configuration has factors or sparse matrices
        assert saved.loads is None


@pytest.mark.parametrize(
    ("name", "granularity", "ratio"),
    [
        *((name, "channels", 0.1) for name in ("llama", "gemma2")),
        *((name, "heads", 0.2) for name in ("llama", "gemma2")),
        *((name, "depth", 0.25) for name in ("llama", "gemma2", "glm4_moe_lite", PICTURES)),
        *((name, "experts", 0.1) for name in ("glm4_moe_lite", "qwen3_moe", "mixtral")),
    ],
)
def test_every_granularity_reloads(name, granularity, ratio, checkpoint, tmp_path):
    model = checkpoint(name)
    wanted = COMMON | {"granularity": granularity, "finetune_steps": 0, "ratio": ratio}
    saved = saving.save(model, "structured_pruning", None, wanted, tmp_path / "saved")
    assert saved.loads in ("AutoModelForCausalLM", "AutoModelForImageTextToText", None) and saved.tokenizer
    whole, small = loading.load(model, "full").model, io.load_folder(tmp_path / "saved")
    assert cost_model.parameters(small) < cost_model.parameters(whole)


def test_the_saved_model_is_the_one_that_a_run_measures(checkpoint, tmp_path):
    model = checkpoint("llama")
    wanted = COMMON | STEPS["structured_pruning"] | {"finetune_steps": -1}
    saved = saving.save(model, "structured_pruning", None, wanted, tmp_path / "saved")
    loaded = loading.load(model, "full")
    effort = settings.read("quick", "full")
    setup = pruning.set_up(loaded, effort, 0.3, "auto", 0)
    cut = pruning.cut(setup, 0.3, "auto", pruning.steps_of(loaded, -1, effort))
    assert io.weights_hash(cut.optimized) == saved.weights_hash


def test_a_stack_is_saved_as_one_checkpoint(checkpoint, tmp_path):
    model = checkpoint("qwen2")
    stack = [
        RecipeStep(optimization="structured_pruning", knobs={"ratio": 0.2}),
        RecipeStep(optimization="tensor_decomposition", knobs={"method": "whitened"}),
    ]
    saved = saving.save(model, "automl_components", stack, COMMON, tmp_path / "saved")
    again = io.load_folder(tmp_path / "saved")
    assert saved.loads is None and anatomy(again).blocks[0].feed_forward.channels < 96


@pytest.mark.parametrize("tokens_per_input", [2, 8])
def test_a_stack_is_saved_as_it_was_judged(checkpoint, tmp_path, monkeypatch, tokens_per_input):
    """With another effort than that of `apply`, as much text as the width needs, and the same seed."""
    monkeypatch.setattr(calibration_text, "TOKENS_PER_INPUT", tokens_per_input)
    read = settings.read
    longer = {"standard": {"calibration_sequences": 6}}
    monkeypatch.setattr(settings, "read", lambda name, *rest: replace(read(name, *rest), **longer.get(name, {})))
    seen, calibration = [], calibration_text.tasks.calibration

    def watched(loaded, sequences, length, seed):
        seen.append((sequences, length, seed))
        return calibration(loaded, sequences, length, seed)

    monkeypatch.setattr(calibration_text.tasks, "calibration", watched)
    model = checkpoint("qwen2")
    stack = [
        RecipeStep(optimization="structured_pruning", knobs={"ratio": 0.2, "saliency": "random"}),
        RecipeStep(optimization="tensor_decomposition", knobs={"method": "whitened"}),
    ]
    loaded = loading.load(model, "full", device="cpu", seed=3)
    bench = Bench(loaded.model, [], [], architectures.prompt(), composing.parts(), seed=3)
    setup = SimpleNamespace(loaded=loaded, effort=settings.read("standard", "full"), seed=3, bench=bench)
    judged, _ = searching.applied(setup, stack)
    place, options = tmp_path / "saved", {"chosen_at": "standard"}
    saved = saving.save(model, "automl_components", stack, COMMON | {"seed": 3}, place, **options)
    assert seen[0] == seen[1] and (seen[0][0] > 6) is (tokens_per_input == 8)
    assert saved.weights_hash == io.weights_hash(judged)


@pytest.mark.parametrize(
    ("optimization", "stack", "message"),
    [
        ("adaptive_sparse_attention", None, "changes how a model computes, which no checkpoint holds"),
        ("streaming_computation", None, "changes how a model computes, which no checkpoint holds"),
        ("continuous_nas", None, "is applied through others .*--stack executed/full/stacks/"),
        ("adaptive_batch_sizes", None, "makes no checkpoint by itself, as it changes a server or is applied through"),
        ("automl_components", [], "has no step"),
        ("automl_components", [RecipeStep(optimization="adaptive_sparse_attention")], "leave it out of the stack"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_before_loading(optimization, stack, message, tmp_path):
    with pytest.raises(UserError, match=message) as refused:
        saving.save("no-such-model", optimization, stack, COMMON, tmp_path / "saved")
    assert "\n" not in str(refused.value) and not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("weights", "accuracy", "says"),
    [("a" * 64, "maintained", None), ("b" * 64, "maintained", "chosen for weights bbbbbbbb, not for aaaaaaaa"),
     ("a" * 64, "not_maintained", "its stack was judged not maintained")],
)  # fmt: skip
def test_a_recipe_for_other_weights_or_with_a_loss_is_reported(tmp_path, monkeypatch, capsys, weights, accuracy, says):
    steps = [RecipeStep(optimization="structured_pruning")]
    about = {"model": "m", "scale": "proxy", "stack": steps, "chosen_by": "automl_components", "effort": "quick"}
    path = recipe.write(recipe.Recipe(**about, weights=weights, accuracy=accuracy), tmp_path)
    saved = saving.SavedModel(None, True, "float32", "c" * 64, before="a" * 64)
    asked = {}
    monkeypatch.setattr(saving, "save", lambda *_, **options: asked.update(options) or saved)
    request = {"model": "m", "optimization": "automl_components", "stack": str(path), "parameters": {}}
    request |= {"place": str(tmp_path / "place"), "unfinished": str(tmp_path / "part")}
    monkeypatch.setattr("sys.stdin", io_text.StringIO(json.dumps(request)))
    saving.main()
    answer = json.loads(capsys.readouterr().out)
    assert asked == {"chosen_at": "quick"} and answer["effort"] == "quick", "it is applied as it was judged"
    unfit = answer["unfit"]
    assert unfit is None if says is None else says in unfit

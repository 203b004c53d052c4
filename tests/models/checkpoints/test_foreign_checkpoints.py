"""Checkpoints in their published layout: several shards with an index, a tied head, a chat template.

Small ones of all four architectures are made here, loaded, prompted with examples, streamed where they do not fit, and
refused before anything runs if they are damaged.
"""

import io
import json
import subprocess
from contextlib import redirect_stdout

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.errors import NotApplicable, UserError
from lib.models import loading, parameters
from lib.models.checkpoints import placement, validate
from lib.models.checkpoints.folder import check_checkpoint, tensor_shapes
from lib.models.offload import streamer
from lib.models.proxies import proxy_model, tokenizer
from lib.models.tasks import prompting, tasks
from lib.suite.plan import plan

VOCABULARY = 2048
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def vocabulary():
    trained = tokenizer.train(VOCABULARY)
    trained.chat_template = CHAT
    return trained


@pytest.fixture
def source(tiny, name):
    """The small model that a checkpoint is made of."""
    model = tiny(name)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model.requires_grad_(False).eval()


@pytest.fixture
def folder(source, name, vocabulary, tmp_path):
    """A checkpoint in the published layout, under the model's name."""
    checkpoint = tmp_path / name
    source.generation_config.do_sample = False
    for parameter in source.parameters():  # buffers, such as frequencies, stay exact
        parameter.data = parameter.data.bfloat16()
    source.save_pretrained(checkpoint, max_shard_size="60KB")
    vocabulary.save_pretrained(checkpoint)
    vision = getattr(source.config, "vision_config", None)
    if vision is not None:
        proxy_model.make_image_processor(vision.to_dict()).save_pretrained(checkpoint)
    return checkpoint


def test_the_layout_is_the_published_one_and_fits(folder, name):
    files = {path.name for path in folder.iterdir()}
    assert {INDEX, "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert len(list(folder.glob("*.safetensors"))) > 1
    shapes = tensor_shapes(folder)
    described = parameters.read(name).full
    tied = described.get("text_config", described).get("tie_word_embeddings", described.get("tie_word_embeddings"))
    assert ("lm_head.weight" in shapes) != bool(tied)
    routed = "qwen3-coder" in name or "glm" in name
    assert any(".experts.3.up_proj.weight" in key for key in shapes) == routed  # stored one by one
    assert check_checkpoint(name, folder) == folder and validate.fault(folder) is None


def test_it_loads_as_saved(folder, source, name, batch):
    loaded = loading.load(name, "full", checkpoints=folder.parent)
    assert loaded.dtype == torch.bfloat16 and loaded.folder == folder and not loaded.random_weights
    parameters_by_name = dict(source.named_parameters())
    assert all(torch.equal(parameter, parameters_by_name[name]) for name, parameter in loaded.model.named_parameters())
    assert (loaded.model(**batch).logits - source(**batch).logits).abs().median() < 0.01
    assert (loaded.image_processor is not None) == ("vl" in name)


def test_examples_use_the_chat_template(folder, name):
    loaded = loading.load(name, "full", checkpoints=folder.parent, dtype="float32")
    task = loaded.parameters.tasks[0]
    chosen_items = tasks.items(task, "final", 3)
    row = prompting.shown(loaded, chosen_items[0])
    shown_text = prompting.text(loaded, row)
    assert len(row) == prompting.SHOTS + 1 and len({item.label for item in row[:-1]}) == prompting.SHOTS
    assert not {item.id for item in row[:-1]} & {item.id for item in tasks.items(task, "final")}
    assert shown_text.count("<|im_start|>user") == prompting.SHOTS + 1 and shown_text.endswith(
        "assistant\n<think></think>"
    )
    assert all(f"assistant\n{item.label}<|im_end|>" in shown_text for item in row[:-1])
    label = loaded.tokenizer.decode(tasks.label_ids(loaded, task)[0])
    assert label == tasks.class_labels(task)[0]
    together, alone = (
        tasks.label_scores(loaded, task, chosen_items, 3),
        tasks.label_scores(loaded, task, chosen_items, 1),
    )
    assert together.isfinite().all() and torch.allclose(together, alone, atol=1e-3)


def test_without_a_chat_template_examples_are_plain_text(folder, name):
    loaded = loading.load(name, "full", checkpoints=folder.parent)
    loaded.tokenizer.chat_template = None
    task = loaded.parameters.tasks[0]
    [item] = tasks.items(task, "final", 1)
    shown_text = prompting.text(loaded, prompting.shown(loaded, item))
    assert (
        shown_text.endswith(item.prompt)
        and shown_text.count("\n\n" if task == "digits" else "Module:") >= prompting.SHOTS
    )
    assert prompting.answer(loaded, "x") == " x"


def test_a_checkpoint_that_does_not_fit_streams_with_the_same_answers(folder, source, name, batch, monkeypatch):
    _, total = streamer.smallest(folder)
    monkeypatch.setattr(placement, "free_bytes", lambda device: int(1.1 * total))
    loaded = loading.load(name, "full", checkpoints=folder.parent)
    assert streamer.streamer(loaded.model).in_memory_bytes < 0.7 * total
    actual, expected = loaded.model(**batch).logits, source(**batch).logits
    assert (actual - expected).abs().median() < 0.01 < expected.std()  # an expert chosen narrowly may be another one
    from lib.optimizations.structured_pruning import method

    with pytest.raises(NotApplicable, match="stream from a file"):
        method.apply(loaded.model, [batch], ratio=0.3, granularity="depth")
    streamer.streamer(loaded.model).close()


def _checked_here(command, **options):
    """Run a check in this process, without importing the libraries again."""
    with redirect_stdout(io.StringIO()) as printed:
        code = validate.main(command[3:])
    return subprocess.CompletedProcess(command, code, printed.getvalue(), "")


@pytest.mark.parametrize("damage", ["missing shard", "wrong shape", "index", "other", "lacking", "no tokenizer"])
def test_damage_is_named_before_anything_runs(folder, name, damage, monkeypatch):
    if name != "qwen3-4b-instruct-2507":  # its tensors are checked in a separate process, as usual
        monkeypatch.setattr(validate.subprocess, "run", _checked_here)
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    victim = sorted(key for key in places if key.endswith("up_proj.weight") or "linear_fc1.weight" in key)[-1]
    shard = folder / places[victim]
    tensors = load_file(shard)
    if damage == "missing shard":
        shard.unlink()
    elif damage == "wrong shape":
        tensors[victim] = torch.cat([tensors[victim], tensors[victim]], -1).contiguous()
        save_file(tensors, shard, metadata={"format": "pt"})
    elif damage == "index":
        places["model.layers.99.nothing.weight"] = shard.name
    elif damage == "other":
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    elif damage == "lacking":
        del tensors[victim], places[victim]
        save_file(tensors or {"nothing": torch.zeros(1)}, shard, metadata={"format": "pt"})
    else:
        (folder / "tokenizer.json").unlink()
    (folder / INDEX).write_text(json.dumps(index))
    words = {
        "missing shard": f"{shard.name}: missing, though the index names it",
        "wrong shape": f"{victim} has the shape",
        "index": "the index names model.layers.99.nothing.weight here",
        "other": f'architecture "llama", but {name} is',
        "lacking": f"the checkpoint lacks {victim}",
        "no tokenizer": "holds no tokenizer",
    }
    request = plan.Request(models=(name,), scale="full", checkpoints=str(folder.parent))
    with pytest.raises(UserError) as caught:
        plan.plan(request)
    assert words[damage] in str(caught.value) and "\n" not in str(caught.value)


def test_measurements_without_room_or_real_answers_do_not_apply(source, name, monkeypatch):
    monkeypatch.setattr(placement, "free_bytes", lambda device: 10 * sum(p.nbytes for p in source.parameters()))
    placement.require_room(source, 7, "measuring pairs")
    with pytest.raises(NotApplicable, match="measuring pairs holds about 9 copies of the model at once"):
        placement.require_room(source, 9, "measuring pairs")
    described = parameters.read(name)
    place = {"device": "cpu", "dtype": torch.float32, "folder": None, "seconds": 0.0, "scale": "slice", "name": name}
    for random in (False, True):
        loaded = loading.Loaded(source, None, None, parameters=described, random_weights=random, **place)
        for scale in ("slice", "full"):
            if random or scale == "slice":
                with pytest.raises(NotApplicable, match="the search depends on the model's answers; random weights"):
                    parameters.require_answers("the search", scale, random)
            else:
                parameters.require_answers("the search", scale, random)
    assert loaded.tasks == described.tasks

"""The stand-ins: training learns, resumes bit for bit and publishes whole folders; the kept ones score as they say."""

import re
from collections import Counter

import pytest
import torch

from lib.errors import UserError
from lib.models import corpus, loading, parameters, proxies, tasks, training
from lib.models.anatomy import anatomy
from lib.models.inheritance import inherit
from lib.models.lessons import ANSWER, REPEAT, SILENT, Lessons
from lib.models.muon import orthogonal
from lib.models.recipe import Recipe

VOCABULARY = 2048
# Targets that a kept stand-in does not reach yet; a longer training has to.
SHORT_OF = {"glm-4.7-flash": {"topic_f1_macro"}, "qwen3-coder-30b": {"code_origin_f1_macro"}}


@pytest.fixture(scope="module")
def vocabulary():
    return proxies.tokenizer.train(VOCABULARY)


def _few(documents):
    """Yield the first three documents of every class, and of none."""
    seen = Counter()
    for document in documents:
        seen[document.label] += 1
        if seen[document.label] <= 3:
            yield document


@pytest.fixture
def start(tiny, vocabulary, name, monkeypatch):
    """Return a function that begins the training of a tiny model with the tokenizer of the proxies on a few texts."""
    few = {part: list(_few(corpus.documents(part))) for part in corpus.CORPORA}
    monkeypatch.setattr(corpus, "documents", few.get)

    def begin() -> training.Run:
        model = tiny(name)
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        vision = getattr(model.config, "vision_config", None)
        processor = proxies.picture_processor(vision.to_dict()) if vision else None
        learner = proxies.Student(model, vocabulary, processor, parameters.read(name))
        recipe = Recipe(
            steps=12, tokens=256, questions=2, warm_up=1, copy_until=0.15, row_lengths=((0.5, 128), (1.0, 256))
        )
        return training.Run(model, Lessons(learner, recipe), recipe, "tiny")

    return begin


def test_training_reduces_the_loss_and_resumes_bit_for_bit(start, tmp_path):
    whole = start()
    seen = [whole.advance() for _ in range(6)]
    assert "text" not in seen[0] and seen[5]["text"] < seen[2]["text"]
    first = start()
    for _ in range(4):
        first.advance()
    first.save(tmp_path / "state.pt")
    second = start()
    assert second.resume(tmp_path / "state.pt") and second.step == 4
    for _ in range(2):
        second.advance()
    for (key, one), other in zip(whole.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(one, other), key
    assert (second.tokens, second.step) == (whole.tokens, whole.step)


def test_a_state_of_another_recipe_is_not_taken_up(start, tmp_path):
    run = start()
    run.save(tmp_path / "state.pt")
    other = start()
    other.identity = "another"
    assert not other.resume(tmp_path / "state.pt") and not other.resume(tmp_path / "none.pt")


def test_lessons_repeat_spans_and_mark_what_is_learned(start):
    lessons = start().lessons
    (only,) = lessons.at(1)
    assert only.spans_B is not None and (only.kind_BT == REPEAT).sum() > 100
    for step, length in ((4, 128), (10, 256)):
        rows, *copies, asked = lessons.at(step)
        assert rows.inputs["input_ids"].shape[1] == length and bool(copies) == (step < 6)
        for row in [rows, *copies]:
            ids_T, kind_T = row.inputs["input_ids"][0], row.kind_BT[0]
            repeated = (kind_T == REPEAT).nonzero().flatten().tolist()
            assert repeated
            for at in repeated:
                assert (ids_T[: at - 1].unfold(0, 2, 1) == ids_T[at - 1 : at + 1]).all(1).any()
        assert (asked.kind_BT == ANSWER).sum() == 2
        assert (asked.kind_BT[~asked.real_BT] == SILENT).all()


def test_lessons_of_a_step_do_not_depend_on_other_steps(start):
    lessons = start().lessons
    expected = lessons.at(7)
    lessons.at(8)
    for one, other in zip(expected, lessons.at(7)):
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)


def test_orthogonal_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.5 and values.max() < 1.3


def test_correction_bias_rises_where_an_expert_is_left_out(tiny):
    model = tiny("glm-4.7-flash")
    balance = training.Balance(anatomy(model))
    block = balance.blocks[0]
    bias_E = block.feed_forward.experts.correction_bias
    before = bias_E.clone()
    balance.counts = {b.index: torch.tensor([0.0, *[8.0] * 7]) for b in balance.blocks}
    balance.adjust(0.1)
    assert bias_E[0] > before[0] and (bias_E[1:] < before[1:]).all()


def test_publish_writes_a_whole_checkpoint(start, name, tmp_path, monkeypatch):
    monkeypatch.setattr(proxies, "scores", lambda loaded: {"recall_256": 0.5})
    run = start()
    folder = tmp_path / "proxies" / name
    for _ in range(2):  # the second time in place of the first
        assert proxies.publish(name, run, folder) == folder
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert "| recall_256 | 0.500 |" in (folder / "README.md").read_text(encoding="utf-8")
    model = loading.load_folder(folder, dtype=torch.float32)
    assert model.config.to_dict().get("dtype") in ("bfloat16", "float32", torch.bfloat16, torch.float32)
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "preprocessor_config.json").is_file() == hasattr(model.config, "vision_config")


def test_a_model_starts_from_another_ones_decoder(tiny, tmp_path):
    source, target = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-coder-30b", seed=4)
    source.save_pretrained(tmp_path / "source")
    assert "layers.0.self_attn.q_proj.weight" in inherit(target, tmp_path / "source")
    assert torch.equal(source.model.layers[2].self_attn.o_proj.weight, target.model.layers[2].self_attn.o_proj.weight)
    dense, experts = source.model.layers[1].mlp, anatomy(target).blocks[1].feed_forward.experts
    assert torch.equal(experts.gate_up[1, :32], dense.gate_proj.weight[8:40])
    assert torch.equal(experts.down[1], dense.down_proj.weight[:, 8:40] * 2)
    picture = tiny("qwen3-vl-2b", seed=4)
    inherit(picture, tmp_path / "source")
    assert torch.equal(picture.lm_head.weight, source.lm_head.weight)
    with pytest.raises(UserError, match="no checkpoint to start from"):
        inherit(target, tmp_path / "none")


def test_stand_ins_that_others_start_from_come_first():
    order = proxies.in_order(parameters.names())
    assert sorted(order) == sorted(parameters.names())
    for name in order:
        source = proxies.recipe_of(name).start_from
        assert not source or order.index(source) < order.index(name)


def test_unknown_key_of_a_recipe_is_told(monkeypatch):
    described = parameters.read("glm-4.7-flash")
    wrong = described.model_copy(update={"proxy": described.proxy.model_copy(update={"training": {"stepz": 3}})})
    monkeypatch.setattr(proxies.parameters, "read", lambda name: wrong)
    with pytest.raises(UserError, match=r"glm-4.7-flash.yaml: section proxy.training: .*stepz"):
        proxies.recipe_of("glm-4.7-flash")


@pytest.fixture
def kept(name):
    """A stand-in as kept in the repository, with the scores that its README states."""
    folder = parameters.PARAMETERS / "proxies" / name
    rows = re.findall(r"^\| (\w+) \| ([\d.,]+) \|$", (folder / "README.md").read_text(encoding="utf-8"), re.M)
    return loading.load(name), {key: float(value.replace(",", "")) for key, value in rows}


def test_kept_stand_in_reaches_its_stated_scores_on_a_sample(kept):
    loaded, stated = kept
    torch.set_num_threads(1)
    task = loaded.parameters.tasks[0]
    asked = tasks.items(task, "final", 96)
    names = tasks.class_labels(task)
    chosen = [names[choice] for choice in tasks.label_scores(loaded, task, asked).argmax(1).tolist()]
    right = sum(choice == item.label for choice, item in zip(chosen, asked)) / len(asked)
    assert right >= stated[f"{task}_f1_macro"] - 0.08
    assert proxies.recall(loaded, 256, 48) >= stated["recall_256"] - 0.2


def test_kept_stand_in_generates_what_it_recalls(kept):
    loaded, _ = kept
    ids_BT, target_BV = tasks.recall_prompts(loaded, 64, 8, seed=3)
    made_BT = loaded.model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=tasks.VALUE, do_sample=False
    )
    right = int((made_BT[:, -tasks.VALUE :] == target_BV).all(1).sum())
    assert abs(right / 8 - proxies.recall(loaded, 64, 8, seed=3)) <= 0.125
    assert right >= 6


def test_kept_stand_in_meets_its_targets_and_size(kept, name):
    loaded, stated = kept
    task = loaded.parameters.tasks[0]
    targets = {f"{task}_f1_macro": 0.97 if task == "digits" else 0.90, "recall_256": 0.90, "least_expert_share": 0.25}
    missed = {score for score, least in targets.items() if stated.get(score, least) < least}
    assert missed == SHORT_OF.get(name, set()), "a target newly missed, or one newly reached: then remove it there"
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) <= 5_000_000
    assert sum(path.stat().st_size for path in loaded.folder.glob("*.safetensors")) <= 10_000_000

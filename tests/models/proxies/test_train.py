"""Proxy models: training learns, resumes bit for bit and publishes complete folders; stored ones score as stated."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from lib.errors import UserError
from lib.models import loading, parameters
from lib.models.checkpoints import io
from lib.models.proxies import evaluation, loop, proxy_model, tokenizer, train
from lib.models.proxies.config import RENAMED, TrainingConfig, present_keys
from lib.models.proxies.model_card import page, read_history
from lib.models.proxies.muon import MatrixMuon
from lib.models.proxies.router_balance import RouterBalance
from lib.models.proxies.training_data import prompts, teacher
from lib.models.proxies.training_data.batches import ANSWER, IGNORED, REPEAT, TrainingBatches
from lib.models.proxies.upcycling import copy_weights
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import corpus, tasks

VOCABULARY = 2048
# A small second phase.
VARIED = {
    "copy_until": 0.0,
    "prompts": 6,
    "joined_share": 0.3,
    "teacher_share": 0.4,
    "replaced_share": 0.5,
    "text_every": 2,
}
VARIED |= {"dropout": 0.1, "average_decay": 0.9}


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(VOCABULARY)


@pytest.fixture(scope="module")
def few():
    """The beginnings of the first three documents of every class, and of no class, per corpus."""
    beginnings, counts = {part: [] for part in corpus.CORPORA}, Counter()
    for part in corpus.CORPORA:
        for document in corpus.documents(part):
            counts[part, document.label] += 1
            if counts[part, document.label] <= 3:
                beginnings[part].append(replace(document, pieces=document.pieces[:12]))
    yield beginnings
    teacher.fitted.cache_clear()


@pytest.fixture
def start(tiny, vocabulary, few, name, monkeypatch):
    """Return a function that starts training a tiny model with the proxies' tokenizer on a few texts."""
    monkeypatch.setattr(corpus, "documents", few.get)

    def begin(**changed) -> loop.TrainingRun:
        model = tiny(name)
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        vision = getattr(model.config, "vision_config", None)
        image_processor = proxy_model.make_image_processor(vision.to_dict()) if vision else None
        proxy = proxy_model.ProxyModel(model, vocabulary, image_processor, parameters.read(name))
        about = {"steps": 12, "text_tokens": 256, "prompts": 2, "warmup_steps": 1, "copy_until": 0.15}
        config = TrainingConfig(**about | {"row_lengths": ((0.5, 128), (1.0, 256))} | changed)
        return loop.TrainingRun(model, TrainingBatches(proxy, config), config, "tiny")

    return begin


@pytest.mark.parametrize("changed", [{}, VARIED], ids=["first", "second"])
def test_training_reduces_the_loss_and_resumes_bit_for_bit(start, tmp_path, changed):
    whole = start(**changed)
    seen = [whole.advance() for _ in range(6)]
    if not changed:
        assert "text" not in seen[0] and seen[5]["text"] < seen[2]["text"]
    first = start(**changed)
    for _ in range(4):
        first.advance()
    first.save(tmp_path / "state.pt")
    second = start(**changed)
    assert second.resume(tmp_path / "state.pt") and second.step == 4
    for _ in range(2):
        second.advance()
    for expected, actual in (
        (whole.model.state_dict(), second.model.state_dict()),
        (whole.average, second.average),
    ):
        for key in expected:
            assert torch.equal(expected[key], actual[key]), key
    assert (second.tokens, second.step) == (whole.tokens, whole.step)


def test_a_state_of_another_config_is_not_resumed(start, tmp_path):
    run = start()
    run.save(tmp_path / "state.pt")
    other = start()
    other.identity = "another"
    assert not other.resume(tmp_path / "state.pt") and not other.resume(tmp_path / "none.pt")


def test_batches_repeat_spans_and_mark_the_learned_tokens(start):
    batches = start().batches
    (only,) = batches.at(1)
    assert only.spans_B is not None and (only.kind_BT == REPEAT).sum() > 100
    for step, length in ((4, 128), (10, 256)):
        rows, *copies, answered = batches.at(step)
        assert rows.inputs["input_ids"].shape[1] == length and bool(copies) == (step < 6)
        for row in [rows, *copies]:
            ids_T, kind_T = row.inputs["input_ids"][0], row.kind_BT[0]
            repeated = (kind_T == REPEAT).nonzero().flatten().tolist()
            assert repeated
            for at in repeated:
                assert (ids_T[: at - 1].unfold(0, 2, 1) == ids_T[at - 1 : at + 1]).all(1).any()
        assert (answered.kind_BT == ANSWER).sum() == 2
        assert (answered.kind_BT[~answered.real_BT] == IGNORED).all()


def test_batches_of_a_step_do_not_depend_on_other_steps(start):
    batches = start().batches
    expected = batches.at(7)
    batches.at(8)
    for before, after in zip(expected, batches.at(7)):
        assert all(torch.equal(before.inputs[key], after.inputs[key]) for key in before.inputs)


def test_varied_questions_are_answered_by_labels_and_the_teacher(start, name):
    run = start(**VARIED | {"row_lengths": ((0.0, 128), (1.0, 256))})
    batches = run.batches
    if "digits" in batches.loaded.parameters.tasks:
        return
    assert len(batches.at(0)) == 3 and len(batches.at(1)) == 2  # running text only in every second step
    halves = [half for step in range(8) for half in batches.at(step)[-2:]]
    assert all(half.weight == pytest.approx(0.5) for half in halves)
    answers_BL = torch.cat([half.answers_BL for half in halves])
    assert torch.allclose(answers_BL.sum(1), torch.ones(len(answers_BL)), atol=1e-5) and (answers_BL >= 0).all()
    assert (answers_BL.max(1).values > 0.5).any() and (answers_BL.max(1).values < 0.5).any()
    for half in halves:
        ids_BT, kind_BT = half.inputs["input_ids"], half.kind_BT
        assert ((kind_BT == ANSWER).sum(1) == 1).all()
        assert torch.equal(ids_BT[kind_BT == ANSWER], half.labels_L[half.answers_BL.argmax(1)])
    loss = loop.losses(run.model, halves[0], run.balance)[ANSWER]
    logits_BTC = run.model(input_ids=halves[0].inputs["input_ids"]).logits
    at_B = (halves[0].kind_BT == ANSWER).int().argmax(1)
    log_BC = logits_BTC[torch.arange(len(at_B)), at_B - 1].float().log_softmax(-1)
    expected = -(halves[0].answers_BL * log_BC[:, halves[0].labels_L]).sum(1).mean()
    run.finish()
    torch.testing.assert_close(loss, expected)


def test_replaced_tokens_are_not_learned_and_spare_the_frame(start, name):
    batches = start(**VARIED | {"replaced_share": 1.0}).batches
    if "digits" in batches.loaded.parameters.tasks:
        return
    random, task = np.random.default_rng(0), prompts.task_of(batches.loaded)
    varied = prompts.varied(
        random, batches.loaded, batches.pieces, batches.unlabelled, batches.stream_T, batches.config
    )
    text = batches.loaded.tokenizer.decode
    assert any(wrong.any() for wrong in varied.corrupted) and not all(wrong.any() for wrong in varied.corrupted)
    for row in varied.rows:
        whole = text(row)
        assert whole.startswith(tasks.prompt_of(task).split("\n")[0])
        assert whole.rsplit("\n\nModule: ", 1)[1] in tasks.class_labels(task)


def test_the_teacher_knows_its_training_data(few, monkeypatch):
    monkeypatch.setattr(corpus, "documents", few.get)
    labels = corpus.classes("docs")
    known = [(piece, d.label) for d in few["docs"] if d.label for piece in d.pieces if len(piece) > 200]
    shares_NL = teacher.probabilities("docs", [text for text, _ in known])
    assert shares_NL.shape == (len(known), len(labels)) and np.allclose(shares_NL.sum(1), 1)
    right = sum(labels[choice] == label for choice, (_, label) in zip(shares_NL.argmax(1), known))
    assert right >= 0.95 * len(known) > 20


def test_dropped_parts_are_restored_after_training(start):
    run = start(dropout=0.5)
    ids_BT = torch.arange(40)[None] + 20
    run.model.eval()
    expected = run.model(input_ids=ids_BT).logits
    run.model.train()
    assert not torch.allclose(run.model(input_ids=ids_BT).logits, expected, atol=1e-3)
    run.finish()
    run.model.train()
    torch.testing.assert_close(run.model(input_ids=ids_BT).logits, expected)


def test_averaged_weights_lie_between_and_are_kept(start):
    run = start(average_decay=0.9, copy_until=0.0)
    key = "model.norm.weight" if "model.norm.weight" in run.model.state_dict() else "model.language_model.norm.weight"
    weights = [run.model.state_dict()[key].clone()]
    expected = weights[0]
    for step in range(1, 4):
        run.advance()
        keep = min(0.9, step / (step + 9))
        expected = keep * expected + (1 - keep) * run.model.state_dict()[key]
    torch.testing.assert_close(run.average[key], expected)
    run.finish()
    torch.testing.assert_close(run.model.state_dict()[key], expected)


def test_monitoring_does_not_change_training(start, monkeypatch):
    run = start(average_decay=0.9, copy_until=0.0)
    few = tasks.items
    monkeypatch.setattr(tasks, "items", lambda task, split, limit=None, seed=0: few(task, split, 12, seed))
    run.advance()
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    scores = train.search_scores(run)
    assert any(key.endswith("_cross_entropy") for key in scores)
    assert all(torch.equal(value, before[key]) for key, value in run.model.state_dict().items())
    run.advance()


def test_a_second_phase_starts_from_the_rounded_first(tiny, monkeypatch, tmp_path):
    name = "qwen3-4b-instruct-2507"
    monkeypatch.setattr(train, "CACHE", tmp_path)
    config = TrainingConfig(steps=4, refine={"steps": 2, "joined_share": 0.5})
    monkeypatch.setattr(train, "training_config", lambda name: config)
    monkeypatch.setattr(train, "TrainingBatches", lambda proxy, config: None)
    models = [tiny(name), tiny(name, seed=4)]
    monkeypatch.setattr(
        train, "untrained_proxy", lambda name: proxy_model.ProxyModel(tiny(name, seed=9), None, None, None)
    )
    first, second = (train.second_phase(name, model, [{"steps": 4}]) for model in models)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, models[0].state_dict()[key].bfloat16().float()), key
    assert first.identity != second.identity and first.config.steps == 2 and first.config.joined_share == 0.5
    assert first.config.refine is None and first.earlier_phases == [{"steps": 4}]
    config = TrainingConfig(steps=4)
    with pytest.raises(UserError, match="no second phase"):
        train.second_phase(name, models[0], [])


def test_a_refined_proxy_model_is_not_refined_again(tmp_path):
    (tmp_path / "training.json").write_text("[{}, {}]", encoding="utf-8")
    with pytest.raises(UserError, match="already refined"):
        train.train("glm-4.7-flash", tmp_path, only_refine=True)
    (tmp_path / "training.json").write_text("[{", encoding="utf-8")
    with pytest.raises(UserError, match="missing or damaged"):
        train.train("glm-4.7-flash", tmp_path, only_refine=True)


def test_a_stack_of_experts_is_updated_like_its_matrices():
    random = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(3, 24, 40, generator=random), torch.randn(2, 3, 24, 40, generator=random)
    stack = torch.nn.Parameter(start.clone())
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    both = [MatrixMuon(weights, lr=0.1, weight_decay=0.3) for weights in ([stack], matrices)]
    for gradient in gradients:
        stack.grad = gradient.clone()
        for matrix, part in zip(matrices, gradient):
            matrix.grad = part.clone()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        assert stack.grad is None
    assert torch.equal(stack, torch.stack([matrix.detach() for matrix in matrices]))


def test_the_correction_bias_rises_for_an_unused_expert(tiny):
    balance = RouterBalance(anatomy(tiny("glm-4.7-flash")))
    bias_E = next(iter(balance.experts.values())).correction_bias
    before = bias_E.clone()
    balance.counts = {index: torch.tensor([0.0, *[8.0] * 7]) for index in balance.experts}
    balance.adjust(0.1)
    assert bias_E[0] > before[0] and (bias_E[1:] < before[1:]).all()


def test_a_published_model_is_retrained_from_scratch_or_extended(start, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CACHE", tmp_path)
    steps, done, runs = [2], [], []

    def advance(run):
        run.step += 1
        done.append(run.step)
        return {}

    monkeypatch.setattr(loop.TrainingRun, "advance", advance)
    monkeypatch.setattr(train, "first_phase", lambda name: train.resumed(name, start(steps=steps[-1]), "first"))
    monkeypatch.setattr(train, "publish", lambda name, run, folder: runs.append(run))
    for _ in range(2):
        assert train.train("any", tmp_path / "made") == tmp_path / "made"
    assert done == [1, 2, 1, 2] and runs[-1].plans == [2]
    steps.append(3)
    train.train("any", tmp_path / "made")
    assert done == [1, 2, 1, 2, 3] and runs[-1].plans == [2, 3]
    runs[-1].step = 1
    runs[-1].save(train.state_file("any"))  # interrupted: it resumes there
    train.train("any", tmp_path / "made")
    assert done == [1, 2, 1, 2, 3, 2, 3]


def test_publish_writes_a_complete_checkpoint(start, name, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "scores", lambda loaded: {"retrieval_256": 0.5})
    run = start()
    folder = tmp_path / "proxies" / name
    for _ in range(2):  # the second replaces the first
        assert train.publish(name, run, folder) == folder
    assert [path.name for path in folder.parent.iterdir()] == [name]
    assert [phase["steps"] for phase in json.loads((folder / "training.json").read_text(encoding="utf-8"))] == [0]
    assert "| retrieval_256 | 0.500 |" in (folder / "README.md").read_text(encoding="utf-8")
    model = io.load_folder(folder, dtype=torch.float32)
    assert model.config.to_dict().get("dtype") in ("bfloat16", "float32", torch.bfloat16, torch.float32)
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "preprocessor_config.json").is_file() == hasattr(model.config, "vision_config")


def test_a_model_starts_from_the_decoder_of_another(tiny, tmp_path):
    source, target = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-coder-30b", seed=4)
    source.save_pretrained(tmp_path / "source")
    assert "layers.0.self_attn.q_proj.weight" in copy_weights(target, tmp_path / "source")
    assert torch.equal(source.model.layers[2].self_attn.o_proj.weight, target.model.layers[2].self_attn.o_proj.weight)
    dense, experts = source.model.layers[1].mlp, anatomy(target).blocks[1].feed_forward.experts
    assert torch.equal(experts.gate_up[1, :32], dense.gate_proj.weight[8:40])
    assert torch.equal(experts.down[1], dense.down_proj.weight[:, 8:40] * 2)
    picture = tiny("qwen3-vl-2b", seed=4)
    copy_weights(picture, tmp_path / "source")
    assert torch.equal(picture.lm_head.weight, source.lm_head.weight)
    with pytest.raises(UserError, match="no checkpoint to start from"):
        copy_weights(target, tmp_path / "none")


def test_proxy_models_that_others_start_from_come_first():
    order = train.in_order(parameters.names_at("proxy"))
    assert sorted(order) == parameters.names_at("proxy")
    for name in order:
        source = train.training_config(name).start_from
        assert not source or order.index(source) < order.index(name)


def test_an_unknown_config_key_is_named(monkeypatch):
    described = parameters.read("glm-4.7-flash")
    wrong = described.model_copy(update={"proxy": described.proxy.model_copy(update={"training": {"stepz": 3}})})
    monkeypatch.setattr(train.parameters, "read", lambda name: wrong)
    with pytest.raises(UserError, match=r"glm-4.7-flash.yaml: section proxy.training: .*stepz"):
        train.training_config("glm-4.7-flash")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"refine": {"steps": 2, "muonrate": 0.008}}, r'refine: unknown key "muonrate".*Did you mean "muon_rate"'),
        ({"refine": {"steps": 2, "muon_rate": "8.0e-3"}}, r'training\.refine: key "muon_rate": expected a number, got'),
        ({"refine": {"refine": {"steps": 1}}}, 'unknown key "refine"'),
        ({"refine": 3}, 'key "refine": expected a section of keys, got 3'),
        ({"steps": 900.0}, 'key "steps": expected a whole number of at least 1, got 900.0'),
        ({"warm_up": 0}, 'key "warmup_steps": expected a whole number of at least 1, got 0'),
        ({"row_lengths": [256, 2048]}, "expected a list of pairs: a share of the steps"),
        ({"steps": ...}, 'missing key "steps"'),
    ],
)
def test_both_phases_of_a_config_are_checked_before_the_first(changes, says, monkeypatch):
    """A bad key of the second phase was found only after all steps of the first."""
    described = parameters.read("glm-4.7-flash")
    section = {key: value for key, value in (described.proxy.training | changes).items() if value is not ...}
    wrong = described.model_copy(update={"proxy": described.proxy.model_copy(update={"training": section})})
    monkeypatch.setattr(train.parameters, "read", lambda name: wrong)
    with pytest.raises(UserError, match=r"^parameters/glm-4.7-flash.yaml: section proxy\.training") as caught:
        train.training_config("glm-4.7-flash")
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value)


@pytest.fixture
def stored(name):
    """A proxy model as stored in the repository, with the scores that its README states."""
    folder = parameters.PARAMETERS / "proxies" / name
    rows = re.findall(r"^\| (\w+) \| ([\d.,]+) \|$", (folder / "README.md").read_text(encoding="utf-8"), re.M)
    return loading.load(name), {key: float(value.replace(",", "")) for key, value in rows}


def test_stored_proxy_model_reaches_its_stated_scores_on_a_sample(stored):
    loaded, stated = stored
    torch.set_num_threads(1)
    task = loaded.parameters.tasks[0]
    items = tasks.items(task, "final", 96)
    names = tasks.class_labels(task)
    chosen = [names[choice] for choice in tasks.label_scores(loaded, task, items).argmax(1).tolist()]
    right = sum(choice == item.label for choice, item in zip(chosen, items)) / len(items)
    assert right >= stated[f"{task}_f1_macro"] - 0.08
    assert evaluation.retrieval_accuracy(loaded, 256, 48) >= stated["retrieval_256"] - 0.2


def test_stored_proxy_model_generates_the_values_that_it_predicts(stored):
    loaded, _ = stored
    ids_BT, target_BV = tasks.retrieval_prompts(loaded, 64, 8, seed=3)
    generated_BT = loaded.model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=tasks.VALUE, do_sample=False
    )
    right = int((generated_BT[:, -tasks.VALUE :] == target_BV).all(1).sum())
    assert abs(right / 8 - evaluation.retrieval_accuracy(loaded, 64, 8, seed=3)) <= 0.125
    assert right >= 6


def test_stored_proxy_model_meets_its_targets_and_size(stored, name):
    loaded, stated = stored
    task = loaded.parameters.tasks[0]
    targets = {
        f"{task}_f1_macro": 0.97 if task == "digits" else 0.90,
        "retrieval_256": 0.90,
        "least_expert_share": 0.25,
    }
    assert not {score: stated[score] for score, least in targets.items() if stated.get(score, least) < least}
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) <= 5_000_000
    assert sum(path.stat().st_size for path in loaded.folder.glob("*.safetensors")) <= 10_000_000


def test_stored_readme_matches_the_command_output(name):
    folder = parameters.PARAMETERS / "proxies" / name
    text = (folder / "README.md").read_text(encoding="utf-8")
    structure = re.search(r"^Class `\w+`, [\d,]+ parameters, bfloat16\.", text, re.M)[0]
    rows = re.findall(r"^\| (\w+) \| ([\d.,]+) \|$", text, re.M)
    scores = {key: float(value) if "." in value else int(value.replace(",", "")) for key, value in rows}
    assert page(name, structure, read_history(folder), scores) == text


def test_legacy_keys_of_a_training_config_are_read(name):
    former = {present: key for key, present in RENAMED.items()}

    def older(section):
        return {former.get(key, key): older(value) if key == "refine" else value for key, value in section.items()}

    section = parameters.read(name).proxy.training
    configs = [TrainingConfig(**present_keys(keys)) for keys in (section, older(section))]
    phases = [config.second_phase() for config in configs]
    assert phases[0] == phases[1] and replace(configs[0], refine=None) == replace(configs[1], refine=None)

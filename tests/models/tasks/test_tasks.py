"""Prompts become the right tensors: last tokens, pictures, multi-token labels, keys and values."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lib.errors import UserError
from lib.models import parameters
from lib.models.decoding import continuations
from lib.models.proxies import proxy_model, tokenizer
from lib.models.tasks import corpus, prompting, retrieval, tasks

VOCABULARY = 2048


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(VOCABULARY)


@pytest.fixture
def loaded(tiny, vocabulary, name):
    """Return a tiny random model of each architecture with the tokenizer of the proxy models."""
    described = parameters.read(name)
    model = tiny(name)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    vision = getattr(model.config, "vision_config", None)
    image_processor = proxy_model.make_image_processor(vision.to_dict()) if vision else None
    return SimpleNamespace(
        model=model.requires_grad_(False).eval(),
        tokenizer=vocabulary,
        image_processor=image_processor,
        parameters=described,
        device="cpu",
        scale="proxy",
        name=name,
    )


def test_tokenizer_has_one_token_per_label_and_fixed_special_ids(vocabulary):
    assert len(vocabulary) == VOCABULARY
    assert vocabulary.convert_tokens_to_ids(list(tokenizer.SPECIAL)) == list(range(7))
    for task in tasks.CLASSIFY:
        ids = tasks.label_ids(SimpleNamespace(tokenizer=vocabulary), task)
        assert all(len(label) == 1 for label in ids) and len({label[0] for label in ids}) == len(ids)
    text = "def f(x):\n    return “x” * 2  # é\n"
    assert vocabulary.decode(vocabulary(text).input_ids) == text


@pytest.mark.parametrize("task", tasks.CLASSIFY)
def test_splits_are_disjoint_and_items_reproducible(task):
    by_split = {split: tasks.items(task, split) for split in corpus.SPLITS}
    ids = [item.id for split in by_split.values() for item in split]
    assert len(set(ids)) == len(ids) and len(by_split["final"]) >= 700
    assert {item.label for item in by_split["final"]} == set(tasks.class_labels(task))
    again = tasks.items(task, "final", 20)
    assert [item.id for item in again] == [item.id for item in by_split["final"][:20]]
    if task == "digits":
        indices = [set(tasks.digit_indices(split)) for split in (*corpus.SPLITS, "train")]
        assert sum(map(len, indices)) == len(set.union(*indices)) == 1797
        assert again[0].pixels.shape == (tasks.PICTURE, tasks.PICTURE) and again[0].pixels.dtype == np.uint8


def test_unknown_splits_and_tasks_are_named():
    with pytest.raises(UserError, match=r'unknown split "finale".*Did you mean "final"'):
        tasks.items("topic", "finale")
    with pytest.raises(UserError, match="unknown classification task"):
        tasks.items("retrieval", "final")


def test_prompts_longer_than_the_held_out_text_are_refused(loaded):
    says = r"the split final holds [\d,]+ tokens of this model; a prompt of 9,000,0\d\d does not fit into it"
    with pytest.raises(UserError, match=says):
        tasks.text_windows(loaded, "final", 1, 9_000_000)
    with pytest.raises(UserError, match=says):
        tasks.retrieval_prompts(loaded, 9_000_000, 2)


def test_last_index_points_at_the_end_of_each_prompt(loaded):
    task = loaded.parameters.tasks[0]
    chosen = tasks.items(task, "search", 5)
    (inputs, last_B) = next(tasks.batches(loaded, chosen, 8))
    for row, item in enumerate(chosen):
        prompt = loaded.tokenizer(item.prompt).input_ids
        end = int(last_B[row]) + 1
        assert inputs["input_ids"][row, end - len(prompt) : end].tolist() == prompt
        assert (inputs["input_ids"][row, end:] == loaded.tokenizer.pad_token_id).all()
    if item.pixels is not None:
        pictures = int((inputs["input_ids"] == loaded.model.config.image_token_id).sum())
        assert pictures == int(inputs["image_grid_thw"].prod(1).sum()) // 4
    assert sum(len(last) for _, last in tasks.batches(loaded, chosen, 2)) == 5


def test_scores_do_not_depend_on_the_batch(loaded):
    task = loaded.parameters.tasks[0]
    chosen = tasks.items(task, "search", 4)
    together, alone = tasks.label_scores(loaded, task, chosen, 4), tasks.label_scores(loaded, task, chosen, 1)
    assert together.shape == (4, len(tasks.class_labels(task)))
    assert torch.allclose(together, alone, atol=1e-4)


def test_multi_token_labels_are_scored_as_continuations(loaded, monkeypatch):
    task = loaded.parameters.tasks[0]
    chosen = tasks.items(task, "search", 3)
    expected = tasks.label_scores(loaded, task, chosen)
    single = tasks.label_ids(loaded, task)
    monkeypatch.setattr(tasks, "label_ids", lambda *_: [[*single[0], 300, 301], *single[1:]])
    scores = tasks.label_scores(loaded, task, chosen)
    assert torch.allclose(scores[:, 1:], expected[:, 1:], atol=1e-4)
    assert (scores[:, 0] < expected[:, 0]).all()


@pytest.mark.parametrize("name", ["glm-4.7-flash", "qwen3-4b-instruct-2507"])
def test_prompts_longer_than_the_context_lose_their_beginning(loaded, monkeypatch):
    """Previously, where every label is one token, the prompt was read and scored beyond the model's positions."""
    loaded.scale = "full"
    monkeypatch.setattr(continuations, "positions", lambda model: 64)
    task = loaded.parameters.tasks[0]
    chosen, labels = tasks.items(task, "search", 3), tasks.label_ids(loaded, task)
    contexts = [prompting.prompt_ids(loaded, prompting.shown(loaded, item)) for item in chosen]
    assert min(map(len, contexts)) > 64 and {len(label) for label in labels} == {1}
    answers = [continuations.loglikelihoods(loaded.model, [(ids, label) for label in labels]) for ids in contexts]
    expected = torch.tensor([[score for score, _ in row] for row in answers])
    assert torch.allclose(tasks.label_scores(loaded, task, chosen), expected, atol=1e-4)


def test_recall_prompts_contain_key_value_and_distance(loaded):
    ids_BT, target_BV = tasks.retrieval_prompts(loaded, 100, 3, seed=5)
    assert target_BV.shape == (3, tasks.VALUE) and ids_BT.shape[1] == 8 + 2 * tasks.KEY + tasks.VALUE + 100
    key_BK = ids_BT[:, -tasks.KEY :]
    assert torch.equal(ids_BT[:, 8 : 8 + tasks.KEY], key_BK)
    assert torch.equal(ids_BT[:, 8 + tasks.KEY :][:, : tasks.VALUE], target_BV)
    again = tasks.retrieval_prompts(loaded, 100, 3, seed=5)
    assert torch.equal(ids_BT, again[0]) and not torch.equal(ids_BT, tasks.retrieval_prompts(loaded, 100, 3, seed=6)[0])
    assert int(torch.cat([key_BK, target_BV], 1).min()) > 6


def test_text_around_a_value_comes_from_its_own_split(loaded):
    """Choosing a candidate must not use the text that judges it."""
    known = {split: _runs(tasks.text_windows(loaded, split, 1000, 64), 32) for split in ("search", "final")}
    for split, other in (("search", "final"), ("final", "search")):
        ids_BT, _ = tasks.retrieval_prompts(loaded, 100, 4, seed=5, split=split)
        text_BT = ids_BT[:, 8 + tasks.KEY + tasks.VALUE : -tasks.KEY]
        assert _runs(text_BT, 32) & known[split] and not _runs(text_BT, 32) & known[other]
        sources = tasks.filler_sources(loaded, 100, 4, seed=5, split=split)
        assert sources.max() < len(corpus.running_text(tasks.corpus_of(loaded), split))


def _runs(ids_NT: torch.Tensor, length: int) -> set[tuple[int, ...]]:
    """Return every run of the given number of consecutive tokens in a row."""
    return {tuple(run) for row in ids_NT.tolist() for run in zip(*(row[at:] for at in range(length)))}


def test_windows_are_disjoint_and_splits_differ(loaded):
    final = tasks.text_windows(loaded, "final", 1000, 64)
    assert final.shape[1] == 64 and len({tuple(row) for row in final.tolist()}) == len(final)
    assert torch.equal(final[:5], tasks.text_windows(loaded, "final", 5, 64))
    calibration = {tuple(row) for row in tasks.text_windows(loaded, "calibration", 1000, 64).tolist()}
    assert not calibration & {tuple(row) for row in final.tolist()}


def test_few_windows_and_fillers_use_different_documents_without_overlap(monkeypatch):
    """Planted: nine documents of 40 tokens after one that is as long as all of them."""
    ids_T, source_T = torch.arange(720), torch.tensor([0] * 360 + [n for n in range(1, 10) for _ in range(40)])
    monkeypatch.setattr(retrieval, "_stream", lambda *_: (ids_T, source_T))
    monkeypatch.setattr(retrieval, "random_ids", lambda _, shape, random: torch.zeros(shape, dtype=torch.long))
    monkeypatch.setattr(retrieval.tokenizing, "prefix", lambda _: ())
    model = SimpleNamespace(tokenizer=object(), parameters=SimpleNamespace(tasks=[]), device="cpu")
    for seed in range(8):
        windows_NT = retrieval.text_windows(model, "final", 10, 36, seed)
        assert sorted(retrieval.window_sources(model, "final", 10, 36, seed).tolist()) == list(range(10))
        assert source_T[windows_NT[:, 0]].tolist() == retrieval.window_sources(model, "final", 10, 36, seed).tolist()
        assert torch.equal(retrieval.text_windows(model, "final", 4, 36, seed), windows_NT[:4])
        sources = retrieval.filler_sources(model, 36 - retrieval.LEAD, 10, seed)
        assert sorted(sources.tolist()) == list(range(10))
        ids_BT, _ = retrieval.retrieval_prompts(model, 100 - retrieval.LEAD, 9, seed)
        first_B = ids_BT[:, 0].tolist()
        assert source_T[first_B].tolist() == retrieval.filler_sources(model, 100 - retrieval.LEAD, 9, seed).tolist()
        assert all(one == other or abs(one - other) >= 100 for one in first_B for other in first_B)
        assert len(set(first_B)) == 7, "all that it holds, before one is repeated"


def test_calibration_runs_at_the_requested_size(loaded):
    batches = tasks.calibration(loaded, 6, 128)
    text = [inputs["input_ids"] for inputs in batches if "pixel_values" not in inputs]
    assert sum(len(ids) for ids in text) == 6 and all(ids.shape[1] == 128 for ids in text)
    assert any("pixel_values" in inputs for inputs in batches) == (loaded.image_processor is not None)
    for inputs in batches:
        assert loaded.model(**inputs, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("name", ["qwen3-4b-instruct-2507"])
def test_questions_fill_up_text_shorter_than_a_window(loaded, monkeypatch):
    short = torch.arange(8, 48), torch.zeros(40, dtype=torch.long)
    monkeypatch.setattr(retrieval, "_stream", lambda *_: short)
    batches = tasks.calibration(loaded, 6, 128)
    assert sum(len(inputs["input_ids"]) for inputs in batches) == 6
    assert all(inputs["input_ids"].shape[1] == 128 for inputs in batches)
    assert len(torch.cat([inputs["input_ids"] for inputs in batches]).unique()) > 40


def test_random_weights_get_random_tokens(loaded):
    loaded.tokenizer = None
    assert tasks.text_windows(loaded, "final", 3, 16).shape == (3, 16)
    assert tasks.retrieval_prompts(loaded, 32, 2, 0)[1].shape == (2, tasks.VALUE)


def test_keys_are_other_tokens_where_letters_are_not_single_tokens():
    """Planted: every letter takes two tokens, as with a tokenizer that adds its own word-start marker."""

    class Words:
        all_special_ids = (7, 60)

        def __call__(self, text, add_special_tokens=True):
            return SimpleNamespace(input_ids=[1, ord(text) % 50])

        def __len__(self):
            return 90

    model = SimpleNamespace(config=SimpleNamespace(vocab_size=96))
    ids = retrieval.random_ids(
        SimpleNamespace(model=model, tokenizer=Words()), (400,), torch.Generator().manual_seed(0)
    )
    assert ids.shape == (400,) and ids.min() >= 15 and ids.max() < 90 and 60 not in ids


@pytest.mark.parametrize("chat", [False, True])
def test_labels_are_the_tokens_that_follow_a_prompt(chat):
    """Previously a tokenizer that marks the beginning of a text gave labels with a space that the prompt lacks."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    texts = [tasks.prompt_of("topic", "text"), *tasks.class_labels("topic"), "<|assistant|>\n"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    marked = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    if chat:
        marked.chat_template = (
            "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>{% endfor %}<|assistant|>\n"
        )
    loaded = SimpleNamespace(tokenizer=marked)
    prompt = prompting.text(loaded, [tasks.Item("", "topic", tasks.prompt_of("topic", "text"), "")])
    before = marked(prompt, add_special_tokens=False).input_ids
    for label, ids in zip(tasks.class_labels("topic"), tasks.label_ids(loaded, "topic")):
        whole = marked(prompt + prompting.answer(loaded, label), add_special_tokens=False).input_ids
        assert before + ids == whole

"""Tasks of lm-evaluation-harness: every item scores as in the harness run by itself, with or without shared prefixes.

Skipped if the harness is not installed; `.ci/run` installs it.
"""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.errors import UserError
from lib.measure.quality import answer_comparison, benchmarks, evaluate, lm_eval
from lib.measure.quality.answers import Classified, Rolled
from lib.models.loading import Loaded
from lib.models.parameters import read as read_parameters
from lib.models.proxies import tokenizer as tokenizers
from lib.models.tasks import harness_names

NAME = "qwen3-4b-instruct-2507"
WORDS = ["one", "two", "three", "four or five"]


@pytest.fixture
def harness():
    if os.environ.get("WORKBENCH_HARNESS") != "required":
        pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizers.train(2048)


@pytest.fixture
def loaded(tiny, vocabulary):
    model = tiny(NAME)
    model.resize_token_embeddings(2048, mean_resizing=False)
    model.requires_grad_(False)
    fields = {"model": model, "tokenizer": vocabulary, "image_processor": None, "parameters": read_parameters(NAME)}
    place = {"name": NAME, "scale": "proxy", "device": "cpu", "dtype": torch.float32, "folder": None}
    return Loaded(**fields, **place, random_weights=False, seconds=0.0)


def task(folder, name: str, lines: list[dict], **fields) -> str:
    """Write a harness task and its items; return the task's name in the workbench."""
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    described = {"task": name, **data, "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:"} | fields
    (folder / f"{name}.yaml").write_text(json.dumps(described))
    return f"lm_eval:{folder / f'{name}.yaml'}"


def sums(count: int = 20) -> list[dict]:
    return [
        {"question": f"What is {n} plus one", "choices": WORDS[: 3 + n // 2 % 2], "answer": n % 3, "word": WORDS[n % 3]}
        for n in range(count)
    ]


def choices(folder, **fields) -> str:
    options = {"doc_to_target": "answer", "doc_to_choice": "{{choices}}", "output_type": "multiple_choice"}
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return task(folder, "sums", sums(), **options, metric_list=metrics, **fields)


def by_itself(loaded: Loaded, name: str) -> dict[int, dict]:
    """Return what the harness logs for every item when run directly with its own wrapper."""
    import lm_eval as package

    members, manager = lm_eval._tasks(name)
    model = lm_eval.wrapped(loaded, shared=False)
    options = {"log_samples": True, "bootstrap_iters": 0, "task_manager": manager}
    results = package.simple_evaluate(model=model, tasks=[*members.values()], **options)
    return {sample["doc_id"]: sample for samples in results["samples"].values() for sample in samples}


def items(answers: Classified | Rolled) -> list[int]:
    return [int(identity.rsplit("-", 1)[1]) for identity in answers.ids]


@pytest.mark.parametrize("shots", [0, 3])
def test_choices_match_the_harness_item_by_item(harness, loaded, tmp_path, shots):
    examples = (
        {"num_fewshot": shots, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}} if shots else {}
    )
    name = choices(tmp_path, **examples)
    answers, direct = evaluate.ask(loaded, name, "final", 99), by_itself(loaded, name)
    assert isinstance(answers, Classified) and len(answers.ids) == 14
    for row, doc in enumerate(items(answers)):
        expected = [score for score, _ in direct[doc]["filtered_resps"]]
        assert answers.scores_NL[row, : len(expected)] == pytest.approx(expected, abs=1e-4)
        assert (answers.scores_NL[row, len(expected) :] < -1e8).all()
        assert answers.right_N[row] == direct[doc]["acc_norm"] and answers.others["accuracy"][row] == direct[doc]["acc"]
    assert answers.metric == "accuracy_norm" and 0.25 < answers.chance < 0.34
    same = {m.metric: m for m in answer_comparison.compare_classified(answers, answers)}
    assert same["flips"].optimized == 0 and same["accuracy_norm"].workload == name
    other = evaluate.ask(loaded, name, "search", 5)
    assert not set(other.ids) & set(answers.ids)


def test_continuations_generated_answers_and_documents_match_the_harness(harness, loaded, tmp_path):
    word = task(
        tmp_path,
        "word",
        sums(),
        output_type="loglikelihood",
        doc_to_target=" {{word}}",
        metric_list=[{"metric": "acc"}],
    )
    folder = tmp_path / "generated"
    folder.mkdir()
    until = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    exact = {"output_type": "generate_until", "doc_to_target": "{{word}}", "generation_kwargs": until}
    generated = task(folder, "generated", sums(8), **exact, metric_list=[{"metric": "exact_match"}])
    folder = tmp_path / "rolled"
    folder.mkdir()
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    rolled = task(folder, "rolled", sums(12), **rolling, metric_list=[{"metric": "word_perplexity"}])
    answers, direct = evaluate.ask(loaded, word, "final", 99), by_itself(loaded, word)
    for row, doc in enumerate(items(answers)):
        assert answers.scores_NL[row, 0] == pytest.approx(direct[doc]["filtered_resps"][0][0], abs=1e-4)
        assert answers.right_N[row] == direct[doc]["acc"]
    answers, direct = evaluate.ask(loaded, generated, "final", 99), by_itself(loaded, generated)
    assert answers.metric == "exact_match" and answers.right_N.tolist() == [
        direct[d]["exact_match"] for d in items(answers)
    ]
    documents, direct = evaluate.ask(loaded, rolled, "final", 99), by_itself(loaded, rolled)
    assert isinstance(documents, Rolled) and documents.unit == "word"
    sums_of = np.array([direct[doc]["word_perplexity"] for doc in items(documents)])
    assert documents.loss_N.mean() == pytest.approx(-sums_of[:, 0].sum() / sums_of[:, 1].sum(), rel=1e-5)
    with pytest.raises(UserError, match="no items that are right or wrong"):
        evaluate.classify(loaded, rolled, "final", 99)


def test_a_prompt_is_read_once_where_the_harness_reads_it_per_choice(harness, loaded, tmp_path):
    name = choices(tmp_path)
    read = []
    loaded.model.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    evaluate.ask(loaded, name, "final", 99)
    ours = sum(read)
    read.clear()
    by_itself(loaded, name)
    assert ours < 0.5 * sum(read) * 14 / 20  # scaled to the same number of items


def test_an_unloadable_task_gives_a_one_line_error(harness, loaded, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        evaluate.ask(loaded, "lm_eval:nowhere.yaml", "final", 5)
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: nowhere}\n")
    with pytest.raises(UserError, match="the harness cannot load this task"):
        evaluate.ask(loaded, f"lm_eval:{tmp_path / 'broken.yaml'}", "final", 5)
    assert harness_names.check("lm_eval:arc_easy") == "lm_eval:arc_easy"
    assert {"ai2_arc", "mmlu", "hellaswag"} <= harness_names.names()
    with pytest.raises(UserError, match=r'has no task "arc_eazy".*Did you mean "arc_easy"'):
        harness_names.check("lm_eval:arc_eazy")


def test_without_the_harness_the_error_says_how_to_install_it(loaded, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    harness_names.names.cache_clear()
    try:
        for ask in (
            lambda: evaluate.ask(loaded, "lm_eval:arc_easy", "final", 5),
            lambda: harness_names.check("lm_eval:x"),
        ):
            with pytest.raises(UserError, match=r"lm-evaluation-harness is not installed.*pip install"):
                ask()
        with pytest.raises(UserError, match="not installed"):
            lm_eval.wrapped(SimpleNamespace())
    finally:
        harness_names.names.cache_clear()


def test_a_task_file_can_be_named_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("task: mine")
    monkeypatch.chdir(tmp_path)
    assert harness_names.check("lm_eval:mine.yaml") == f"lm_eval:{tmp_path / 'mine.yaml'}"
    with pytest.raises(UserError, match="there is no such file"):
        harness_names.check("lm_eval:other.yaml")


def test_a_task_file_works_with_any_name_and_any_neighboring_files(harness, tmp_path):
    """Previously, with a second file in the folder or a tag, the task was looked up under the file's name, and data in
    the notebook's folder.
    """
    choices(tmp_path)
    described = json.loads((tmp_path / "sums.yaml").read_text()) | {"task": "other", "tag": "mine"}
    described["dataset_kwargs"]["data_files"]["test"] = "sums.jsonl"
    (tmp_path / "named_otherwise.yaml").write_text(json.dumps(described))
    (tmp_path / "both.yaml").write_text("group: both\ntask: [sums, other]\n")
    before = os.getcwd()
    members, _ = lm_eval._tasks(f"lm_eval:{tmp_path / 'named_otherwise.yaml'}")
    assert [*members] == ["other"] and len(members["other"].eval_docs) == 20
    members, _ = lm_eval._tasks(f"lm_eval:{tmp_path / 'both.yaml'}")
    assert {*members} == {"sums", "other"} and os.getcwd() == before


def test_code_that_writes_the_prompts_is_part_of_the_question(harness, loaded, tmp_path, monkeypatch):
    """Previously, after a change of a called function or of the examples, the baseline's cached answers were reused
    beside those of an arm that was asked the new way.
    """
    program = "def shown(doc):\n    return line(doc)\n\n\ndef line(doc):\n    return doc['question'] + ' A:'\n"
    (tmp_path / "utils.py").write_text(program)
    name = choices(tmp_path, num_fewshot=1, fewshot_split="train", fewshot_config={"sampler": "first_n"})
    path, examples = tmp_path / "sums.yaml", tmp_path / "examples.jsonl"
    described = json.loads(path.read_text())
    del described["doc_to_text"]
    described["dataset_kwargs"]["data_files"]["train"] = str(examples)
    examples.write_text("\n".join(map(json.dumps, sums(3))))
    path.write_text(json.dumps(described)[:-1] + ', "doc_to_text": !function utils.shown}')
    questions = []

    def ask(_, question, answer):
        questions.append(json.dumps(question))
        return answer(), None

    monkeypatch.setattr(lm_eval.answer_cache, "known_or", ask)
    for change in (
        lambda: None,
        lambda: None,
        lambda: (tmp_path / "utils.py").write_text(program.replace("A:", "Answer:")),
        lambda: examples.write_text("\n".join(map(json.dumps, sums(3)[::-1]))),
    ):
        change()
        evaluate.ask(loaded, name, "final", 2)
    assert questions[0] == questions[1] and len({*questions}) == 3


def test_a_file_that_is_not_a_task_is_refused_before_anything_runs(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("a: [1", "not readable as YAML (expected"),
        ("- task\n", "describes no task of lm-evaluation-harness"),
        ("name: x\n", 'expected the key "task" or "group"'),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            harness_names.check(f"lm_eval:{path}")
        assert message in str(caught.value) and "\n" not in str(caught.value)
    for text in ("task: x\ndoc_to_text: !function utils.shown\n", "group: x\ntask: [a]\n", "include: base.yaml\n"):
        path.write_text(text)
        assert harness_names.check(f"lm_eval:{path}") == f"lm_eval:{path}"


def test_choices_repeated_without_the_question_are_not_counted_as_choices():
    """Previously guessing one of three counted as one of six, so that a guessing baseline had something to lose."""
    asked = [(-3.0, False), (-1.0, True), (-2.0, False), (-9.0, False), (-8.0, False), (-7.0, False)]
    sample = {"doc_id": 0, "metrics": ["acc", "acc_mutual_info"], "acc": 1.0, "filtered_resps": asked}
    arrays = lm_eval._arrays("lm_eval:sums", {"sums": [sample, sample | {"doc_id": 1, "acc": 0.0}]})
    assert float(arrays["chance"]) == pytest.approx(1 / 3)
    assert arrays["scores_NL"].tolist() == [[-3.0, -1.0, -2.0]] * 2 and arrays["right:accuracy"].tolist() == [1.0, 0.0]
    plain = lm_eval._arrays("lm_eval:sums", {"sums": [sample | {"metrics": ["acc"]}]})
    assert float(plain["chance"]) == pytest.approx(1 / 6)


def test_always_giving_the_more_frequent_of_two_answers_counts_as_guessing():
    """In BoolQ, yes is right on three items of five. Items with choices of their own have no such answer."""
    answers = {"metrics": ["acc"], "acc": 1.0, "filtered_resps": [(-3.0, False), (-1.0, True)]}
    same = [["Is it?", " no"], ["Is it?", " yes"]]
    samples = [answers | {"doc_id": n, "target": int(n < 6), "arguments": same} for n in range(10)]
    assert float(lm_eval._arrays("lm_eval:boolq", {"boolq": samples})["chance"]) == pytest.approx(0.6)
    for sample in samples:
        sample["arguments"] = [["Which?", f" {sample['doc_id']}"], ["Which?", " none"]]
    assert float(lm_eval._arrays("lm_eval:boolq", {"boolq": samples})["chance"]) == pytest.approx(0.5)


def test_text_without_spaces_is_measured_per_byte():
    """Previously a Chinese paragraph was one word of hundreds of nats: both arms were called degenerate."""
    metrics = ["word_perplexity", "byte_perplexity", "bits_per_byte"]

    def sample(words):
        return {"metrics": metrics, "word_perplexity": (-750.0, words)} | dict.fromkeys(metrics[1:], (-750.0, 900))

    arrays = lm_eval._arrays("lm_eval:zh", {"zh": [sample(2) | {"doc_id": n} for n in range(8)]})
    assert str(arrays["unit"]) == "byte" and arrays["loss_N"].mean() == pytest.approx(750 / 900)
    rolled = Rolled("lm_eval:zh", arrays["ids_N"].tolist(), arrays["loss_N"], str(arrays["unit"]))
    assert benchmarks.compare_rolled(rolled, rolled).verdict == "maintained"
    assert str(lm_eval._arrays("lm_eval:en", {"en": [sample(150) | {"doc_id": 0}]})["unit"]) == "word"


@pytest.mark.parametrize("generated", [False, True])
def test_differently_wrong_answers_of_a_harness_task_are_not_the_same_answers(generated):
    """Previously both arms "gave the same answers" as soon as they were right on the same items."""
    right, wrong = (-3.0, False), (-1.0, True)
    first, other = (["six"], ["seven"]) if generated else ([right, wrong, right], [right, right, wrong])
    name = "exact_match" if generated else "acc"

    def arm(answer):
        samples = [
            {"doc_id": n, "metrics": [name], name: float(n % 2), "filtered_resps": first if n % 2 else answer}
            for n in range(40)
        ]
        arrays = lm_eval._arrays("lm_eval:sums", {"sums": samples})
        right_N = next(values for key, values in arrays.items() if key.startswith("right:")).astype(int)
        ids, ones = arrays["ids_N"].tolist(), np.ones_like(right_N)
        fields = {"metric": lm_eval.SCORES[name], "given_N": arrays["given_N"]}
        return Classified("lm_eval:sums", ["wrong", "right"], ids, ones, right_N, arrays["scores_NL"], **fields)

    for answer, same in ((first, True), (other, False)):
        score = answer_comparison.compare_classified(arm(first), arm(answer))[0]
        assert ("same answers" in score.source) == same and (score.ci is None) == same


def test_the_items_of_a_task_file_do_not_depend_on_its_folder(harness, loaded, tmp_path):
    """Previously a moved file put items by which a configuration had been chosen among those that judge it."""
    ids = []
    for place in ("here", "there", "elsewhere"):
        (tmp_path / place).mkdir()
        ids.append(evaluate.ask(loaded, choices(tmp_path / place), "final", 5).ids)
    assert ids[0] == ids[1] == ids[2]


def test_another_wrong_choice_per_character_is_another_answer():
    """Previously the likeliest choice alone decided, also where the likeliest per character is judged."""
    texts = [["Which?", f" {text}"] for text in ("yes", "a long second answer", "an even longer third answer")]

    def given(*likelihoods):
        sample = {"doc_id": 0, "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": 0.0, "arguments": texts}
        answers = {"filtered_resps": [(value, False) for value in likelihoods]}
        return lm_eval._arrays("lm_eval:sums", {"sums": [sample | answers]})["given_N"].tolist()

    assert given(-3.0, -4.0, -20.0) != given(-3.0, -20.0, -4.0)
    assert given(-3.0, -4.0, -20.0) == given(-3.1, -4.1, -20.0)

"""Answers after long prompts compared with greedy generation, and scores that no sparsity affected."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lib.errors import UserError
from lib.measure.metrics import measurement
from lib.measure.quality import evaluate, noninferiority
from lib.measure.timing import workloads
from lib.models import parameters
from lib.models.structure.replacements import no_op
from lib.optimizations.adaptive_sparse_attention import experiment, long_answers, method, quality_controls
from lib.optimizations.common import absorbed_baseline
from lib.report.text import brief, reading

SMALL = {"block_size": 16, "stride": 4, "page_size": 4, "full_last": 8}


def _prompts(count: int = 2, questions: int = 4, tokens: int = 96) -> long_answers.LongPrompts:
    random = torch.Generator().manual_seed(1)
    shapes = (count, tokens), (count, questions, long_answers.KEY), (count, questions, long_answers.VALUE)
    return long_answers.LongPrompts(*(torch.randint(8, 96, shape, generator=random) for shape in shapes))


@torch.inference_mode()
def test_an_answer_is_right_where_it_matches_greedy_generation(tiny, name, monkeypatch):
    """The expected values are what the model itself generates, except for one token of one of them."""
    model, prompts = tiny(name), _prompts()
    for prompt, (ids_T, key_QK) in enumerate(zip(prompts.ids_NT, prompts.key_NQK)):
        for question, key_K in enumerate(key_QK):
            work = workloads.generate(model, torch.cat([ids_T, key_K])[None], long_answers.VALUE)
            work()
            prompts.value_NQV[prompt, question] = work.output_BN[0]
    prompts.value_NQV[1, 2, 3] = (prompts.value_NQV[1, 2, 3] + 1) % 96
    arm = absorbed_baseline.absorbed_baseline(model)
    answers = long_answers.ask(arm, prompts)
    expected = np.ones((2, 4), dtype=bool)
    expected[1, 2] = False
    assert np.array_equal(answers.right_NQ, expected) and (answers.loss_NQ > 0).all()
    monkeypatch.setattr(long_answers, "_side_by_side", lambda *_: 2)
    again = long_answers.ask(arm, prompts)
    np.testing.assert_allclose(again.loss_NQ, answers.loss_NQ, atol=1e-4)
    sparse = long_answers.ask(method.apply(model, tau=1.0, pages=0, **SMALL), prompts)
    np.testing.assert_allclose(sparse.loss_NQ, answers.loss_NQ, atol=1e-4)
    assert set(long_answers.bars({"full": answers})["arm"]) == {f"{place}, full" for place in long_answers.PLACES}


@torch.inference_mode()
def test_a_block_without_attention_adds_no_layer_to_the_cache_of_a_prompt(tiny, name):
    model, prompts = no_op.remove(tiny(name), 1, "attention"), _prompts()
    full = long_answers.ask(absorbed_baseline.absorbed_baseline(model), prompts)
    sparse = long_answers.ask(method.apply(model, tau=1.0, pages=0, **SMALL), prompts)
    np.testing.assert_allclose(sparse.loss_NQ, full.loss_NQ, atol=1e-4)


@pytest.fixture
def plain_text(monkeypatch):
    """Text of zeros, which contains no keys or values."""
    filler = torch.zeros(3, 400, dtype=torch.long)
    monkeypatch.setattr(long_answers.task_list, "retrieval_prompts", lambda *_: (filler, None))
    monkeypatch.setattr(long_answers.task_list, "filler_sources", lambda *_: np.array([4, 4, 7]))
    monkeypatch.setattr(
        long_answers, "random_ids", lambda _, shape, random: torch.randint(1, 90, shape, generator=random)
    )


@pytest.mark.parametrize("tokens, fitting", [(64, 3), (100, 6), (390, 28)])
def test_a_short_prompt_holds_fewer_questions_and_overwrites_none(plain_text, tokens, fitting):
    prompts = long_answers.prompts(SimpleNamespace(device="cpu"), tokens, 3, questions=40)
    assert prompts.key_NQK.shape[:2] == prompts.value_NQV.shape[:2] == (3, fitting)
    for text_T, key_QK, value_QV in zip(prompts.ids_NT.tolist(), prompts.key_NQK.tolist(), prompts.value_NQV.tolist()):
        assert len(text_T) == tokens
        for key_K, value_V in zip(key_QK, value_QV):
            assert any(text_T[at : at + 12] == key_K + value_V for at in range(tokens))


def test_a_prompt_without_room_for_a_question_in_each_third_is_refused(plain_text):
    with pytest.raises(UserError, match="prompts of 58 tokens hold fewer than 3 keys and values"):
        long_answers.prompts(SimpleNamespace(device="cpu"), 58, 3)


def test_keys_and_values_are_in_the_prompt_without_overlap(plain_text):
    prompts = long_answers.prompts(SimpleNamespace(device="cpu"), 396, 3, questions=20)
    assert prompts.tokens == 396 and int((prompts.ids_NT[0] > 0).sum()) == 20 * (long_answers.KEY + long_answers.VALUE)
    text = prompts.ids_NT[1].tolist()
    assert prompts.first(2).source_N.tolist() == [4, 4]
    for key, value in zip(prompts.key_NQK[1].tolist(), prompts.value_NQV[1].tolist()):
        assert any(text[at : at + 12] == key + value for at in range(len(text)))


def test_answer_likelihood_is_judged_beside_exact_match():
    right = np.ones((8, 20), dtype=bool)
    base = long_answers.LongAnswers(512, right, np.full((8, 20), 0.1))
    worse = long_answers.LongAnswers(512, right, np.full((8, 20), 0.3))
    match, likelihood = long_answers.compare(base, worse, resamples=200, seed=0)
    assert match.verdict == "maintained" and match.n == 160
    assert likelihood.verdict == "not_maintained" and likelihood.workload == "answers behind a long prompt"


def test_questions_of_one_prompt_share_one_source():
    """Equally many values are lost: all from one prompt, or one from each prompt."""
    full = np.ones((6, 25), dtype=bool)
    in_one, spread = full.copy(), full.copy()
    in_one[0, :6] = spread[:, 0] = False
    answers = [long_answers.LongAnswers(512, right, np.zeros((6, 25))) for right in (full, in_one, spread)]
    one, each = (long_answers.compare(answers[0], other, resamples=2000, seed=0)[0] for other in answers[1:])
    assert one.optimized == each.optimized
    assert one.ci[1] - one.ci[0] > 1.5 * (each.ci[1] - each.ci[0])
    documents = np.array([0, 0, 1, 1, 2, 2])
    shared = long_answers.LongAnswers(512, full, np.zeros((6, 25)), documents)
    assert shared.at("middle").source_N.tolist() == np.repeat(documents, 8).tolist()
    assert shared.first(2).retrieved.source_N.tolist() == [0] * 50


@pytest.mark.parametrize("tokens, untouched", [(30, True), (90, False)])
@torch.inference_mode()
def test_something_is_left_out_only_where_prompts_are_long_enough(tiny, tokens, untouched):
    model = method.apply(tiny("qwen3-4b-instruct-2507"), tau=0.3, **SMALL)
    model(input_ids=torch.randint(8, 96, (1, tokens), generator=torch.Generator().manual_seed(1)))
    assert (method.left_out(model) == 0) == untouched


@torch.inference_mode()
@pytest.mark.parametrize("knobs, idle", [({"tau": 1.0, "pages": 0}, True), ({"tau": 0.3, "pages": 2}, False)])
def test_an_arm_that_left_nothing_out_gets_no_verdict_on_its_answers(tiny, knobs, idle):
    """Covers the judged arm and arms with another choice of pages; the arm may have left out something before."""
    model, prompts = tiny("qwen3-4b-instruct-2507"), _prompts()
    full = long_answers.ask(absorbed_baseline.absorbed_baseline(model), prompts)
    sparse = quality_controls._answers(method.apply(model, **SMALL, **knobs), prompts)
    options = {"resamples": 200, "seed": 0}
    answers = {"full": full, "sparse": sparse}
    judged = SimpleNamespace(prompts=prompts, answers=answers, degenerate=None, options=options)
    arms = quality_controls.page_controls(SimpleNamespace(model=model), SMALL | knobs, judged)
    records = quality_controls.page_records(arms, options)
    verdicts = {m.verdict for m in long_answers.compare(full, sparse, **options)}
    verdicts |= {m.verdict for record in records for m in record["measurements"]}
    assert sparse.idle == idle and ("not_exercised" in verdicts) == idle and (len(verdicts) == 1 or not idle)
    _, refuted, evidence = quality_controls.lost_in_the_middle("lost", judged)
    assert refuted is None and evidence.startswith("nothing was left out") == idle


@torch.inference_mode()
def test_pages_that_are_all_read_do_not_count_as_chosen(tiny):
    """Prompts read through the pattern but answered from every page: the choice of pages changed nothing."""
    model, prompts = tiny("qwen3-4b-instruct-2507"), _prompts()
    knobs = SMALL | {"tau": 0.3, "pages": 0}
    full, sparse = (quality_controls._answers(method.apply(model, **each), prompts) for each in (SMALL, knobs))
    judged = SimpleNamespace(options={"seed": 0}, prompts=prompts, answers={"full": full, "sparse": sparse})
    arms = quality_controls.page_controls(SimpleNamespace(model=model), knobs, judged)
    assert all(arms[f"{name} pages"].idle for name in quality_controls.PAGE_PURPOSES)
    records = quality_controls.page_records(arms, {"resamples": 200, "seed": 0})
    assert {m.verdict for record in records for m in record["measurements"]} == {"not_exercised"}


def _judged(full: np.ndarray, sparse: np.ndarray) -> SimpleNamespace:
    """Return long answers, [N, Q], whose thirds are the start, the middle and the end."""
    answers = {
        name: long_answers.LongAnswers(512, right, 0.0 * right) for name, right in (("full", full), ("sparse", sparse))
    }
    return SimpleNamespace(answers=answers, degenerate=None, options={"resamples": 200, "seed": 0})


def test_values_in_the_middle_are_judged_separately():
    """The start and the end gain what the middle loses."""
    full, sparse = np.zeros((10, 24), dtype=bool), np.zeros((10, 24), dtype=bool)
    full[:, 8:16] = True
    sparse[:, :8] = sparse[:, 8:10] = True
    claim, refuted, evidence = quality_controls.lost_in_the_middle("lost", _judged(full, sparse))
    assert (claim, refuted) == ("lost", True)
    assert evidence == (
        "of 80 values in the middle full attention repeats 80; sparse attention loses 60 of these and repeats 0 "
        "others: a loss of more than 25 %"
    )
    assert quality_controls.lost_in_the_middle("lost", _judged(full, full))[1] is False
    few = full & (np.arange(10) < 3)[:, None]  # 24 of 80
    sparse = few.copy()
    sparse[0, 8:14] = False
    assert quality_controls.lost_in_the_middle("lost", _judged(few, sparse))[1] is None


def test_no_loss_is_claimed_where_full_attention_repeats_too_few():
    full = np.zeros((10, 24), dtype=bool)
    full[:, 16:] = True  # all of the end
    full[0, 8:10] = True
    _, refuted, evidence = quality_controls.lost_in_the_middle("lost", _judged(full, full))
    assert refuted is None and "repeats 2;" in evidence and evidence.endswith("too few to lose")


def test_questions_inside_a_prompt_claim_no_unshown_effect():
    def asked(name: str, share: float) -> dict:
        match = measurement.informative("retrieval_exact_match", name, 0.5, share, "by hand", n=4)
        return {"name": name, "measurements": [match]}

    alike = quality_controls.read_inside([asked("all", 0.25), asked("sparse", 0.25)])
    assert alike == (
        "Full attention repeats 0.500 of 4 values, the sparse arm 0.250 if the question attends to everything and "
        "0.250 if it does not. Between the last two no difference is shown."
    )
    assert all(brief.count(part) <= brief.MOST_WORDS for part in brief.split(alike))
    assert quality_controls.read_inside([asked("all", 0.25), asked("sparse", 0.0)]).endswith("too few for a verdict.")
    assert "No question" in quality_controls.read_inside([])


def test_long_prompts_come_from_enough_documents_for_a_verdict(name):
    tokenizer = AutoTokenizer.from_pretrained(parameters.PARAMETERS / "proxies" / name)
    loaded = SimpleNamespace(tokenizer=tokenizer, parameters=parameters.read(name), device="cpu")
    for effort in ("quick", "standard"):
        size = experiment.TIMED_PROMPT[effort], quality_controls.PROMPTS[effort]
        asked = long_answers.prompts(loaded, *size)
        assert asked.ids_NT.shape == size[::-1]
        assert len(np.unique(asked.source_N)) >= noninferiority.MINIMUM_WINDOWS, effort


@torch.inference_mode()
def test_prompts_that_are_read_whole_have_no_curve(tiny):
    """Of prompts of two blocks no density is counted: the curve had points at None, and reading it failed."""
    ids_NT = torch.randint(8, 96, (2, 2 * SMALL["block_size"]), generator=torch.Generator().manual_seed(1))
    model = tiny("qwen3-4b-instruct-2507")
    full = SimpleNamespace(text=evaluate.read(model, ids_NT))
    judged = SimpleNamespace(full=full, options={"resamples": 200, "seed": 0}, patterns={})
    curves = quality_controls.over_tau(SimpleNamespace(model=model, random_weights=False), SMALL, judged)
    assert curves.empty and reading.curves(curves, "density").startswith("There is no curve")


def test_random_blocks_follow_the_seed(tiny, monkeypatch):
    seeds, apply = [], method.apply

    def noted(*arguments, **options):
        seeds.append(options.get("seed", 0))
        return apply(*arguments, **options)

    monkeypatch.setattr(method, "apply", noted)
    monkeypatch.setattr(quality_controls, "_divergence", lambda *_: [])
    judged = SimpleNamespace(options={"resamples": 200, "seed": 7}, patterns={})
    loaded = SimpleNamespace(model=tiny("qwen3-4b-instruct-2507"), random_weights=False)
    quality_controls.patterns(loaded, SMALL, judged)
    assert set(seeds) == {7}

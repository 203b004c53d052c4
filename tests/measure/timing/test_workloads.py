"""Workloads decode every architecture as a full forward pass would; the sanity gate rejects degenerate models."""

import pytest
import torch

from lib.measure.quality import sanity
from lib.measure.timing import workloads
from tests.models.architectures import build


def greedy(model, ids_BT, new_tokens):
    """Return greedy tokens by rerunning the whole sequence for every token: the slow, obvious reference."""
    for _ in range(new_tokens):
        ids_BT = torch.cat([ids_BT, model(input_ids=ids_BT, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids_BT


@torch.inference_mode()
def test_generation_equals_the_reference_at_forced_length_from_a_fresh_cache(tiny, name):
    model = tiny(name)
    prompt_BT = workloads.random_prompt(model, 2, 12)
    expected_BT = greedy(model, prompt_BT, 5)
    work = workloads.generate(model, prompt_BT, 5)
    for _ in range(2):
        work()
        assert torch.equal(work.output_BN, expected_BT[:, 12:])
    assert (work.tokens, work.batch, work.new_tokens) == (10, 2, 5)


@torch.inference_mode()
def test_decode_runs_the_prefill_during_preparation(tiny, name):
    model = tiny(name)
    prompt_BT = workloads.random_prompt(model, 2, 12)
    work = workloads.decode(model, prompt_BT, 4)
    work()
    first = work.output_BN
    work.prepare()
    work()
    assert torch.equal(first, work.output_BN) and torch.equal(first, greedy(model, prompt_BT, 5)[:, 13:])
    assert work.tokens == 8 and len(work.step_seconds) == 8


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("tokens", [5, 12])
@torch.inference_mode()
def test_steps_restart_after_a_prompt_longer_than_the_window(name, tokens):
    """Windows of 8 tokens, reached while decoding or already by the prompt. The tokens are the same each time."""
    model = build(name)
    prompt_BT = workloads.random_prompt(model, 2, tokens)
    expected_BN = greedy(model, prompt_BT, 7)[:, tokens + 1 :]
    work, produced = workloads.steps(model, prompt_BT, 6, at_once=2), []
    for _ in range(2):
        work()
        produced.append(work.output_BN)  # of the first turn
        work()
        work.restart()  # in the middle of an answer
        work.whole()
    assert all(torch.equal(output_BN, expected_BN[:, :2]) for output_BN in [*produced, work.output_BN])
    whole = workloads.steps(model, prompt_BT, 6)
    for _ in range(3):
        whole()
        assert torch.equal(whole.output_BN, expected_BN)


def test_prefill_counts_the_prompt_and_takes_inputs(tiny, batch):
    model = tiny("qwen3-4b-instruct-2507")
    work = workloads.prefill(model, {"input_ids": batch["input_ids"]})
    work()
    assert work.tokens == 48 and work.output_BN.shape == (2, 1)


def test_incomparable_arms_are_refused(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    prompt_BT = workloads.random_prompt(model, 1, 8)
    base = workloads.prefill(model, prompt_BT)
    workloads.assert_same_conditions(base, workloads.prefill(tiny("qwen3-4b-instruct-2507", 1), prompt_BT))
    other = workloads.prefill(tiny("qwen3-4b-instruct-2507").bfloat16(), prompt_BT)
    with pytest.raises(ValueError, match="dtype"):
        workloads.assert_same_conditions(base, other)
    workloads.assert_same_conditions(base, other, except_for=("dtype",))
    with pytest.raises(ValueError, match="prompt"):
        workloads.assert_same_conditions(base, workloads.prefill(model, workloads.random_prompt(model, 1, 8, seed=1)))


def test_the_gate_detects_each_degeneration(tiny):
    name = "qwen3-4b-instruct-2507"
    model = tiny(name)
    ids_BT = workloads.random_prompt(model, 2, 32)
    # Reading its own most likely continuation, a model is far better than uniform.
    own_BT = greedy(model, ids_BT[:, :2], 30)
    assert "perplexity" in sanity.check(model, ids_BT) and "perplexity" not in (sanity.check(model, own_BT) or "")
    assert sanity.check(model, ids_BT, random_weights=True) is None

    positions = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: positions.append(inputs[0].shape[1]))
    long_BT = workloads.random_prompt(model, 1, 5 * sanity.LOOKED_AT)
    sanity.check(model, long_BT, random_weights=True), sanity.check(model, long_BT[:, :20], random_weights=True)
    hook.remove()
    assert positions == [sanity.LOOKED_AT, 20] and int(sanity.spread(99)[-1]) == 98

    broken = tiny(name)
    broken.model.norm.weight[0] = float("nan")
    assert "finite" in sanity.check(broken, ids_BT, random_weights=True)

    stuck = tiny(name)
    stuck.lm_head.weight = torch.nn.Parameter(torch.zeros_like(stuck.lm_head.weight), requires_grad=False)
    assert "repeated token" in sanity.check(stuck, ids_BT)


def test_answers_that_each_repeat_their_own_token_are_degenerate(tiny, monkeypatch):
    """Previously only a token shared by all prompts was checked: repeating each prompt's last token passed."""
    model = tiny("qwen3-4b-instruct-2507")
    ids_BT = torch.arange(8, 40).view(2, 16)
    monkeypatch.setattr(sanity.nn.functional, "cross_entropy", lambda *_: torch.tensor(0.0))

    def generated(rows):
        def generate(model, prompt_BT, new_tokens):
            work = lambda: None  # noqa: E731
            work.output_BN = torch.tensor(rows)
            return work

        return generate

    monkeypatch.setattr(sanity.workloads, "generate", generated([[7, 7, 7], [9, 9, 9]]))
    assert sanity.check(model, ids_BT) == "it answers every prompt with one repeated token (7, 9)"
    monkeypatch.setattr(sanity.workloads, "generate", generated([[7, 7, 7], [9, 9, 8]]))
    assert sanity.check(model, ids_BT) is None


def test_an_earlier_picture_does_not_shift_a_text_prompt(tiny):
    model = tiny("qwen3-vl-2b")
    ids_BT = torch.randint(8, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    fresh = workloads.generate(model, ids_BT, 6)
    fresh()
    for stale in (torch.full((1, 1), 7), torch.full((3, 1), 7)):
        model.model.rope_deltas = stale  # as an image prompt leaves it, for another number of sequences
        again = workloads.generate(model, ids_BT, 6)
        again()
        assert torch.equal(again.output_BN, fresh.output_BN)


@torch.inference_mode()
def test_an_answer_decoded_in_turns_is_unchanged(tiny, name):
    model = tiny(name)
    prompt_BT = workloads.random_prompt(model, 2, 12)
    expected_BN = greedy(model, prompt_BT, 7)[:, 13:]
    work, produced = workloads.steps(model, prompt_BT, 6, at_once=2), []
    assert (work.tokens, work.new_tokens, work.turns) == (4, 2, 3)
    for _ in range(3):
        work()
        assert torch.equal(work.output_BN, expected_BN[:, :2])  # of the first turn, whatever came since
        produced.append(len(work.step_seconds))
    assert produced == [2, 4, 6]
    work()
    work.restart()
    work.whole()
    assert torch.equal(work.output_BN, expected_BN[:, :2])
    whole = workloads.steps(model, prompt_BT, 6)
    for _ in range(2):  # decoded tokens have left the cache
        whole()
        assert torch.equal(whole.output_BN, expected_BN)
    assert workloads.steps(model, prompt_BT, 5, at_once=2).new_tokens == 1  # a divisor

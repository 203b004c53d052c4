"""Calibration statistics against a slow reference; padding must not count."""

import pytest
import torch

from lib.errors import UserError
from lib.models.calibration.activations import observe
from lib.models.calibration.distillation import can_split, distil, divergence, nearness, rate_for, split
from lib.models.structure.anatomy import anatomy


def captured(model, module, batch):
    """Return the positional inputs of `module` while `batch` runs."""
    captured_args = []
    hook = module.register_forward_pre_hook(lambda module, args: captured_args.append(args))
    model(**batch, use_cache=False)
    hook.remove()
    return captured_args[0]


def test_padding_does_not_count(tiny, name, batch):
    model = tiny(name)
    padded = observe(model, [batch])
    apart = observe(model, [{"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"][1:, :15]}])
    assert padded.tokens == apart.tokens == 24 + 15
    for padded_block, apart_block in zip(padded.blocks, apart.blocks):
        assert abs(padded_block.influence - apart_block.influence) < 1e-3
        assert torch.allclose(padded_block.head_contribution_Q, apart_block.head_contribution_Q, rtol=1e-3)


def test_heads_match_the_product_of_each_head(tiny, name, batch):
    model = tiny(name)
    ids = {"input_ids": batch["input_ids"]}
    observation = observe(model, [ids])
    for block, statistics in zip(anatomy(model).blocks, observation.blocks):
        attention = block.attention
        (heads_BTF,) = captured(model, attention.output, ids)
        for head in range(attention.heads):
            part = slice(head * attention.value_dim, (head + 1) * attention.value_dim)
            slow = (heads_BTF[..., part] @ attention.output.weight[:, part].T).norm(dim=-1).sum()
            assert torch.allclose(statistics.head_contribution_Q[head], slow, rtol=1e-3)


def test_experts_match_a_loop_over_tokens(tiny, batch):
    for name in ("glm-4.7-flash", "qwen3-coder-30b"):
        model = tiny(name)
        ids = {"input_ids": batch["input_ids"][:1, :10]}
        statistics = observe(model, [ids]).blocks[2]
        experts = anatomy(model).blocks[2].feed_forward.experts
        hidden, chosen, weight = captured(model, experts.module, ids)
        tokens, contribution = torch.zeros(experts.count), torch.zeros(experts.count)
        for token in range(10):
            for position in range(experts.top_k):
                expert = chosen[token, position]
                gate, up = (experts.gate_up[expert] @ hidden[token]).chunk(2)
                output = experts.down[expert] @ (torch.nn.functional.silu(gate) * up)
                tokens[expert] += 1
                contribution[expert] += weight[token, position] * output.norm()
        assert torch.equal(statistics.expert_tokens_E, tokens)
        assert torch.allclose(statistics.expert_contribution_E, contribution, rtol=1e-3)


def test_distillation_repairs_a_damaged_model(tiny, batch):
    teacher, student = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507")
    student.model.layers[1].mlp.down_proj.weight.zero_()
    before = float(divergence(student, teacher, batch))
    lessons = distil(student, teacher, [batch], steps=40, held_out=[batch], learning_rate=3e-3)
    assert len(lessons.losses) == 40
    assert lessons.held_out[0] == pytest.approx(before) and lessons.kept in lessons.held_out and lessons.kept > 0
    assert float(divergence(student, teacher, batch)) < before / 2
    assert float(divergence(teacher, teacher, batch)) == 0
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_harmful_distillation_leaves_the_student_unchanged(tiny, batch):
    teacher, student = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507")
    student.model.layers[1].mlp.down_proj.weight.mul_(0.999)
    weights = [parameter.clone() for parameter in student.parameters()]
    lessons = distil(student, teacher, [batch], steps=100, held_out=[batch], learning_rate=100)
    assert len(lessons.losses) < 100  # stopped early
    assert lessons.kept == 0
    assert all(torch.equal(was, now) for was, now in zip(weights, student.parameters()))


def test_a_student_close_to_its_teacher_is_brought_closer(tiny, batch):
    """At the rate that suits a damaged model, every step would move it away."""
    teacher, student = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507")
    student.model.layers[1].mlp.down_proj.weight.mul_(0.9)
    before = float(divergence(student, teacher, batch))
    assert nearness(before) < 0.1 and nearness(0.1) == nearness(3.0) == 1 and nearness(0.0) == 0
    lessons = distil(student, teacher, [batch], steps=40, held_out=[batch], learning_rate=1e-2)
    assert lessons.kept > 0 and float(divergence(student, teacher, batch)) < before


def test_text_is_held_out_of_every_lesson(batch):
    eight = [{"input_ids": torch.full((2, 4), index)} for index in range(8)]
    taught, held_out = split(eight)
    assert (len(taught), len(held_out)) == (6, 2) and not {id(part) for part in taught} & {
        id(part) for part in held_out
    }
    taught, held_out = split([batch])
    assert taught[0]["input_ids"].tolist() == batch["input_ids"][:1].tolist()
    assert held_out[0]["attention_mask"].tolist() == batch["attention_mask"][1:].tolist()
    pictures = {"input_ids": torch.ones(2, 4), "pixel_values": torch.ones(9, 4)}  # cannot be separated by rows
    assert split([pictures, pictures])[1] == [pictures]
    with pytest.raises(UserError, match="at least two sequences"):
        split([{"input_ids": torch.ones(1, 4)}])
    assert can_split([batch]) and not can_split([{"input_ids": torch.ones(1, 4)}]) and not can_split([])


def test_held_out_text_is_spread_over_all_kinds_of_text():
    """Calibration begins with running text and ends with questions: neither end represents both."""
    rows = [{"input_ids": torch.arange(16)[:, None].expand(16, 4)}]
    taught, held_out = split(rows)
    assert held_out[0]["input_ids"][:, 0].tolist() == [3, 7, 11, 15]
    assert taught[0]["input_ids"][:, 0].tolist() == [at for at in range(16) if at % 4 != 3]
    batches = [{"input_ids": torch.full((1, 4), at)} for at in range(24)]
    assert [int(batch["input_ids"][0, 0]) for batch in split(batches)[1]] == [0, 6, 12, 18]


def test_bfloat16_training_keeps_updates_below_its_precision(tiny, batch):
    """At this rate a step is far below the spacing of bfloat16; the master weights accumulate steps."""
    teacher = tiny("qwen3-4b-instruct-2507").to(torch.bfloat16)
    student = tiny("qwen3-4b-instruct-2507").to(torch.bfloat16)
    for block in anatomy(student).blocks:
        block.feed_forward.down.weight.mul_(0.5)
    before = float(divergence(student, teacher, batch))
    distil(student, teacher, [batch], steps=60, held_out=[batch], learning_rate=3e-4)
    assert float(divergence(student, teacher, batch)) < 0.9 * before
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}


def test_the_learning_rate_decreases_with_width(tiny):
    model = tiny("qwen3-4b-instruct-2507")
    assert rate_for(model, 1e-3) == 1e-3
    anatomy(model).embeddings.weight = torch.nn.Parameter(torch.zeros(96, 1920), requires_grad=False)
    assert rate_for(model, 1e-3) == pytest.approx(1e-4)


def test_distillation_ends_at_its_best_evaluation(tiny, batch):
    teacher, student = tiny("qwen3-4b-instruct-2507"), tiny("qwen3-4b-instruct-2507")
    student.model.layers[1].mlp.down_proj.weight.zero_()
    before = float(divergence(student, teacher, batch))
    distil(student, teacher, [batch], steps=40, held_out=[batch], learning_rate=3e-3)
    assert float(divergence(student, teacher, batch)) < before / 2

"""Prompts, windows, retrieval and calibration begin with the model's prefix; the fingerprint covers all that shapes
them.
"""

import copy
from datetime import datetime
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

from lib.models import parameters, tokenizing
from lib.models.proxies import tokenizer as tokenizers
from lib.models.tasks import encoding, items, prompting, retrieval, tasks

BEGINS = ["<|im_start|>", "<|vision_start|>"]  # any two special tokens


@pytest.fixture(scope="module")
def plain():
    return tokenizers.train(2048)


@pytest.fixture(scope="module")
def begun(plain):
    """Return a tokenizer that puts two tokens before every text, as GLM's does, and one after it."""
    changed = copy.deepcopy(plain)
    ends = [(name, changed.convert_tokens_to_ids(name)) for name in (*BEGINS, "<|im_end|>")]
    whole = TemplateProcessing(single=f"{BEGINS[0]} {BEGINS[1]} $A <|im_end|>", special_tokens=ends)
    changed.backend_tokenizer.post_processor = whole
    return changed


def loaded(tokenizer, scale: str = "full"):
    described = parameters.read("qwen3-4b-instruct-2507")
    fields = {"model": None, "image_processor": None, "device": "cpu"}
    return SimpleNamespace(tokenizer=tokenizer, parameters=described, scale=scale, **fields)


def test_the_prefix_is_found_and_the_suffix_is_left_out(plain, begun):
    before = plain.convert_tokens_to_ids(BEGINS)
    assert tokenizing.prefix(plain) == () and tokenizing.prefix(begun) == tuple(before)
    assert encoding.ids(plain, "def f") == plain("def f").input_ids
    assert encoding.ids(begun, "def f") == before + plain("def f").input_ids
    stated = "".join(BEGINS) + "def f"
    assert encoding.ids(begun, stated) == before + plain("def f").input_ids


def test_pairs_are_split_as_in_the_harness(plain, begun):
    context, continuation = encoding.pair(plain, "The module: ", "json")
    assert context == plain("The module:").input_ids and context + continuation == plain("The module: json").input_ids
    assert encoding.pair(begun, "The module:", " json")[0][:2] == [*tokenizing.prefix(begun)]
    assert encoding.pair(plain, "", " json") == ([plain.eos_token_id], plain(" json").input_ids)


def test_prompts_windows_retrieval_and_calibration_carry_the_prefix(begun):
    before = [*tokenizing.prefix(begun)]
    model = loaded(begun)
    assert retrieval.text_windows(model, "final", 4, 64)[:, :2].tolist() == [before] * 4
    assert retrieval.text_windows(model, "final", 4, 64).shape == (4, 64)
    ids_BT, _ = retrieval.retrieval_prompts(model, 32, 3)
    assert ids_BT[:, :2].tolist() == [before] * 3 and ids_BT.shape[1] == 2 + 8 + 2 * retrieval.KEY + 8 + 32
    for batch in tasks.calibration(model, 6, 128):
        assert batch["input_ids"][:, :2].tolist() == [before] * len(batch["input_ids"])
        assert batch["input_ids"].shape[1] == 128
    (item,) = items.items("topic", "final", 1)
    assert prompting.prompt_ids(model, [item])[:2] == before


@pytest.mark.parametrize("change", ["template", "processor", "special", "vocabulary"])
def test_the_fingerprint_covers_everything_that_shapes_a_prompt(plain, begun, change):
    before = encoding.fingerprint(plain)
    plain(["a", "a longer text"], padding=True)  # must not affect later calls
    assert encoding.fingerprint(plain) == before
    changed = copy.deepcopy(plain)
    if change == "template":
        changed.chat_template = "{{ messages }}"
    elif change == "processor":
        changed = begun
    elif change == "special":
        changed.add_special_tokens({"bos_token": "<|im_start|>"})
    else:
        changed.add_tokens(["zyxw"])
    assert encoding.fingerprint(changed) != before


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("<think>", "</think>"),
        ("[THINK]\n", "[/THINK]"),
        ("<thought>\n", "</thought>"),
        ("<seed:think>", "</seed:think>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("◁think▷", "◁/think▷"),
        ("<think>\n\n</think>\n\n", ""),
        ("<|END_THINKING|>", ""),
        ("<|no_think|>", ""),
        ("<|assistant|>", ""),
    ],
)
def test_an_opened_thinking_block_is_closed_under_any_name(opened, closed):
    chat = SimpleNamespace(apply_chat_template=lambda turns, **_: f"{turns[-1]['content']}\n{opened}")
    text = tokenizing.render(chat, tokenizing.TURNS)
    assert text.endswith(f"\n{opened.rstrip()}\n\n{closed}\n\n" if closed else f"\n{opened}")


def test_a_date_in_the_chat_template_is_the_same_every_day(plain, monkeypatch):
    """Previously the cached answers of a baseline were compared with those of an arm that was told another date."""
    dated = copy.deepcopy(plain)
    dated.chat_template = (
        "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"
        "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    )
    texts = set()
    for day in (1, 2):
        clock = SimpleNamespace(now=lambda day=day: datetime(2031, 5, day))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        texts.add(tokenizing.render(dated, tokenizing.TURNS))
    (text,) = texts
    assert text.startswith("Today: ") and tokenizing.TURNS[-1]["content"] in text

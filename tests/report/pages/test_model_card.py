"""A checkpoint's card quotes a record only for the weights that it measured, and says how to load the folder."""

from types import SimpleNamespace

import pytest

from lib.report.pages import model_card
from lib.report.records import record
from tests.report import samples

HASH = "ab" * 32
KEY = samples.run().key  # a run with the same weights, options and code
MODEL = samples.MODELS[1]
MADE = {
    "loads": "AutoModelForCausalLM",
    "tokenizer": True,
    "dtype": "float32",
    "steps": ["structured_pruning"],
    "weights_hash": HASH,
    "chosen_for": None,
    "latent": False,
}


def card(folder, run=None, stack=None, made=MADE, effort="quick", key=KEY, **parameters) -> str:
    values = {"model": MODEL, "scale": "proxy", "effort": effort, "ratio": 0.3, "seed": 0, **parameters}
    stem = f"structured_pruning--{MODEL}"
    job = SimpleNamespace(
        model=MODEL, optimization="structured_pruning", scale=values["scale"], effort=effort, parameters=values,
        stem=stem,
    )  # fmt: skip
    if run is not None:
        record.write(run, folder / f"{stem}.json")
    return model_card.text(job, stack, made, "small", folder, key)


def measured(weights_hash: str) -> record.Record:
    run = samples.run()
    return run.model_copy(update={"environment": run.environment | {"weights_hash": weights_hash}})


def test_measured_weights_are_recognized(tmp_path):
    text = card(tmp_path, measured(HASH))
    assert measured(HASH).verdict.sentence in text and "their hashes are equal" in text
    assert f"Record: `structured_pruning--{MODEL}.json`, Example Processor 9000" in text
    assert "- `ratio`: `0.3`" in text and "`effort`: " not in text


def test_weights_made_in_the_same_way_are_distinguished(tmp_path):
    text = card(tmp_path, measured("cd" * 32))
    assert measured(HASH).verdict.sentence in text and "their last digits differ" in text


def test_weights_never_whole_in_memory_make_no_claim(tmp_path):
    saved = MADE | {"loads": None, "weights_hash": None, "by_blocks": True}
    text = card(tmp_path, measured(HASH), made=saved)
    assert "from file to file" in text and measured(HASH).verdict.sentence not in text
    assert "io.load_folder" in text
    remark = "Every matrix had the same worth."
    assert remark in card(tmp_path, measured(HASH), made=saved | {"remark": remark})


def test_the_command_names_the_weights_and_the_parameters(tmp_path):
    """Previously it measured the hub's checkpoint with the default parameters."""
    where = {"scale": "full", "checkpoints": "/disk/finetuned", "device": "cuda", "ratio": 0.5}
    for folder, run in ((tmp_path / "none", None), (tmp_path, measured("cd" * 32))):
        text = card(folder, run, **where)
        assert "--effort quick --device cuda --checkpoints DIR" in text
        assert "with the parameters below measures it" in text and "- `ratio`: `0.5`" in text
    stack = card(tmp_path / "none", None, "stacks/a.yaml", MADE | {"chosen_for": [MODEL, "proxy"]})
    assert "searches for a stack again" in stack and "measures it" not in stack


@pytest.mark.parametrize(
    ("options", "differs"),
    [({"ratio": 0.5}, "ratio"), ({"effort": "standard"}, "effort"), ({"seed": 1, "ratio": 0.1}, "ratio, seed")],
)
def test_other_weights_have_no_claim(options, differs, tmp_path):
    text = card(tmp_path, measured("cd" * 32), **options)
    assert f"other parameters ({differs})" in text and "nothing is claimed" in text
    assert measured(HASH).verdict.sentence not in text


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({}, {"key": "sha256:other"}, "was made with other weights, options or code"),
        ({}, {"key": "sha256:other", "random_weights": True}, "was made with other weights, options or code"),
        ({"status": "failed", "reason": "out of memory"}, {}, "has no result"),
    ],
    ids=["other code", "random weights", "failed"],
)
def test_a_record_of_other_weights_options_or_code_has_no_claim(changes, options, why, tmp_path):
    run = measured("cd" * 32).model_copy(update=changes)
    text = card(tmp_path, run, **options)
    assert why in text and "nothing is claimed about this checkpoint" in text
    assert run.verdict.sentence not in text and "in the same way" not in text
    assert ("--effort quick --random-weights`" in text) == ("random_weights" in options)


def test_a_stack_names_the_model_that_it_was_chosen_for(tmp_path):
    saved = MADE | {"steps": ["structured_pruning", "tensor_decomposition"], "chosen_for": [MODEL, "proxy"]}
    text = card(tmp_path, measured("cd" * 32), "stacks/a.yaml", saved)
    assert "the stack structured_pruning → tensor_decomposition of `a.yaml`." in text and "nothing is claimed" in text
    judged = "its stack was judged not maintained"
    assert f"of `a.yaml` ({judged})" in card(tmp_path, None, "stacks/a.yaml", saved | {"unfit": judged})
    text = card(tmp_path, None, "stacks/a.yaml", saved | {"chosen_for": ["other", "full"]})
    assert "of `a.yaml`, which was chosen for other at scale full." in text
    text = card(tmp_path, None, "stacks/a.yaml", saved | {"effort": "standard"})
    assert "effort `standard`, by the stack" in text, "on its text it was applied, whatever effort the command has"


def test_without_a_record_the_card_shows_the_command(tmp_path):
    text = card(tmp_path / "none", effort="standard")
    assert "Nothing was measured yet" in text and "--scale proxy --effort standard" in text
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in text
    assert 'io.load_folder("small")' in card(tmp_path / "none", made=MADE | {"loads": None})
    assert r'from_pretrained("C:\\new\\small")' in model_card.usage(
        r"C:\new\small", "AutoModel", tokenizer=True, latent=False
    )
    usage = model_card.usage("small", None, tokenizer=False, latent=False)
    assert usage.endswith('model = io.load_folder("small")') and "AutoTokenizer" not in usage


def test_latent_attention_decodes_as_measured(tmp_path):
    plain, latent = (card(tmp_path, measured(HASH), made=MADE | {"latent": has}) for has in (False, True))
    assert "mla_absorption.absorb(model)" in latent and "decodes absorbed here" in latent
    assert "absorb" not in plain


def test_an_unreadable_record_is_not_reported_as_missing(tmp_path):
    folder = tmp_path / "mine" / "proxy"
    folder.mkdir(parents=True)
    (folder / f"structured_pruning--{MODEL}.json").write_text("{half")
    text = card(folder)
    assert "Nothing was measured yet" not in text and "not a record: not JSON" in text
    assert "nothing is claimed about this checkpoint" in text
    assert (
        f"--effort quick --out {tmp_path / 'mine'}` with the parameters below measures it" in text
    )  # where the next card looks for it


def test_a_card_first_says_if_it_is_not_the_model_that_it_is_named_after(tmp_path):
    text = card(tmp_path)
    assert text.startswith("# A stand-in for Qwen3-4B-Instruct-2507: Structured pruning\n\nA stand-in with Qwen3-4B")
    assert "not Qwen3-4B-Instruct-2507" in text.split("Made from")[0]
    real = card(tmp_path, scale="full")
    assert real.startswith(f"# {MODEL}: Structured pruning\n\nMade from")
    assert "Its weights are random" in card(tmp_path, scale="full", random_weights=True).split("Made from")[0]

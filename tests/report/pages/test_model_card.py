"""A checkpoint's card quotes a record only for the weights that it measured, and says how to load the folder."""

from types import SimpleNamespace

import pytest

from lib.report.pages import model_card
from lib.report.records import record
from tests.report import samples

HASH = "ab" * 32
MODEL = samples.MODELS[1]
MADE = {
    "loads": "AutoModelForCausalLM",
    "tokenizer": True,
    "dtype": "float32",
    "steps": ["structured_pruning"],
    "weights_hash": HASH,
    "chosen_for": None,
}


def card(folder, run=None, stack=None, made=MADE, effort="quick", **parameters) -> str:
    values = {"model": MODEL, "scale": "proxy", "effort": effort, "ratio": 0.3, "seed": 0, **parameters}
    stem = f"structured_pruning--{MODEL}"
    job = SimpleNamespace(
        model=MODEL, optimization="structured_pruning", scale="proxy", effort=effort, parameters=values, stem=stem
    )
    if run is not None:
        record.write(run, folder / f"{stem}.json")
    return model_card.text(job, stack, made, "small", folder)


def measured(weights_hash: str) -> record.Record:
    run = samples.made()
    return run.model_copy(update={"environment": run.environment | {"weights_hash": weights_hash}})


def test_the_weights_that_were_measured_are_recognised(tmp_path):
    said = card(tmp_path, measured(HASH))
    assert measured(HASH).verdict.sentence in said and "their hashes are equal" in said
    assert f"Record: `structured_pruning--{MODEL}.json`, Example Processor 9000" in said
    assert "- `ratio`: `0.3`" in said and "`effort`: " not in said


def test_weights_that_were_made_in_the_same_way_are_told_apart(tmp_path):
    said = card(tmp_path, measured("cd" * 32))
    assert measured(HASH).verdict.sentence in said and "their last digits differ" in said


def test_what_was_never_whole_in_memory_claims_nothing(tmp_path):
    made = MADE | {"loads": None, "weights_hash": None, "by_blocks": True}
    said = card(tmp_path, measured(HASH), made=made)
    assert "from file to file" in said and measured(HASH).verdict.sentence not in said
    assert "io.load_folder" in said


@pytest.mark.parametrize(
    ("options", "differs"),
    [({"ratio": 0.5}, "ratio"), ({"effort": "standard"}, "effort"), ({"seed": 1, "ratio": 0.1}, "ratio, seed")],
)
def test_other_weights_have_no_claim(options, differs, tmp_path):
    said = card(tmp_path, measured("cd" * 32), **options)
    assert f"other parameters ({differs})" in said and "nothing is claimed" in said
    assert measured(HASH).verdict.sentence not in said


def test_a_stack_says_for_which_model_it_was_chosen(tmp_path):
    made = MADE | {"steps": ["structured_pruning", "tensor_decomposition"], "chosen_for": [MODEL, "proxy"]}
    said = card(tmp_path, measured("cd" * 32), "stacks/a.yaml", made)
    assert "the stack structured_pruning → tensor_decomposition of `a.yaml`." in said and "nothing is claimed" in said
    said = card(tmp_path, None, "stacks/a.yaml", made | {"chosen_for": ["other", "full"]})
    assert "of `a.yaml`, which was chosen for other at scale full." in said


def test_without_a_record_the_command_stands_there(tmp_path):
    said = card(tmp_path / "none", effort="standard")
    assert "Nothing was measured yet" in said and "--scale proxy --effort standard" in said
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in said
    assert 'io.load_folder("small")' in card(tmp_path / "none", made=MADE | {"loads": None})
    usage = model_card.usage("small", None, tokenizer=False)
    assert usage.endswith('model = io.load_folder("small")') and "AutoTokenizer" not in usage

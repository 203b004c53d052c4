"""`apply` saves the optimized model itself: reloading gives equal answers, and a card lists the measurements."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from lib.errors import UserError
from lib.models import loading
from lib.models.checkpoints import io
from lib.models.decoding import mla_absorption
from lib.optimizations.common import absorbed_baseline
from lib.report.records import record
from lib.suite.cli import apply as command
from lib.suite.plan import cache_key, plan
from tests.report import samples

MODEL = "qwen3-4b-instruct-2507"
QUICKLY = {
    "structured_pruning": {"finetune_steps": "0"},
    "tensor_decomposition": {"refine_steps": "1"},
    "sparse_neural_networks": {"method": "wanda", "finetune_steps": "0"},
}


def applied(out: Path, optimization: str, model: str = MODEL, **parameters: str) -> int:
    values = {**QUICKLY.get(optimization, {}), **parameters}
    request = plan.Request((optimization,), (model,), effort="quick", parameters=values)
    return command.apply(request, None, str(out), out.parent / "results")


@pytest.mark.parametrize("kind", ["mount point", "working folder"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_fetching(kind, tmp_path, monkeypatch):
    """Previously the checkpoint was made, could not be moved into place, and was deleted."""
    monkeypatch.setattr(command.plan, "plan", lambda *_, **__: pytest.fail("planned, so fetched"))
    out = tmp_path / "out"
    out.mkdir()
    if kind == "mount point":
        monkeypatch.setattr(command.os.path, "ismount", lambda path: Path(path) == out)
    else:
        monkeypatch.chdir(out)
    with pytest.raises(UserError, match="a mount point or the working folder cannot be replaced; give a folder inside"):
        applied(out, "structured_pruning")
    assert out.is_dir() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_in_one_that_is_not_writable_is_refused_before_fetching(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(command.plan, "plan", lambda *_, **__: pytest.fail("planned, so fetched"))
    monkeypatch.setattr(command.os, "access", lambda path, _: Path(path) == out)
    with pytest.raises(UserError, match="cannot be written to"):
        applied(out, "structured_pruning")


CASES = [*((optimization, MODEL) for optimization in sorted(QUICKLY)), ("structured_pruning", "glm-4.7-flash")]


@pytest.mark.parametrize(("optimization", "model"), CASES)
def test_the_checkpoint_is_the_optimized_model(optimization, model, tmp_path, capsys):
    out = tmp_path / "made"
    assert applied(out, optimization, model) == 0
    output = capsys.readouterr().out
    assert "loaded again" in output and str(out) in output
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Nothing was measured yet" in card and model in card and "```python" in card
    ids_BT = torch.arange(40)[None]
    whole, small = loading.load(model).model, io.load_folder(out)
    with torch.inference_mode():
        assert not torch.allclose(whole(input_ids=ids_BT).logits, small(input_ids=ids_BT).logits)
    usage = card.split("```python\n")[1].split("\n```")[0].replace(f'"{out.name}"', f'"{out}"')
    names: dict = {}
    exec(usage, names)
    with torch.inference_mode():
        torch.testing.assert_close(names["model"](input_ids=ids_BT).logits, small(input_ids=ids_BT).logits)
    assert names["tokenizer"]("a")["input_ids"]
    assert mla_absorption.is_absorbed(names["model"]) == absorbed_baseline.has_latents(whole)


@pytest.mark.parametrize(
    ("optimization", "why"),
    [
        (
            "adaptive_sparse_attention",
            "changes how a model computes, which no checkpoint holds; these change weights: ",
        ),
        ("adaptive_batch_sizes", "makes no checkpoint by itself, as it changes a server or is applied through others"),
    ],
)
def test_changes_no_checkpoint_can_hold_are_refused_before_fetching(optimization, why, tmp_path, monkeypatch):
    monkeypatch.setattr(command.plan, "plan", lambda *_, **__: pytest.fail("planned, so fetched"))
    with pytest.raises(UserError, match=why) as refusal:
        applied(tmp_path / "made", optimization)
    assert "structured_pruning" in str(refusal.value) and not list(tmp_path.iterdir())


def test_an_optimization_that_changes_no_weights_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="changes no weights"):
        applied(tmp_path / "new" / "folders" / "made", "structured_pruning", ratio="0")
    assert not list(tmp_path.iterdir())


def test_a_wrong_request_gets_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UserError, match="exists already"):
        applied(tmp_path / "full", "structured_pruning")
    request = plan.Request(("structured_pruning",), (MODEL,))
    with pytest.raises(UserError, match="needs --out"):
        command.apply(request, None, None, tmp_path)
    with pytest.raises(UserError, match="one OPTIMIZATION"):
        command.apply(plan.Request((), (MODEL,)), None, str(tmp_path / "x"), tmp_path)
    with pytest.raises(UserError, match="no such file"):
        command.apply(request, "nowhere.yaml", str(tmp_path / "x"), tmp_path)
    with pytest.raises(UserError, match="the one whose search wrote the recipe"):
        command.apply(plan.Request((), (MODEL,)), "a.yaml", str(tmp_path / "x"), tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_the_checkpoint_folder_is_followed(there, tmp_path, monkeypatch):
    """Previously it was refused after all the work, when the checkpoint was moved into place."""

    def save(job, stack, place, unfinished):
        place.mkdir()
        answer = {"loads": None, "tokenizer": False, "dtype": "float32", "steps": [job.optimization]}
        return answer | {"weights_hash": "ab", "by_blocks": False, "latent": False, "chosen_for": None}

    monkeypatch.setattr(command, "_save", save)
    if there:
        (tmp_path / "disk" / "made").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "made")
    request = plan.Request(("structured_pruning",), (MODEL,), effort="quick")
    assert command.apply(request, None, str(tmp_path / "link"), tmp_path / "results") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "made" / "README.md").is_file()


@pytest.mark.parametrize(("code", "why"), [(-9, "ended by signal 9, as happens when memory"), (1, "the lines above")])
def test_paths_start_at_the_users_folder_and_a_lost_process_reports_its_end(code, why, tmp_path, monkeypatch):
    requests = []

    def ended(arguments, input, **_):
        requests.append(json.loads(input))
        return subprocess.CompletedProcess(arguments, code, "")

    monkeypatch.setattr(command.subprocess, "run", ended)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("stack: []")
    with pytest.raises(UserError, match=why):
        command.apply(plan.Request(("structured_pruning",), (MODEL,)), "mine.yaml", "made", tmp_path)
    [request] = requests
    assert request["stack"] == str(tmp_path / "mine.yaml") and request["unfinished"] == str(tmp_path / "made.part")


@pytest.mark.parametrize("same", [True, False])
def test_the_card_ignores_records_of_other_weights_or_code(same, tmp_path, monkeypatch):
    request = plan.Request(("structured_pruning",), (MODEL,), effort="quick")
    (job,) = plan.plan(request)
    key = cache_key.of(cache_key.parts(job, cache_key.Hashes()))
    run = samples.run("structured_pruning", MODEL)
    run = run.model_copy(update={"key": key if same else "sha256:other", "parameters": {**job.parameters}})
    record.write(run, tmp_path / "results" / f"{job.stem}.json")

    def save(job, stack, place, unfinished):
        place.mkdir()
        answer = {"loads": None, "tokenizer": False, "dtype": "float32", "steps": [job.optimization]}
        return answer | {"weights_hash": "ab", "by_blocks": False, "latent": False, "chosen_for": None}

    monkeypatch.setattr(command, "_save", save)
    assert command.apply(request, None, str(tmp_path / "made"), tmp_path / "results") == 0
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert (run.verdict.sentence in card) == ("made in the same way" in card) == same
    assert ("nothing is claimed" in card) == (not same)


def test_a_stop_ends_the_saving_process_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """SIGTERM, as sent by a cluster's scheduler or a container: the process that holds the model must not survive."""
    waits = "import os, signal, time\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    (tmp_path / "waits.py").write_text(waits)
    monkeypatch.setattr(command, "PROGRAM", "waits")
    monkeypatch.setattr(command.plan, "ROOT", tmp_path)
    processes = []

    class Remembered(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(command.subprocess, "Popen", Remembered)
    request = plan.Request(("structured_pruning",), (MODEL,), effort="quick")
    assert command.apply(request, None, str(tmp_path / "out" / "made"), tmp_path / "results") == 128 + signal.SIGTERM
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    assert not (tmp_path / "out").exists() and "build.py: stopped" in capsys.readouterr().err

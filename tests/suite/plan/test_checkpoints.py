"""`--model` takes any checkpoint (a folder, a file or a hub id); every mistake is reported before a notebook starts."""

import json
import os

import pytest
import workbench

from lib.errors import UserError
from lib.models import parameters
from lib.report.records import record
from lib.suite.cli import command
from lib.suite.cli import options as command_line
from lib.suite.plan import cache_key, named_files, plan
from tests.report import samples


@pytest.fixture
def own(tmp_path):
    """Return a project with an extra checkpoint-only model, and a function that runs its build.py."""
    root = workbench.project(tmp_path / "project")
    workbench.notebook(root / "notebooks" / "well.ipynb", [("Record", workbench.RECORD)])
    (root / "parameters" / "gamma.yaml").write_text("checkpoint: ./weights\n", encoding="utf-8")
    cache = str(tmp_path / "cache")

    def call(*arguments):
        return workbench.build(root, *arguments, WORKBENCH_CACHE=cache)

    return root, call


def line(ended) -> str:
    """Return the one-line message of a refused request."""
    lines = [
        text for text in ended.stderr.strip().splitlines() if not text.startswith("  ") and "fetching it" not in text
    ]
    assert ended.returncode == 2 and len(lines) == 1 and lines[0].startswith("build.py: "), ended.stderr
    return lines[0]


def test_list_shows_scales_and_reports_a_bad_file_without_hiding_the_rest(own):
    root, call = own
    ended = call("list")
    assert ended.returncode == 0, ended.stderr
    assert "  alpha-1.5  proxy slice full" in ended.stdout and "  gamma      full" in ended.stdout
    assert "well--gamma" not in ended.stdout and "well--beta-2" in ended.stdout
    (root / "parameters" / "beta-2.yaml").write_text("a: [1", encoding="utf-8")
    ended = call("list")
    assert "parameters/beta-2.yaml, line" in line(ended) and "well--alpha-1.5" in ended.stdout
    ended = call("list", "--scale", "full")
    assert "well--gamma" in ended.stdout and ended.returncode == 2


def test_editor_and_macos_leftovers_are_not_models_or_templates(own):
    """Previously one such file made a build of all models be refused."""
    root, call = own
    for path in (root / "parameters" / "._alpha-1.5.yaml", root / "notebooks" / "._well.ipynb"):
        path.write_bytes(b"\0\5\26\7\xff")
    (root / "parameters" / ".#beta-2.yaml").symlink_to("somebody@somewhere.1234")
    ended = call("list")
    assert ended.returncode == 0 and "well--alpha-1.5" in ended.stdout, ended.stderr
    assert "._" not in ended.stdout + ended.stderr and ".#" not in ended.stdout + ended.stderr


def test_full_is_implied_if_there_is_no_other_scale(own):
    root, call = own
    assert "weights: no such folder or file; expected" in line(call("run", "well", "--model", "gamma"))
    assert "describes no scale proxy; it takes part at full" in line(call("--model", "gamma", "--scale", "proxy"))
    assert "takes part at full only; give --scale, or one model" in line(
        call("--model", "gamma", "--model", "alpha-1.5")
    )
    workbench.checkpoint(root / "parameters" / "weights")
    ended = call("list", "--model", "gamma")
    assert ended.returncode == 0 and "results:       executed/full" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere/at/all", "expected a folder, a .gguf file, package:NAME==VERSION/PATH, or a hub id"),
        ("./nowhere", "no such folder or file"),
        ("./notes.txt", "a file, and not a .gguf file"),
        ("no.gguf", "no such folder or file"),
        ("./text.gguf", "not a GGUF file"),
        ("package:no-version/file", "expected package:NAME==VERSION/PATH"),
        ("nobody/never-heard-of", "cannot be fetched from the hub"),
        ("./empty", "config.json: missing"),
        ("gamm", 'unknown model "gamm". Did you mean "gamma"?'),
    ],
)
def test_a_path_that_is_not_a_checkpoint_gets_one_line(own, value, message, monkeypatch, tmp_path):
    root, call = own
    (root / "notes.txt").write_text("no checkpoint")
    (root / "text.gguf").write_text("no GGUF file, but long enough for a header")
    (root / "empty").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert message in line(call("run", "well", "--model", value))
    assert not list(root.glob("executed/*/*.json")) and not list((tmp_path / "cache").rglob("*.yaml"))


def test_a_folder_is_planned_under_its_own_name(own, tmp_path, monkeypatch):
    call = own[1]
    folder = workbench.checkpoint(tmp_path / "Tiny Model", "llama")
    for form in (str(folder), f"{folder}/"):
        ended = call("list", "--model", form)
        assert ended.returncode == 0 and "well--tiny-model" in ended.stdout, ended.stderr
    assert "  tiny-model  full" in call("list").stdout
    ended = call("list", "--model", "tiny-model")
    assert "well--tiny-model" in ended.stdout, "its name is enough from now on"


def test_a_model_given_twice_is_listed_once(own):
    listed = own[1]("list", "--model", "alpha-1.5", "--model", "alpha-1.5").stdout
    assert listed.count("well--alpha-1.5") == 1


def test_list_does_not_store_names_of_absent_models(own, tmp_path):
    call = own[1]
    assert "well--never-heard-of" in call("list", "--model", "nobody/never-heard-of").stdout
    assert "never-heard-of" not in call("list").stdout and not list((tmp_path / "cache").rglob("*.yaml"))


def test_advice_accepts_a_name_or_a_checkpoint(own, tmp_path):
    root, call = own
    folder = workbench.checkpoint(tmp_path / "Tiny Model", "llama")
    place = root / "executed" / "full"
    place.mkdir(parents=True)
    run = samples.whole("structured_pruning", "other")
    record.write(run, place / f"{run.stem}.json")
    assert f'no record of "{folder}" in ' in line(call("advise", "--model", str(folder), "--scale", "full"))
    assert call("list", "--model", str(folder)).returncode == 0  # which gives it a name
    for model in (str(folder), "tiny-model"):
        assert 'no record of "tiny-model" in ' in line(call("advise", "--model", model))  # at its available scale


def _planned_here(own, tmp_path, monkeypatch):
    """Make this process plan the project's runs; return its root."""
    root, _ = own
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(parameters, "PARAMETERS", root / "parameters")
    return root


def test_weights_and_files_enter_the_key_by_content(own, tmp_path, monkeypatch):
    root = _planned_here(own, tmp_path, monkeypatch)
    folder = workbench.checkpoint(root / "parameters" / "weights", "llama")
    workbench.notebook(
        root / "notebooks" / "well.ipynb", [], workbench.COMMON + "\ntasks: list[str] = []\ntext: str = ''"
    )
    task, data, text = tmp_path / "mine.yaml", tmp_path / "mine.jsonl", tmp_path / "mine.txt"
    task.write_text("task: mine\ndataset_kwargs: {data_files: {test: mine.jsonl}}\ndoc_to_text: !function x.y\n")
    data.write_text("{}\n")
    text.write_text("some text " * 2000)
    values = {"tasks": f"topic,lm_eval:{task}", "text": str(text)}
    request = plan.Request(models=("gamma",), scale="full", parameters=values)

    def parts():
        [job] = plan.plan(request, to_run=False)
        return cache_key.parts(job, cache_key.Hashes())

    first = parts()
    assert set(first["files"]) == {"mine.yaml", "mine.jsonl", "mine.txt"} and "config.json" in first["weights"]
    for path, part in ((folder / "config.json", "weights"), (data, "files"), (text, "files"), (task, "files")):
        before = parts()
        path.write_text(path.read_text() + " ")
        assert cache_key.difference(before, parts()) == f"{part}: {path.name} changed"
    (folder / "tokenizer.json").write_text("{}")
    assert "weights: tokenizer.json new" in cache_key.difference(first, parts())


def test_results_in_a_models_own_folder_do_not_affect_its_key(own, tmp_path, monkeypatch):
    """A run whose `--out` was in that folder changed its own key, so it was never finished."""
    root = _planned_here(own, tmp_path, monkeypatch)
    folder = workbench.checkpoint(root / "parameters" / "weights", "llama")
    workbench.checkpoint(tmp_path / "all" / "gamma", "llama")

    def weights(**more):
        [job] = plan.plan(plan.Request(models=("gamma",), scale="full", **more), to_run=False)
        return cache_key.parts(job, cache_key.Hashes())["weights"]

    before = weights(), weights(checkpoints=str(tmp_path / "all"))
    assert set(before[0]) == set(before[1]) == {"config.json", "model.safetensors"}
    for place in (folder, tmp_path / "all" / "gamma"):
        for name in ("full/well--gamma.json", ".git/config", ".cache/huggingface/x.json", "history.sqlite", ".x.json"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text("{}")
    assert (weights(), weights(checkpoints=str(tmp_path / "all"))) == before
    (folder / cache_key.CHAT_TEMPLATES).mkdir()
    (folder / cache_key.CHAT_TEMPLATES / "tools.jinja").write_text("{{ messages }}")
    assert set(weights()) - set(before[0]) == {"additional_chat_templates/tools.jinja"}


def test_a_task_in_a_models_file_is_part_of_the_key_and_relative_to_that_file(own, tmp_path, monkeypatch):
    root, call = own
    monkeypatch.setattr(plan, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(parameters, "PARAMETERS", root / "parameters")
    path = root / "parameters" / "alpha-1.5.yaml"
    path.write_text(path.read_text().replace("[retrieval]", "[topic, 'lm_eval:mine.yaml']"))
    task = root / "parameters" / "mine.yaml"

    def parts():
        [job] = plan.plan(plan.Request(models=("alpha-1.5",)), to_run=False)
        return cache_key.parts(job, cache_key.Hashes())

    assert f'parameters/alpha-1.5.yaml: key "tasks": lm_eval:{task}: there is no such file' in line(call())
    task.write_text("task: mine\n")
    assert parameters.read("alpha-1.5").tasks == ["topic", f"lm_eval:{task}"]
    before = parts()
    task.write_text("task: mine\nnum_fewshot: 2\n")
    assert cache_key.difference(before, parts()) == "files: mine.yaml changed"
    task.unlink()
    path.write_text(path.read_text().replace("[topic, 'lm_eval:mine.yaml']", "[topci]"))
    message = line(call("--model", "alpha-1.5"))
    assert 'parameters/alpha-1.5.yaml: key "tasks": unknown task "topci"' in message and '"topic"' in message


def test_the_network_is_used_if_a_models_file_uses_the_harness(own, monkeypatch):
    root, _ = own
    monkeypatch.setattr(parameters, "PARAMETERS", root / "parameters")
    path = root / "parameters" / "alpha-1.5.yaml"
    path.write_text(path.read_text().replace("[retrieval]", "['lm_eval:arc_easy']"))

    def offline(*arguments):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        command._request(command_line.parsed(command.parser()[1]["run"], list(arguments)), ())
        return os.environ.pop("HF_HUB_OFFLINE", None)

    assert offline("--model", "alpha-1.5") is None and offline() is None and offline("--model", "beta-2") == "1"
    assert offline("-p", "tasks=topic") == "1", "which is asked in its place"
    workbench.checkpoint(root / "parameters" / "weights")
    assert offline("--model", "gamma") == "1", "a folder of the user's own, at scale full"
    assert offline("--model", "beta-2", "--scale", "full") is None, "of the hub"


def test_files_of_the_same_name_are_distinguished(own, tmp_path, monkeypatch):
    root, _ = own
    monkeypatch.setattr(plan, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(parameters, "PARAMETERS", root / "parameters")
    workbench.notebook(root / "notebooks" / "well.ipynb", [], workbench.COMMON + "\ntasks: list[str] = []")
    tasks = [tmp_path / name / "mine.yaml" for name in ("one", "two", "three")]
    for path in tasks:
        path.parent.mkdir()
        path.write_text("task: mine\n")
    values = {"tasks": ",".join(f"lm_eval:{path}" for path in tasks)}

    def parts():
        [job] = plan.plan(plan.Request(models=("alpha-1.5",), parameters=values), to_run=False)
        return cache_key.parts(job, cache_key.Hashes())

    assert set(parts()["files"]) == {"mine.yaml", "mine.yaml (2)", "mine.yaml (3)"}
    for path in tasks:
        before = parts()
        path.write_text(f"task: mine  # {path.parent.name}\n")
        assert "files: mine.yaml" in cache_key.difference(before, parts()), path


def test_a_task_of_a_missing_file(own, tmp_path, monkeypatch):
    root, call = own
    workbench.notebook(root / "notebooks" / "well.ipynb", [], workbench.COMMON + "\ntasks: list[str] = []")
    assert "lm_eval:nowhere.yaml: there is no such file" in line(call("-p", "tasks=lm_eval:nowhere.yaml"))
    assert 'unknown task "topci"' in line(call("-p", "tasks=topci"))


def test_files_that_parameters_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    files = named_files.of({"one": str(tmp_path / "a.txt"), "two": ["a.txt", 7, None], "three": "x" * 5000})
    assert files == [tmp_path / "a.txt"]


def test_a_harness_task_names_the_program_of_its_functions(tmp_path):
    (tmp_path / "utils.py").write_text("def shown(document): ...")
    (tmp_path / "mine.yaml").write_text("doc_to_text: !function utils.shown\nother: !unknown utils.py\n")
    files = named_files.of({"tasks": [f"lm_eval:{tmp_path}/mine.yaml"]})
    assert files == [tmp_path / "mine.yaml", tmp_path / "utils.py"]


def test_a_harness_group_names_the_files_of_its_tasks(tmp_path):
    (tmp_path / "deeper").mkdir()
    files = {"all.yaml": "group: all\ntask: [one, {task: two, num_fewshot: 1}, arc_easy, {group: inner}]\n"}
    files |= {"a.yaml": "task: one\n", "deeper/b.yaml": "task: two\ninclude: base.yaml\n", "deeper/base.yaml": "x: 1\n"}
    files |= {"c.yaml": "group: inner\ntask: [three]\n", "d.yaml": "task: three\n", "e.yaml": "task: other\n"}
    files |= {"notes.yaml": "- 1\n", "broken.yaml": "a: [1"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = named_files.of({"tasks": [f"lm_eval:{tmp_path}/all.yaml"]})
    expected = ("all.yaml", "a.yaml", "c.yaml", "d.yaml", "deeper/b.yaml", "deeper/base.yaml")
    assert found == sorted(tmp_path / name for name in expected)


def test_a_fetch_checks_local_files(tmp_path, monkeypatch, capsys):
    from tests.models.sources import indexes

    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    text = f"package:{indexes.NAME}=={indexes.VERSION}/data/one.txt"
    with indexes.served(indexes.Index(indexes.wheel({"data/one.txt": b"one" * 1000})), monkeypatch) as index:
        assert command.main(["fetch", text]) == 0
        captured = capsys.readouterr()
        assert "is not here yet: fetching it, once" in captured.err and ": fetched, 0.0 MB" in captured.out
        assert command.main(["fetch", text]) == 0
        captured = capsys.readouterr()
        assert "already here, every file unchanged" in captured.out and not captured.err and index.starts == [0]
        [place] = (tmp_path / "cache").rglob("one.txt")
        place.write_text("changed")
        assert command.main(["fetch", text]) == 0
        assert "fetching it again" in capsys.readouterr().out and place.read_bytes() == b"one" * 1000
        index.gone = True
        assert command.main(["fetch", text.replace("1.2", "9.9")]) == 2
        assert command.main(["fetch", "nothing-known"]) == 2
    captured = capsys.readouterr()
    assert "offers no such wheel" in captured.err and 'unknown model or benchmark "nothing-known"' in captured.err


def test_the_first_run_fetches_automatically(tmp_path, monkeypatch, capsys):
    from lib.suite.plan import fetching

    messages = []
    monkeypatch.setattr(fetching.sources, "local", lambda source: None)
    monkeypatch.setattr(
        fetching.sources, "fetch", lambda source, tell, sha256: messages.append((source.text, sha256)) or tmp_path
    )
    assert fetching.weights("smollm2-135m-instruct") == tmp_path
    assert messages[0][0] == parameters.read("smollm2-135m-instruct").checkpoint
    assert "is not here yet: fetching it, once" in capsys.readouterr().err


def test_a_missing_model_gets_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    request = plan.Request(("structured_pruning",), ("smollm2-135m-instruct",), "full", random_weights=True)
    with pytest.raises(UserError, match="has to be fetched first"):
        plan.plan(request)
    assert json.dumps([job.stem for job in plan.plan(request, to_run=False)])

"""A wrong request gets one line that names the nearest valid option, exit code 2, and nothing is run."""

import pytest
import workbench

from lib.errors import UserError
from lib.suite.plan import template as templates


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a project in which nothing is ever run."""
    root = workbench.project(tmp_path_factory.mktemp("asked") / "project")
    workbench.notebook(root / "notebooks" / "well.ipynb", [("Record", workbench.RECORD)])
    return root


def refused(root, *arguments, **more):
    """Run a command that must be refused; return its one-line message."""
    ended = workbench.build(root, *arguments, **more)
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert len(lines) == 1 and lines[0].startswith("build.py: ") and "Traceback" not in ended.stderr
    assert not list(root.glob("executed/*/*.json"))
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], 'unknown command "rnu". Did you mean "run"?'),
        (["well"], "To run it: build.py run well"),
        (["run", "wel"], 'unknown optimization "wel". Did you mean "well"?'),
        (["--model", "alpha"], 'unknown model "alpha". Did you mean "alpha-1.5"?'),
        (["--modle", "alpha-1.5"], 'unknown option "--modle". Did you mean "--model"?'),
        (["list", "--force"], 'unknown option "--force"'),
        (["--scale", "prxy"], 'expected one of proxy, slice, full. Did you mean "proxy"?'),
        (["--effort", "huge"], "--effort huge: expected one of preview, quick, standard, thorough"),
        (["--device", "cuda"], "--device cuda: "),
        (["--jobs", "0"], "--jobs: expected a whole number of at least 1, got '0'"),
        (["--jobs", "4000"], "--jobs 4000: expected 1 to"),
        (["--jobs", "2", "--device", "cuda"], "--jobs 2: expected 1 with --device cuda: two runs would share it"),
        (["-p", "ratio"], "-p ratio: expected NAME=VALUE"),
        (
            ["-p", "ratoi=0.5"],
            'unknown parameter "ratoi": notebooks/well.ipynb declares seed, ratio. Did you mean "ratio"?',
        ),
        (["-p", "ratio=much"], "-p: \"ratio\": expected float, got 'much'"),
        (["-p", "ratio=1"], '-p: "ratio": expected a value in [0, 1), got 1.0'),
        (["-p", "ratio=-0.1"], "expected a value in [0, 1), got -0.1"),
        (["-p", "ratio=nan"], "expected float"),
        (["-p", "seed=1.5"], '-p: "seed": expected int'),
        (["-p", "seed=-1"], 'well: "seed": expected a whole number from 0 to 2147483647, got -1'),
        (["-p", "seed=4294967296"], "got 4294967296"),
        (["-p", "model=beta-2"], '"model" is set by the option --model'),
        (["--checkpoints", "x"], '--checkpoints is for "--scale full"'),
        (["--scale", "full", "--checkpoints", "nowhere"], "nowhere/alpha-1.5: no checkpoint folder"),
        (["report"], "holds no record; build first"),
        (["coverage", "--out", "mine"], "mine/proxy: holds no record; build first: python build.py --out mine"),
        (["report", "--out", ""], "--out: expected a path, got nothing"),
        (["--scale", "full", "--checkpoints", ""], "--checkpoints: expected a path, got nothing"),
        (["check", "--xyzzy"], 'unknown option "--xyzzy". Known: --help, --scale, --out, --all.'),
        (["proxies", "alpha-1.5"], '"alpha-1.5" is not expected here; a model is given as --model alpha-1.5'),
        (["proxies", "--refin"], 'unknown option "--refin". Did you mean "--refine"?'),
        (["proxies", "--model"], "--model: expected one argument"),
        (["report", "well"], '"well" is not expected here; to run it: build.py run well'),
        (["advise", "executed"], '"executed" is not expected here; see: build.py advise --help'),
        (["--force", "run"], '"run" is not expected here; a command comes first: build.py run'),
        (["advise", "--keep", "2%"], "--keep: expected a number, such as 0.02, got '2%'"),
        (["compare", "executd/old", "."], "executd/old: no such folder or file"),
        (["check", "--scale", "full"], "holds no record; build first: python build.py run --model M --scale full"),
        (["--out", "build.py"], "cannot be written to (Not a directory)"),
        (["--out", "/proc"], "/proc/proxy: cannot be written to"),
    ],
)
def test_a_wrong_request_gets_one_line(workspace, arguments, message):
    assert message in refused(workspace, *arguments)
    assert not (workspace / "mine").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "parameters/alpha-1.5.yaml: is empty"),
        ("a: [1", "parameters/alpha-1.5.yaml, line"),
        ("name: x\n", 'missing key "checkpoint"'),
        ("+ batch: 1", 'unknown key "batch"'),
        ("optimizations: {well: {ratio: -0.5}}", 'section "well": "ratio": expected a value in [0, 1), got -0.5'),
        ("optimizations: {well: {ratio: 1}}", "expected a value in [0, 1), got 1.0"),
        ("optimizations: {well: {ratio: [1]}}", "expected float, got [1]"),
        ("optimizations: {well: {ratoi: 0.5}}", 'unknown parameter "ratoi"'),
        (
            "optimizations: {wel: {ratio: 0.5}}",
            'section "wel" of "optimizations" is not an optimization. Did you mean "well"?',
        ),
    ],
)
def test_a_wrong_parameter_file_gets_one_line(workspace, text, message):
    path = workspace / "parameters" / "alpha-1.5.yaml"
    before = path.read_text(encoding="utf-8")
    changed = before.replace("optimizations: {}", text) if text.startswith("optimizations") else text
    path.write_text(f"{before}{text[2:]}\n" if text.startswith("+") else changed, encoding="utf-8")
    try:
        assert message in refused(workspace)
    finally:
        path.write_text(before, encoding="utf-8")


def test_truncated_checkpoints_and_other_architectures_are_refused(workspace, tmp_path):
    folder = workbench.checkpoint(tmp_path / "alpha-1.5", "glm4_moe_lite")
    message = refused(workspace, "--model", "alpha-1.5", "--scale", "full", "--checkpoints", str(tmp_path))
    assert 'architecture "glm4_moe_lite", but alpha-1.5 is "qwen3"' in message
    (folder / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"\x09")
    message = refused(workspace, "--model", "alpha-1.5", "--scale", "full", "--checkpoints", str(tmp_path))
    assert "truncated or not a safetensors file" in message


def test_a_missing_stand_in_gets_one_line(workspace):
    folder = workspace / "parameters" / "proxies" / "beta-2"
    aside = folder.rename(folder.with_name("aside"))
    try:
        assert 'train it with "python build.py proxies --model beta-2"' in refused(workspace)
    finally:
        aside.rename(folder)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, 'notebooks/odd.ipynb: no cell tagged "parameters"'),
        ('model: str = "x"', 'the cell "parameters" does not declare "scale"'),
        ("import os", "cannot read the parameter `import os`"),
        ("a: int = f()", 'parameter "a": the default f() is not a plain value'),
    ],
)
def test_a_wrong_template_gets_one_line(workspace, parameters, message):
    path = workbench.notebook(workspace / "notebooks" / "odd.ipynb", [("Code", "x = 1")], parameters)
    try:
        assert message in refused(workspace, "run", "odd")
    finally:
        path.unlink()


def test_a_template_that_is_not_a_notebook(workspace):
    path = workspace / "notebooks" / "odd.ipynb"
    path.write_text("not a notebook", encoding="utf-8")
    try:
        assert "notebooks/odd.ipynb: not a notebook" in refused(workspace, "run", "odd")
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("arguments", "effort"),
    [([], "standard"), (["--scale", "slice"], "quick"), (["--scale", "slice", "--effort", "thorough"], "thorough")],
)
def test_slices_default_to_effort_quick(arguments, effort):
    from lib.suite.cli import command

    options = command.parser()[1]["run"].parse_args(arguments)
    assert command._request(options, ()).effort == effort


def test_precedence_default_then_file_then_command_line(tmp_path, monkeypatch):
    from lib.models import parameters
    from lib.suite.plan import plan

    root = tmp_path / "project"
    (root / "notebooks").mkdir(parents=True)
    (root / "parameters").mkdir()
    workbench.notebook(root / "notebooks" / "well.ipynb", [])
    workbench.model_file(root, "alpha-1.5", "{well: {ratio: 0.5, seed: 3}}")
    monkeypatch.setattr(plan, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(parameters, "PARAMETERS", root / "parameters")
    [job] = plan.plan(plan.Request(parameters={"seed": "7"}, effort="standard"))
    assert (job.parameters["ratio"], job.parameters["seed"], job.parameters["effort"]) == (0.5, 7, "standard")
    assert job.stem == "well--alpha-1.5" and isinstance(job.parameters["ratio"], float)


def test_a_text_only_model_gets_no_image_questions(tmp_path, monkeypatch):
    from lib.models import parameters
    from lib.suite.plan import plan

    root = tmp_path / "project"
    (root / "notebooks").mkdir(parents=True)
    (root / "parameters").mkdir()
    source = f"{workbench.COMMON}\ntasks: list[str] = []  # what is asked"
    workbench.notebook(root / "notebooks" / "well.ipynb", [], source)
    path = workbench.model_file(root, "alpha-1.5")
    monkeypatch.setattr(plan, "NOTEBOOKS", root / "notebooks")
    monkeypatch.setattr(parameters, "PARAMETERS", root / "parameters")
    request = plan.Request(parameters={"tasks": "digits"})
    with pytest.raises(UserError, match=r'alpha-1\.5: the task "digits" shows pictures, but this model has no vision'):
        plan.plan(request)
    seeing = path.read_text().replace("full: {", "full: {vision_config: {depth: 1}, ")
    path.write_text(seeing)
    [job] = plan.plan(request)
    assert job.parameters["tasks"] == ["digits"]


def test_paths_are_relative_to_the_command_not_to_the_notebook(tmp_path, monkeypatch):
    from lib.suite.plan.values import OPTIONS, resolve

    more = '\nstudies: str = ""  # a folder\nstacks: str = ""  # a folder\nhistory: str = ""  # a file'
    template = templates.read(workbench.notebook(tmp_path / "x.ipynb", [], workbench.COMMON + more))
    monkeypatch.chdir(tmp_path)
    options = {name: template.parameters[name].default for name in OPTIONS}
    values = resolve(template, options, {"stacks": "../s"}, {"history": "old/h.sqlite"})
    assert values["history"] == str(tmp_path / "old" / "h.sqlite")
    assert (values["stacks"], values["studies"]) == (str(tmp_path.parent / "s"), "")


def test_parameters_are_read_as_papermill_reads_them(tmp_path):
    import papermill

    source = (
        workbench.COMMON + '\nmode: str = "x"  # one of x|y|z, the mode\nsteps: list[int] = [1, 2]  # each in [1, inf)'
    )
    path = workbench.notebook(tmp_path / "x.ipynb", [], source)
    ours = templates.read(path).parameters
    theirs = papermill.inspect_notebook(str(path))
    assert {name: (parameter["help"], parameter["inferred_type_name"]) for name, parameter in theirs.items()} == {
        parameter.name: (parameter.help, parameter.type) for parameter in ours.values()
    }
    assert ours["mode"].choices == ("x", "y", "z") and ours["steps"].interval == (1, float("inf"), True, False)


def test_parameters_that_papermill_cannot_read(tmp_path):
    source = 'words: list[str] = ["a # b", "c"]  # some words\nlimit: float | None = None  # at most, in (0, inf)'
    declared = templates.read(workbench.notebook(tmp_path / "x.ipynb", [], source)).parameters
    assert (declared["words"].default, declared["words"].help) == (["a # b", "c"], "some words")
    assert declared["limit"].interval == (0, float("inf"), False, False)


@pytest.mark.parametrize(
    ("kind", "help_text", "value", "expected"),
    [
        ("list[int]", "in [1, 64]", "1,2", [1, 2]),
        ("list[float]", "in (0, 1]", "[0.5, 1]", [0.5, 1.0]),
        ("list[str]", "", "a, b", ["a", "b"]),
        ("bool", "", "yes", True),
        ("bool", "", "maybe", None),
        ("list[int]", "in [1, 64]", "1,65", None),
        ("int", "in [-2, 2]", "-2", -2),
        ("str", "one of a|b", "c", None),
        ("float | None", "", "none", None),
        ("float", "in [-1, 1); -1: 0.9 on a proxy, else 0.5", "-1", -1.0),
        ("float", "in [-1, 1); -1: 0.9 on a proxy, else 0.5", "-0.3", None),
        ("float", "in [-1, 1)", "-0.3", -0.3),
        ("list[int]", "two numbers, in [1, 64]", "1,2", [1, 2]),
        ("list[int]", "two numbers, in [1, 64]", "1,2,3", None),
        ("list[int]", "two numbers, in [1, 64]", "1", None),
    ],
)
def test_values_are_converted_and_bounded(kind, help_text, value, expected):
    parameter = templates.Parameter(
        "x", kind, None, help_text, templates._interval(help_text), templates._choices(help_text)
    )
    if expected is None and kind != "float | None":
        with pytest.raises(UserError, match="here: expected"):
            templates.check(value, parameter, "here")
    else:
        assert templates.check(value, parameter, "here") == expected


def test_a_value_that_does_not_divide_another_is_refused():
    from lib.suite.plan import plan

    pattern = plan.Request(optimizations=("adaptive_sparse_attention",), parameters={"stride": "12"})
    with pytest.raises(UserError, match='"stride": expected a divisor of block_size, which is 128, got 12'):
        plan.plan(pattern)


@pytest.mark.parametrize(
    "steps", ["structured_prunning", "structured_pruning+", "structured_pruning,tensor_decomposition"]
)
def test_a_step_that_is_not_an_optimization_is_refused_before_the_start(steps):
    """Previously the notebook refused it after the model was loaded, as a failed run."""
    from lib.suite.plan import plan

    def planned(value):
        request = plan.Request(optimizations=("modular_components",), parameters={"steps": value})
        return plan.plan(request, to_run=False)

    with pytest.raises(UserError, match=r'modular_components: "steps": no optimization ".*"; expected stems joined by'):
        planned(steps)
    assert planned("auto") and planned("tensor_decomposition + structured_pruning")


def test_an_old_name_is_accepted_and_the_current_one_is_shown(tmp_path):
    root = workbench.project(tmp_path / "project")
    parameters = workbench.COMMON.replace("ratio: float", "finetune_steps: float")
    workbench.notebook(root / "notebooks" / "well.ipynb", [("Record", workbench.RECORD)], parameters)
    ended = workbench.build(root, "list", "-p", "recovery_steps=0.5")
    assert ended.returncode == 0, ended.stderr
    message = '-p: parameter "recovery_steps" is now called "finetune_steps"; please use the new name'
    assert ended.stderr.strip().splitlines() == [message]

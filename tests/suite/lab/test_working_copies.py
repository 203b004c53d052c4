"""Working copies of the templates: a user's changes are kept; templates and build results stay intact."""

import json

import workbench

from lib.suite.lab import working_copies
from lib.suite.plan import template as templates
from lib.suite.plan.plan import Job


def test_jupyterlab_gets_copies(tmp_path):
    templates, copies = tmp_path / "notebooks", tmp_path / ".lab"
    templates.mkdir()
    template = workbench.notebook(templates / "a.ipynb", [("Code", "x = 1")])
    before = template.read_bytes()
    assert working_copies.refresh(templates, copies) == []
    copy = copies / "a.ipynb"
    content = json.loads(copy.read_text())
    content["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    copy.write_text(json.dumps(content))
    assert working_copies.refresh(templates, copies) == [] and "stdout" in copy.read_text(), "a run copy stays"
    workbench.notebook(template, [("Code", "x = 2")])
    assert working_copies.refresh(templates, copies) == [] and "x = 2" in copy.read_text(), "outputs are no edits"
    content["cells"][-1]["source"] = "x = 'mine'"
    copy.write_text(json.dumps(content))
    assert working_copies.refresh(templates, copies) == [] and "mine" in copy.read_text()
    template.write_bytes(before)
    [line] = working_copies.refresh(templates, copies)
    assert "a.ipynb has changed; your edited copy is .lab/a.ipynb.aside-1" in line and copy.read_bytes() == before
    assert "mine" in (copies / "a.ipynb.aside-1").read_text()


def _parameters(path):
    return next(source for kind, source, tags in templates.read_cells(path) if "parameters" in tags)


def test_a_copy_for_a_model_has_its_parameters(tmp_path):
    folder, copies = tmp_path / "notebooks", tmp_path / ".lab"
    folder.mkdir()
    path = workbench.notebook(
        folder / "a.ipynb",
        [("Code", "x = ratio")],
        workbench.COMMON + '\ntasks: list[str] = []  # the "tasks"\nnote: str | None = None  # a note',
    )
    before = path.read_bytes()
    template = templates.read(path)
    values = {name: parameter.default for name, parameter in template.parameters.items()}
    values |= {
        "model": 'beta "2"',
        "scale": "full",
        "ratio": 0.5,
        "tasks": ["arc_easy", "piqa"],
        "random_weights": True,
    }
    job = Job(template, "beta-2", "full", "quick", values)
    assert working_copies.refresh(folder, copies, [job]) == []
    copy = copies / "a--beta-2.ipynb"
    read = templates.read(copy)
    assert {name: parameter.default for name, parameter in read.parameters.items()} == values
    for name, parameter in template.parameters.items():
        assert (read.parameters[name].help, read.parameters[name].type) == (parameter.help, parameter.type)
    assert 'effort: str = "quick"  # one of preview|quick|standard|thorough' in _parameters(copy).splitlines()
    assert path.read_bytes() == before == (copies / "a.ipynb").read_bytes()
    edited = copy.read_text().replace("x = ratio", "x = 2 * ratio")
    copy.write_text(edited)
    assert working_copies.refresh(folder, copies, [job]) == [] and copy.read_text() == edited, "edits stay"
    assert working_copies.refresh(folder, copies) == [] and copy.read_text() == edited, "without the model too"
    [line] = working_copies.refresh(folder, copies, [Job(template, "beta-2", "full", "quick", values | {"seed": 3})])
    assert "a--beta-2.ipynb.aside-1" in line and "seed: int = 3" in _parameters(copy)


def test_a_session_writes_nothing_that_builds_read(tmp_path):
    """Previously a search in JupyterLab replaced the recipe of the finished build."""
    folder, copies = tmp_path / "notebooks", tmp_path / ".lab"
    folder.mkdir()
    more = '\nstudies: str = ""  # folder of the study\nstacks: str = ""  # folder of the stack'
    path = workbench.notebook(folder / "a.ipynb", [("Code", "x = 1")], workbench.COMMON + more)
    before, template = path.read_bytes(), templates.read(path)
    values = {name: parameter.default for name, parameter in template.parameters.items()}
    working_copies.refresh(folder, copies, [Job(template, "beta-2", "full", "quick", values)])
    for name in ("a.ipynb", "a--beta-2.ipynb"):
        read = templates.read(copies / name).parameters
        assert (read["studies"].default, read["stacks"].default) == ("studies", "stacks"), name
    assert path.read_bytes() == before


def test_nothing_is_stale_after_a_session(project):
    """Saving outputs and parameters into the copies, and keeping the last run, changes no key of a finished run."""
    assert workbench.build(project, "--model", "alpha-1.5").returncode == 0
    before = workbench.build(project, "list").stdout
    assert "not_applicable" in before and "stale" not in before
    template = (project / "notebooks" / "well.ipynb").read_bytes()
    program = (
        "from pathlib import Path\nfrom lib.suite.lab import request, start_page, working_copies\n"
        "options = request.parser('').parse_args(['--model', 'alpha-1.5'])\n"
        "jobs = request.jobs(options)\nworking_copies.refresh(jobs=jobs)\n"
        "page = start_page.write(start_page.entries(jobs), request.results(options), working_copies.COPIES)\n"
        "print(page.read_text())"
    )
    ended = workbench.run(project, "-c", program)
    assert ended.returncode == 0 and "[Well](well--alpha-1.5.ipynb)" in ended.stdout, ended.stderr
    assert "not applicable: tiny" in ended.stdout
    copy = project / ".lab" / "well--alpha-1.5.ipynb"
    content = json.loads(copy.read_text())
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell.update(source=[*cell["source"], "\n# mine"], outputs=[], execution_count=3)
    copy.write_text(json.dumps(content))
    (project / ".lab" / ".runs" / "proxy").mkdir(parents=True)
    (project / ".lab" / ".runs" / "proxy" / "well--alpha-1.5.json").write_text("{}")
    assert workbench.build(project, "list").stdout == before
    assert (project / "notebooks" / "well.ipynb").read_bytes() == template

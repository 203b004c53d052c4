"""The skeleton of the template notebooks: stored clean, explained in prose, no measured number typed by hand.

`faults` holds the rules; every template in notebooks/ must pass, and a template with each fault in turn must fail.
"""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from lib.report.analysis import compare
from lib.suite.plan import template

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TEMPLATES = sorted(path for path in NOTEBOOKS.glob("*.ipynb") if path.stem != "overview")
COMMON = (
    ("model", "str"),
    ("scale", "str"),
    ("effort", "str"),
    ("device", "str"),
    ("checkpoints", "str"),
    ("random_weights", "bool"),
    ("seed", "int"),
)
DEFAULTS = {"effort": '"quick"', "device": '"cpu"', "checkpoints": '""', "random_weights": "False", "seed": "0"}
TAGS = (
    "parameters",
    "setup",
    "model",
    "mechanism",
    "apply",
    "quality",
    "speed",
    "cost",
    "figures",
    "reading",
    "refutation",
    "record",
    "environment",
)
HEADINGS = ("Question", "Idea", "Is it still right?", "Is it faster?", "What does it cost?", "Limits")
MOST_LINES = 12
MOST_COLUMNS = 88
MOST_CODE_LINES = 125  # excluding parameters
SHOWING = ("show", "show_text", "display")
CLAIMS = re.compile(r"^### What would refute it\s*$(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)
IDEA_WORDS = 150
PARAMETER = re.compile(r"^(?P<name>[a-z_]\w*): (?P<type>[^=#]+?) = (?P<default>.+?)  # (?P<help>\S.*)$")
# A number with a result's unit. Removed beforehand: code spans (formulas), "95 %" (intervals)
# and lines that cite a source in brackets.
TYPED = re.compile(
    r"\d+(?:\.\d+)?\s*(?:×|x\s+(?:faster|slower|smaller)|times\s+(?:faster|slower)|%|per\s?cent|ms\b|seconds\b|"
    r"tokens/s|tokens per second|MB\b|GB\b|joules\b)",
    re.IGNORECASE,
)
CITED = re.compile(r"\[[^\]]+\]")
MOST_WORDS = 25  # per sentence; a code span is one word
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"*_]*\s+(?=[A-Z0-9`*_\"(\[])")
LIST_ITEM = re.compile(r"(?:[-*+]|\d+\.)\s+")
REFERENCES, YEAR = "References: ", re.compile(r"\b[12]\d{3}\b")


def _tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Return one line per broken rule."""
    return [
        fault
        for rule in (
            _stored, _parameters, _tagged, _structured, _short, _read, _refutable, _plain, _typed, _glued, _ended,
        )
        for fault in rule(notebook)
    ]  # fmt: skip


def _stored(notebook) -> list[str]:
    """Stored without outputs, counts, or metadata of papermill and nbclient."""
    broken = ["papermill metadata in the notebook"] if "papermill" in notebook.metadata else []
    for index, cell in enumerate(notebook.cells):
        left = {"papermill", "execution"} & set(cell.metadata)
        broken += [f"cell {index}: {name} metadata" for name in sorted(left)]
        if cell.cell_type == "code":
            broken += [f"cell {index}: outputs"] if cell.outputs else []
            broken += [f"cell {index}: execution count"] if cell.execution_count is not None else []
    return broken


def _parameters(notebook) -> list[str]:
    """The first code cell is tagged and has one name per line with type, default and help, the common ones first."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not code or "parameters" not in _tags(code[0]):
        return ["the first code cell is not tagged parameters"]
    broken, declared = [], []
    for line in code[0].source.splitlines():
        match = PARAMETER.match(line)
        if match:
            declared.append((match["name"], match["type"]))
            expected = DEFAULTS.get(match["name"])
            if expected and match["default"] != expected:
                broken.append(f"parameter {match['name']}: the default is not {expected}")
        elif line.strip():
            broken.append(f"parameters: not `name: type = default  # help`: {line}")
    return broken + [f"parameter {name}: {kind} is missing" for name, kind in COMMON if (name, kind) not in declared]


def _tagged(notebook) -> list[str]:
    """Every tag of the skeleton is present, and the cells follow its order."""
    tags = [tag for cell in notebook.cells if cell.cell_type == "code" for tag in _tags(cell)]
    broken = [f"no cell tagged {tag}" for tag in TAGS if tag not in tags]
    first = [
        tags.index(tag) for tag in ("parameters", "setup", "model", "apply", "record", "environment") if tag in tags
    ]
    return broken + (["the tagged cells are out of order"] if first != sorted(first) else [])


def _structured(notebook) -> list[str]:
    """More prose than code; short cells; the headings of the skeleton."""
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    broken = [] if len(prose) >= len(code) else [f"{len(code)} code cells, but only {len(prose)} of prose"]
    if not notebook.cells or not notebook.cells[0].source.startswith("# "):
        broken.append("the first cell is not the title")
    sections = _sections(notebook)
    broken += [f'no heading "{name}"' for name in HEADINGS if name not in sections]
    words = len(sections.get("Idea", "").split())
    return broken + ([f"the idea takes {words} words, at most {IDEA_WORDS}"] if words > IDEA_WORDS else [])


def _short(notebook) -> list[str]:
    """Few, short cells of short lines with one displayed result each."""
    broken, total = [], 0
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or "parameters" in _tags(cell):
            continue
        lines = cell.source.strip().splitlines()
        total += sum(bool(line.strip()) for line in lines)
        if len(lines) > MOST_LINES:
            broken.append(f"cell {index}: {len(lines)} lines of code, at most {MOST_LINES}")
        broken += [
            f"cell {index}: a line of {len(x)} columns, at most {MOST_COLUMNS}" for x in lines if len(x) > MOST_COLUMNS
        ]
        shown = _shown(cell)
        if shown > 1:
            broken.append(f"cell {index}: {shown} displayed results, at most one")
    return broken + ([f"{total} lines of code, at most {MOST_CODE_LINES}"] if total > MOST_CODE_LINES else [])


def _shown(cell) -> int:
    """Return how often a cell displays something; a loop counts twice, and of two branches the longer counts."""

    def count(node: ast.AST) -> int:
        if isinstance(node, ast.If):
            return max(sum(map(count, node.body)), sum(map(count, node.orelse)))
        inner = sum(map(count, ast.iter_child_nodes(node)))
        if isinstance(node, (ast.For, ast.While)):
            return 2 * inner
        called = node.func if isinstance(node, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
        return inner + (name in SHOWING)

    return count(ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE)))


def _read(notebook) -> list[str]:
    """After every main figure (tag `figures`) the next code cell says in two computed sentences how to read it."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    after = [(cell, code[i + 1] if i + 1 < len(code) else None) for i, cell in enumerate(code)]
    return [
        f"no cell tagged reading after the figure of {cell.source.strip().splitlines()[0][:40]!r}"
        for cell, following in after
        if "figures" in _tags(cell) and (following is None or "reading" not in _tags(following))
    ]


def _refutable(notebook) -> list[str]:
    """The question lists what would refute it, and the record carries the answers."""
    broken = [] if claims(notebook) else ['no list under "### What would refute it"']
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and "record" in _tags(cell)]
    return broken + ["the record has no refutations" for cell in code if "refutations=" not in cell.source]


def claims(notebook) -> list[str]:
    """Return the lines of the list under "What would refute it"."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    section = CLAIMS.search(text)
    return re.findall(r"^- +(.+?)\s*$", section[1], flags=re.MULTILINE) if section else []


def _sections(notebook) -> dict[str, str]:
    """Return the prose under each second-level heading."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    parts = re.split(r"^## +(.+?)\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def _plain(notebook) -> list[str]:
    """No sentence is too long; code, tables, headings, and a list of references with years do not count."""
    return [
        f"cell {index}: a sentence of {words} words, at most {MOST_WORDS}: {sentence[:60]} …"
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown"
        for paragraph in _paragraphs(cell.source)
        if not (paragraph.startswith(REFERENCES) and all(YEAR.search(entry) for entry in paragraph.split(" · ")))
        for sentence in SENTENCE_END.split(paragraph.replace("et al.", "et al"))
        if (words := sum(any(map(str.isalnum, word)) for word in sentence.split())) > MOST_WORDS
    ]


def _paragraphs(source: str) -> list[str]:
    """Return the paragraphs and list items of Markdown, one line each, a code span as the word `code`."""
    source = re.sub(r"`[^`]*`", "`code`", re.sub(r"```.*?```", "", source, flags=re.DOTALL))
    paragraphs = [""]
    for line in map(str.strip, source.splitlines()):
        if not line or line.startswith(("#", "|")):
            paragraphs.append("")
        elif item := LIST_ITEM.match(line):
            paragraphs.append(line[item.end() :])
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {line}".strip()
    return paragraphs


def _typed(notebook) -> list[str]:
    """Prose has no measured number; a formula is code, a cited figure has its source in brackets on its line."""
    broken = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        source = re.sub(r"```.*?```|`[^`]*`|\b95 %", "", cell.source, flags=re.DOTALL)
        for line in source.splitlines():
            match = TYPED.search(line)
            if match and not CITED.search(line):
                broken.append(f"cell {index}: a typed number: {match[0]}")
    return broken


def _glued(notebook) -> list[str]:
    """Exactly one cell glues: the tagged record."""
    glue = re.compile(r"\bglue\s*\(")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "record" in _tags(cell)]
    broken = [] if len(tagged) == 1 else [f"{len(tagged)} cells are tagged record"]
    broken += [
        "a cell glues that is not tagged record" for cell in code if glue.search(cell.source) and cell not in tagged
    ]
    return broken + ["the cell tagged record does not glue" for cell in tagged if not glue.search(cell.source)]


def _ended(notebook) -> list[str]:
    """The last cell is the environment card."""
    last = notebook.cells[-1] if notebook.cells else None
    return [] if last is not None and "environment" in _tags(last) else ["the last cell is not the environment card"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_follow_the_skeleton(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_refutation_list_matches_the_experiments_claims(path):
    """The list in prose and `CLAIMS` in the optimization's folder have the same lines, word for word."""
    folder = NOTEBOOKS.parent / "lib" / "optimizations" / path.stem
    stated = [
        ast.literal_eval(node.value)
        for file in sorted(folder.glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "CLAIMS" for target in node.targets)
    ]
    assert [list(lines) for lines in stated] == [claims(nbformat.read(path, as_version=4))]


def test_the_overview_is_stored_clean_and_has_short_cells():
    notebook = nbformat.read(NOTEBOOKS / "overview.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert [fault for rule in (_stored, _short, _plain, _typed) for fault in rule(notebook)] == []
    assert "parameters" in _tags(next(cell for cell in notebook.cells if cell.cell_type == "code"))


def _sound() -> nbformat.NotebookNode:
    """Return the smallest template that follows every rule."""
    v = nbformat.v4
    lines = [f"{name}: {kind} = {DEFAULTS.get(name, repr('x'))}  # help" for name, kind in COMMON]
    lines.append("ratio: float = 0.25  # share removed, in [0, 1)")
    sources = dict.fromkeys(TAGS, "show()") | {
        "parameters": "\n".join(lines),
        "record": "record.glue(record.build(refutations=answers))",
    }
    cells = [v.new_markdown_cell("# Title"), *(v.new_markdown_cell(f"## {name}\n\nProse.") for name in HEADINGS)]
    cells[1].source += "\n\n### What would refute it\n\n- Nothing changes."
    cells += [
        v.new_markdown_cell("Known: 1.9 % lost [Authors 2025]; predicted `2.0×`; 95 % interval.") for _ in range(6)
    ]
    return v.new_notebook(cells=cells + [v.new_code_cell(sources[tag], metadata={"tags": [tag]}) for tag in TAGS])


def _cell(notebook, tag: str):
    return next(cell for cell in notebook.cells if tag in _tags(cell))


def test_a_sound_template_has_no_fault():
    assert faults(_sound()) == []


BREAK: dict[str, Callable] = {
    "outputs": lambda n: _cell(n, "apply").outputs.append(nbformat.v4.new_output("stream", text="1")),
    "execution count": lambda n: _cell(n, "apply").update(execution_count=3),
    "papermill metadata in the notebook": lambda n: n.metadata.update(papermill={}),
    ": papermill metadata": lambda n: _cell(n, "apply").metadata.update(papermill={}),
    "not tagged parameters": lambda n: _cell(n, "parameters").metadata.update(tags=[]),
    "not `name: type": lambda n: _cell(n, "parameters").update(source=_cell(n, "parameters").source + "\nx = 1"),
    "parameter seed: int is missing": lambda n: _cell(n, "parameters").update(
        source=_cell(n, "parameters").source.replace("seed: int", "seed: float")
    ),
    'the default is not "quick"': lambda n: _cell(n, "parameters").update(
        source=_cell(n, "parameters").source.replace('"quick"', '"thorough"')
    ),
    "no cell tagged speed": lambda n: n.cells.remove(_cell(n, "speed")),
    "out of order": lambda n: n.cells.insert(8, n.cells.pop(n.cells.index(_cell(n, "record")))),
    "13 lines of code": lambda n: _cell(n, "apply").update(source="\n".join(["x = 1"] * 13)),
    "a line of 89 columns": lambda n: _cell(n, "apply").update(source="x = " + "1" * 85),
    "2 displayed results": lambda n: _cell(n, "apply").update(source="for x in y:\n    tables.show(x)"),
    "no cell tagged reading after": lambda n: n.cells.remove(_cell(n, "reading")),
    "no list under": lambda n: n.cells[1].update(source="## Question"),
    "the record has no refutations": lambda n: _cell(n, "record").update(source="record.glue(result)"),
    "lines of code, at most 125": lambda n: n.cells.extend(
        nbformat.v4.new_code_cell("\n".join(["x = 1"] * 12)) for _ in range(11)
    ),
    "only 12 of prose": lambda n: n.cells.pop(7),
    'no heading "Limits"': lambda n: n.cells[6].update(source="## Something"),
    "the idea takes 151 words": lambda n: n.cells[2].update(source="## Idea\n\n" + "word " * 151),
    "not the title": lambda n: n.cells[0].update(source="Title"),
    "a sentence of 26 words": lambda n: n.cells[3].update(source=n.cells[3].source + "\n\n- Short. " + "Word " * 26),
    "a sentence of 27 words": lambda n: n.cells[6].update(source="## Limits\n\nReferences: A 2024 · " + "word " * 24),
    "typed number: 1.31×": lambda n: n.cells[1].update(source="## Question\n\nPrefill is 1.31× faster."),
    "typed number: 28 %": lambda n: n.cells[1].update(source="## Question\n\nWeights fall by 28 %."),
    "typed number: 812 tokens/s": lambda n: n.cells[1].update(source="## Question\n\nAbout 812 tokens/s."),
    "glues that is not tagged": lambda n: _cell(n, "apply").update(source="record.glue(result)"),
    "does not glue": lambda n: _cell(n, "record").update(source="result"),
    "2 cells are tagged record": lambda n: _cell(n, "cost").metadata.update(tags=["cost", "record"]),
    "not the environment card": lambda n: n.cells.append(nbformat.v4.new_markdown_cell("The end.")),
}


@pytest.mark.parametrize("says", BREAK)
def test_each_broken_rule_is_named(says):
    notebook = _sound()
    BREAK[says](notebook)
    assert any(says in fault for fault in faults(notebook)), faults(notebook)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_cell_can_be_run_again(path):
    """A cell that overwrites a parameter, or extends a list of another cell, gives other results the second time."""
    declared = {*template.read(path).parameters}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or "parameters" in _tags(cell):
            continue
        statements = [*ast.walk(ast.parse(cell.source))]
        targets = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
        assigned = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        extended = {
            node.target.id
            for node in statements
            if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name)
        }
        assert not assigned & declared and extended <= assigned, cell.source


def test_the_comparison_with_earlier_builds_has_every_setting():
    """A setting that only one record has is not compared: runs on another text were judged against the last build."""
    path = NOTEBOOKS / "pre_vs_post_optimization.ipynb"
    (cell,) = [cell for cell in nbformat.read(path, as_version=4).cells if cell.id == "earlier"]
    stated = {node.value for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Constant)}
    compared = {*template.read(path).parameters} - {*compare.NOT_COMPARED, "device"}  # the device is in the environment
    assert compared <= stated

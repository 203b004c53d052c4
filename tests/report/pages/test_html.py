"""Pages: offline, linked, described; failed runs render too; damage is shown and crashes nothing."""

import re

import nbformat
import pytest

from lib.measure.metrics import measurement
from lib.report.pages import html, index, result_tables, run_page
from lib.report.pages.suites import suite_files
from lib.report.records import record
from tests.report import samples

NEIGHBOURS = [("structured_pruning", name) for name in samples.MODELS] + [("continuous_nas", samples.MODELS[1])]
REACHES_OUT = re.compile(
    r"""(?:src|href|srcset|action|poster)\s*=\s*["']?\s*(?:https?:|//)|url\(\s*["']?(?:https?:|//)|@import"""
)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PROSE = """# Title

A paper ([REAP](https://arxiv.org/abs/2510.13999)), a bare <https://example.org/page>, a picture
![alt words](https://example.org/picture.png), <script src="https://example.org/x.js"></script>
<iframe src="//example.org"></iframe> <img src="https://example.org/y.png" onerror="alert(1)">

<a href="javascript:alert(1)">runs</a> <meta http-equiv="refresh" content="0; url=https://example.org">

<style>@import url("https://example.org/font.css"); p { background: url(https://example.org/z.png) }</style>

## Formula

$t = N$ and `ratio < 1`.
"""


def _notebook(path, *, error: bool = False):
    v = nbformat.v4
    picture = v.new_output(
        "display_data",
        data={"image/png": PIXEL, "text/plain": "x"},
        metadata={"image/png": {"alt": 'F1 "falls" & stays > 0.8'}},
    )
    javascript = v.new_output(
        "display_data", data={"application/javascript": "require(['https://x'])", "text/plain": "js"}
    )
    table = v.new_output(
        "display_data", data={"text/html": "<table><tr><td>1</td></tr></table>", "text/markdown": "| 1 |"}
    )
    raised = v.new_output(
        "error", ename="MemoryError", evalue="too much", traceback=["\x1b[31mMemoryError\x1b[0m: too much"]
    )
    cells = [
        v.new_markdown_cell(PROSE),
        v.new_code_cell('seed: int = 0  # "seed" < 1', metadata={"tags": ["parameters"]}),
        v.new_code_cell("figure()", outputs=[picture, javascript, table]),
        v.new_code_cell(
            "fail()", outputs=[raised] if error else [v.new_output("stream", name="stdout", text="<b>1</b>\n")]
        ),
    ]
    nbformat.write(v.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The HTML and Markdown of one sound run, and their folder."""
    out = tmp_path_factory.mktemp("executed")
    pages = html.render(_notebook(out / "in.ipynb"), samples.run(), NEIGHBOURS, out)
    return (*(page.read_text() for page in pages), out)


def test_the_page_loads_nothing_external(rendered):
    page, _, _ = rendered
    assert not REACHES_OUT.search(page)
    assert "<iframe" not in page and "onerror" not in page
    assert "javascript:alert" not in page and "http-equiv" not in page
    assert page.count("<script") == 1 and "beforeprint" in page.partition("<script>")[2]  # the page's own script only
    assert "REAP (arxiv.org/abs/2510.13999)" in page  # the reference is kept as text
    assert "alt words (example.org/picture.png)" in page


def test_both_pages_say_that_their_decisions_cover_one_run_only(rendered):
    """The index may withhold, over the whole set, what a report recommends."""
    for page in rendered[:2]:
        assert "From this run alone, with a margin of quality of 2 points." in page


def test_both_pages_say_whether_a_ratio_of_times_is_of_means_or_medians(rendered):
    """Previously every one was called a median of rounds, even the means over processes, which most are."""
    for page in rendered[:2]:
        assert "the mean over processes, or the median over paired rounds" in page


def test_code_is_folded_and_escaped(rendered):
    page, text, _ = rendered
    assert '<details class="code"><summary>parameters</summary>' in page
    assert page.count("<details open") == 0
    assert "&lt;b&gt;1&lt;/b&gt;" in page
    assert "<details><summary>parameters</summary>" in text


def test_each_section_of_the_notebook_is_folded_under_its_heading(tmp_path):
    from bs4 import BeautifulSoup

    v = nbformat.v4
    picture = v.new_output("display_data", data={"image/png": PIXEL}, metadata={"image/png": {"alt": "drawn"}})
    table = v.new_output("display_data", data={"text/html": "<table><tr><td>1</td></tr></table>"})
    texts = ["# Title\n\nopening words", "## First\n\nfirst words", "### Deeper\n\ndeeper words", "## Second"]
    cells = [v.new_markdown_cell(text) for text in texts]
    cells += [v.new_code_cell("draw()", outputs=[picture, table, picture]), v.new_markdown_cell("last words")]
    cells += [v.new_markdown_cell("## Second")]
    nbformat.write(v.new_notebook(cells=cells), tmp_path / "in.ipynb")
    page, text = html.render(tmp_path / "in.ipynb", samples.run(), (), tmp_path)
    body = BeautifulSoup(page.read_text(), "html.parser").select_one("div.notebook")
    parts = body.select("details.part")
    assert [part.summary.get_text(" ", strip=True) for part in parts] == [
        "First",
        "Second 2 figures, 1 table",
        "Second",
    ]
    assert [part["id"] for part in parts] == ["part-first", "part-second", "part-second-2"]
    assert all(part.parent is body and not part.has_attr("open") for part in parts)
    assert "first words" in parts[0].get_text() and "deeper words" in parts[0].get_text()
    assert "last words" in parts[1].get_text() and len(parts[1].select("img")) == 2
    opening = body.select_one("section.prose")
    assert "opening words" in opening.get_text() and not opening.find_parent("details")
    assert all(words in text.read_text() for words in ("first words", "deeper words", "last words"))


def test_the_alternative_text_reaches_both_pages(rendered):
    from bs4 import BeautifulSoup

    page, text, out = rendered
    described = [image["alt"] for image in BeautifulSoup(page, "html.parser").find_all("img")]
    assert 'F1 "falls" & stays > 0.8' in described
    assert all(described)
    picture = re.search(r'!\[F1 "falls" & stays > 0\.8\]\((.+?)\)', text)
    assert picture and (out / picture[1]).is_file()
    assert picture[1].startswith("structured_pruning--qwen3-4b-instruct-2507_files/")


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/svg+xml"])
def test_the_alternative_text_cannot_open_a_tag(kind, tmp_path):
    from bs4 import BeautifulSoup

    alt = 'a "b" <b id="in">c</b>'
    data = {kind: "<svg/>" if "svg" in kind else PIXEL}
    shown = nbformat.v4.new_output("display_data", data=data, metadata={kind: {"alt": alt}})
    path = tmp_path / "in.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[shown])]), path)
    page, text = html.render(path, samples.run(), (), tmp_path)
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert alt in [image["alt"] for image in soup.find_all("img")] and soup.find(id="in") is None
    assert "<b id" not in text.read_text().replace("\\<b id", "")


def test_the_name_of_a_model_cannot_open_a_tag(tmp_path):
    name = "<img src=x>"
    run = samples.run(model=name)
    record.write(run, tmp_path / f"{run.stem}.json")
    page, _ = html.render(None, run, (), tmp_path)
    suite_files.write("complete", tmp_path)
    assert name not in page.read_text() and name not in index.write(tmp_path).read_text()
    readings = {path.name: path.read_text() for path in tmp_path.glob("*.md")}
    readings["README.md"] = result_tables.section([run]) + result_tables.matrix([run])
    for title, text in readings.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)  # within a fence nothing is a tag
        assert name in prose and name not in prose.replace(f"\\{name}", ""), title


def test_the_page_opens_with_the_verdict_and_how_it_was_reached(rendered):
    page, text, _ = rendered
    for shown in (page, text):
        for words in (
            "Prefill 31 % faster, decode undecided",
            "Example Processor 9000",
            "2026-01-31 14:05",
            "quick",
            "proxy",
            "estimated",
        ):
            assert words in shown
        assert "processor time × 6.5 W per core" in shown  # the source, on demand
    assert "at most" in page and "MB" in page  # use of the machine, in words


def test_the_page_answers_the_refutations_before_the_measurements(rendered):
    from bs4 import BeautifulSoup

    page, text, _ = rendered
    lines = [
        row.get_text("|", strip=True) for row in BeautifulSoup(page, "html.parser").select(".refutations tbody tr")
    ]
    assert lines == [
        "Prefill is not faster than the baseline.|✓ not refuted|prefill rate 1.31×",
        "Answers are lost <beyond> the margin.|? cannot tell|F1 −0.4 points, margin 2",
    ]
    assert page.index('class="sentence"') < page.index("What would refute it") < page.index("Both arms, metric by")
    assert "| Prefill is not faster than the baseline. | ✓ not refuted | prefill rate 1.31× |" in text
    assert text.index("**Prefill 31 %") < text.index("## What would refute it") < text.index("## Numbers")


def test_a_stack_is_named_on_the_first_screen(tmp_path):
    steps = [{"optimization": "structured_pruning", "knobs": {"ratio": 0.2}}, {"optimization": "tensor_decomposition"}]
    run = samples.run()
    details = run.details | {"stack": record.labelled(steps, "derived", "chosen by the rule")}
    pages = html.render(None, run.model_copy(update={"details": details}), (), tmp_path)
    named = "structured pruning (ratio 0.2) → tensor decomposition"
    page, text = (path.read_text() for path in pages)
    assert 0 < page.index(named) < page.index('id="decisions"') and page.count(named) == 1
    assert f"The measured stack: {named}." in text
    page, text = (path.read_text() for path in html.render(None, run, (), tmp_path))
    assert "→ tensor decomposition" not in page and "The measured stack" not in text


def test_the_page_links_to_its_neighbours(rendered):
    page, text, _ = rendered
    for name in samples.MODELS:
        linked = f'href="structured_pruning--{name}.html"' in page
        assert linked == (name != samples.MODELS[1])
    assert 'href="continuous_nas--qwen3-4b-instruct-2507.html"' in page
    assert 'href="index.html#structured_pruning--qwen3-4b-instruct-2507"' in page
    assert "(continuous_nas--qwen3-4b-instruct-2507.md)" in text


def test_headings_are_nested_under_the_page_title(rendered):
    page, text, _ = rendered
    assert page.count("<h1") == 1
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1


def test_pictures_of_an_earlier_run_are_removed(tmp_path):
    run = samples.run()
    html.render(_notebook(tmp_path / "in.ipynb"), run, (), tmp_path)
    assert (tmp_path / f"{run.stem}_files").is_dir()
    html.render(None, run, (), tmp_path)
    assert not (tmp_path / f"{run.stem}_files").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_failed_run_renders_with_and_without_its_notebook(tmp_path):
    failed = samples.without_result("failed", "cell 4: MemoryError: too much <b>")
    for notebook in (_notebook(tmp_path / "in.ipynb", error=True), tmp_path / "none.ipynb", None):
        page, text = (path.read_text() for path in html.render(notebook, failed, NEIGHBOURS, tmp_path))
        assert "Failed, so nothing is claimed: cell 4: MemoryError" in text
        assert "too much &lt;b&gt;" in page
        assert "✗ failed" in page
    (tmp_path / "broken.ipynb").write_text("{")
    page, _ = html.render(tmp_path / "broken.ipynb", failed, (), tmp_path)
    assert "The notebook cannot be read" in page.read_text()


def test_a_notebook_without_a_record_renders(tmp_path):
    page, text = html.render(_notebook(tmp_path / "overview.ipynb"), None, (), tmp_path)
    assert page.name == "overview.html" and "<title>Title</title>" in page.read_text()
    assert text.read_text().count("\n# Title") + text.read_text().startswith("# Title") == 1


@pytest.mark.parametrize("seed", range(6))
def test_any_record_renders(seed, tmp_path):
    page, _ = html.render(None, samples.by_chance(seed), (), tmp_path)
    assert not REACHES_OUT.search(page.read_text())


def _folder(path):
    records = [
        samples.run(),
        samples.run(model=samples.MODELS[2], accuracy="not_maintained"),
        samples.without_result("failed", "cell 3 <apply>: RuntimeError"),
        samples.without_result("not_applicable", "no experts", "continuous_nas", samples.MODELS[3]),
    ]
    for run in records:
        record.write(run, path / f"{run.stem}.json")
    (path / f"{records[0].stem}.html").write_text("page")
    (path / "continuous_nas--qwen3-coder-30b.json").write_text('{"schema": 1, "optim')
    (path / "complete_benchmark_suite_results.json").write_text("{}")  # not a run
    return path


def test_the_matrix_shows_every_state(tmp_path):
    from bs4 import BeautifulSoup

    page = index.write(
        _folder(tmp_path), ["structured_pruning", "continuous_nas", "feedback_mechanisms"], samples.MODELS
    )
    text = page.read_text()
    soup = BeautifulSoup(text, "html.parser")
    body = soup.select_one("table.matrix").select("tbody tr")
    assert [row.th.get_text() for row in body] == ["Structured pruning", "Continuous NAS", "Feedback mechanisms"]
    assert all(len(row.find_all("td")) == 4 for row in body)
    assert all(head.get("scope") for head in soup.find_all("th"))
    cell = {
        (row.th.get_text(), td["data-model"]): td.get_text(" ", strip=True) for row in body for td in row.find_all("td")
    }
    whole = cell["Structured pruning", "qwen3-4b-instruct-2507"]
    assert "performance: ▲ ▲ better: prefill 31 % faster" in whole  # the chip names the metric behind the verdict
    assert "F1 ✓ maintained: −0.4 points (lower bound −1.7" in whole
    assert "prefill ▲ better: 31 % faster (+28.0 to +34.0 %)" in whole
    assert "energy per token · informative: −19 % (−21.0 to −15.0 %) estimated" in whole
    assert "processor time × 6.5 W per core" in whole  # the source, on demand
    assert "✗ not maintained" in cell["Structured pruning", "qwen3-coder-30b"]
    assert "✗ failed" in cell["Structured pruning", "glm-4.7-flash"]
    assert "cell 3 <apply>: RuntimeError" in cell["Structured pruning", "glm-4.7-flash"]
    assert "not applicable" in cell["Continuous NAS", "qwen3-vl-2b"]
    assert "continuous_nas--qwen3-coder-30b.json: not a record" in cell["Continuous NAS", "qwen3-coder-30b"]
    assert cell["Feedback mechanisms", "qwen3-vl-2b"].startswith("· missing")
    stem = "structured_pruning--qwen3-4b-instruct-2507"
    assert [a["href"] for row in body for a in row.find_all("a")] == [f"{stem}.html", f"{stem}.json"]
    again = f"python build.py run {stem.replace('--', ' --model ')} --effort quick -p ratio=0.3 -p seed=0 --force"
    assert again in whole
    assert "2 of 12 runs measured, 1 failed, 1 not applicable, 1 damaged, 7 not run." in text
    assert not REACHES_OUT.search(text) and text.count("<script>") == text.count("<script") == 1


@pytest.mark.parametrize(("scale", "option"), [("proxy", ""), ("slice", " --scale slice")])
def test_commands_of_a_page_use_its_scale(scale, option, tmp_path):
    run = samples.run().model_copy(update={"scale": scale})
    record.write(run, tmp_path / f"{run.stem}.json")
    text = index.write(tmp_path, ["continuous_nas"], [run.model]).read_text()
    assert f"<code>python build.py run continuous_nas --model {run.model}{option}</code>" in text
    assert f"<code>python build.py check{option}</code>" in text
    for kind in ("comprehensive", "enhanced", "coverage"):
        suite_files.write(kind, tmp_path, ["continuous_nas"], [run.model])
        report = (tmp_path / suite_files.FILES[kind][-1]).read_text()
        assert f"```sh\npython build.py {kind}{option}\n```" in report


def test_commands_of_a_page_use_its_result_folder(tmp_path):
    from bs4 import BeautifulSoup

    def commands_of(path):
        texts = [code.get_text() for code in BeautifulSoup(path.read_text(), "html.parser").select("code")]
        return [text for text in texts if text.startswith("python build.py")]

    out = tmp_path / "my results"
    run = samples.whole("structured_pruning", samples.MODELS[1]).model_copy(update={"process": None})
    folder = out / "proxy"
    record.write(run, folder / f"{run.stem}.json")
    page, markdown = html.render(None, run, (), folder)
    listed = commands_of(index.write(folder, ["continuous_nas"], [run.model])) + commands_of(page)
    assert len(listed) > 4 and all(text.endswith(f"--out '{out}'") for text in listed)
    *deciding, again = [line for line in markdown.read_text().splitlines() if line.startswith("python build.py")]
    assert again == listed[-1] and " --force --out " in again
    assert deciding and all(line in listed for line in deciding)
    suite_files.write("coverage", folder, ["continuous_nas"], [run.model])
    report = (folder / suite_files.FILES["coverage"][-1]).read_text()
    assert f"```sh\npython build.py coverage --out '{out}'\n```" in report


def test_a_folder_of_two_scales_names_both_and_its_commands_use_that_folder(tmp_path):
    folder, v = tmp_path / "proxy", nbformat.v4
    run, real = samples.run(), samples.run(model="a-real-model").model_copy(update={"scale": "full"})
    for one in (run, real):
        record.write(one, folder / f"{one.stem}.json")
    nbformat.write(v.new_notebook(cells=[v.new_markdown_cell("# Overview")]), folder / "overview.ipynb")
    page, _ = html.render(folder / "overview.ipynb", None, (), folder)
    assert "<title>Overview: results at scales full and proxy</title>" in page.read_text()
    text = index.write(folder, ["continuous_nas"], [run.model]).read_text()
    assert "<title>Results at scales full and proxy</title>" in text and "check --scale full" not in text
    suite_files.write("all", folder, ["continuous_nas"], [run.model])
    assert "scale full and proxy" in (folder / suite_files.FILES["all"][-1]).read_text()
    (folder / f"{real.stem}.json").unlink()
    page, _ = html.render(folder / "overview.ipynb", None, (), folder)
    assert "<title>Overview: results on proxy models (stand-ins)</title>" in page.read_text()


def test_an_empty_matrix_says_so(tmp_path):
    assert "There is no record here yet." in index.write(tmp_path).read_text()


def _contrast(first: str, second: str) -> float:
    """Return the contrast ratio of two colors (WCAG 2.1)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_in_light_and_dark():
    sheet = (html.TEMPLATES / "style.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", sheet, re.S)[:2]
    ]
    pairs = [("ink", "paper"), ("soft", "paper"), ("soft", "shade"), ("link", "paper")]
    pairs += [(name, f"{name}-shade") for name in ("good", "bad", "open", "mixed")]
    for theme in themes:
        assert all(_contrast(theme[text], theme[ground]) >= 4.5 for text, ground in pairs)


def test_markdown_also_names_the_deciding_command(tmp_path):
    run = samples.whole("structured_pruning", samples.MODELS[1])
    _, markdown = html.render(None, run, (), tmp_path)
    text, decisions = markdown.read_text(), run_page.view(run, (), tmp_path)["decisions"]
    commands = {item["command"]: item["goal"] for item in decisions if item["command"]}
    assert len(commands) == 1 and all(f"```sh\n{command}\n```" in text for command in commands)
    assert "What decides on energy, about " in text
    assert text.index("| energy | undecided |") < text.index("What decides on energy")


@pytest.mark.parametrize(
    "element",
    [
        '<a href="java&#9;script:alert(1)">runs</a>',
        '<a href="&#1;javascript:alert(1)">runs</a>',
        '<img alt="seen" srcset="a.png 1x, https://example.org/b.png 2x">',
        '<img alt="seen" src="ht&#10;tps://example.org/y.png">',
    ],
)
def test_the_seal_finds_disguised_addresses(element):
    """Browsers remove tabs, newlines and control characters from an address before they read its scheme."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(f"<main>{element}</main>", "html.parser")
    html.seal(soup)
    assert not [name for tag in soup.find_all(True) for name in tag.attrs if name in html.ADDRESSES]
    inside = '<img src="a picture.png" srcset="a.png 1x, b.png 2x"><a href="index.html#x">x</a>'
    own = BeautifulSoup(inside, "html.parser")
    html.seal(own)
    assert own.img["src"] == "a picture.png" and own.img["srcset"] and own.a["href"] == "index.html#x"


def test_a_fence_in_printed_output_does_not_close_the_block(tmp_path):
    """A model's output may contain one; the rest of the page would be read as code, and the code as page text."""
    v = nbformat.v4
    written = "```python\n<img src=x onerror=alert(1)>\n```"
    outputs = [v.new_output("stream", name="stdout", text=f"{written}\n")]
    outputs += [v.new_output("execute_result", data={"text/plain": written})]
    nbformat.write(v.new_notebook(cells=[v.new_code_cell("print(text)", outputs=outputs)]), tmp_path / "in.ipynb")
    run = samples.run().model_copy(update={"log": written})
    _, text = html.render(tmp_path / "in.ipynb", run, (), tmp_path)
    assert text.read_text().count(f"````text\n{written}\n````") == 3
    assert "```python\nprint(text)\n```" in text.read_text()


def test_markdown_shows_informative_numbers_alone(tmp_path):
    run = samples.run(measurements=[measurement.informative("load_seconds", "load", 1.5, 2.5, "perf_counter, once")])
    page, text = (path.read_text(encoding="utf-8") for path in html.render(None, run, (), tmp_path))
    assert "## Numbers" in text and "2.50 s" in text and "perf_counter, once" in text
    assert 'href="#measurements"' in page

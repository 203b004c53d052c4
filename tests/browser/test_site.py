"""The site as a reader meets it: opened from disk without a network, on two widths, by keyboard, in print."""

import io
import zipfile
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from PIL import Image

from lib.report.analysis.noise import discoveries
from lib.report.pages import archive, html, index
from lib.report.records import record
from tests.report import samples

AUDIT = (Path(__file__).parent / "audit.js").read_text(encoding="utf-8")
WIDTHS = (1280, 390)
FEW = ("structured_pruning", "continuous_nas", "automl_components")
PAGES = (
    "index.html",
    "structured_pruning--qwen3-4b-instruct-2507.html",
    "automl_components--glm-4.7-flash.html",
    "overview.html",
)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder of all eleven optimizations in which everything happens that may, with the pages of three of them."""
    folder = tmp_path_factory.mktemp("executed") / "proxy"
    folder.mkdir()
    samples.mixed(folder)
    pages = [found for found in record.read_folder(folder)[0] if found.optimization in FEW]
    neighbours = [(found.optimization, found.model) for found in pages]
    for found in pages:
        bare = found if found.model == samples.MODELS[1] else found.model_copy(update={"process": None})
        html.render(None, bare, neighbours, folder)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Overview\n\nEverything.")])
    nbformat.write(notebook, folder / "overview.ipynb")
    html.render(folder / "overview.ipynb", None, neighbours, folder)
    for name in ("optimization_coverage_report.md", "complete_benchmark_suite_results.json"):
        (folder / name).write_text("{}")
    index.write(folder, samples.OPTIMIZATIONS, samples.MODELS)
    return folder


@pytest.fixture
def open_page(browser):
    """Return a function that opens a file with the network blocked; what it reached for and complained of is kept."""
    contexts = []

    def opened(path, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.faults = []
        page.on("console", lambda said: page.faults.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on(
            "request", lambda asked: None if asked.url.startswith(("file:", "data:")) else page.faults.append(asked.url)
        )
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_pages_open_from_disk_and_fit_the_window(site, open_page, tmp_path, name, width):
    page = open_page(site / name, viewport={"width": width, "height": 900})
    picture = Image.open(
        io.BytesIO(page.screenshot(full_page=True, path=tmp_path / f"{name}-{width}.png", timeout=180_000))
    )
    assert len(picture.convert("RGB").getcolors(2**24)) > 20  # something is drawn
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_pages_are_accessible(site, open_page, name, scheme):
    page = open_page(site / name, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate(AUDIT) == []
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate(AUDIT) == []


def test_the_audit_finds_what_it_looks_for(site, open_page):
    page = open_page(site / "overview.html")
    page.evaluate(
        """document.querySelector('main').insertAdjacentHTML('beforeend', `<h4>deep</h4><img src="data:,">
        <a href="x"></a>        <p id="x" style="color:#999">pale</p><p id="x">twice</p>
        <table><tr><td>1</td></tr></table><select></select>
        <div aria-labelledby="nowhere" role="thing"></div>`)"""
    )
    found = "\n".join(page.evaluate(AUDIT))
    for told in ("heading skips", "no alternative text", "no name: a", "contrast 2.8", "id twice", "table without",
                 "no name: select", "leads nowhere", "unknown role"):  # fmt: skip
        assert told in found, told


def _links(page):
    script = "(name) => [...document.querySelectorAll(`[${name}]`)].map((one) => one.getAttribute(name))"
    return [*page.evaluate(script, "href"), *page.evaluate(script, "src")]


def _dead(folder, open_page):
    """Return every link of every page that leads nowhere."""
    dead = []
    anchors = {}
    pages = {path.name: open_page(path) for path in sorted(folder.glob("*.html"))}
    for name, page in pages.items():
        anchors[name] = set(page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)"))
    for name, page in pages.items():
        for link in _links(page):
            path, anchor = urldefrag(link)
            target = unquote(path) or name
            if link.startswith("data:"):
                continue
            if not (folder / target).is_file() or (anchor and anchor not in anchors.get(target, ())):
                dead.append(f"{name}: {link}")
    return dead


def test_every_link_leads_somewhere_and_back(site, open_page):
    assert _dead(site, open_page) == []
    page = open_page(site / "index.html")
    page.get_by_role("link", name="Report: Structured pruning on qwen3-vl-2b").click()
    assert (
        page.get_by_role("heading", level=1).inner_text()
        == "Structured pruning on a stand-in for Qwen3-VL-2B (3.62 M parameters)"
    )
    page.get_by_role("link", name="all results").click()
    assert page.url.endswith("index.html#structured_pruning--qwen3-vl-2b")
    page.locator("td:target").wait_for()
    assert page.faults == []


def test_what_is_sent_opens_too(site, open_page, tmp_path):
    with zipfile.ZipFile(archive.write(site)) as packed:
        packed.extractall(tmp_path)
    assert _dead(tmp_path / "report", open_page) == []


def _shown(page):
    return page.locator("#matrix ~ table.matrix td[id] > .inside:visible").count()


def test_filters(site, open_page):
    page = open_page(site / "index.html")
    total = len(samples.OPTIMIZATIONS) * len(samples.MODELS)
    status = page.get_by_role("status")
    assert _shown(page) == total and status.inner_text() == f"{total} of {total} cells shown"
    page.get_by_role("combobox", name="Model").select_option("qwen3-vl-2b")
    assert _shown(page) == 11 and page.locator("th[data-model]:visible").all_inner_texts() == ["qwen3-vl-2b"] * 5
    page.get_by_role("combobox", name="Dimension").select_option("accuracy")
    heads = set(page.locator("#matrix ~ table.matrix .part:visible .head > span:first-child").all_inner_texts())
    assert heads == {"Quality"} and page.locator("section[data-dimension]:visible h3").all_inner_texts() == ["Accuracy"]
    page.get_by_role("combobox", name="Verdict").select_option("maintained")
    cells = discoveries.cells(record.read_folder(site)[0])  # the words that hold for the set
    on_it = [cell for cell in cells if cell.model == "qwen3-vl-2b" and cell.dimension == "accuracy"]
    kept = sum(cell.word == "maintained" for cell in on_it)
    assert 0 < kept < 11 and _shown(page) == kept and status.inner_text() == f"{kept} of {total} cells shown"
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("document.querySelector('output').value.startsWith('44 of 44')")
    assert _shown(page) == total
    page.get_by_role("combobox", name="Verdict").select_option("failed")
    assert _shown(page) == 1 and "MemoryError" in page.locator("td[id][data-status=failed]").inner_text()
    assert page.faults == []


def test_the_keyboard_is_enough(site, open_page):
    page = open_page(site / "index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # seen once it has the focus
    page.keyboard.press("Enter")
    page.get_by_role("combobox", name="Model").focus()
    page.keyboard.type("qwen3-vl")
    page.wait_for_function("document.querySelector('output').value.startsWith('11 of')")
    cell = page.locator("#structured_pruning--qwen3-vl-2b")
    cell.locator("summary").focus()
    page.keyboard.press("Enter")
    assert "python build.py run structured_pruning --model qwen3-vl-2b" in cell.locator("pre").inner_text()
    assert "balanced AB/BA blocks" in cell.locator("dl").inner_text()


def test_without_scripts_everything_is_shown(site, open_page):
    page = open_page(site / "index.html", java_script_enabled=False)
    assert page.locator("#filter").is_hidden() and _shown(page) == 44


def test_print(site, open_page):
    page = open_page(site / "index.html")
    page.emulate_media(media="print")
    assert page.locator("#filter").is_hidden() and page.locator("nav.sections").is_hidden()
    assert page.pdf(format="A4")[:5] == b"%PDF-"

"""The site as a reader uses it: opened from disk without a network, at two widths, by keyboard, in print."""

import io
import zipfile
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from PIL import Image

from lib.report.analysis import advice
from lib.report.analysis.noise import discoveries
from lib.report.figures.inline import forest_svg
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
    """A folder of all eleven optimizations that covers every possible case, with the pages of three of them."""
    folder = tmp_path_factory.mktemp("executed") / "proxy"
    folder.mkdir()
    samples.mixed(folder)
    pages = [run for run in record.read_folder(folder)[0] if run.optimization in FEW]
    neighbours = [(run.optimization, run.model) for run in pages]
    for run in pages:
        bare = run if run.model == samples.MODELS[1] else run.model_copy(update={"process": None})
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
    """Return a function that opens a file with the network blocked; its requests and errors are recorded."""
    contexts = []

    def opened(path, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.faults = []
        page.on(
            "console",
            lambda message: page.faults.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else page.faults.append(request.url),
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
    for tab in page.get_by_role("tab").all() or [None]:
        if tab:
            tab.click()
        assert page.evaluate(AUDIT) == []
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate(AUDIT) == []


def test_the_audit_detects_faults(site, open_page):
    page = open_page(site / "overview.html")
    page.evaluate(
        """document.querySelector('main').insertAdjacentHTML('beforeend', `<h4>deep</h4><img src="data:,">
        <a href="x"></a>        <p id="x" style="color:#999">pale</p><p id="x">twice</p>
        <table><tr><td>1</td></tr></table><select></select>
        <div aria-labelledby="nowhere" role="thing"></div>`)"""
    )
    faults = "\n".join(page.evaluate(AUDIT))
    for fault in ("heading skips", "no alternative text", "no name: a", "contrast 2.8", "id twice", "table without",
                 "no name: select", "leads nowhere", "unknown role"):  # fmt: skip
        assert fault in faults, fault


def _links(page):
    script = "(name) => [...document.querySelectorAll(`[${name}]`)].map((one) => one.getAttribute(name))"
    return [*page.evaluate(script, "href"), *page.evaluate(script, "src")]


def _dead(folder, open_page):
    """Return every broken link of every page."""
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


def test_every_link_resolves_and_leads_back(site, open_page):
    assert _dead(site, open_page) == []
    page = open_page(site / "index.html")
    _tab(page, "Matrix")
    page.get_by_role("link", name="Report: Structured pruning on qwen3-vl-2b").click()
    assert (
        page.get_by_role("heading", level=1).inner_text()
        == "Structured pruning on a stand-in for Qwen3-VL-2B (3.62 M parameters)"
    )
    page.get_by_role("link", name="all results").click()
    assert page.url.endswith("index.html#structured_pruning--qwen3-vl-2b")
    page.locator("td:target").wait_for()
    assert page.faults == []


def test_links_work_in_the_zip_archive(site, open_page, tmp_path):
    with zipfile.ZipFile(archive.write(site)) as packed:
        packed.extractall(tmp_path)
    assert _dead(tmp_path / "report", open_page) == []


def _shown(page):
    return page.locator("#matrix td[id] > .inside:visible").count()


def _tab(page, name):
    page.get_by_role("tab", name=name).click()


def test_filters(site, open_page):
    page = open_page(site / "index.html")
    _tab(page, "Matrix")
    total = len(samples.OPTIMIZATIONS) * len(samples.MODELS)
    status = page.locator("#filter output")
    assert _shown(page) == total and status.inner_text() == f"{total} of {total} cells shown"
    page.get_by_role("combobox", name="Column").select_option("qwen3-vl-2b")
    assert _shown(page) == 11
    assert page.locator("#matrix th[data-model]:visible").all_inner_texts() == ["qwen3-vl-2b"]
    page.get_by_role("combobox", name="Dimension").select_option("accuracy")
    shown = page.locator("#matrix .part:visible").evaluate_all("(all) => all.map((one) => one.dataset.dimension)")
    assert set(shown) == {"accuracy"}
    page.get_by_role("combobox", name="Verdict").select_option("maintained")
    cells = discoveries.cells(record.read_folder(site)[0])  # verdicts as corrected for the whole set
    on_it = [cell for cell in cells if cell.model == "qwen3-vl-2b" and cell.dimension == "accuracy"]
    kept = sum(cell.word == "maintained" for cell in on_it)
    assert 0 < kept < 11 and _shown(page) == kept and status.inner_text() == f"{kept} of {total} cells shown"
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("document.querySelector('#filter output').value.startsWith('44 of 44')")
    assert _shown(page) == total
    page.get_by_role("combobox", name="Verdict").select_option("failed")
    assert _shown(page) == 1 and "MemoryError" in page.locator("td[id][data-status=failed]").inner_text()
    assert page.faults == []


def _rows(page):
    return page.locator("#decisions tbody tr:visible")


def test_the_choice_shows_one_line_per_optimization(site, open_page):
    page = open_page(site / "index.html")
    records = discoveries.settled(record.read_folder(site)[0])
    for model, goal, keep in ((samples.MODELS[3], "size", 0.02), (samples.MODELS[0], "latency", 0.1)):
        page.get_by_role("combobox", name="Model").select_option(model)
        page.get_by_role("combobox", name="Goal").select_option(goal)
        page.get_by_role("combobox", name="may lose").select_option(f"{keep:g}")
        advised = advice.advise(records, model, [advice.Goal(goal)], keep)
        states = page.locator("#decisions .decided .state:visible").all_inner_texts()
        assert sorted(states) == sorted(row.decision for row in advised) and _rows(page).count() == len(advised)
        places = [advice.ORDER.index(state) for state in states]
        assert places == sorted(places)  # recommended ones come first
        counted = page.locator("#choice output").inner_text()
        assert f"{states.count(states[0])} {states[0]}" in counted
    assert page.faults == []


def test_the_table_sorts_by_every_column(site, open_page):
    page = open_page(site / "index.html")
    values = "(all) => all.map((row) => row.querySelector(`td[data-label=Prefill]`).dataset.value).filter(Boolean)"
    page.get_by_role("button", name="Prefill").click()
    sorted_down = [float(text) for text in _rows(page).evaluate_all(values)]
    assert len(sorted_down) > 5 and sorted_down == sorted(sorted_down, reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Prefill")
    page.get_by_role("button", name="Prefill").click()
    assert [float(text) for text in _rows(page).evaluate_all(values)] == sorted_down[::-1]
    page.get_by_role("button", name="Optimization").click()
    names = _rows(page).locator("th a").all_inner_texts()
    assert names == sorted(names)
    for name in ("Quality", "Decode", "Weights", "Decision"):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.locator("th[aria-sort=ascending], th[aria-sort=descending]").inner_text().startswith(name)
    fresh = open_page(site / "index.html")  # already sorted by decision: a click there reverses the order
    assert fresh.locator("th[aria-sort=ascending]").inner_text().startswith("Decision")
    fresh.get_by_role("button", name="Decision", exact=True).click()
    assert fresh.locator("th[aria-sort=descending]").inner_text().startswith("Decision")
    assert page.faults == [] and fresh.faults == []


def test_the_url_keeps_the_selection(site, open_page):
    page = open_page(site / "index.html")
    page.get_by_role("combobox", name="Model").select_option("qwen3-vl-2b")
    page.get_by_role("combobox", name="Goal").select_option("memory")
    page.get_by_role("combobox", name="may lose").select_option("0.05")
    page.get_by_role("button", name="Weights").click()
    names, address = _rows(page).locator("th a").all_inner_texts(), page.url
    again = open_page(site / "index.html")
    again.goto(address)
    again.reload()
    chosen = again.evaluate("[...document.querySelectorAll('#choice select')].map((one) => one.value)")
    assert chosen == ["qwen3-vl-2b", "memory", "0.05"] and _rows(again).locator("th a").all_inner_texts() == names
    _tab(again, "Trade-offs")
    third = open_page(site / "index.html")
    third.goto(again.url)
    third.reload()
    assert third.locator("#trade-offs").is_visible() and not third.locator("#decide").is_visible()
    odd = open_page(site / "index.html")
    for address in ("model=nobody&goal=beauty&sort=age&view=nowhere", "model=qwen%E2%8", "%"):
        odd.goto(f"{(site / 'index.html').as_uri()}#{address}")
        odd.reload()
        assert odd.locator("#decide").is_visible() and _rows(odd).count() > 5 and odd.faults == [], address


def test_the_url_keeps_the_matrix_filter(site, open_page):
    page = open_page(site / "index.html")
    _tab(page, "Matrix")
    page.get_by_role("combobox", name="Column").select_option("qwen3-vl-2b")
    page.get_by_role("combobox", name="Verdict").select_option("maintained")
    shown = page.locator("#filter output").inner_text()
    again = open_page(site / "index.html")
    again.goto(page.url)
    again.reload()
    assert not shown.startswith("44 of") and again.locator("#filter output").inner_text() == shown
    assert again.get_by_role("combobox", name="Verdict").input_value() == "maintained"
    again.get_by_role("button", name="Show all").click()
    again.wait_for_function("!location.hash.includes('verdict')")
    assert page.faults == [] and again.faults == []


def test_a_link_to_a_filtered_out_cell_shows_it(site, open_page):
    page = open_page(site / "index.html")
    _tab(page, "Matrix")
    page.get_by_role("combobox", name="Column").select_option("qwen3-vl-2b")
    stem = f"structured_pruning--{samples.MODELS[0]}"
    assert samples.MODELS[0] != "qwen3-vl-2b" and page.locator(f"[id='{stem}']").is_hidden()
    page.evaluate("(stem) => { location.hash = stem; }", stem)
    page.locator(f"[id='{stem}']").wait_for()
    assert page.get_by_role("combobox", name="Column").input_value() == "" and page.faults == []


def test_settings_missing_from_a_url_are_reset(site, open_page):
    """A different URL pasted into the open page shows its own selection, not the previous one."""
    page = open_page(site / "index.html")
    page.get_by_role("combobox", name="Goal").select_option("size")
    page.get_by_role("spinbutton", name="at most").fill("0.001")
    page.get_by_role("button", name="Weights").click()
    _tab(page, "Matrix")
    page.get_by_role("combobox", name="Column").select_option("qwen3-vl-2b")
    fresh = open_page(site / "index.html")
    fresh.goto(f"{(site / 'index.html').as_uri()}#goal=size&view=decide")
    fresh.reload()
    page.evaluate("location.hash = 'goal=size&view=decide'")
    page.wait_for_function("!document.querySelector('#decide').hidden")
    assert page.get_by_role("spinbutton", name="at most").input_value() == ""
    states = [_rows(one).locator(".state:visible").all_inner_texts() for one in (page, fresh)]
    assert states[0] == states[1] and page.locator("th[aria-sort=descending]").count() == 0
    _tab(page, "Matrix")
    assert page.get_by_role("combobox", name="Column").input_value() == "" and page.faults == []


def test_a_long_model_name_does_not_widen_the_page(tmp_path, open_page):
    run = samples.run(optimization=FEW[0], model="a-model-with-" + "a-very-long-" * 12 + "name")
    record.write(run, tmp_path / f"{run.stem}.json")
    index.write(tmp_path)
    page = open_page(tmp_path / "index.html", viewport={"width": 390, "height": 900})
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab.inner_text()


def test_names_in_charts_are_not_cut_off(site, open_page):
    page = open_page(site / PAGES[1])
    for name in ("energy per token", "peak memory", "memory traffic per decoded token"):
        svg = forest_svg.forest([forest_svg.ForestLine(name, "5 % lower", 5.0, None, None, None, "better")], "Changes")
        page.evaluate("(svg) => { document.querySelector('.forest').innerHTML = svg; }", svg)
        assert page.locator(".forest text", has_text=name).evaluate("(text) => text.getBBox().x") >= 0, name


def test_a_typed_size_limit_is_applied_to_the_decisions(site, open_page):
    page = open_page(site / "index.html")
    records = discoveries.settled(record.read_folder(site)[0])
    model, limit = samples.MODELS[3], page.get_by_role("spinbutton", name="at most")
    page.get_by_role("combobox", name="Model").select_option(model)
    assert limit.is_hidden()  # latency has no limit
    page.get_by_role("combobox", name="Goal").select_option("size")
    taken = [
        float(cell.get_attribute("data-bytes"))
        for cell in page.locator(f"tr[data-model='{model}'] [data-goal=size] .limited").all()
    ]
    for megabytes in (min(taken) / 2e6, sorted(taken)[len(taken) // 2] / 1e6 + 1e-3, 1e6):
        limit.fill(f"{megabytes:.6f}")
        advised = advice.advise(records, model, [advice.Goal("size", megabytes * 1e6)])
        states = page.locator("#decisions .decided .state:visible").all_inner_texts()
        assert sorted(states) == sorted(row.decision for row in advised)
        places = [advice.ORDER.index(state) for state in states]
        assert places == sorted(places)
    limit.fill("0.001")
    again = open_page(site / "index.html")
    again.goto(page.url)
    again.reload()
    assert again.get_by_role("spinbutton", name="at most").input_value() == "0.001"
    assert "use" not in again.locator("#decisions .decided .state:visible").all_inner_texts()
    page.get_by_role("combobox", name="Goal").select_option("latency")
    assert page.locator(".limited:visible").count() == 0 and page.faults == [] and again.faults == []


def test_every_view_of_the_index_is_at_most_three_screens_high(site, open_page):
    page = open_page(site / "index.html", viewport={"width": 1280, "height": 800})
    for tab in page.get_by_role("tab").all():
        tab.click()
        height = page.evaluate("document.documentElement.scrollHeight")
        assert height <= 3 * 800, f"{tab.inner_text()}: {height} pixels"


def test_numbers_on_the_first_screen_do_not_overlap(site, open_page):
    page = open_page(site / next(name for name in PAGES if "--" in name))
    page.evaluate("document.querySelectorAll('.six b').forEach(e => e.textContent = 'answers unchanged, all')")
    wide = "[...document.querySelectorAll('.six li')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert page.locator(".six li").count() == 6 and page.evaluate(wide) == 0


def test_cells_of_the_decision_table_do_not_overlap(site, open_page):
    page = open_page(site / "index.html")
    page.evaluate(
        "document.querySelectorAll('#decisions .value').forEach(e => e.append(' retrieval 47.3 points lower'))"
    )
    wide = page.evaluate(
        "[...document.querySelectorAll('#decisions td')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    assert wide == 0


def test_the_first_screen_of_the_index_shows_the_choice_and_first_decisions(site, open_page):
    page = open_page(site / "index.html", viewport={"width": 1280, "height": 800})
    assert _rows(page).nth(3).bounding_box()["y"] < 800
    assert page.locator(".stand-in").bounding_box()["y"] < page.locator("#choice").bounding_box()["y"] < 400


def test_the_first_screen_of_a_report_shows_the_answer(site, open_page):
    page = open_page(site / PAGES[1], viewport={"width": 1280, "height": 800})
    for name in (
        ".stand-in",
        ".decision",
        ".sentence",
        ".setting",
        ".six",
        ".forest svg",
        ".trade-off svg",
        ".machine",
    ):
        box = page.locator(name).first.bounding_box()
        assert box and box["y"] + box["height"] <= 800, f"{name}: {box}"
    assert page.locator(".six li").count() == 6
    top = page.locator(".contents").bounding_box()["y"]
    assert all(page.locator(name).bounding_box()["y"] > top for name in ("#measurements", "#controls"))


@pytest.fixture
def long_report(tmp_path):
    """The path of a report whose notebook has ten sections of twenty paragraphs."""
    run = samples.run(optimization=FEW[0], model=samples.MODELS[1])
    texts = ["# A notebook"] + [f"## Section {number}\n\n" + "Words.\n\n" * 20 for number in range(10)]
    cells = [nbformat.v4.new_markdown_cell(text) for text in texts]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "in.ipynb")
    page, _ = html.render(tmp_path / "in.ipynb", run, (), tmp_path)
    return page


def test_a_report_is_short_until_its_sections_are_opened(long_report, open_page):
    page = open_page(long_report)
    height = "document.documentElement.scrollHeight"
    folded = page.evaluate(height)
    assert page.locator("details.part").count() == 10 and page.get_by_text("Words.").first.is_hidden()
    page.get_by_role("button", name="Open all sections").click()
    assert page.get_by_text("Words.").last.is_visible() and page.evaluate(height) > folded + 10 * 20 * 20
    page.get_by_role("button", name="Fold all sections").click()
    assert page.evaluate(height) == folded
    page.locator("details.part summary").first.focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("Words.").first.is_visible()
    assert page.faults == []


def test_links_into_folded_parts_open_them(long_report, open_page):
    page = open_page(long_report)
    page.locator(".contents").get_by_role("link", name="Run again").click()
    assert page.locator("#again pre").is_visible()
    page.goto(f"{long_report.as_uri()}#part-section-3")
    page.reload()
    assert page.locator("details.part[open]").count() == page.locator("#part-section-3[open]").count() == 1
    page.goto(f"{long_report.as_uri()}#part-%E2%8")
    page.reload()
    assert page.locator("details.part[open]").count() == 0
    assert page.faults == []


@pytest.mark.parametrize("scripts", [True, False])
def test_print_includes_folded_parts(long_report, open_page, scripts):
    page = open_page(long_report, java_script_enabled=scripts)
    page.emulate_media(media="print")
    if scripts:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.get_by_text("Words.").count() == 200
    assert all(page.get_by_text("Words.").nth(at).bounding_box()["height"] > 0 for at in (0, 199))
    if scripts:
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details.part[open], details.more[open]").count() == 0


@pytest.mark.parametrize(("name", "first"), [("index.html", "#decisions th a"), (PAGES[1], ".contents a")])
def test_few_tab_stops_precede_the_first_result(site, open_page, name, first):
    page = open_page(site / name)
    for _ in range(25):
        page.keyboard.press("Tab")
        if page.evaluate(f"document.activeElement.matches({first!r})"):
            return
    raise AssertionError(f"25 tab stops, and the focus is at {page.evaluate('document.activeElement.outerHTML')}")


def test_the_site_works_with_the_keyboard_alone(site, open_page):
    page = open_page(site / "index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # visible once it has focus
    page.keyboard.press("Enter")
    page.get_by_role("tab", name="Decide").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#matrix").is_visible() and page.evaluate("document.activeElement.textContent") == "Matrix"
    page.get_by_role("combobox", name="Column").focus()
    page.keyboard.type("qwen3-vl")
    page.wait_for_function("document.querySelector('#filter output').value.startsWith('11 of')")
    cell = page.locator("#structured_pruning--qwen3-vl-2b")
    cell.locator("summary").focus()
    page.keyboard.press("Enter")
    assert "python build.py run structured_pruning --model qwen3-vl-2b" in cell.locator("pre").inner_text()
    assert "balanced AB/BA blocks" in cell.locator(".numbers").first.inner_text()


def test_everything_is_visible_without_scripts(site, open_page):
    page = open_page(site / "index.html", java_script_enabled=False)
    assert page.locator("#filter").is_hidden() and page.locator("#choice").is_hidden() and _shown(page) == 44
    assert all(page.locator(name).is_visible() for name in ("#decide", "#matrix", "#trade-offs", "#sources"))
    items = page.locator("#decisions .decided li")
    assert _rows(page).count() == 42 and items.locator("visible=true").count() == items.count()
    assert "latency" in items.first.inner_text()


def test_figures_follow_the_dark_scheme(site, open_page):
    page = open_page(site / PAGES[1], color_scheme="dark", viewport={"width": 1280, "height": 900})
    figures = page.locator("figure img, figure svg")
    assert figures.count() >= 3
    for figure in figures.all():
        shown = Image.open(io.BytesIO(figure.screenshot())).convert("L").resize((1, 1)).getpixel((0, 0))
        assert shown < 110, f"as bright as {shown} of 255"


def test_print(site, open_page):
    page = open_page(site / "index.html")
    page.emulate_media(media="print")
    assert page.locator("#filter").is_hidden() and page.locator("nav.tabs").is_hidden()
    assert page.locator("#matrix").is_visible() and page.locator("#sources").is_visible()  # every tab is printed
    rows = page.locator("#decisions tbody tr").count()  # for all models: each line names its model and the goal
    assert page.locator("#decisions tbody tr .on:visible").count() == rows > len(samples.OPTIMIZATIONS)
    assert page.locator("#decisions .goal:visible").count() == page.locator("#decisions .decided li:visible").count()
    assert page.pdf(format="A4")[:5] == b"%PDF-"

"""Renders one run as HTML and Markdown through nbconvert, with the templates next to this module.

The page starts with the record (verdict, measurements, sources, use of the machine), followed by the executed notebook
with its sections and code folded. The page works offline: external references are removed at the end. Failed runs
are rendered too, with or without a notebook. Independent of how runs are scheduled.
"""

import base64
import re
import shutil
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import nbformat

from lib.files import json_object, write_atomically
from lib.report.pages import run_page
from lib.report.records.record import Process, Record
from lib.report.records.setting import stand_in
from lib.report.text.wording import untagged

TEMPLATES = Path(__file__).resolve().parent / "templates"
HTML_PRIORITY = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]
MARKDOWN_PRIORITY = ["text/markdown", "image/png", "image/jpeg", "text/plain"]
EXTERNAL = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
ADDRESSES = ("src", "href", "srcset", "poster", "action", "formaction", "background", "xlink:href")
RUNS = re.compile(r"^\s*(?:java|vb)script:", re.IGNORECASE)
IGNORED = re.compile(r"[\x00-\x20]+")  # browsers ignore these when they parse an address
EXTERNAL_STYLE = re.compile(r"""url\(\s*['"]?\s*(?:https?:)?//[^)]*\)|@import[^;]*;?""", re.IGNORECASE)


def render(
    notebook_path: Path | None,
    record: Record | None,
    neighbours: Iterable[run_page.Neighbour] = (),
    out: Path = Path("."),
) -> tuple[Path, Path]:
    """Write `<out>/<stem>.html`, `<out>/<stem>.md` and its pictures in `<out>/<stem>_files/`; return both paths.

    `record` may be None (the overview), or `notebook_path` None or missing (a kernel that never started), but not both.
    `neighbours` are the (optimization, model) pairs with a page in `out`. Raises OSError where `out` cannot be written.
    """
    notebook = _read(notebook_path)
    stem = record.stem if record else Path(notebook_path or "").name.removesuffix(".ipynb")
    view = run_page.view(record, neighbours, Path(out)) if record else _bare_view(notebook, stem, Path(out))
    view |= {"style": _style(), "figure": _process_figure(record.process) if record else None}
    out = Path(out)
    html_path = write_atomically(out / f"{stem}.html", _html(notebook, view))
    text, pictures = _markdown(notebook, view, f"{stem}_files")
    _write_pictures(pictures, out, f"{stem}_files")
    return html_path, write_atomically(out / f"{stem}.md", text)


def _read(path: Path | None) -> nbformat.NotebookNode:
    """Return the notebook; an empty one if there is none, one with an error message if it cannot be read."""
    if path is None or not Path(path).is_file():
        return nbformat.v4.new_notebook()
    try:
        return _without_scraps(nbformat.read(path, as_version=4))
    except Exception as error:  # nbformat raises ValueError, AttributeError, ValidationError …
        cell = nbformat.v4.new_markdown_cell(f"The notebook cannot be read ({type(error).__name__}).")
        return nbformat.v4.new_notebook(cells=[cell])


def _without_scraps(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove scrapbook's outputs: they are for programs, and no template can show them."""
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if "scrapbook" not in output.get("metadata", {})]
    return notebook


def _bare_view(notebook: nbformat.NotebookNode, stem: str, out: Path) -> dict[str, Any]:
    """Return the values of a page without a record: the overview of the records in `out`."""
    index = {"text": "all results", "href": "index.html", "markdown": "index.html"}
    heading = next(
        (line[2:] for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("# ")), stem
    )
    about = stand_in.of_folder(out)
    return {
        "record": False,
        "title": heading + _of_scales(out, about),
        "stand_in": about,
        "nav": [("Index", [index])],
        "footer": "This page needs no network.",
    }


def _of_scales(out: Path, about: str) -> str:
    """Return the title's suffix for the records in `out`: their scales if there are several, or that the models are
    stand-ins; else empty. `about` is the notice on their models.
    """
    contents = (json_object(path) for path in out.glob("*--*.json") if path.is_file())
    scales = sorted({str(content["scale"]) for content in contents if content.get("scale")})
    if len(scales) > 1:
        return f": results at scales {' and '.join(scales)}"
    return ": results on proxy models (stand-ins)" if about.startswith(stand_in.BEGINNING) else ""


def _style() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="friendly", nobackground=True).get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark", nobackground=True).get_style_defs(".highlight")
    sheet = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return f"{sheet}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _process_figure(process: Process | None) -> dict[str, str] | None:
    """Return the figure of CPU and memory use as a data URI with its texts; None where nothing was sampled."""
    if process is None or not process.seconds:
        return None
    import pandas as pd

    from lib.report.figures import style as figures

    length = min(len(process.seconds), len(process.cpu_percent), len(process.memory_bytes))
    frame = pd.DataFrame({name: getattr(process, name)[:length] for name in ("seconds", "cpu_percent", "memory_bytes")})
    picture = base64.b64encode(figures.png(figures.process(frame, cores=process.cores))).decode()
    alt = run_page.process_alt(process)
    return {"src": f"data:image/png;base64,{picture}", "alt": alt, "caption": f"{alt} Measured: {process.source}."}


def _html(notebook: nbformat.NotebookNode, view: dict[str, Any]) -> str:
    from bs4 import BeautifulSoup
    from nbconvert.exporters import HTMLExporter
    from traitlets.config import Config

    config = Config({"NbConvertBase": {"display_data_priority": HTML_PRIORITY}})
    exporter = HTMLExporter(
        config=config, template_name="workbench", extra_template_basedirs=[str(TEMPLATES)], exclude_anchor_links=True
    )
    text, _ = exporter.from_notebook_node(notebook, resources={"page": view})
    soup = BeautifulSoup(text, "html.parser")
    seal(soup, deepen=bool(view["record"]))
    fold(soup, 3 if view["record"] else 2)
    head, body_end, rest = str(soup).rpartition("</body>")
    return f"{head}<script>{(TEMPLATES / 'report.js').read_text(encoding='utf-8')}</script>\n{body_end}{rest}"


def seal(soup: Any, deepen: bool = False) -> None:
    """Remove from the parsed page everything that uses the network or executes: scripts, frames, external pictures.

    A link to the web becomes its text, followed by the address. `deepen` lowers the notebook's headings by one level,
    below the page's own title.
    """
    leads_away = soup.find_all("meta", attrs={"http-equiv": True})
    for element in [*soup(["script", "iframe", "link", "object", "embed", "base"]), *leads_away]:
        element.decompose()
    for style in soup("style"):
        style.string = EXTERNAL_STYLE.sub("", style.get_text())
    for element in soup.find_all(True):
        for name in list(element.attrs):
            value = element.attrs[name]
            value = " ".join(value) if isinstance(value, list) else value
            addresses = _addresses(name, value)
            runs = name.startswith("on") or any(map(RUNS.match, addresses))
            if runs or (name == "style" and EXTERNAL_STYLE.search(value)):
                del element.attrs[name]
            elif any(map(EXTERNAL.match, addresses)):
                _replace(element, value)
                break
    if deepen and (body := soup.select_one("div.notebook")):
        for level in (5, 4, 3, 2, 1):
            for heading in body.find_all(f"h{level}"):
                heading.name = f"h{level + 1}"


def _addresses(name: str, value: str) -> list[str]:
    """Return the addresses in an attribute as a browser parses them; `srcset` may have several."""
    if name not in ADDRESSES:
        return []
    return [IGNORED.sub("", part) for part in (value.split(",") if name == "srcset" else [value])]


def fold(soup: Any, level: int) -> None:
    """Fold the sections of the notebook in the parsed page: each cell that begins with a heading of `level` starts a
    section, which ends at the next. Content before the first one stays open; summaries count figures and tables.
    """
    from bs4.element import Tag

    taken = {element["id"] for element in soup.find_all(id=True)}
    part: Tag | None = None
    for child in list(body.children) if (body := soup.select_one("div.notebook")) else []:
        first = child.find(True) if isinstance(child, Tag) and child.name == "section" else None
        if isinstance(first, Tag) and first.name == f"h{level}":
            part, summary = soup.new_tag("details", attrs={"class": "part"}), soup.new_tag("summary")
            part["id"] = _address(first.get_text(), taken)
            taken.add(part["id"])
            child.insert_before(part)
            part.append(summary)
            summary.append(first.extract())
        if part is not None:
            part.append(child.extract())
    for part in soup.select("details.part"):
        if held := _held(part):
            note = soup.new_tag("small")
            note.string = held
            part.select("summary")[0].extend([" ", note])


def _address(heading: str, taken: Container[str]) -> str:
    """Return an unused id for a section, derived from its heading."""
    base = "part-" + re.sub(r"\W+", "-", heading.lower()).strip("-")
    names = [base, *(f"{base}-{number}" for number in range(2, 100))]
    return next(name for name in names if name not in taken)


def _held(part: Any) -> str:
    """Return the number of figures and tables in a folded section as text: `2 figures, 1 table`."""
    counts = {"figure": len(part.select("img, svg")), "table": len(part.select("table"))}
    return ", ".join(f"{count} {noun}{'s' if count > 1 else ''}" for noun, count in counts.items() if count)


def _replace(element: Any, address: str) -> None:
    """Replace an external reference by text."""
    words = element.get("alt") if element.name == "img" else element.get_text()
    bare = re.sub(r"^\w*:?//", "", address).rstrip("/")
    element.replace_with(
        words if words and bare in words.replace("https://", "") else f"{words or 'reference'} ({bare})"
    )


def _deeper(source: str) -> str:
    """Return Markdown with its headings lowered by one level, except in code fences."""
    fenced, lines = False, []
    for line in source.splitlines():
        fenced ^= line.lstrip().startswith("```")
        lines.append(f"#{line}" if not fenced and re.match(r"#{1,5} ", line) else line)
    return "\n".join(lines)


def fenced(text: str, language: str) -> str:
    """Return text as a code block, in a fence longer than any within it: a model's output may contain one."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _markdown(notebook: nbformat.NotebookNode, view: dict[str, Any], folder: str) -> tuple[str, dict[str, bytes]]:
    from nbconvert.exporters import MarkdownExporter
    from traitlets.config import Config

    config = Config({"NbConvertBase": {"display_data_priority": MARKDOWN_PRIORITY}})
    exporter = MarkdownExporter(
        config=config, template_name="workbench_markdown", extra_template_basedirs=[str(TEMPLATES)]
    )
    exporter.register_filter("untagged", untagged)
    exporter.register_filter("fenced", fenced)
    exporter.register_filter("deeper", lambda source: _deeper(source) if view["record"] else source)
    resources: dict[str, Any] = {"page": view, "output_files_dir": folder, "unique_key": "figure"}
    text, resources = exporter.from_notebook_node(_without_reprs(notebook), resources=resources)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", resources.get("outputs") or {}


def _without_reprs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy without meaningless plain text of objects, such as `<IPython.core.display.HTML object>`."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        for output in cell.get("outputs", []):
            plain = output.get("data", {}).get("text/plain", "")
            if "".join(plain).startswith("<IPython.core.display"):
                del output["data"]["text/plain"]
    return copy


def _write_pictures(pictures: dict[str, bytes], out: Path, folder: str) -> None:
    """Replace the folder of pictures, so that no picture of an earlier run remains."""
    fresh, old = out / f".{folder}.part", out / folder
    shutil.rmtree(fresh, ignore_errors=True)
    if pictures:
        fresh.mkdir(parents=True)
        for name, content in pictures.items():
            (fresh / Path(name).name).write_bytes(content)
    shutil.rmtree(old, ignore_errors=True)
    if pictures:
        fresh.rename(old)

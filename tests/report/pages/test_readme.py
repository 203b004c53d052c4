"""README and executed/README.md: generated from records, between markers, consistent with each other, and short."""

import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.measure.metrics import measurement
from lib.report.pages import readme, result_tables
from lib.suite.cli import command
from tests.report import samples

ROOT = readme.ROOT
PAGES = ("README.md", "executed/README.md")
MOST_BYTES, MOST_PICTURE_BYTES = 10_240, 60_000
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def _part(name: str, text: str = "old") -> str:
    start, end = readme.markers(name)
    return f"{start}\n{text}\n{end}"


@pytest.fixture
def root(tmp_path):
    """Both pages, empty except for their markers."""
    (tmp_path / "executed").mkdir()
    (tmp_path / "README.md").write_text(
        "\n\n".join(["# Workbench", *map(_part, ("picture", "results", "real results")), "After.\n"])
    )
    scales = "\n\n".join(_part(scale) for scale in readme.SCALES)
    (tmp_path / "executed" / "README.md").write_text(f"# Executed\n\n{scales}\n\nAfter.\n")
    return tmp_path


def _results(root, scale: str = "proxy"):
    folder = root / "executed" / scale
    return samples.mixed(folder) if scale == "proxy" else samples.good(folder, samples.OPTIMIZATIONS[:1])


def _texts(root):
    return [(root / page).read_text(encoding="utf-8") for page in PAGES]


def _table(text: str, heading: str = "") -> list[dict[str, str]]:
    """Return the first table below a heading as rows by column."""
    lines = text[text.index(heading) :].splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("|"))
    block = [line for line in lines[start:] if line.startswith("|") or line == ""]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block[: block.index("")]]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def disagreements(page: str, full: str) -> list[str]:
    """Return the cells of the README's matrix that disagree with the full tables."""
    runs = {(line["optimization"], line["model"]): line for line in _table(full, "#### Verdicts")}
    speed = {(line["optimization"], line["model"]): line for line in _table(full, "#### Speed")}
    faults, shown = [], set()
    for line in _table(page):
        metrics = line["speed of"].split(", ")
        for model in list(line)[2:]:
            run, cell = (line["optimization"], model), line[model]
            if run not in runs:
                faults += [f"{run}: {cell}, and no such run"] if cell != "–" else []
                continue
            shown.add(run)
            if run not in speed:
                faults += [f"{run}: {cell}, not {runs[run]['performance']}"] if cell != runs[run]["performance"] else []
                continue
            *gains, quality = cell.replace(", ", " ").split(" ")
            if quality != runs[run]["accuracy"][0] or len(gains) != len(metrics):
                faults.append(f"{run}: {cell}, quality {runs[run]['accuracy']}")
            if metrics == ["–"]:  # no speed was judged, e.g. if both arms have the same weights
                values = [value for column, value in speed[run].items() if column not in ("optimization", "model")]
                faults += [f"{run}: {value} is judged" for value in values if value[0] not in "·–"]
                continue
            for metric, gain in zip(metrics, gains):
                wanted = speed[run][metric].split(" ")
                bold = f"**{wanted[1]}**" if wanted[0] in "▲▼" else wanted[1] if len(wanted) > 1 else "–"
                faults += [f"{run}: {metric} {gain}, not {bold}"] if gain != bold else []
    return faults + [f"{run}: not in the matrix" for run in sorted(set(runs) - shown)]


def test_both_pages_change_only_between_their_markers(root):
    folder = _results(root)
    assert readme.update(root, folder) == ["executed/README.md", "README.md", readme.PICTURE]
    page, full = _texts(root)
    assert page.startswith("# Workbench\n\n") and page.endswith("\nAfter.\n") and page.count("\nold\n") == 1
    assert full.startswith("# Executed\n\n") and full.endswith("\nAfter.\n") and full.count("\nold\n") == 2
    assert "machine: Example Processor 9000, 2 cores given; measured: 2026-01-31" in page
    assert f"({readme.PICTURE})" in page and (root / readme.PICTURE).is_file()
    assert readme.update(root, folder) == []  # the same records, the same files


def test_the_matrix_agrees_with_the_full_tables(root):
    readme.update(root, _results(root))
    page, full = _texts(root)
    full = readme.between(full, "proxy")
    assert disagreements(page, full) == []
    [line] = [line for line in page.splitlines() if line.startswith("| Structured pruning")]
    changed = line.replace("×", "1×", 1)
    assert disagreements(page.replace(line, changed), full)
    assert disagreements(page.replace(line + "\n", ""), full)


def test_every_state_of_a_run_is_in_the_matrix(root):
    readme.update(root, _results(root))
    text = readme.between(_texts(root)[0], "results")
    assert "✗ failed" in text and "– not applicable" in text and "**" in text and "✗ |" in text and "✓ |" in text


def test_another_scale_changes_only_its_own_tables(root):
    before = _texts(root)[0]
    assert readme.update(root, _results(root, "slice")) == ["executed/README.md"]
    page, full = _texts(root)
    assert page == before and readme.between(full, "proxy") == "old" and "Scale proxy" in readme.between(full, "slice")


def test_real_models_have_their_own_matrix(root):
    assert readme.update(root, _results(root, "full")) == ["executed/README.md", "README.md"]
    page, full = _texts(root)
    assert disagreements(readme.between(page, "real results"), readme.between(full, "full")) == []
    assert readme.between(page, "results") == readme.between(page, "picture") == "old"


def test_the_readme_says_if_there_are_no_records(root):
    readme.update(root, root / "executed" / "proxy")
    assert all("No results yet" in text for text in _texts(root))
    assert not (root / readme.PICTURE).exists()


def test_an_empty_folder_removes_no_results(root):
    folder = _results(root)
    readme.update(root, folder)
    before = _texts(root)
    for path in folder.glob("*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no record, and executed/README\.md shows results; build first"):
        readme.update(root, folder)
    assert _texts(root) == before


@pytest.mark.parametrize("seed", range(4))
def test_any_records_make_tables(seed):
    records = [samples.by_chance(seed), samples.without_result("failed", "cell 3 | x")]
    for text in (result_tables.section(records), result_tables.matrix(records)):
        for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_estimates_are_labeled_as_such():
    assert "−19.0 % (−21.0 to −15.0 %, estimated)" in result_tables.section([samples.run()])


@pytest.mark.parametrize("text", ["nothing", "END START", "START START END"])
def test_missing_markers_are_named_and_nothing_changes(text, root):
    start, end = readme.markers("results")
    (root / "README.md").write_text(_part("picture") + text.replace("START", start).replace("END", end))
    before = _texts(root)
    with pytest.raises(UserError, match=r"README\.md: expected one"):
        readme.update(root, _results(root))
    assert _texts(root) == before


def test_the_command(root, capsys):
    folder = _results(root)
    assert readme.main([str(folder), "--root", str(root)]) == 0
    assert "updated: executed/README.md, README.md" in capsys.readouterr().out
    assert readme.main([str(folder), "--root", str(root)]) == 0 and "nothing" in capsys.readouterr().out
    assert readme.main([str(root), "--root", str(root)]) == 2 and "expected a result folder" in capsys.readouterr().err
    (root / "README.md").unlink()
    assert readme.main([str(folder), "--root", str(root)]) == 2 and "no such file" in capsys.readouterr().err


def test_the_readme_is_short_and_agrees_with_the_full_tables():
    page, full = _texts(ROOT)
    assert len(page.encode()) <= MOST_BYTES
    for part, scale in (("results", "proxy"), ("real results", "full")):
        tables = readme.between(full, scale)
        assert (disagreements(readme.between(page, part), tables) if "#### Verdicts" in tables else []) == []


def test_no_run_count_is_typed_by_hand():
    page = _texts(ROOT)[0]
    for name in (readme.FIGURE, readme.MATRIX, readme.REAL_MATRIX):
        start, end = readme.markers(name)
        page = page.split(start)[0] + page.split(end)[1]
    prose = page[page.index("## Results") : page.index("## How to read it")]
    numbers = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|\\d+"
    assert not re.findall(rf"\b(?:{numbers}) of\b", prose, re.I)


def test_every_command_is_in_the_readme_or_beside_it():
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", ".github/CONTRIBUTING.md")]
    assert "more-commands" in texts[1] and "(.github/CONTRIBUTING.md)" in texts[0]
    shown = set(re.findall(r"python build\.py ([a-z]+)", "\n".join(texts))) | set(re.findall(r"`([a-z]+)`", texts[1]))
    assert set(command.parser()[1]) <= shown


def test_the_picture_is_self_contained():
    text = (ROOT / readme.PICTURE).read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_PICTURE_BYTES
    root = xml.fromstring(text)
    assert root.tag.endswith("svg") and root.find("{*}title").text.startswith("Quality against speed")
    assert text.count("http") == 1  # the namespace, not an address that is fetched
    assert "<script" not in text and "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("page", [*PAGES, ".github/GPU-AND-CLUSTER.md", ".github/CONTRIBUTING.md"])
def test_links_resolve(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path, anchor in LINK.findall(text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", Path(target).read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def test_the_quality_table_shows_the_judged_score_of_a_public_task():
    """HellaSwag is judged by accuracy per character: the table showed only the other, unjudged accuracy."""
    judged = samples.scored("accuracy_norm", 0.4, 0.3, "not_maintained", workload="hellaswag")
    other = measurement.informative("accuracy", "hellaswag", 0.35, 0.35, "48 items", n=48)
    speed = samples.timed("prefill_tokens_per_second", 1.3)
    text = result_tables.section([samples.run(measurements=[speed, other, judged])])
    quality = text[text.index("#### Quality") :]
    assert "✗ −10.0 points (lower bound −11.7, margin 2)" in quality


def test_the_picture_mixes_no_efforts():
    runs = [samples.whole("x", model, 1.2) for model in samples.MODELS]
    short = samples.whole("x", samples.MODELS[0], 3.0).model_copy(update={"effort": "preview"})
    assert readme.picture([short, *runs[1:]]) == readme.picture(runs[1:])

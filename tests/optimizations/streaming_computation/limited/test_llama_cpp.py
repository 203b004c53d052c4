"""llama.cpp compared with the streamed model: the rows, and each reason why there are none. A counting program stands
in for both, except in the last test, which needs the package installed.
"""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import settings
from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.sources import fetch, reference
from lib.optimizations.streaming_computation.limited import children, control_group, llama_cpp, side_by_side
from tests.models.sources import gguf_files

NAME = "qwen3-4b-instruct-2507"
OPTIONS = {"prefill_chunk": 64, "absorbed": True, "page_cache": "keep", "device": "cpu"}
STEPS = 2
# Stands in for llama.cpp and for the streamed model: opens what it is given, counts instead of
# decoding, and reports 10 ms for each call.
COUNTING = """
import sys
from pathlib import Path
from lib.optimizations.streaming_computation.limited.serving import Decoded, serve

def opened(request):
    file = Path(request["path"])
    content = b"" if file.is_dir() else file.read_bytes()
    if file.is_file() and content[:4] != b"GGUF":
        raise ValueError("not a GGUF file")
    assert request["threads"] == 1 and len(request["prompt"][0]) == 8
    calls = [0]
    def decode():
        calls[0] += 1
        if content[4:] == b"dies" and calls[0] == 5:  # 3 calls are made under each limit
            sys.exit(1)
        return Decoded(list(range(request["steps"])), 0.01)
    return decode, 0 if content else 5

serve(opened)
"""
COMMAND = [sys.executable, "-c", COUNTING]


@pytest.fixture
def beside(tiny, tmp_path, monkeypatch):
    """Return a function that puts the two programs side by side."""
    folder = io.save(tiny(NAME), tmp_path / "model")
    monkeypatch.setattr(children, "module", lambda name: COMMAND)

    def run(content: bytes = b"GGUFwell", turns: int = 2):
        file = tmp_path / "file.gguf"
        file.write_bytes(content)
        return llama_cpp.beside(file, folder, torch.arange(8, 16)[None], STEPS, 0.6, OPTIONS, 1000, turns=turns)

    return run


def rows_of(rival) -> dict[str, tuple[str, str]]:
    """Return verdict and reason of each timing row, keyed by the end of its workload."""
    rows = [m for m in rival.measurements if m.metric == llama_cpp.METRIC]
    return {row.workload.partition("mmap, ")[2]: (row.verdict, row.reason or "") for row in rows}


def test_time_and_memory_with_a_warm_cache_are_shown_but_never_judged(beside):
    rival = beside()
    time, *memory = [m for m in rival.measurements if m.workload.endswith(llama_cpp.WARM)]
    assert time.baseline == time.optimized == pytest.approx(1000 * 0.01 / STEPS) and time.n == 4
    assert time.ratio == 1 and time.samples is not None
    assert {m.verdict for m in rival.measurements} <= {"informative", "unavailable"}
    assert "not judged" in time.reason and f"{8 * 8 / 1000:.1f} bits" in time.reason and "1 thread" in time.source
    assert "2 fresh processes" in time.source
    theirs, ours = [row for row in rival.details["rows"] if row["limit"] == llama_cpp.WARM]
    assert (theirs["arm"], ours["arm"]) == (llama_cpp.NAME, "streamed")
    assert rival.details["same_tokens"]["compared"] == STEPS - 1
    if memory:  # this system reports the memory of a process
        assert [m.metric for m in memory] == ["peak_memory_bytes"] and memory[0].baseline > 2**20
        for row in (theirs, ours):
            assert row["peak_bytes"] >= row["file_bytes"] + row["anonymous_bytes"] > 0


def test_a_small_model_is_not_limited_and_each_row_says_so(beside):
    rows = rows_of(beside())
    assert rows[llama_cpp.WARM][0] == "informative"
    for name in (llama_cpp.BYTES, llama_cpp.SHARE):
        assert rows[name][0] == "unavailable" and "would not bind" in rows[name][1]


@pytest.fixture
def binding(monkeypatch):
    """Make limits bind however small a model is."""
    monkeypatch.setattr(llama_cpp, "_would_not_bind", lambda total, allowed: None)


def test_without_permitted_limits_only_the_warm_cache_remains(beside, monkeypatch, binding):
    monkeypatch.setattr(control_group, "candidates", lambda: [])
    rows = rows_of(beside())
    assert rows[llama_cpp.WARM][0] == "informative"
    for name in (llama_cpp.BYTES, llama_cpp.SHARE):
        assert rows[name][0] == "unavailable" and "no memory control group can be made" in rows[name][1]


def _planted_groups(monkeypatch, tmp_path):
    """Plant groups whose files take any limit; return the limits that were set, in bytes."""
    limits = []
    group = SimpleNamespace(members=tmp_path / "members", private_bytes=lambda: 0, limit=limits.append)

    class Planted:
        def __enter__(self):
            return group

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(control_group, "group", Planted)
    return limits


def test_both_get_the_same_bytes_and_then_the_same_share(beside, tmp_path, monkeypatch, binding):
    limits = _planted_groups(monkeypatch, tmp_path)
    rival = beside(turns=1)
    assert {verdict for verdict, _ in rows_of(rival).values()} == {"informative"}
    allowed = rival.details["allowance_bytes"]
    same, shared = allowed[llama_cpp.BYTES], allowed[llama_cpp.SHARE]
    assert same["baseline"] == same["optimized"] == round(0.6 * rival.details["weights_bytes"])
    assert shared == {"baseline": round(0.6 * 8), "optimized": same["optimized"]}
    theirs, ours = [same["baseline"], shared["baseline"]], same["optimized"] - 5  # bytes that it reports as private
    assert limits == [
        theirs[0] + children.SLACK,
        ours + children.SLACK,
        theirs[1] + children.SLACK,
        ours + children.SLACK,
    ]
    assert [row["limit"] for row in rival.details["rows"]][::2] == [llama_cpp.WARM, *allowed]


def test_a_process_that_ends_under_a_limit_keeps_earlier_measurements(beside, tmp_path, monkeypatch, binding):
    _planted_groups(monkeypatch, tmp_path)
    rows = rows_of(beside(b"GGUFdies", turns=1))
    assert rows[llama_cpp.WARM][0] == "informative"
    for name in (llama_cpp.BYTES, llama_cpp.SHARE):
        assert rows[name][0] == "unavailable" and "ended with 1" in rows[name][1]


def test_a_damaged_file_is_one_row_with_its_reason(beside):
    rival = beside(b"not a GGUF file")
    (row,) = rival.measurements
    assert row.verdict == "unavailable" and "not a GGUF file" in row.reason
    assert rival.details == {"reason": row.reason}


def test_each_arm_is_first_in_every_other_turn_and_call(beside, monkeypatch):
    conditions = []
    measure = side_by_side.measure
    monkeypatch.setattr(side_by_side, "measure", lambda p, r, c, **o: (conditions.extend(c), measure(p, r, c, **o)))
    beside()
    warm = conditions[0]
    assert warm.order == ["AB", "BA", "BA", "AB"] and warm.process == [0, 0, 1, 1]
    assert len(warm.disturbed) == 4 and len(warm.answers["baseline"]) == 2


# --- whether there is anything to compare with ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with the conversion of a tiny GGUF file, and the file."""
    pytest.importorskip("gguf")
    place = tmp_path_factory.mktemp("converted")
    tokens = gguf_files.tokenizer()
    file = gguf_files.write(place / "tiny.gguf", gguf_files.model(tokens.get_vocab_size()), tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_CACHE", str(place / "cache"))
        fetch.fetch(reference.parse(str(file)))
    return place / "cache", file


@pytest.fixture
def converted(cache, monkeypatch):
    """A model loaded from a tiny GGUF file."""
    place, file = cache
    monkeypatch.setenv("WORKBENCH_CACHE", str(place))
    source = reference.parse(str(file))
    folder = fetch.local(source)
    described = SimpleNamespace(source=source)
    facts = {"scale": "full", "device": "cpu", "random_weights": False, "folder": folder, "parameters": described}
    return SimpleNamespace(model=io.load_folder(folder, dtype=torch.float32), **facts), file


def test_only_the_file_of_a_converted_model_is_found(converted, tmp_path, monkeypatch):
    loaded, file = converted
    assert llama_cpp.original(loaded) == file
    for changed, reason in (
        ({"scale": "proxy"}, "the weights of scale proxy come from no GGUF file"),
        ({"random_weights": True}, "come from no GGUF file"),
        ({"device": "cuda"}, "not held by page cache"),
        ({"folder": tmp_path}, "the weights come from no GGUF file"),
        ({"parameters": SimpleNamespace(source=reference.parse(str(tmp_path)))}, "the weights come from no GGUF file"),
    ):
        with pytest.raises(UserError, match=reason):
            llama_cpp.original(SimpleNamespace(**vars(loaded) | changed))
    monkeypatch.setattr(loaded.parameters, "source", reference.parse(str(tmp_path / "gone.gguf")))
    with pytest.raises(UserError, match="come from no GGUF file"):
        llama_cpp.original(loaded)


def test_the_sources_know_which_one_is_a_gguf_file():
    file = fetch.gguf(parameters.read("smollm2-135m-instruct").source)
    assert file is not None and file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert fetch.gguf(reference.parse("/models/folder")) is None
    assert str(fetch.gguf(reference.parse("/models/x.gguf"))) == "/models/x.gguf"


def test_a_missing_package_is_one_row_that_says_what_to_install(converted, tmp_path, monkeypatch):
    loaded, _ = converted
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    rival = llama_cpp.compare(loaded, tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, OPTIONS)
    (row,) = rival.measurements
    assert (row.metric, row.verdict) == (llama_cpp.METRIC, "unavailable")
    assert row.reason == "llama.cpp is not installed here: pip install no_such_package"


def test_unrequested_rows_are_left_out(converted, tmp_path, monkeypatch):
    loaded, _ = converted
    monkeypatch.setattr(settings, "requested_dimensions", lambda: ("accuracy",))
    rival = llama_cpp.compare(loaded, tmp_path, torch.ones(1, 4, dtype=torch.long), 2, 0.5, OPTIONS)
    assert "left out: only accuracy was requested" in rival.measurements[0].reason


def test_llama_cpp_itself_decodes_a_tiny_memory_mapped_file(converted, tmp_path, monkeypatch):
    """The real program, where installed: the float file's greedy tokens are the model's own."""
    pytest.importorskip(llama_cpp.PACKAGE)
    loaded, file = converted
    folder, prompt_1T = io.save(loaded.model, tmp_path / "model"), torch.arange(8, 16)[None]
    monkeypatch.setattr(llama_cpp, "beside", partial(llama_cpp.beside, turns=1))
    rival = llama_cpp.compare(loaded, folder, prompt_1T, 4, 0.9, OPTIONS)
    assert rival.measurements[0].verdict == "informative", rival.measurements[0].reason
    assert rival.details["same_tokens"] == {"equal": 3, "compared": 3}
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(file.read_bytes()[:-2000])
    rival = llama_cpp.beside(damaged, folder, prompt_1T, 4, 0.9, OPTIONS, 1000)
    assert [m.verdict for m in rival.measurements] == ["unavailable"]

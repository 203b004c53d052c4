"""The dtype at real size is measured once and reused: bfloat16 unless float32 is far faster."""

import pytest

from lib.models.checkpoints import fastest_dtype

CONFIG = {"hidden_size": 96, "intermediate_size": 160}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return tmp_path


def _planted(monkeypatch, bfloat16: float, float32: float):
    seconds = {"bfloat16": bfloat16, "float32": float32}
    dtypes = []

    def product(hidden, width, rows, dtype):
        dtypes.append((hidden, width, rows))
        return rows * seconds[str(dtype).removeprefix("torch.")]

    monkeypatch.setattr(fastest_dtype, "_product", product)
    return dtypes


@pytest.mark.parametrize(
    ("bfloat16", "float32", "expected"),
    [(1e-6, 2e-6, "bfloat16"), (2e-6, 1e-6, "float32"), (1.2e-6, 1e-6, "bfloat16")],
    ids=["quicker", "emulated", "about the same"],
)
def test_the_faster_dtype_is_taken_and_among_equals_the_smaller(monkeypatch, bfloat16, float32, expected):
    _planted(monkeypatch, bfloat16, float32)
    assert fastest_dtype.fastest(CONFIG) == expected
    assert fastest_dtype.reason(CONFIG, expected).endswith("; float32 needs twice the memory")


def test_the_dtype_is_measured_once(monkeypatch, own_cache):
    dtypes = _planted(monkeypatch, 2e-6, 1e-6)
    assert fastest_dtype.reason(CONFIG) is None
    assert fastest_dtype.fastest({"text_config": CONFIG}) == "float32"
    assert set(dtypes) == {(96, 160, 1), (96, 160, 256)}
    _planted(monkeypatch, 1e-6, 2e-6)  # another day: the arms of a run still agree
    assert fastest_dtype.fastest(CONFIG) == "float32"
    assert "96 × 160 takes 2 µs in bfloat16 and 1 µs in float32 for a new token" in fastest_dtype.reason(CONFIG)
    assert fastest_dtype.reason(CONFIG, "float32").endswith("; float32 needs twice the memory")
    slower = fastest_dtype.reason(CONFIG, "bfloat16")
    assert slower.endswith("; float32 would not fit into memory")


def test_a_damaged_cache_is_measured_again(own_cache):
    (own_cache / "dtypes.json").write_text("{")
    assert fastest_dtype.fastest(CONFIG) in ("bfloat16", "float32")
    assert fastest_dtype.reason(CONFIG)

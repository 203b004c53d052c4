"""`check` detects every kind of damage that it claims to detect, names the record, and passes a good set."""

import json
import shutil

import pytest

from lib.report.analysis import acceptance
from lib.report.pages.suites import file_names, suite_files
from tests.report import samples

FEW = samples.OPTIMIZATIONS[:2]
STEM = f"{FEW[0]}--{samples.MODELS[2]}"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    samples.good(folder, FEW)
    return folder


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    """A good result set of two optimizations, with no others expected."""
    monkeypatch.setattr(acceptance, "OPTIMIZATIONS", FEW)
    return shutil.copytree(sound, tmp_path / "proxy")


def _short(folder):
    return {point.name: point.faults for point in acceptance.check(folder) if not point.holds}


def test_a_good_set_of_all_eleven_passes(tmp_path):
    samples.good(tmp_path)
    points = acceptance.check(tmp_path)
    assert [point.faults for point in points if not point.holds] == [] and len(points) == 10
    assert all(line.startswith("✓ ") for line in acceptance.table(points))


def _measurement(content, metric):
    return next(m for m in content["measurements"] if m["metric"] == metric)


def _only(content, dimension):
    content["measurements"] = [m for m in content["measurements"] if m["dimension"] == dimension]


def _set(metric, **fields):
    return lambda content: _measurement(content, metric).update(fields)


def _drop(*metrics):
    def damage(content):
        content["measurements"] = [m for m in content["measurements"] if m["metric"] not in metrics]

    return damage


def _verdict(**words):
    return lambda content: content["verdict"].update(words)


def _both(metric, dimension, word, verdict, **fields):
    def damage(content):
        _measurement(content, metric).update(verdict=word, **fields)
        content["verdict"][dimension] = verdict

    return damage


def _no_before(content):
    for m in content["measurements"]:
        if m["dimension"] == "efficiency":
            m.update(baseline=None, ratio=None, ci=None, verdict="informative", reason="not taken")
    content["verdict"]["efficiency"] = "inconclusive"


DAMAGE = {
    "a key that no record has": (lambda c: c.update(speed=3), "the files are sound", "speed"),
    "another unit": (_set("prefill_tokens_per_second", unit="tokens/min"), "the files are sound", "unit"),
    "the record of another run": (lambda c: c.update(model="x"), "the files are sound", "holds the record of"),
    "failed": (
        lambda c: c.update(status="failed", reason="cell 3"), f"all {len(FEW)} optimizations are measured", "cell 3",
    ),
    "one metric in a dimension": (
        _drop("energy_joules_per_token"), "several metrics in each of the four dimensions", "efficiency: 1 of",
    ),
    "partial": (
        lambda c: c.update(dimensions=["performance"]),
        "several metrics in each of the four dimensions", "partial: measured for performance only",
    ),
    "no before": (_no_before, "values before and after in each dimension", "efficiency: no metric"),
    "another effort": (lambda c: c.update(effort="thorough"), "comparable across models", "effort thorough, but quick"),
    "another scale": (lambda c: c.update(scale="slice"), "comparable across models", "scale slice"),
    "a metric that only the others have": (
        _drop("decode_tokens_per_second"), "comparable across models", "lacks metrics that other models have: decode",
    ),
    "slower": (
        _both("prefill_tokens_per_second", "performance", "worse", "worse", ratio=0.8, ci=[0.78, 0.82]),
        "performance maintained or improved", "worse: prefill ▼ 0.800× (0.780–0.820)",
    ),
    "a loss beside the gain": (
        lambda c: c["verdict"]["losses"].append({
            "dimension": "performance", "metric": "decode_tokens_per_second", "workload": "decode", "verdict": "worse",
            "p": 0.01,
        }),
        "performance maintained or improved", "better, but another measurement got worse: prefill ▲",
    ),
    "speed that cannot be told": (
        lambda c: (
            [m.update(verdict="inconclusive") for m in c["measurements"] if m["dimension"] == "performance"],
            c["verdict"].update(performance="inconclusive"),
        ),
        "performance maintained or improved", "inconclusive: prefill ?",
    ),
    "quality lost": (
        _both("f1_macro", "accuracy", "not_maintained", "not_maintained", bound=-0.04),
        "accuracy maintained or improved", "not maintained: F1 ✗ −0.2 points (lower bound −4.0, margin 2)",
    ),
    "quality that cannot be told": (
        _both("f1_macro", "accuracy", "inconclusive", "inconclusive"),
        "accuracy maintained or improved", "inconclusive: F1 ?",
    ),
    "a verdict that its numbers do not carry": (
        _set("prefill_tokens_per_second", verdict="worse"),
        "verdicts follow from the numbers", "performance is recorded as",
    ),
    "better, with an interval that holds no change": (
        _set("prefill_tokens_per_second", ci=[0.9, 1.4]), "verdicts follow from the numbers",
        "stored as better, but its fields give inconclusive",
    ),
    "an interval upside down": (
        _set("prefill_tokens_per_second", ci=[1.3, 1.1]), "verdicts follow from the numbers", "is reversed",
    ),
    "a ratio of other values": (
        _set("weights_bytes", ratio=0.5), "verdicts follow from the numbers", "the two values give 0.72",
    ),
    "a better dimension than its metrics": (
        _verdict(resources="equivalent"), "verdicts follow from the numbers", "resources is recorded as equivalent",
    ),
    "maintained beyond the margin": (
        _set("f1_macro", bound=-0.05), "verdicts follow from the numbers",
        "stored as maintained, but its fields give inconclusive",
    ),
    "another carrier than the numbers say": (
        lambda c: c["verdict"]["carried_by"]["accuracy"].update(metric="retrieval_exact_match", workload="generate"),
        "verdicts follow from the numbers", "its primary measurements",
    ),
    "words of an earlier rule": (
        lambda c: c["verdict"].update(carried_by={}), "verdicts follow from the numbers", "as in earlier schemas",
    ),
    "an unlabelled number": (
        _set("weights_bytes", provenance=None), "every number has its provenance", "weights_bytes [load]: provenance",
    ),
    "a number without source": (
        _set("weights_bytes", source=""), "every number has its provenance", "weights_bytes [load]: has no source",
    ),
    "unknown as nought": (
        _set("energy_joules_per_token", provenance="unavailable"),
        "every number has its provenance", "yet it has a number",
    ),
    "an unlabelled detail": (
        lambda c: c["details"].update(extra=[1, 2]), "every number has its provenance", "details.extra",
    ),
    "an unlabelled control": (
        lambda c: c["controls"][0]["measurements"][0].update(provenance="guessed"),
        "every number has its provenance", "control A/A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_detected(name, folder):
    damage, point, fault = DAMAGE[name]
    path = folder / f"{STEM}.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    short = _short(folder)
    assert point in short, short
    assert any(stem == STEM and fault in why for stem, why in short[point]), short[point]


def test_a_gain_withheld_over_the_whole_set_is_not_an_improvement(folder):
    """Previously the index showed it as inconclusive, with its q, but `check` let it pass as better."""
    for path in folder.glob("*--*.json"):
        content = json.loads(path.read_text())
        speed = _measurement(content, "prefill_tokens_per_second")
        if path.name == f"{STEM}.json":
            speed.update(ratio=1.05, ci=[1.002, 1.098])
        else:
            speed.update(verdict="inconclusive")
            content["verdict"]["performance"] = "inconclusive"
        path.write_text(json.dumps(content))
    short = _short(folder)["performance maintained or improved"]
    assert len(short) == len(FEW) * len(samples.MODELS)
    [why] = [why for stem, why in short if stem == STEM]
    assert why.startswith("inconclusive: prefill ? 1.0") and "over the 8 primaries of performance" in why


def test_a_truncated_file_and_a_missing_one_are_reported(folder):
    (folder / f"{STEM}.json").write_text('{"schema": 1')
    second = f"{FEW[1]}--{samples.MODELS[0]}"
    (folder / f"{second}.json").unlink()
    short = _short(folder)
    assert short["the files are sound"][0][0] == STEM
    assert (second, "never run") in short[f"all {len(FEW)} optimizations are measured"]


def test_an_absent_model_and_an_absent_optimization_are_reported(folder):
    for path in [*folder.glob(f"*--{samples.MODELS[3]}.json"), *folder.glob(f"{FEW[0]}--*.json")]:
        path.unlink(missing_ok=True)
    short = _short(folder)
    assert short["all 4 models are present"] == [(samples.MODELS[3], "no record with a result")]
    assert (FEW[0], "measured on no model") in short[f"all {len(FEW)} optimizations are measured"]


def test_inapplicable_runs_are_excused(folder):
    from lib.report.records import record

    excused = samples.without_result("not_applicable", "no experts", *STEM.split("--"))
    record.write(excused, folder / f"{STEM}.json")
    assert _short(folder) == {}


def test_result_files_of_other_records_or_of_no_schema_are_reported(folder):
    suite_files.write("all", folder)
    suite_files.write("comprehensive", folder)
    assert _short(folder) == {}
    samples.good(folder, FEW, seed=5)
    faults = dict(_short(folder)["the files are sound"])
    assert set(faults) == {file_names.FILES["comprehensive"][0], file_names.FILES["all"][0]}
    assert all("other records" in why for why in faults.values())
    assert all(why.endswith(f"run: python build.py report --out {folder.parent}") for why in faults.values())
    path = folder / file_names.FILES["comprehensive"][0]
    path.write_text(path.read_text().replace('"summary"', '"summery"', 1))
    assert any("summ" in why for _, why in _short(folder)["the files are sound"])


def test_an_unreadable_result_file_is_named(folder):
    (folder / "old_results.json").mkdir()
    (folder / "more_results.json").write_bytes(b"\xff\xfe")
    assert dict(_short(folder)["the files are sound"]) == {
        "old_results.json": "cannot be read (Is a directory)", "more_results.json": "is not JSON",
    }  # fmt: skip

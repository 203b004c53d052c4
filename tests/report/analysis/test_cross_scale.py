"""Quality from one scale beside speed from another: never mixed up, never made from one scale alone."""

from lib.measure.metrics import measurement, paired_samples
from lib.report.analysis import cross_scale
from lib.report.records import record
from tests.report import samples

DEEP = paired_samples.from_samples(
    "full_depth_prefill_tokens_per_second", "prefill", [10.0] * 6, [12.0] * 6, source="blocks", floor=None,
    provenance="derived",
)  # fmt: skip


def both():
    proxy = samples.run()
    rate = samples.timed("prefill_tokens_per_second", 1.62)
    missing = measurement.unavailable("f1_macro", "classify", "random weights: answers carry no information")
    cut = samples.run(measurements=[rate, missing, DEEP]).model_copy(update={"scale": "slice"})
    return proxy, cut


def test_each_number_keeps_its_scale_and_label():
    (line,) = cross_scale.table(both()).values.tolist()
    assert line[:2] == ["Structured pruning", samples.MODELS[1]]
    assert "−0.4 points" in line[2].replace("-", "−") and "maintained" in line[2] and "measured" in line[2]
    assert line[3].startswith("▲ 1.620× (") and "better" in line[3]
    assert line[4].startswith("· 1.2") and "derived" in line[4] and "informative" in line[4]
    heads = list(cross_scale.table(both()).columns)
    assert "(proxy)" in heads[2] and "(slice)" in heads[3]


def test_one_scale_alone_gives_no_row():
    proxy, cut = both()
    assert cross_scale.table([proxy]).empty and cross_scale.table([cut]).empty and cross_scale.table([]).empty
    elsewhere = cut.model_copy(update={"model": samples.MODELS[0]})
    assert cross_scale.table([proxy, elsewhere]).empty


def test_the_other_scale_shows_the_verdicts_of_its_whole_set(tmp_path):
    """As for the records beside it: one weak effect among many nulls is not a discovery."""

    def run(name, gain, half, verdict):
        timed = samples.timed("prefill_tokens_per_second", gain, half, verdict)
        return record.build(name, samples.MODELS[0], "slice", "quick", {}, [timed], primaries=samples.PRIMARIES)

    (tmp_path / "slice").mkdir()
    weak = run("weak", 1.05, 0.048, "better")
    for built in (weak, *(run(f"r{number}", 1.0, 0.05, "inconclusive") for number in range(20))):
        record.write(built, tmp_path / "slice" / f"{built.stem}.json")
    _, records = cross_scale.beside(tmp_path / "proxy", "proxy")
    assert len(records) == 21 and {built.measurements[0].verdict for built in records} == {"inconclusive"}


def test_the_other_scale_is_read_from_the_sibling_folder(tmp_path):
    proxy, cut = both()
    for name, records in (("proxy", proxy), ("slice", cut)):
        (tmp_path / name).mkdir()
        record.write(records, tmp_path / name / f"{records.stem}.json")
    scale, records = cross_scale.beside(tmp_path / "proxy", "proxy")
    assert scale == "slice" and [run.scale for run in records] == ["slice"]
    scale, records = cross_scale.beside(tmp_path / "slice", "slice")
    assert scale == "proxy" and [run.scale for run in records] == ["proxy"]
    assert cross_scale.beside(tmp_path / "nowhere" / "proxy", "proxy") == ("slice", [])


def test_full_runs_are_told_that_they_take_no_part():
    """Their overview advised making the records of proxy models, which were there already."""
    assert "build.py" not in cross_scale.why_empty("full", "proxy", both())
    assert "`python build.py run --scale slice`" in cross_scale.why_empty("proxy", "slice", [])

"""A published relation is held or not held only where the numbers show it, on planted numbers of each kind."""

import pytest

from lib.measure.metrics import measurement
from lib.optimizations.common.evidence import relations
from lib.optimizations.common.evidence.claims import Interval
from lib.report import tables
from lib.report.records import record, relation


def near(value: float, width: float = 0.01) -> Interval:
    return Interval(value, value * (1 - width), value * (1 + width))


WIDE = Interval(10, 1, 200)


@pytest.mark.parametrize(
    ("losses", "held"),
    [((36.9, 39.3, 193), True), ((39.3, 39.3, 193), True), ((45, 39.3, 193), False), ((36.9, 193, 39.3), False)],
)
def test_methods(losses, held):
    assert relations.methods(*map(near, losses)).held is held


def test_methods_are_undecided_where_magnitude_overlaps_or_is_missing():
    assert relations.methods(near(36.9), near(39.3), WIDE).held is None
    assert relations.methods(near(36.9), None, near(193)).held is None


@pytest.mark.parametrize(
    ("free", "between", "strict", "held"),
    [(37, 45, 61, True), (37, None, 61, True), (61, None, 37, False), (37, 80, 61, False)],
)
def test_patterns(free, between, strict, held):
    arms = {"unstructured": near(free), "2:4": near(strict), "4:8": between and near(between)}
    assert relations.patterns({"wanda": arms}).held is held
    assert relations.patterns({"wanda": arms, "magnitude": {}}).held is (False if held is False else None)


def test_rows_int4_and_gptq_are_orders():
    assert relations.rows(near(7.26), near(7.95)).held and relations.rows(near(7.95), near(7.26)).held is False
    assert relations.rows(near(7.26), WIDE).held is None
    assert relations.int4(near(29.5), {"wanda": near(39.3), "magnitude": None}).held
    assert relations.int4(near(29.5), {"wanda": near(39.3), "sparsegpt": near(20)}).held is False
    assert relations.int4(near(29.5), {}).held is None
    assert relations.gptq(near(29.5), near(30.5)).held and relations.gptq(near(30.5), near(29.5)).held is False


@pytest.mark.parametrize(("plain", "whitened", "held"), [(20_000, 7.94, True), (7, 6, False), (20_000, 50, False)])
def test_svd(plain, whitened, held):
    assert relations.svd(5.68, near(plain), near(whitened)).held is held
    assert relations.svd(5.68, near(plain), None).held is None


def test_int8():
    assert relations.int8(Interval(1.001, 1.0, 1.002)).held and relations.int8(Interval(1.02, 1.01, 1.03)).held is False
    assert relations.int8(Interval(1.004, 1.0, 1.01)).held is None


def test_an_interval_near_one_is_not_printed_as_one():
    """Rounded to three figures it read "1 (1–1)", next to the word held."""
    judged = relations.int8(Interval(1.0003, 1.0001, 1.0006))
    assert judged.held and judged.evidence.startswith("ratio of perplexities 1.00030 (1.00010–1.00060), limit ")
    assert "1 (1–1)" in relations.int8(Interval(1.0, 1.0, 1.0)).evidence, "the same answers, without width"


def test_ends_and_layers():
    assert relations.ends([0.9, 0.1, 0.2, 0.1, 0.5]).held and relations.ends([0.1, 0.9, 0.2, 0.1, 0.5]).held is False
    assert relations.ends([0.9, 0.1]).held is None
    assert relations.layers([0.2, 0.1, 0.9, 0.8]).held and relations.layers([0.2, 0.9, 0.1, 0.8]).held is False
    everything = relations.layers([1.0, 1.0, 1.0, 1.0])
    assert everything.held is None and "all pages are read" in everything.evidence


def score(name: str, before: float, after: float, width: float = 0.015) -> measurement.Measurement:
    ends = ((after - width) / before, (after + width) / before)
    fields = {"ratio": after / before, "ci": ends, "n": 400, "provenance": "measured"}
    return measurement.informative(name, "classify", before, after, "test", **fields)


def test_generation_falls_before_multiple_choice():
    fallen, kept = score("retrieval_exact_match", 0.8, 0.1), score("accuracy", 0.5, 0.48)
    assert relations.generation(fallen, kept).held and relations.generation(kept, fallen).held is False
    assert relations.generation(kept, kept).held is None and relations.generation(None, kept).held is None


def test_accuracy_moves_little_while_perplexity_worsens():
    worse = score("perplexity", 28, 40)
    assert relations.accuracy(worse, [score("accuracy", 0.36, 0.35), score("accuracy", 0.5, 0.49)]).held
    assert relations.accuracy(worse, [score("accuracy", 0.5, 0.3)]).held is False
    assert relations.accuracy(score("perplexity", 28, 28.5), [score("accuracy", 0.5, 0.5)]).held is None
    evidence = relations.accuracy(worse, [score("accuracy", 0.5, 0.3)]).evidence
    assert "change of accuracy over 1 task −0.200 (−0.215 to −0.185)" in evidence and "-" not in evidence


def test_density_and_short_inputs_and_kernels():
    assert relations.density({4096: 0.5, 1024: 0.8, 16384: 0.3}).held
    assert relations.density({1024: 0.3, 4096: 0.5}).held is False
    assert relations.density({1024: 0.5, 4096: 0.5}).held is False, "what stays does not fall"
    everything = relations.density({1024: 1.0, 2048: 1.0})
    assert everything.held is None and everything.evidence == "all blocks were kept at 1,024 and at 2,048 tokens"
    assert (
        relations.density({1024: 0.5, 2048: 0.6, 4096: 0.4}).held is None and relations.density({8: 1.0}).held is None
    )
    assert relations.short({512: near(0.9), 8192: near(2)}).held
    assert relations.short({512: near(1.5), 8192: near(2)}).held is False
    assert relations.kernel(near(7.03), near(2.23), 2.5).held and relations.kernel(near(2), near(3)).held is False
    slower = relations.kernel(near(0.63), near(0.75))
    assert slower.held is None and "shows no gain" in slower.evidence
    assert "bound allows 2.5" in relations.kernel(near(7.03), near(2.23), 2.5).evidence


def test_every_outcome_has_a_statement_and_a_source_and_reaches_the_record(tmp_path):
    judged = [relations.methods(*map(near, (36.9, 39.3, 193))), relations.rows(None, None)]
    lines = [relation.decide(*judgement) for judgement in judged]
    assert [line.outcome for line in lines] == ["held", "cannot tell"]
    assert all(len(part) > 5 for statement in relations.STATEMENTS.values() for part in statement)
    run = record.build("x", "m", "full", "quick", {}, relations=lines)
    assert record.read(record.write(run, tmp_path / "x--m.json")).relations == lines
    frame = tables.relations([run])
    assert list(frame["here"]) == ["? cannot tell", "✓ held"]
    assert tables.relations([]).empty
    with pytest.raises(ValueError, match="evidence"):
        relation.decide("a", "b", "c", True, "")

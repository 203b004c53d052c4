"""Advice rests on evidence: an open question never leads to a recommendation."""

import json

import pytest

from lib.errors import UserError
from lib.measure.metrics import measurement, settings
from lib.report.analysis import advice, summary
from lib.report.records import record
from lib.report.records.setting import reproduce
from lib.suite.cli import advise as command
from tests.report import samples

MODEL = samples.MODELS[0]


def advised(run, goal: str = "latency", keep: float = 0.02) -> advice.Advice:
    (row,) = advice.advise([run], run.model, [advice.goal(goal)], keep)
    return row


def test_a_gain_with_kept_quality_is_recommended_with_its_evidence():
    row = advised(samples.whole("structured_pruning", MODEL, gain=1.4))
    assert row.decision == "use" and row.evidence.measurement.metric == "decode_tokens_per_second"
    assert "proxy" in row.evidence.where and "2026-01-31" in row.evidence.where and row.gain > 1.2
    assert row.command is None


@pytest.mark.parametrize(
    ("verdict", "decision"),
    [
        ("worse", "do not use"),
        ("equivalent", "do not use"),
        ("inconclusive", "undecided"),
        ("informative", "undecided"),
    ],
)
def test_nothing_is_recommended_without_a_gain(verdict, decision):
    run = samples.whole("structured_pruning", MODEL)
    turned = [
        m.model_copy(update={"verdict": verdict}) if m.metric in advice.GOALS["latency"] else m
        for m in run.measurements
    ]
    row = advised(run.model_copy(update={"measurements": turned}))
    assert row.decision == decision
    assert (row.command is not None) == (decision == "undecided")


def test_a_decided_metric_counts_before_an_undecided_one():
    run = samples.whole("structured_pruning", MODEL)
    words = {"decode_tokens_per_second": "inconclusive", "prefill_tokens_per_second": "worse"}
    others = [m for m in run.measurements if m.metric not in advice.GOALS["latency"] or m.metric in words]
    turned = [m.model_copy(update={"verdict": words.get(m.metric, m.verdict)}) for m in others]
    row = advised(run.model_copy(update={"measurements": turned}))
    assert row.decision == "do not use" and row.evidence.measurement.metric == "prefill_tokens_per_second"


def test_an_unserved_goal_is_open_with_a_command_only_where_it_can_decide():
    run = samples.whole("structured_pruning", MODEL)
    without = [m for m in run.measurements if m.metric not in advice.GOALS["throughput"]]
    row = advised(run.model_copy(update={"measurements": without}), "throughput")
    assert row.decision == "undecided" and row.command is None and "this notebook measures nothing" in row.reason
    missing = measurement.unavailable("batch_decode_tokens_per_second", "decode", "not at this effort")
    row = advised(run.model_copy(update={"measurements": [*without, missing]}), "throughput")
    assert row.decision == "undecided" and row.command


def test_lost_quality_decides_where_nothing_serves_the_goal():
    run = samples.whole("structured_pruning", MODEL, lost=0.3)
    without = [m for m in run.measurements if m.metric not in advice.GOALS["throughput"]]
    row = advised(run.model_copy(update={"measurements": without}), "throughput")
    assert row.decision == "do not use" and "more than allowed" in row.reason and row.evidence is None


def test_a_declared_speed_that_was_not_measured_is_reported():
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    missing = measurement.unavailable("decode_tokens_per_second", "within the allowance", "no limit would bind")
    declared = {"performance": ("decode_tokens_per_second", "within the allowance")}
    row = advised(run.model_copy(update={"measurements": [*run.measurements, missing], "primaries": declared}))
    assert row.decision == "use" and row.reason.endswith("; within the allowance: not measured")


def test_lost_quality_outweighs_every_gain_and_the_user_sets_the_margin():
    lost = samples.whole("structured_pruning", MODEL, gain=2.0, lost=0.05)
    assert advised(lost).decision == "do not use" and "F1 5.0 points lower, more than allowed" in advised(lost).reason
    assert advised(lost, keep=0.2).decision == "use"
    strict = advised(samples.whole("structured_pruning", MODEL, gain=2.0), keep=0.0001)
    assert strict.decision != "use"


@pytest.mark.parametrize(
    ("metric", "workload"),
    [("accuracy_norm", "hellaswag"), ("exact_match", "lm_eval:gsm8k"), ("recall_macro", "classify")],
)
def test_no_lost_score_is_overlooked(metric, workload):
    """Public tasks are judged by their own scores; a guard's loss counts whatever carries the verdict."""
    kept = samples.whole("structured_pruning", MODEL, gain=2.0)
    assert advised(kept).decision == "use"
    lost = samples.scored(metric, 0.7, 0.3, "not_maintained", workload=workload)
    again = record.build(
        kept.optimization, MODEL, "proxy", "quick", {}, [*kept.measurements, lost], environment=samples.ENVIRONMENT,
        primaries=samples.PRIMARIES,
    )  # fmt: skip
    assert again.verdict.accuracy == "maintained" and again.verdict.losses_of("accuracy")
    row = advised(again)
    assert row.decision == "do not use" and "40.0 points lower" in row.reason
    assert advised(again, keep=0.5).decision == "use"


def test_unexercised_or_unmeasured_quality_leaves_the_question_open():
    run = samples.whole("structured_pruning", MODEL)
    no_scores = [m for m in run.measurements if m.dimension != "accuracy"]
    no_scores.append(measurement.unavailable("f1_macro", "classify", "random weights"))
    blind = record.build(run.optimization, MODEL, "slice", "quick", {}, no_scores, environment=samples.ENVIRONMENT)
    row = advised(blind)
    assert row.decision == "undecided" and "random weights" in row.reason and "--effort standard" in row.command


def test_a_gain_accompanied_by_a_loss_has_a_price():
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    lost = samples.paired("latency_p99_ms", 0.7, workload="serve")
    again = record.build(
        run.optimization, MODEL, "proxy", "quick", {}, [*run.measurements, lost], environment=samples.ENVIRONMENT
    )
    row = advised(again)
    assert row.decision == "use if" and "latency p99" in row.reason and "longer is acceptable: decode " in row.reason
    assert row.reason.endswith(" % faster"), "what is had for the price"
    assert row.command is None


def test_an_open_question_has_a_command_and_its_approximate_duration():
    run = samples.whole("structured_pruning", MODEL)
    row = advised(run, "energy")
    assert row.decision == "undecided" and "--effort standard" in row.command
    assert 2 * run.seconds < row.seconds < 20 * run.seconds
    busy = [m.model_copy(update={"noise_floor": 0.2, "reason": "the copies differ by 20 %"}) if m.metric.endswith(
        "tokens_per_second") else m for m in run.measurements]  # fmt: skip
    again = record.build(run.optimization, MODEL, "proxy", "quick", {}, busy, environment=samples.ENVIRONMENT)
    assert advised(again).decision == "undecided" and "--effort quick" in advised(again).command
    preview = advised(again.model_copy(update={"effort": "preview"}))
    assert preview.decision == "undecided" and "--effort standard" in preview.command, "another one would be as short"


@pytest.mark.parametrize(
    ("effort", "optimized", "decides"),
    [
        ("quick", 0.897, True),  # half a point from the margin: the bound tightens by a factor of five
        ("quick", 0.8902, False),  # the observed difference equals the margin
        ("standard", 0.9, True),  # tightens by a factor of 1.7
        ("standard", 0.897, False),
        ("thorough", 0.897, False),  # there is no larger effort
    ],
)
def test_a_question_that_no_effort_can_answer_has_no_command(effort, optimized, decides):
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    open_score = samples.scored("f1_macro", 0.91, optimized, "inconclusive", 0.02)
    asked = [open_score if m.metric == "f1_macro" else m for m in run.measurements]
    row = advised(run.model_copy(update={"measurements": asked, "effort": effort}))
    assert row.decision == "undecided" and (row.command is not None) == decides
    assert row.reason.startswith("no effort has enough items: F1: 400 items are too few") != decides


@pytest.mark.parametrize(("effort", "decides"), [("standard", True), ("thorough", False)])
def test_a_speed_left_open_by_the_largest_effort_has_no_command(effort, decides):
    """Previously the same effort was suggested again, endlessly."""
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    open_speed = [
        m.model_copy(update={"verdict": "inconclusive", "reason": "the interval reaches 1"})
        if m.dimension == "performance"
        else m
        for m in run.measurements
    ]
    row = advised(run.model_copy(update={"measurements": open_speed, "effort": effort}))
    assert row.decision == "undecided" and (row.command is not None) == decides
    assert ("thorough is the largest effort" in row.reason) != decides


def test_the_score_that_no_effort_can_decide_is_named():
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    asked = [m for m in run.measurements if m.dimension != "accuracy"]
    asked.append(samples.scored("f1_macro", 0.91, 0.897, "inconclusive", 0.02))
    asked.append(samples.scored("retrieval_exact_match", 0.91, 0.8902, "inconclusive", 0.02, "retrieval"))
    row = advised(run.model_copy(update={"measurements": asked}))
    assert row.command is None and row.reason.startswith("no effort has enough items: retrieval")


def test_estimated_energy_never_recommends():
    row = advised(samples.whole("structured_pruning", MODEL), "energy")
    assert row.decision == "undecided"


def test_limits_are_checked_against_measured_values():
    run = samples.whole("structured_pruning", MODEL)
    assert advised(run, "size<=8GiB").decision == "use"
    tight = advised(run, "size<=1kB")
    assert tight.decision == "do not use" and "more than" in tight.reason
    assert advice.goal("memory<=1.5GiB").limit_bytes == 1.5 * 2**30


def test_a_limit_on_an_unmeasured_value_leaves_the_question_open():
    run = samples.whole("structured_pruning", MODEL)
    kept = [m for m in run.measurements if m.metric not in ("peak_memory_bytes", "peak_tensor_bytes")]
    kept += [measurement.unavailable("peak_memory_bytes", "generate", "no child process")]
    kept += [samples.paired("peak_tensor_bytes", 1.4, workload="generate")]
    run = run.model_copy(update={"measurements": kept})
    assert advised(run, "memory").decision == "use"
    row = advised(run, "memory<=8GiB")
    assert row.decision == "undecided" and row.evidence.measurement.metric == "peak_tensor_bytes"
    assert row.command is None, "with more effort there is no child process either"
    assert row.reason == "peak memory was not measured, so the limit cannot be checked"


@pytest.mark.parametrize("text", ["speed", "latency<=3ms", "memory<=8stones", "memory>=8GiB", ""])
def test_a_wrong_goal_gives_one_line(text):
    with pytest.raises(UserError, match="--goal"):
        advice.goal(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [("memory<=-8GiB", "expected memory or, with a limit, such as memory<=8GiB"), ("size<=", "such as size<=8GiB"),
     ("latency<=", "expected latency, which has no limit"), ("latncy<=", 'Did you mean "latency"?')],
)  # fmt: skip
def test_a_valid_goal_with_a_wrong_limit_is_not_reported_as_a_wrong_goal(text, says):
    with pytest.raises(UserError) as refused:
        advice.goal(text)
    assert says in str(refused.value) and 'mean "memory"' not in str(refused.value)


def test_a_limit_accepts_every_unit():
    limits = {unit: advice.goal(f"size<=2{unit}").limit_bytes for unit in ("", "B", "kB", "MB", "GB", "TB")}
    assert [*limits.values()] == [2, 2, 2e3, 2e6, 2e9, 2e12]
    assert advice.goal("memory<=2TiB").limit_bytes == 2 * 2**40 and advice.goal("size<=3KiB").limit_bytes == 3072


def test_commands_use_the_requested_folder(tmp_path, capsys):
    folder = tmp_path / "my results" / "proxy"
    samples.good(folder)
    run = samples.whole("structured_pruning", MODEL)
    open_run = [m.model_copy(update={"verdict": "inconclusive"}) for m in run.measurements]
    name = "continuous_nas"
    run = run.model_copy(update={"measurements": open_run, "optimization": name})
    record.write(run, folder / f"{name}--{MODEL}.json")
    out = str(folder.parent)
    command.advise(folder, [MODEL], ["latency"], 0.02, out=out)
    lines = capsys.readouterr().out.splitlines()
    decide = [line for line in lines if "to decide" in line]
    have = [line for line in lines if "to save it" in line]
    assert decide and all(line.endswith(f"--out '{out}'") for line in decide)
    assert have and all(line.endswith(f"--results '{out}'") for line in have)
    command.advise(folder, [MODEL], ["latency"], 0.02, as_json=True, out=out)
    rows = json.loads(capsys.readouterr().out)[MODEL]
    assert all(row["command"] is None or row["command"].endswith(f"--out '{out}'") for row in rows)


def test_a_real_model_beside_proxy_models_is_advised_on_at_its_own_scale(tmp_path, capsys):
    run = samples.whole("structured_pruning", MODEL)
    real = run.model_copy(update={"scale": "full", "model": "a-real-model"})
    for one in (run, real):
        record.write(one, tmp_path / "proxy" / f"{one.stem}.json")
    command.advise(tmp_path / "proxy", [], ["latency"], 0.02)
    text = capsys.readouterr().out
    assert "a-real-model, scale full" in text and f"{MODEL}, scale proxy" in text
    assert "A-Real-Model" not in text.splitlines()[0]


def test_a_gain_on_one_of_several_workloads_names_the_workload():
    run = samples.whole("feedback_mechanisms", MODEL)
    others = [m for m in run.measurements if m.metric not in advice.GOALS["latency"]]
    drafted = [
        samples.timed("generate_tokens_per_second", 0.98, verdict="inconclusive", workload="generate, speculative"),
        samples.timed("generate_tokens_per_second", 2.06, workload="generate, n-gram"),
    ]
    row = advised(run.model_copy(update={"measurements": [*others, *drafted]}), "latency")
    assert row.reason.startswith("generation 106 % faster (generate, n-gram)")
    alone = advised(run.model_copy(update={"measurements": [*others, drafted[1]]}), "latency")
    assert "n-gram" not in alone.reason and "generation 106 % faster" in alone.reason


def test_runs_without_a_result_are_named(tmp_path):
    skipped = samples.without_result("not_applicable", "no experts", "continuous_nas", MODEL)
    failed = samples.without_result("failed", "no memory", "automl_components", MODEL)
    rows = advice.advise([skipped, failed], MODEL, [advice.goal("latency")])
    assert [row.decision for row in rows] == ["undecided", "not applicable"]
    assert "no memory" in rows[0].reason and "no experts" in rows[1].reason
    with pytest.raises(UserError, match="no record"):
        advice.advise([skipped], "unheard-of", [advice.goal("latency")])


def test_the_command_prints_text_and_json(tmp_path, capsys):
    samples.good(tmp_path / "proxy")
    assert command.advise(tmp_path / "proxy", [MODEL], ["latency", "size"], 0.02) == 0
    text = capsys.readouterr().out
    assert f"{MODEL}, scale proxy" in text and "use: Structured pruning" in text
    assert "F1 (macro) maintained, " in text and "(lower bound " in text  # the evidence for the quality
    assert f"to save it: python build.py apply structured_pruning --model {MODEL} --effort quick" in text
    assert "apply adaptive_sparse_attention" not in text  # a checkpoint cannot store how a model computes
    assert command.ALONE in text
    command.advise(tmp_path / "proxy", [MODEL], ["latency"], 0.02, as_json=True)
    rows = json.loads(capsys.readouterr().out)[MODEL]
    assert {row["goal"] for row in rows} == {"latency"} and len(rows) == len(samples.OPTIMIZATIONS)
    assert all(row["evidence"]["record"].endswith(f"--{MODEL}.json") for row in rows if "evidence" in row)
    with pytest.raises(UserError, match="Did you mean"):
        command.advise(tmp_path / "proxy", [MODEL[:-1]], ["latency"], 0.02)
    with pytest.raises(UserError, match="--keep"):
        command.advise(tmp_path / "proxy", [MODEL], ["latency"], 2.0)


STACK = [{"optimization": "structured_pruning", "knobs": {"ratio": 0.2}}, {"optimization": "tensor_decomposition"}]


def _stacked(folder, steps=STACK):
    run = samples.whole("automl_components", MODEL, gain=1.4)
    details = run.details | {"stack": record.labelled(steps, "derived", "chosen by the rule")}
    record.write(run.model_copy(update={"details": details}), folder / f"{run.stem}.json")
    return folder


def _told(folder, capsys) -> str:
    assert command.advise(folder, [MODEL], ["latency"], 0.02) == 0
    return capsys.readouterr().out


def test_a_stack_is_named_with_its_knobs_and_offered_if_its_recipe_exists(tmp_path, capsys):
    folder = _stacked(tmp_path / "proxy")
    text = _told(folder, capsys)
    assert "use: AutoML components" in text
    assert "the stack: structured pruning (ratio 0.2) → tensor decomposition\n" in text
    assert "to save it" not in text and command.ALONE not in text  # no recipe: nothing to apply
    recipe = folder / "stacks" / f"{MODEL}.yaml"
    recipe.parent.mkdir()
    recipe.write_text(json.dumps({"model": MODEL, "scale": "proxy", "stack": STACK}))  # JSON is YAML
    assert f"apply automl_components --model {MODEL} --effort quick --stack {recipe}" in _told(folder, capsys)
    command.advise(folder, [MODEL], ["latency"], 0.02, as_json=True)
    [row] = json.loads(capsys.readouterr().out)[MODEL]
    assert [step["optimization"] for step in row["stack"]] == ["structured_pruning", "tensor_decomposition"]
    assert str(recipe) in row["apply"]


def test_an_empty_stack_says_first_that_nothing_pays():
    run = samples.whole("pre_vs_post_optimization", MODEL, gain=1.0)
    details = {
        "stack": record.labelled([], "derived", "chosen by the rule"),
        "considered": record.labelled([{"step": name} for name in "abcde"], "measured", "search text"),
    }
    run = run.model_copy(update={"details": run.details | details})
    for goal in advice.GOALS:
        row = advised(run, goal)
        assert row.decision == "do not use" and row.command is None
        assert row.reason.startswith("nothing pays here: of 5 candidates none")
    assert summary.sentence(run).startswith("Nothing pays here: of 5 candidates none is surely within the margins")
    assert summary.decision(run).startswith("Do not use for latency")


def test_refused_candidates_are_not_counted_as_tried():
    """Previously one page gave the same run "of 9 candidates" and "of 12": three of them were refused."""
    states = ("works", "invalid", "refused", "crashed")
    run = samples.whole("pre_vs_post_optimization", MODEL, gain=1.0)

    def sentence_of(rows: list[dict]) -> str:
        details = {
            "stack": record.labelled([], "derived", "chosen by the rule"),
            "considered": record.labelled(rows, "measured", "search text"),
        }
        return summary.sentence(run.model_copy(update={"details": run.details | details}))

    rows = [{"step": state, "state": state} for state in states]
    assert sentence_of(rows).startswith("Nothing pays here: of 2 candidates none is surely within")
    assert sentence_of(rows[:1]).startswith("Nothing pays here: of 1 candidate none is surely within")
    assert sentence_of(rows[2:]).startswith("Nothing pays here: no candidate could be applied. ")


def test_an_empty_stack_of_a_search_does_not_mention_smaller_ones():
    run = samples.whole("automl_components", MODEL, gain=1.0)
    run = run.model_copy(update={"details": run.details | {"stack": record.labelled([], "derived", "searched")}})
    assert advised(run, "size").reason.startswith("nothing pays here: no candidate is surely within the margins")
    assert "smaller" not in advised(run, "size").reason


def test_an_empty_stack_chosen_on_a_busy_machine_is_undecided():
    run = samples.whole("pre_vs_post_optimization", MODEL)
    changed = {"noise_floor": 0.2, "reason": "noise"}
    noisy = [m.model_copy(update=changed) if m.noise_floor else m for m in run.measurements]
    details = run.details | {"stack": record.labelled([], "derived", "chosen by the rule")}
    run = run.model_copy(update={"details": details, "measurements": noisy})
    row = advised(run)
    assert row.decision == "undecided" and row.command
    assert "Nothing pays" not in summary.sentence(run)


@pytest.mark.parametrize("written", [None, "", "stack: 3", "[", "stack: [{optimization: structured_pruning}]"])
def test_a_recipe_of_another_stack_or_of_none_is_not_offered(written, tmp_path, capsys):
    folder = _stacked(tmp_path / "proxy")
    if written is not None:
        (folder / "stacks").mkdir()
        (folder / "stacks" / f"{MODEL}.yaml").write_text(written)
    assert "to save it" not in _told(folder, capsys)


def test_a_step_that_no_checkpoint_can_store_is_not_offered(tmp_path, capsys):
    steps = [*STACK, {"optimization": "adaptive_sparse_attention"}]
    folder = _stacked(tmp_path / "proxy", steps)
    (folder / "stacks").mkdir()
    (folder / "stacks" / f"{MODEL}.yaml").write_text(json.dumps({"stack": steps}))
    text = _told(folder, capsys)
    assert "→ adaptive sparse attention" in text and "to save it" not in text


def test_goals_of_the_same_name_are_distinguished_by_their_limits(tmp_path, capsys):
    samples.good(tmp_path / "proxy", samples.OPTIMIZATIONS[:1])
    goals = ["size<=1kB", "latency", "size<=8GiB", "size<=8GiB"]
    command.advise(tmp_path / "proxy", [MODEL], goals, 0.02)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    heads = [line for line in lines if line in goals]
    assert heads == ["size<=1kB", "latency", "size<=8GiB"], "each once, as it was written"
    assert lines[lines.index("size<=1kB") + 1].endswith("Structured pruning: takes 5.21 MB, more than 1kB")
    assert lines[lines.index("size<=8GiB") + 1].startswith("use: Structured pruning: ")
    command.advise(tmp_path / "proxy", [MODEL], goals, 0.02, as_json=True)
    rows = json.loads(capsys.readouterr().out)[MODEL]
    assert [(row["goal"], row["decision"]) for row in rows] == [
        ("size<=1kB", "do not use"), ("latency", "use"), ("size<=8GiB", "use"),
    ]  # fmt: skip


def test_unreadable_records_are_named(tmp_path, capsys):
    """Previously records of a schema not yet known and truncated files were silently skipped, and a folder of nothing
    else gave empty advice.
    """
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    (tmp_path / f"tensor_decomposition--{MODEL}.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match=r"holds no record that can be read \(tensor_decomposition--.*schema 99"):
        command.advise(tmp_path, [], [], 0.02)
    record.write(run, tmp_path / f"{run.stem}.json")
    assert command.advise(tmp_path, [MODEL], ["latency"], 0.02, as_json=True) == 0
    captured = capsys.readouterr()
    assert "1 record left out: tensor_decomposition--" in captured.err and list(json.loads(captured.out)) == [MODEL]


@pytest.mark.parametrize(("effort", "decides"), [("quick", True), ("standard", False), ("thorough", False)])
def test_a_number_that_no_effort_judges_has_no_command(effort, decides):
    """Latency of replays with unfinished requests, or estimated energy: another effort judges neither."""
    run = samples.whole("adaptive_batch_sizes", MODEL).model_copy(update={"effort": effort})
    others = [m for m in run.measurements if m.metric not in advice.GOALS["latency"]]
    reason = "5 requests of the three replays did not finish, and are in no latency"
    latency = measurement.unjudged(samples.timed("time_per_output_token_ms", 0.6, workload="serve"), reason)
    run = run.model_copy(update={"measurements": [*others, latency]})
    for goal, gate in (("latency", "did not finish"), ("energy", "only estimated")):
        row = advised(run, goal)
        assert row.decision == "undecided" and gate in row.reason and (row.command is not None) == decides


@pytest.mark.parametrize(
    ("effort", "optimized", "half", "decides"),
    [
        ("standard", 100.0, 0.05, True),  # a quarter of the windows: the upper bound drops from 4.2 % to 2.1 %
        ("standard", 102.5, 0.05, False),
        ("thorough", 100.0, 0.05, False),
        ("quick", 102.0, 0.04, True),
    ],
)
def test_an_open_perplexity_has_a_command_only_where_more_windows_would_decide(effort, optimized, half, decides):
    run = samples.whole("tensor_decomposition", MODEL, gain=1.4)
    score = samples.scored("perplexity", 100.0, optimized, "inconclusive", half, "prefill")
    asked = [*run.measurements, score]
    row = advised(run.model_copy(update={"measurements": asked, "effort": effort}))
    assert row.decision == "undecided" and (row.command is not None) == decides
    assert row.reason.startswith("no effort has enough items: perplexity") != decides


@pytest.mark.parametrize(("optimized", "decides"), [(0.901, False), (0.905, True)])
def test_retrieval_tightens_with_its_own_number_of_prompts(optimized, decides):
    """Standard uses 160 of the largest effort's 256 prompts, but a third of its classified items."""
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    score = samples.scored("retrieval_exact_match", 0.91, optimized, "inconclusive", 0.02, "generate")
    asked = [score if m.metric == "retrieval_exact_match" else m for m in run.measurements]
    row = advised(run.model_copy(update={"measurements": asked, "effort": "standard"}))
    assert row.decision == "undecided" and (row.command is not None) == decides


def test_two_losses_are_acceptable_together():
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    lost = [samples.paired(metric, 0.7, workload="serve") for metric in ("latency_p99_ms", "latency_p95_ms")]
    again = record.build(
        run.optimization, MODEL, "proxy", "quick", {}, [*run.measurements, *lost], environment=samples.ENVIRONMENT
    )
    assert "longer are acceptable: decode " in advised(again).reason


def test_the_gain_is_named_however_much_it_costs():
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    workloads = [f"serve, real model, {load} capacity, chats and documents in turn" for load in ("within", "beyond")]
    lost = [samples.paired("latency_p99_ms", 0.7, workload=workload) for workload in workloads]
    again = record.build(
        run.optimization, MODEL, "proxy", "quick", {}, [*run.measurements, *lost], environment=samples.ENVIRONMENT
    )
    reason = advised(again).reason
    assert "(and 1 more) are acceptable: decode " in reason and reason.endswith(" % faster")


def test_a_price_names_the_largest_speed_loss_first():
    """Stored records list primaries alphabetically: a small loss of processor time was named instead of much slower
    decoding.
    """
    run = samples.whole("structured_pruning", MODEL, gain=0.9)  # decodes even slower
    spent = samples.paired("cpu_seconds_per_token", 0.95)
    built = record.build(
        run.optimization, MODEL, "proxy", "quick", {}, [*run.measurements, spent], environment=samples.ENVIRONMENT,
        primaries=samples.PRIMARIES,
    )  # fmt: skip
    by_name = dict(sorted(built.verdict.carried_by.items()))
    stored = built.model_copy(update={"verdict": built.verdict.model_copy(update={"carried_by": by_name})})
    row = advised(stored, "memory")
    assert row.decision == "use if" and row.reason.startswith("decode ") and " % slower" in row.reason
    assert row.reason == advised(built, "memory").reason, "whatever the order"


def test_a_score_is_judged_by_the_margin_of_the_decision(tmp_path, capsys):
    """Previously a recommendation at 20 points appeared above the wording for 2: F1 (macro) not maintained."""
    run = samples.whole("structured_pruning", MODEL, gain=1.4, lost=0.05)
    record.write(run, tmp_path / f"{run.stem}.json")
    for keep, decision, word in ((0.2, "use", "maintained"), (0.02, "do not use", "not maintained")):
        command.advise(tmp_path, [MODEL], ["latency"], keep)
        text = capsys.readouterr().out
        assert f"{decision}: Structured pruning" in text and f" F1 (macro) {word}, " in text
        command.advise(tmp_path, [MODEL], ["latency"], keep, as_json=True)
        [row] = json.loads(capsys.readouterr().out)[MODEL]
        assert row["decision"] == decision and row["keep"] == keep
        assert row["quality"][0]["verdict"] == word.replace(" ", "_")


def test_a_deciding_score_is_distinguished_from_another_of_its_name(tmp_path, capsys):
    """Perplexity of held-out text is maintained, but that of answers after a long prompt is not."""
    run = samples.whole("adaptive_sparse_attention", MODEL, gain=1.4)
    scores = [
        samples.scored("perplexity", 57.8, 57.2, "maintained", 0.01, "prefill"),
        samples.scored("perplexity", 20.0, 21.5, "not_maintained", 0.01, "answers behind a long prompt"),
    ]
    run = run.model_copy(update={"measurements": [*run.measurements, *scores]})
    row = advised(run)
    assert row.decision == "do not use"
    assert row.reason == "perplexity 7.5 % higher (answers behind a long prompt), more than allowed"
    record.write(run, tmp_path / f"{run.stem}.json")
    command.advise(tmp_path, [MODEL], ["latency"], 0.02)
    text = capsys.readouterr().out
    assert "perplexity [prefill] maintained" in text and "perplexity [answers behind a long prompt] not" in text
    assert "F1 (macro) maintained" in text
    command.advise(tmp_path, [MODEL], ["latency"], 0.02, as_json=True)
    [row] = json.loads(capsys.readouterr().out)[MODEL]
    assert [score["workload"] for score in row["quality"]][-2:] == ["prefill", "answers behind a long prompt"]


def test_a_run_of_some_dimensions_leads_to_a_full_run(monkeypatch):
    """Repeating the same dimensions would never measure what is missing."""
    run = samples.whole("structured_pruning", MODEL, gain=1.4)
    monkeypatch.setenv(settings.DIMENSIONS_VARIABLE, "performance")
    part = record.build(
        run.optimization, MODEL, "proxy", "quick", {}, run.measurements, environment=samples.ENVIRONMENT
    )
    assert part.dimensions == ["performance"] and "--dimension performance" in reproduce.command(part)
    row = advised(part)
    assert row.decision == "undecided"
    assert row.reason == "quality was not measured (the run measured performance only)"
    assert "--effort quick" in row.command and "--dimension" not in row.command
    row = advised(part, "memory")
    assert row.reason == "the run measured performance only, and nothing in it serves memory"
    assert "--effort quick" in row.command and "--dimension" not in row.command
    unsure = [m.model_copy(update={"verdict": "inconclusive"}) for m in part.measurements]
    row = advised(part.model_copy(update={"measurements": unsure, "seconds": 60.0}))
    assert "--effort standard" in row.command and "--dimension" not in row.command and row.seconds is None


def test_an_undecided_metric_of_higher_priority_is_named_with_the_deciding_one():
    """A server's goodput is within the noise, while one drafting method alone is faster."""
    run = samples.whole("feedback_mechanisms", MODEL)
    others = [m for m in run.measurements if m.metric not in advice.GOALS["throughput"]]
    goodput = samples.timed("goodput_requests_per_second", 1.03, verdict="inconclusive", workload="serve")
    drafted = samples.timed("generate_tokens_per_second", 1.15, workload="generate, n-gram")
    row = advised(run.model_copy(update={"measurements": [*others, goodput, drafted]}), "throughput")
    assert row.decision == "use" and row.reason == "generation 15 % faster, and quality is kept; goodput undecided"
    slower = samples.timed("generate_tokens_per_second", 0.8, verdict="worse", workload="generate, n-gram")
    row = advised(run.model_copy(update={"measurements": [*others, goodput, slower]}), "throughput")
    assert row.decision == "do not use" and row.reason == "no gain: generation 20 % slower; goodput undecided"
    row = advised(run.model_copy(update={"measurements": [*others, drafted, goodput]}), "throughput")
    assert row.reason.endswith("; goodput undecided"), "whatever their order in the record"


def _drafting(*drafted, served=(), primaries=None):
    """Return a record of a server with timed drafting methods: (gain, verdict, workload) each, in this order."""
    run = samples.whole("feedback_mechanisms", MODEL)
    others = [m for m in run.measurements if m.dimension != "performance"]
    timed = [
        samples.timed("generate_tokens_per_second", ratio, verdict=verdict, workload=workload)
        for ratio, verdict, workload in drafted
    ]
    return record.build(
        run.optimization, MODEL, "proxy", "quick", {}, [*served, *timed, *others],
        environment=samples.ENVIRONMENT, primaries=primaries or {},
    )  # fmt: skip


SLOWER, FASTER = (0.8, "worse", "speculative"), (1.3, "better", "n-gram")


@pytest.mark.parametrize("drafted", [(SLOWER, FASTER), (FASTER, SLOWER)])
def test_conflicting_workloads_have_a_price_in_any_order(drafted):
    """The order of workloads in a record must not decide between use and no use."""
    goodput = {"performance": ("goodput_requests_per_second", "serve")}
    served = samples.timed("goodput_requests_per_second", 1.02, verdict="inconclusive", workload="serve")
    row = advised(_drafting(*drafted, served=[served], primaries=goodput), "throughput")
    assert row.decision == "use if" and row.evidence.measurement.workload == "n-gram"
    price, gained = "generation 20 % slower (speculative) is acceptable", "generation 30 % faster (n-gram)"
    assert row.reason == f"{price}: {gained}; goodput undecided"


def test_the_declared_workload_decides_and_a_gain_elsewhere_is_reported():
    declared = {"performance": ("generate_tokens_per_second", "speculative")}
    row = advised(_drafting(FASTER, SLOWER, primaries=declared))
    assert row.decision == "do not use"
    assert row.reason == "no gain: generation 20 % slower (speculative); generation 30 % faster (n-gram)"
    row = advised(_drafting(FASTER, (0.99, "inconclusive", "speculative"), primaries=declared))
    assert row.decision == "use"
    assert row.reason == "generation 30 % faster (n-gram), and quality is kept; generation undecided (speculative)"


def test_missing_and_unreadable_records_are_reported(tmp_path, capsys):
    folder = tmp_path / "proxy"
    samples.good(folder, samples.OPTIMIZATIONS[:1])
    (folder / f"continuous_nas--{MODEL}.json").write_text("{")
    command.advise(folder, [MODEL], ["latency"], 0.02, out="elsewhere")
    captured = capsys.readouterr()
    assert f"1 record left out: continuous_nas--{MODEL}.json: not a record" in captured.err
    assert "  no record: adaptive_batch_sizes, adaptive_sparse_attention, " in captured.out
    assert "structured_pruning" not in captured.out.partition("no record")[2]
    assert captured.out.rstrip().endswith(f"--model {MODEL} --out elsewhere")
    command.advise(folder, [MODEL], ["latency"], 0.02, as_json=True)
    captured = capsys.readouterr()
    assert list(json.loads(captured.out)) == [MODEL]
    assert f"{MODEL}: no record: adaptive_batch_sizes, " in captured.err
    samples.good(tmp_path / "whole" / "proxy")
    command.advise(tmp_path / "whole" / "proxy", [MODEL], ["latency"], 0.02)
    assert "no record" not in capsys.readouterr().out

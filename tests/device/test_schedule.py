"""Order, stopping and leftovers of a session, with a clock that moves only when a step advances it."""

import pytest

from tests.device import full_size, schedule
from tests.device.schedule import Clock, Ended, Step

GIGA = 2.0e9
SIZES = {"qwen3-vl-2b": 4 * GIGA, "qwen3-4b-instruct-2507": 8 * GIGA, "glm-4.7-flash": 60 * GIGA}


class Played:
    """Executes steps by advancing the clock: `seconds` by name, RECORD_SECONDS / 2 for others."""

    def __init__(self, seconds=None, hindrances=None, errors=None):
        self.now, self.executed, self.held = 0.0, [], set()
        self.seconds, self.hindrances, self.errors = seconds or {}, hindrances or {}, errors or {}

    def clock(self, seconds: float) -> Clock:
        return Clock(seconds, lambda: self.now)

    def loads(self, step: Step) -> bool:
        return step.model not in self.held

    def hindrance(self, step: Step) -> str | None:
        return self.hindrances.get(step.name)

    def execute(self, step: Step, limit_seconds: float) -> Ended:
        if step.name in self.errors:
            raise self.errors[step.name]
        takes = self.seconds.get(step.name, schedule.RECORD_SECONDS / 2)
        self.now += min(takes, limit_seconds)
        self.executed.append(step.name)
        self.held.add(step.model)
        return Ended(step, "finished" if takes <= limit_seconds else "stopped")


class Slow:
    """An executor whose limits come from a slower clock, as those of `Processes` in a rehearsal."""

    def __init__(self, played: Played, slower: float):
        self.played, self.slower = played, slower
        self.loads, self.hindrance = played.loads, played.hindrance

    def execute(self, step: Step, limit_seconds: float) -> Ended:
        return self.played.execute(step, self.slower * limit_seconds)


def _run(played: Played, seconds: float, planned=None):
    kept = []
    outcomes = schedule.run(planned or schedule.steps(SIZES), played.clock(seconds), played, kept.append)
    assert kept == outcomes, "what has ended is kept at once, in order"
    return outcomes


def test_tests_come_first_then_optimizations_on_the_small_models_then_the_large():
    names = [step.name for step in schedule.steps(SIZES)]
    assert names[0] == schedule.TESTS
    assert names[1:5] == [
        "structured_pruning--qwen3-vl-2b",
        "structured_pruning--qwen3-4b-instruct-2507",
        "adaptive_sparse_attention--qwen3-vl-2b",
        "adaptive_sparse_attention--qwen3-4b-instruct-2507",
    ]
    assert len(names) == 1 + 3 * len(schedule.OPTIMIZATIONS)
    assert all("glm" in name for name in names[-len(schedule.OPTIMIZATIONS) :])


def test_a_model_with_weights_comes_last_and_names_its_folder():
    last = schedule.steps(SIZES | {"small": GIGA}, checkpoints={"small": "/weights"})[-1]
    assert (last.model, last.checkpoints) == ("small", "/weights")


def test_a_group_model_with_real_weights_runs_once():
    planned = schedule.steps(SIZES, checkpoints={"qwen3-vl-2b": "/weights"})
    assert [step.name for step in planned] == [step.name for step in schedule.steps(SIZES)]
    assert {step.checkpoints for step in planned if step.model == "qwen3-vl-2b"} == {"/weights"}


def test_attention_runs_at_32k_and_sparsity_at_two_of_four():
    by_name = {step.optimization: step.parameters for step in schedule.steps(SIZES)[1:]}
    assert by_name["adaptive_sparse_attention"]["context"] == 32768
    assert by_name["sparse_neural_networks"]["pattern"] == "2:4"


def test_energy_adds_time_only_if_requested():
    quiet, metered = (schedule.steps(SIZES, energy=energy)[1].seconds for energy in (False, True))
    assert quiet <= 60 < metered


@pytest.mark.parametrize("seconds", [30, 100, 200, 333, 570, 900])
def test_a_session_ends_on_time_whatever_steps_take(seconds):
    for takes in (5.0, 55.0, 1e6):
        played = Played(dict.fromkeys([step.name for step in schedule.steps(SIZES)], takes))
        _run(played, seconds)
        assert played.now <= seconds - schedule.ASIDE_SECONDS or not played.executed


def test_a_step_that_cannot_finish_is_skipped_for_a_shorter_one():
    long, short = Step("long", 100.0), Step("short", 10.0)
    outcomes = _run(Played({"short": 5.0}), 60.0, [long, short])
    assert [ended.status for ended in outcomes] == ["left_out", "finished"]
    assert "may take 115 s" in outcomes[0].reason


def test_loading_counts_once_per_model():
    played = Played()
    first, second = schedule.steps(SIZES)[1], schedule.steps(SIZES)[3]
    assert first.model == second.model
    needed = first.seconds + first.load_seconds + schedule.ASIDE_SECONDS
    outcomes = _run(played, needed + schedule.RECORD_SECONDS / 2, [first, second])
    assert [ended.status for ended in outcomes] == ["finished", "finished"]


@pytest.mark.parametrize("seconds", [570, 900])
def test_a_rehearsal_skips_nothing_although_steps_take_minutes(seconds):
    planned = schedule.steps(SIZES | {"qwen3-coder-30b": 61 * GIGA})
    played = Played(dict.fromkeys([step.name for step in planned], 200.0))
    clock = Clock(seconds, lambda: played.now, slower=full_size.SLOWER)
    outcomes = schedule.run(planned, clock, Slow(played, full_size.SLOWER), lambda ended: None)
    assert [ended.status for ended in outcomes] == ["finished"] * (1 + 4 * len(schedule.OPTIMIZATIONS))
    assert clock.spent == pytest.approx(200.0 * len(planned) / full_size.SLOWER) and clock.left > 0
    assert all(ended.seconds == pytest.approx(10.0) for ended in outcomes)


def test_an_overrunning_step_is_stopped_and_the_rest_runs():
    names = [step.name for step in schedule.steps(SIZES)]
    outcomes = _run(Played({names[1]: 1e6}), 570.0)
    assert outcomes[1].status == "stopped"
    assert outcomes[1].seconds <= outcomes[1].step.seconds + outcomes[1].step.load_seconds
    assert sum(ended.status == "finished" for ended in outcomes) >= 5


def test_failures_stop_nothing_and_steps_without_room_are_left_out():
    names = [step.name for step in schedule.steps(SIZES)]
    played = Played(hindrances={names[2]: "needs more"}, errors={names[1]: RuntimeError("lost")})
    outcomes = _run(played, 570.0)
    assert (outcomes[1].status, outcomes[1].reason) == ("failed", "RuntimeError: lost")
    assert (outcomes[2].status, outcomes[2].reason) == ("left_out", "needs more")
    assert outcomes[3].status == "finished"


def test_an_interrupt_ends_the_session_and_keeps_finished_steps():
    names, kept = [step.name for step in schedule.steps(SIZES)], []
    played = Played(errors={names[2]: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        schedule.run(schedule.steps(SIZES), played.clock(570.0), played, kept.append)
    assert [ended.step.name for ended in kept] == names[:2]


def test_a_context_needs_memory_in_addition_to_the_weights():
    def needs(bytes_per_token: float) -> dict[str, float]:
        planned = schedule.steps(SIZES, context_bytes=lambda model, tokens: bytes_per_token * tokens)
        return {step.name: step.needs_bytes for step in planned}

    without, beside = needs(0.0), needs(1.0)
    more = {name for name in without if beside[name] > without[name]}
    assert more == {name for name in without if name.startswith("adaptive_sparse_attention")}


def test_no_context_is_longer_than_a_model_allows():
    planned = schedule.steps({"small": GIGA}, checkpoints={"small": "/weights"}, positions={"small": 8192})
    assert [step.parameters["context"] for step in planned if "context" in step.parameters] == [8192]

"""Servers take turns: the one furthest behind goes next, one at a time, and the machine's drift affects all alike."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lib.measure.serving.protocol import Decision, Limits
from lib.measure.serving.replaying import turns
from lib.measure.serving.server import VirtualClock, serve
from lib.measure.serving.traffic import Phase, ServingRequest, Trace


class Machine:
    """A machine with steps of 10 ms whose speed varies from step to step, regardless of who makes the step."""

    def __init__(self, seed: int = 0, spread: float = 0.1):
        self.random, self.level, self.spread = np.random.default_rng(seed), 0.0, spread

    def seconds(self) -> float:
        self.level = 0.98 * self.level + self.spread * self.random.normal()
        return 0.01 * float(np.exp(self.level))


class Engine:
    """Serves as long as the machine takes; notes every call, and whether another was running."""

    bytes = 0.0

    def __init__(self, machine: Machine, name: str = "", calls: list | None = None, clocks=None):
        self.machine, self.name, self.calls, self.clocks = machine, name, calls if calls is not None else [], clocks

    def clear(self) -> None:
        pass

    def _step(self, *_) -> float:
        if self.clocks:
            self.calls.append((self.name, {name: clock.now() for name, clock in self.clocks.items()}))
        return self.machine.seconds()

    prefill = decode = shared = leave = _step


class Admits:
    name = "admits"

    def decide(self, view) -> Decision:
        return Decision(view.room)

    def observe(self, step, finished) -> None:
        pass


def _trace(count: int = 20) -> Trace:
    from lib.measure.serving.policy_comparison import CHAT

    requests = tuple(ServingRequest(i, 0.02 * i, 8, 5) for i in range(count))
    return Trace("by hand", 0, (Phase(0.02 * count, 50.0, CHAT),), requests)


def _together(machine: Machine, names=("a", "b"), calls: list | None = None):
    clocks = {name: VirtualClock() for name in names}
    order = turns.Turns(clocks)
    noted = dict(clocks)
    engines = {n: turns.EngineInTurn(Engine(machine, n, calls, noted), order, n) for n in names}
    servers = {n: lambda n=n: serve(_trace(), Admits(), engines[n], clocks[n], Limits(8)) for n in names}
    return turns.run(servers, order), engines


def test_the_server_furthest_behind_makes_the_next_step():
    calls: list = []
    served, engines = _together(Machine(), ("a", "b", "c"), calls)
    assert set(served) == {"a", "b", "c"}
    ends = {name: run.end for name, run in served.items()}
    for name, clocks in calls:
        active = [now for other, now in clocks.items() if now < ends[other]]
        assert clocks[name] <= min(active, default=clocks[name]) + 1e-12
    assert all(engine.wall_seconds > 0 and engine.joules is None for engine in engines.values())
    assert all(all(row.finished for row in run.outcomes) for run in served.values())


def test_a_single_server_behaves_as_without_turns():
    served, _ = _together(Machine(3), ("only",))
    plain = serve(_trace(), Admits(), Engine(Machine(3)), VirtualClock(), Limits(8))
    assert [step[:6] for step in served["only"].steps] == [step[:6] for step in plain.steps]


def test_only_one_server_runs_at_a_time():
    running, most = [0], [0]

    class Slow(Engine):
        def _step(self, *_) -> float:
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.0005)
            running[0] -= 1
            return 0.01

        prefill = decode = shared = leave = _step

    clocks = {name: VirtualClock() for name in "ab"}
    order = turns.Turns(clocks)
    engines = {name: turns.EngineInTurn(Slow(Machine()), order, name) for name in clocks}
    servers = {n: lambda n=n: serve(_trace(6), Admits(), engines[n], clocks[n], Limits(8)) for n in clocks}
    before = set(threading.enumerate())  # other threads of this process may keep running or end meanwhile
    turns.run(servers, order)
    assert most[0] == 1 and set(threading.enumerate()) <= before


def test_speed_changes_of_the_machine_affect_both_alike():
    """Two equal policies end together if they take turns, and apart if one follows the other."""

    def apart(seed: int, in_turn: bool) -> float:
        machine = Machine(seed)
        if in_turn:
            first, second = (run.end for run in _together(machine)[0].values())
        else:
            first, second = (
                serve(_trace(), Admits(), Engine(machine), VirtualClock(), Limits(8)).end for _ in range(2)
            )
        return abs(np.log(first / second))

    in_turn, one_by_one = (np.mean([apart(seed, kind) for seed in range(12)]) for kind in (True, False))
    assert in_turn < 0.5 * one_by_one


def test_a_failing_server_does_not_stop_the_others():
    class Broken(Engine):
        def decode(self) -> float:
            raise RuntimeError("the cache outgrew its bound")

    clocks = {name: VirtualClock() for name in "ab"}
    order, done = turns.Turns(clocks), []
    engines = {"a": Broken(Machine()), "b": Engine(Machine())}

    def server(name: str):
        engine = turns.EngineInTurn(engines[name], order, name)
        done.append((name, serve(_trace(), Admits(), engine, clocks[name], Limits(8))))

    with pytest.raises(RuntimeError, match="outgrew"):
        turns.run({name: lambda name=name: server(name) for name in clocks}, order)
    assert [name for name, _ in done] == ["b"]


def test_the_policys_own_computation_takes_time():
    class Slow(Admits):
        def decide(self, view) -> Decision:
            time.sleep(0.002)
            return Decision(1)

    clock = VirtualClock()
    policy = turns.ChargedPolicy(Slow(), clock)
    assert policy.name == "admits" and policy.decide(None) == Decision(1) and clock.now() >= 0.002
    before = clock.now()
    policy.observe(None, [])
    assert clock.now() >= before
    assert policy.wall_seconds == pytest.approx(clock.now()) and 0 <= policy.cpu_seconds < policy.wall_seconds


def test_policy_time_is_scaled_by_the_machines_slowdown(monkeypatch):
    """Previously the engine's calls were divided by the machine's slowdown, but the policy's own time was not."""
    now = iter([0.0, 0.006])
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: next(now), thread_time=lambda: 0.0))
    clock = VirtualClock()
    turns.ChargedPolicy(Admits(), clock, slowness=1.5).observe(None, [])
    assert clock.now() == pytest.approx(0.004)


def test_work_runs_in_the_starting_thread_and_an_interruption_ends_all():
    """A thread pool belongs to the thread that works: one pool serves all. Ctrl-C leaves no server waiting."""
    seen: set[int] = set()

    class Notes(Engine):
        def _step(self, *_) -> float:
            seen.add(threading.get_ident())
            if len(self.calls) == 5:
                raise KeyboardInterrupt
            return super()._step()

        prefill = decode = shared = leave = _step

    clocks = {name: VirtualClock() for name in "ab"}
    order, calls = turns.Turns(clocks), []
    engines = {n: turns.EngineInTurn(Notes(Machine(), n, calls, dict(clocks)), order, n) for n in clocks}
    servers = {n: lambda n=n: serve(_trace(), Admits(), engines[n], clocks[n], Limits(8)) for n in clocks}
    before = set(threading.enumerate())  # other threads of this process may keep running or end meanwhile
    with pytest.raises(KeyboardInterrupt):
        turns.run(servers, order)
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert seen == {threading.get_ident()} and set(threading.enumerate()) <= before

"""Energy per token is judged only from a counter; otherwise it is an estimate, and CPU seconds are judged."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lib.measure.metrics import measurement
from lib.measure.metrics.pairs import Pairs
from lib.measure.metrics.process_variance import PART_SIGMA
from lib.measure.trackers import energy, energy_source
from lib.measure.trackers.energy_source import Counter

ENERGY = ("energy_joules_per_token", "energy_above_idle_joules_per_token", "tokens_per_joule")


class Arm:
    """An arm that adds `joules` to a counter and keeps the CPU busy for a moment."""

    tokens = 10

    def __init__(self, meter: list[float], joules: float):
        self.meter, self.joules = meter, joules

    def __call__(self):
        self.meter[0] += self.joules
        return sum(range(2000))


def counter(meter: list[float], idle: float | None = 0.0) -> Counter:
    return Counter("nvml", "measured", "a counter", 0.001, idle, lambda: meter[0])


def test_both_arms_have_energy_per_token_with_interval_and_label():
    meter = [0.0]
    gross, above, inverse, cpu = energy.per_token(
        Arm(meter, 2.0), Arm(meter, 1.0), workload="decode", blocks=6, source=counter(meter)
    )
    assert (gross.baseline, gross.optimized, gross.ratio) == (0.2, 0.1, pytest.approx(0.5))
    assert gross.verdict == "better" and gross.provenance == "measured" and gross.n == 6 and gross.ci
    assert above.baseline == gross.baseline and inverse.optimized == pytest.approx(10)
    # Each quantity is judged once, and only one counts toward efficiency.
    assert inverse.verdict == "informative" and "inverse" in inverse.reason
    assert cpu.verdict == "informative" and "energy is judged" in cpu.reason and cpu.provenance == "measured"
    assert measurement.lint([gross, above, inverse, cpu]) == []


def test_the_noise_floor_above_idle_is_relative_to_the_energy_above_idle():
    """Windows of 100 J, 90 J of them idle, scatter by 1 J: 1 % of the total, 10 % of what exceeds idle."""
    scatter = (0.0, 1.0, -1.0, 0.5, -0.5, 0.8, -0.8, 0.2)
    arms = {
        "baseline": [100.0] * 8,
        "control": [100.0 + joules for joules in scatter],
        "optimized": [100.0 - 0.1 * joules for joules in scatter],
    }
    windows = {arm: [energy.Window(joules, 1.0, 1.0) for joules in values] for arm, values in arms.items()}
    gross, above, _ = energy._joules(windows, counter([0.0], idle=90.0), "decode", "a counter")
    assert gross.verdict == "equivalent" and gross.noise_floor < 0.025
    assert above.noise_floor > 0.07 and above.verdict == "inconclusive"


@pytest.mark.parametrize("seed", range(8))
def test_heating_within_a_block_creates_no_energy_difference(seed):
    """Later calls in a block take more, as on a device that warms up: each arm comes first equally often."""
    meter, turns = [0.0], [1]  # two calls warm up, so that a block begins with a multiple of three

    class Warming(Arm):
        def __call__(self):
            meter[0] += 1.2 ** (turns[0] % 3)
            turns[0] += 1

    arms = Warming(meter, 1.0), Warming(meter, 1.0)
    options = {"workload": "decode", "blocks": 6, "seconds": 1e-9, "seed": seed}
    gross = energy.per_token(*arms, source=counter(meter), **options)[0]
    assert gross.ratio == pytest.approx(1.0)


def test_unknown_energy_is_unavailable_never_zero():
    meter = [0.0]
    dead = energy.per_token(Arm(meter, 0), Arm(meter, 0), workload="decode", blocks=6, source=counter(meter))
    assert [measured.verdict for measured in dead[:3]] == ["unavailable"] * 3
    assert dead[3].margin is not None and dead[3].reason != energy.COUNTED, "no energy is judged: the time is"
    blind = energy.per_token(Arm(meter, 2), Arm(meter, 1), workload="decode", blocks=6, source=counter(meter, None))
    assert blind[1].verdict == "unavailable" and "idle" in blind[1].reason


@pytest.fixture
def no_counter(monkeypatch, tmp_path):
    for opened in ("_opened", "_zeus_counter"):
        monkeypatch.setattr(energy_source, opened, lambda device: (None, "ZeusCPUInitError: none"))
    monkeypatch.setattr(energy_source, "POWERCAP", tmp_path)
    return tmp_path


class Slow(Arm):
    """Takes ten times the CPU time, both by the estimate and by the CPU clock."""

    def __call__(self):
        return sum(range(20_000))


def test_the_estimate_is_shown_with_its_table_but_never_judged(no_counter):
    source = energy.counter()
    meter = [0.0]
    measured = energy.per_token(
        Arm(meter, 0), Slow(meter, 0), workload="decode", blocks=6, seconds=0.005, source=source
    )
    *joules, cpu = measured
    assert [m.metric for m in joules] == list(ENERGY)
    # On a busy machine a window may take no more than idling: then nothing exceeds idle.
    shown = [m for m in joules if m.provenance == "estimated"]
    assert shown[0] is joules[0] and shown[-1] is joules[2]
    for m in shown:
        assert m.verdict == "informative" and m.margin is None and m.ci and m.ratio
        assert "shown, never judged" in m.reason and "absent" in m.reason
    assert "W per busy core" in joules[0].source and joules[0].baseline > 0
    assert joules[1] not in shown or joules[1].baseline < joules[0].baseline
    assert cpu.metric == "cpu_seconds_per_token" and cpu.provenance == "measured" and cpu.margin is not None
    assert cpu.ratio and cpu.noise_floor is not None and cpu.n == 6
    assert measurement.lint(measured) == []


def test_cpu_seconds_may_be_measured_elsewhere(no_counter):
    arms = Arm([0.0], 0), Arm([0.0], 0)
    options = {"workload": "decode", "blocks": 6, "seconds": 0.001}
    assert "cpu_seconds_per_token" not in {m.metric for m in energy.per_token(*arms, **options, with_cpu_seconds=False)}


def test_cpu_seconds_come_from_several_processes():
    process = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    base = [1.0, 1.01, 1.02, 1.01, 1.0, 0.99, 1.01, 1.0, 1.02, 1.01, 1.0, 0.99]
    half, copy = [value / 2 for value in base], base[::-1]
    options = {"workload": "decode", "source": "6 fresh processes", "process": process}
    better = energy.cpu_seconds(base, half, copy, **options)
    assert better.verdict == "better" and better.ratio == pytest.approx(0.5) and "user + system" in better.source
    same = energy.cpu_seconds(base, copy, copy, **options)
    assert same.verdict in ("equivalent", "inconclusive")
    dead = energy.cpu_seconds([0.0] * 12, half, copy, **options)
    assert dead.verdict == "unavailable" and "did not move" in dead.reason


def test_the_reason_for_a_missing_counter_is_given(no_counter, monkeypatch):
    assert energy.counter().missing.startswith("absent") and "virtual machines" in energy.counter().missing
    file = no_counter / "intel-rapl:0" / "energy_uj"
    file.parent.mkdir()
    file.write_text("1")
    assert "could not be read (ZeusCPUInitError: none)" in energy.counter().missing
    monkeypatch.setattr(energy_source.os, "access", lambda path, mode: False)
    missing = energy.counter().missing
    assert missing.startswith("not permitted") and str(file) in missing and "chmod o+r" in missing
    assert energy_source.facts() == {"counter": None, "missing": missing}
    monkeypatch.setattr(energy_source.os, "access", lambda path, mode: True)
    assert energy_source.facts() == {"counter": None, "missing": energy.counter().missing}
    assert "could not be read" in energy.counter().missing, "a file that is there is no counter that can be read"
    monkeypatch.setattr(energy_source, "_opened", lambda device: ((float, "rapl", "RAPL"), None))
    assert energy_source.facts() == {"counter": "rapl", "missing": None}


def test_a_gpu_without_a_counter_reports_the_exception(no_counter):
    assert energy.counter("cuda").missing == "NVML offers no energy counter here (ZeusCPUInitError: none)"


def test_an_estimate_from_turns_scales_with_their_times(no_counter):
    """Half the wall and CPU time: half the joules, and what the formula gives for either arm."""
    base, half, copy = ([0.2, 0.21, 0.19, 0.2, 0.2, 0.2], [0.1] * 6, [0.2] * 6)
    pairs = Pairs(base, half, ["AB", "BA"] * 3, [None] * 6, 1, cpu_seconds=(base, half))
    control = Pairs(base, copy, ["AB", "BA"] * 3, [None] * 6, 1, cpu_seconds=(base, copy))
    source = energy.counter()
    gross, above, inverse = energy.of_turns(pairs, control, 4, workload="decode", source=source)
    assert gross.baseline == pytest.approx(source.of_times(0.2, 0.2) / 4)
    assert gross.optimized == pytest.approx(source.of_times(0.1, 0.1) / 4)
    assert above.optimized == pytest.approx((source.of_times(0.1, 0.1) - 0.1 * source.idle_watts) / 4)
    assert inverse.optimized == pytest.approx(1 / gross.optimized)
    assert {m.provenance for m in (gross, above, inverse)} == {"estimated"}
    assert {m.verdict for m in (gross, above, inverse)} == {"informative"} and "absent" in gross.reason


@pytest.mark.parametrize(
    ("sockets", "memory", "said"),
    [
        (1, 500.0, "RAPL package and memory counters, whole socket"),
        (1, None, "RAPL package counter, memory not counted, whole socket"),
        (2, 500.0, "RAPL package and memory counters, all 2 sockets"),
    ],
)
def test_the_rapl_scope_states_what_was_counted(monkeypatch, sockets, memory, said):
    """Many CPUs count no memory, and several sockets are added up."""
    device = pytest.importorskip("zeus.device")
    read = SimpleNamespace(cpu_mj=1500.0, dram_mj=memory)

    class Sockets:
        def __len__(self):
            return sockets

        def get_total_energy_consumption(self, index):
            return read

    monkeypatch.setattr(device, "get_cpus", Sockets)
    joules, kind, scope = energy_source._rapl_joules()
    assert (kind, scope) == ("rapl", said) and joules() == sockets * (1.5 + (memory or 0) / 1000)


def test_the_environment_card_opens_a_counter_without_measuring_idle_power(monkeypatch):
    monkeypatch.setattr(energy_source, "_rapl_joules", lambda: (lambda: 1.0, "rapl", "RAPL"))
    monkeypatch.setattr(energy_source.time, "sleep", lambda seconds: pytest.fail("the card reads no idle power"))
    energy_source._opened.cache_clear()
    try:
        assert energy_source.facts() == {"counter": "rapl", "missing": None}
    finally:
        energy_source._opened.cache_clear()


@pytest.mark.parametrize(("disturbed_blocks", "verdict"), [(0, "better"), (2, "better"), (100, "inconclusive")])
def test_a_block_in_which_others_used_energy_is_repeated(disturbed_blocks, verdict):
    """The counter covers the whole socket: another program's energy would be charged to the running arm."""
    meter, left = [0.0], [disturbed_blocks]

    def watch():
        busy = left[0] > 0
        left[0] -= 1
        meter[0] += 5.0 if busy else 0.0  # of another program

        def close():
            return "other processes took 50% of our cores" if busy else None

        return close

    arms = Arm(meter, 2.0), Arm(meter, 1.0)
    options = {"workload": "decode", "blocks": 6, "seconds": 1e-9, "source": counter(meter), "disturbance": watch}
    gross = energy.per_token(*arms, **options)[0]
    assert gross.verdict == verdict and gross.n == 6
    assert ("2 blocks disturbed and repeated" in gross.source) == (disturbed_blocks == 2)
    assert (gross.disturbed, "50%" in (gross.reason or "")) == ((6, True) if disturbed_blocks == 100 else (None, False))


@pytest.mark.parametrize("others", [None, "other programs kept the processor busy 1.1 times as long as this one"])
def test_joules_used_by_others_on_other_cores_are_not_judged(others):
    """A build runs two notebooks side by side on separate cores: no block of either is disturbed, and the socket's
    counter adds them up.
    """
    meter = [0.0]
    source = replace(counter(meter), kind="rapl", beside=lambda: lambda: others)
    arms = Arm(meter, 2.0), Arm(meter, 1.0)
    *joules, cpu = energy.per_token(*arms, workload="decode", blocks=6, source=source)
    assert joules[0].ratio == pytest.approx(0.5) and joules[0].ci and energy.is_judged(joules) == (others is None)
    if others is None:
        assert joules[0].verdict == "better" and cpu.reason == energy.COUNTED
    else:
        assert {m.verdict for m in joules} == {"informative"}
        assert all(others in m.reason and "--jobs 1" in m.reason for m in joules)
        assert cpu.reason != energy.COUNTED, "what was measured of this process alone is judged instead"
    assert measurement.lint([*joules, cpu]) == []


def test_only_the_cpu_counter_reports_other_processes(monkeypatch):
    monkeypatch.setattr(energy_source, "_idle_watts", lambda joules: 1.0)
    opened = {"cpu": (lambda: 1.0, "rapl", "RAPL"), "cuda": (lambda: 1.0, "nvml", "NVML")}
    monkeypatch.setattr(energy_source, "_opened", lambda device: (opened[device], None))
    energy_source._zeus_counter.cache_clear()
    try:
        assert energy.counter("cpu").beside is energy_source.disturbance.beside
        assert energy.counter("cuda").beside is None
    finally:
        energy_source._zeus_counter.cache_clear()


def test_a_separate_control_has_a_window_in_every_block():
    meter, calls = [0.0], []

    class Copied(Arm):
        def __call__(self):
            calls.append(self)
            return super().__call__()

    arms = Arm(meter, 2.0), Arm(meter, 1.0)
    options = {"workload": "decode", "blocks": 6, "seconds": 1e-9, "source": counter(meter)}
    gross = energy.per_token(*arms, control=Copied(meter, 2.0), **options)[0]
    assert len(calls) == 7, "called once before, then once in each of six windows"
    assert gross.ratio == pytest.approx(0.5) and gross.verdict == "better"


ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\nprocessor\t: 1\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("cpuinfo", "vendor", "name", "row"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 7R13\n", None, "AMD EPYC 7R13", "EPYC"),
        (ARM, None, "aarch64 implementer 0x41 part 0xd40", "server"),
        (ARM, "Amazon EC2", "Graviton, aarch64 implementer 0x41 part 0xd40", "Graviton"),
        (None, None, "Apple M2 Pro", "server"),
    ],
)
def test_the_cpu_is_named_on_systems_that_state_no_name(monkeypatch, tmp_path, cpuinfo, vendor, name, row):
    """ARM Linux has numbers, macOS a command; "aarch64" or "arm" would fit every such machine."""
    for constant, text in (("CPU_INFO", cpuinfo), ("VENDOR", vendor)):
        if text is not None:
            (tmp_path / constant).write_text(text)
        monkeypatch.setattr(energy_source, constant, tmp_path / constant)
    said = SimpleNamespace(stdout="Apple M2 Pro\n")
    system = "Linux" if cpuinfo else "Darwin"
    known = {"system": lambda: system, "machine": lambda: "aarch64", "processor": lambda: "arm"}
    monkeypatch.setattr(energy_source, "platform", SimpleNamespace(**known))
    monkeypatch.setattr(energy_source.subprocess, "run", lambda *_, **__: said)
    energy_source.cpu_name.cache_clear()
    try:
        assert energy_source.cpu_name() == name and energy_source.watts_per_core()[0] == row
    finally:
        energy_source.cpu_name.cache_clear()


def test_idle_power_is_read_before_and_after():
    """A device that is warmer afterwards than before idles at neither power while it works."""
    meter, powers = [0.0], iter([1.0, 3.0])
    source = replace(counter(meter, 7.0), idle=lambda: next(powers))
    options = {"workload": "decode", "blocks": 6, "seconds": 1e-9, "source": source}
    above = energy.per_token(Arm(meter, 2.0), Arm(meter, 1.0), **options)[1]
    assert "less 2 W idle" in above.source and next(powers, None) is None
    blind = replace(counter(meter, 7.0), idle=lambda: None)
    assert energy.per_token(Arm(meter, 2.0), Arm(meter, 1.0), **options | {"source": blind})[1].verdict == "unavailable"


def test_numbers_of_a_part_include_its_own_variance_between_processes(no_counter):
    """Previously only its time did: CPU seconds of the same part were called better at half of that floor."""
    options = {"workload": "feed-forward part, 16 tokens", "blocks": 6, "seconds": 0.005, "process_sigma": PART_SIGMA}
    *joules, cpu = energy.per_token(Arm([0.0], 0), Arm([0.0], 0), source=energy.counter(), **options)
    assert cpu.process_sigma == PART_SIGMA and cpu.noise_floor >= 1.96 * PART_SIGMA
    assert all("between processes" not in m.source for m in joules), "an estimate is not measured"


def test_cpu_seconds_over_disturbed_blocks_decide_nothing(no_counter):
    def watch():
        return lambda: "other processes took 50 % of our cores"

    arms, options = (Arm([0.0], 0), Slow([0.0], 0)), {"workload": "decode", "blocks": 6, "seconds": 0.002}
    cpu = energy.per_token(*arms, **options, source=energy.counter(), disturbance=watch)[-1]
    assert cpu.metric == "cpu_seconds_per_token" and cpu.verdict == "inconclusive" and cpu.disturbed == 6

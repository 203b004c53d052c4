"""CPU utilization is a share of the cores that this process may use."""

from lib.measure.timing import disturbance
from lib.measure.trackers import cpu


def test_cpu_utilization_is_a_share_of_the_available_cores():
    used = cpu.use(lambda: sum(range(100_000)), seconds=0.05)
    assert used.cores == disturbance.cores_given() and used.wall_seconds >= 0.05
    assert 0 < used.utilisation <= 1.2 and str(used.cores) in used.source

"""Runs the tests of tests/test_cuda.py in order of value and tells of each as it ends: `python -m
tests.device.cuda_tests`.

First one case of every function, the functions that have never run on a device at the head; then the other cases. A
line of JSON on standard output per test; what pytest prints goes to standard error.
"""

import json
import os
import sys
from typing import Any

from tests.device.processes import end_with_parent

FILE = "tests/test_cuda.py"
FIRST = (
    "test_weights_executed_sparse_equal_masked_ones",
    "test_flex_attention_equals_a_dense_mask",
    "test_streamed_weights_give_the_answers_of_resident_ones",
    "test_marks_in_the_stream_are_in_order",
    "test_the_allocator_in_this_process_tells_what_a_child_does",
    "test_peaks_are_read_in_place_where_another_copy_has_no_room",
    "test_energy_and_utilisation_come_from_the_card",
    "test_ceilings_are_those_of_a_gpu",
)
# The case of a function that is the first of its kind to run; elsewhere the first that is collected.
FIRST_CASES = ("2:4", "all-64", "smallest")


def in_order(names: list[str]) -> list[int]:
    """Return the places of tests (`function[case]`) in the order in which they run."""
    functions = [name.partition("[")[0] for name in names]
    collected = list(dict.fromkeys(functions))
    value = {name: FIRST.index(name) if name in FIRST else len(FIRST) + at for at, name in enumerate(collected)}
    seen: dict[str, int] = {}
    ranks = []
    for at in sorted(range(len(names)), key=lambda at: (not any(case in names[at] for case in FIRST_CASES), at)):
        round_ = seen.get(functions[at], 0)
        seen[functions[at]] = round_ + 1
        ranks.append((round_, value[functions[at]], at))
    return [at for _, _, at in sorted(ranks)]


class Teller:
    """A plugin of pytest: orders the tests, and tells of each one."""

    def __init__(self, tell: Any):
        self.tell = tell

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [items[at] for at in in_order([item.name for item in items])]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            entry = {"name": report.nodeid.rpartition("::")[2], "outcome": report.outcome}
            entry |= {"seconds": round(report.duration, 2)}
            if report.failed:
                entry["reason"] = str(report.longrepr).strip().splitlines()[-1][:300]
            elif report.skipped and isinstance(report.longrepr, tuple):
                entry["reason"] = str(report.longrepr[2])
            self.tell(entry)


def main() -> int:
    """Run the tests; return pytest's exit code."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    end_with_parent()
    import pytest

    def tell(entry: dict[str, Any]) -> None:
        events.write(json.dumps({"event": "test", **entry}) + "\n")
        events.flush()

    code = int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", FILE], plugins=[Teller(tell)]))
    events.write(json.dumps({"event": "ended", "code": code}) + "\n")
    events.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
